"""Features of whole inputs, one vector each, from the encoders of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from glocal.nn.modes import evaluating
from glocal.progress import shown

__all__ = ["pooled"]


@torch.no_grad()
def pooled(
    model: Any,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    how: Literal["auto", "pooler", "first", "mean"] = "auto",
    progress: bool = False,
) -> Tensor:
    """One feature vector of an encoder for each input.

    Args:
        model: an encoder of transformers: ``CLIPVisionModel``, ``ViTModel``, ``BertModel`` and the like.
        batches: the model's arguments, or its main one: pixel values, token numbers.
        how: ``pooler``, the model's own pooling; ``first``, the final state of the first token; ``mean``, of all
            tokens that ``attention_mask`` does not hide; ``auto`` is ``pooler`` where the model has it, else ``mean``.
        progress: show a bar, by rich.

    Returns:
        ``(N, C)`` in float32, on the model's device.

    Raises:
        TypeError: a model that gives no final states ``(B, T, C)``, such as a ``CLIPModel``: take its image tower.
        ValueError: no batches; ``pooler`` of a model without.
    """
    if how not in ("auto", "pooler", "first", "mean"):
        raise ValueError(f"how must be 'auto', 'pooler', 'first' or 'mean'; it was {how!r}")
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for batch in shown(batches, progress):
            given = {model.main_input_name: batch} if isinstance(batch, Tensor) else batch
            inputs = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in given.items()}
            found.append(_pool(model(**inputs), inputs.get("attention_mask"), how, type(model).__name__).float())
    if not found:
        raise ValueError("batches must hold at least one; there was none")
    return torch.cat(found)


def _pool(out: Any, real: Tensor | None, how: str, name: str) -> Tensor:
    states, pooler = getattr(out, "last_hidden_state", None), getattr(out, "pooler_output", None)
    if how == "pooler" and pooler is None:
        raise ValueError(f"how must not be 'pooler': this {name} has none")
    if pooler is not None and how in ("auto", "pooler"):
        found: Tensor = pooler
        return found
    if states is None or states.ndim != 3:
        raise TypeError(f"model must be an encoder with final states (B, T, C); {name} gave none")
    wide: Tensor = states
    if how == "first":
        return wide[:, 0]
    if real is None:
        return wide.mean(1)
    return (wide * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
