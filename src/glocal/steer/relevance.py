"""What in the prompt an answer rests on: attention times its gradient, for the rows and layers asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glocal.steer.hooks import Site
from glocal.steer.method import Method
from glocal.steer.steering import Steering

__all__ = ["attention_relevance", "gradient_relevance"]


def gradient_relevance(weights: Tensor, gradient: Tensor) -> Tensor:
    """Attention weights times the positive part of their gradient, of any shape (Selvaraju et al., 2017, 1610.02391).

    >>> gradient_relevance(torch.tensor([0.5, 0.5]), torch.tensor([2.0, -1.0]))
    tensor([1., 0.])
    """
    return weights * gradient.clamp(min=0)


def attention_relevance(
    model: Any,
    inputs: Mapping[str, Any],
    objective: Callable[[Tensor], Tensor],
    *,
    layers: Iterable[int] | None = None,
) -> Tensor:
    """How much each key supports an answer, through the attention of the prompt's last token.

    ``A * relu(d objective / dA)``, the mean over heads, for each layer, at the last row of the prompt.

    Args:
        model: a transformers model with a causal language model in it, in eval mode.
        inputs: its arguments, a batch of prompts that end at the same place (pad on the left).
        objective: of the next token's logits ``(B, V)``, a number for each row, ``(B,)``; rows do not meet.
        layers: numbers of the layers; all where None.

    Returns:
        ``(layers, B, N)`` in float32 or the model's wider type, in the order of the layers' numbers.

    Raises:
        ValueError: layers that are not there; the objective is not one number for each row.
        RuntimeError: under ``torch.inference_mode``, which keeps no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("relevance needs gradients: use torch.no_grad(), not torch.inference_mode(), around it")
    capture = _Capture(model, layers=layers)
    with torch.enable_grad(), Steering.of(model).only(capture):
        output = model(**inputs, use_cache=False)
        value = objective(output.logits[:, -1])
        if value.shape != output.logits.shape[:1]:
            raise ValueError(
                f"objective must give a number for each of {len(output.logits)} rows; it gave {tuple(value.shape)}"
            )
        kept = [capture.kept[layer] for layer in sorted(capture.kept)]
        gradients = torch.autograd.grad(value.sum(), kept)
    found = [gradient_relevance(a.detach(), g)[:, :, 0].mean(1) for a, g in zip(kept, gradients, strict=True)]
    return torch.stack(found)


@dataclass
class _Capture(Method):
    """Keeps the last row's weights, part of the graph of what comes after."""

    kept: dict[int, Tensor] = field(default_factory=dict, init=False)

    def edits(self, site: Site) -> bool:
        return True

    def rows(self, site: Site) -> Tensor:
        return site.last

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        if not weights.requires_grad:  # all parameters are frozen, and no layer before this one was captured
            weights = weights.detach().requires_grad_()
        self.kept[site.layer] = weights
        return weights
