"""Which heads read what is relevant: queries and keys of a prompt, and the attention that chosen keys get of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glocal.hf.attention import attention, refuse
from glocal.hf.install import Installed
from glocal.hf.masks import own
from glocal.hf.rows import Rows
from glocal.patterns import Full
from glocal.progress import shown
from glocal.steer.branch import Branch
from glocal.steer.method import check_range
from glocal.steer.spans import prompt_of
from glocal.steer.steering import Steering, language_layers

__all__ = ["FocusSample", "HeadScores", "contextual_scores", "read_rows"]

_SINKS = 2  # the first tokens, which take the attention that no other needs


class FocusSample(NamedTuple):
    """A prompt with its answer, what is relevant in it, and which positions answer.

    Args:
        inputs: the model's arguments, ``input_ids (B, N)`` or ``inputs_embeds`` among them; answers should come from
            prompts of the relevant passage alone, so that they are right.
        gold: booleans ``(B, N)``, the keys that are relevant.
        rows: booleans ``(B, N)``, the positions whose attention counts: those of the answer.
    """

    inputs: Mapping[str, Any]
    gold: Tensor
    rows: Tensor


class HeadScores(NamedTuple):
    """Mean attention of each head, ``(L, H)`` each: to the relevant keys, and to the first two tokens."""

    gold: Tensor
    sink: Tensor

    def top(self, count: int = 20) -> list[tuple[int, int]]:
        """Layers and heads with the most attention to what is relevant, highest first."""
        check_range("count", count, 1, self.gold.numel())
        heads = self.gold.shape[1]
        order = self.gold.flatten().argsort(descending=True, stable=True)[:count].tolist()
        return [(at // heads, at % heads) for at in order]


@torch.no_grad()
def read_rows(model: Any, inputs: Mapping[str, Any], layers: Iterable[int], at: Tensor) -> dict[int, Rows]:
    """Queries and keys of a prompt in the model as it is, whatever steers it; one prefill.

    Args:
        model: a transformers model with a causal language model in it.
        inputs: its arguments, as for ``generate``.
        layers: numbers of the layers.
        at: positions of the queries, ``(R,)``.

    Returns:
        For each layer its rows, the queries in float32 or wider.
    """
    steering, wanted = Steering.of(model), set(layers)
    found: dict[int, Rows] = {}

    def keep(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        layer = steering.modules.get(id(module))
        if layer in wanted:
            refuse(options)
            mine = own(module, query, key.shape[2], mask, options.get("is_causal"))
            read = Rows.of(mine, query, key, at.to(query.device), options)
            found[layer] = replace(read, query=read.query.to(torch.promote_types(query.dtype, torch.float32)))
        return attention(module, query, key, value, mask, where=Full(), **options)

    installed = Installed(steering._language, keep)
    try:
        Branch(model, inputs, len(prompt_of(inputs))).logits(None)
    finally:
        installed.remove()
    return found


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Which positions of the prompt are no padding, by its attention mask; booleans ``(B, N)``."""
    prompt, mask = prompt_of(inputs), inputs.get("attention_mask")
    return torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device) if mask is None else mask > 0


def sinks(inputs: Mapping[str, Any]) -> Tensor:
    """The first two tokens that are no padding, booleans ``(B, N)``."""
    real = real_tokens(inputs)
    return real & (real.cumsum(1) <= _SINKS)


def check_sample(sample: FocusSample) -> Tensor:
    """The positions of which any row of the batch needs the attention, ``(R,)``."""
    shape = prompt_of(sample.inputs).shape[:2]
    for name, mask in (("gold", sample.gold), ("rows", sample.rows)):
        if mask.shape != shape or mask.dtype != torch.bool or not bool(mask.any(1).all()):
            raise ValueError(
                f"{name} must be booleans {tuple(shape)}, some true in every row; it was {mask.dtype} "
                f"{tuple(mask.shape)} with {int(mask.sum())} true"
            )
    return sample.rows.any(0).nonzero()[:, 0]


def mass(weights: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Attention ``(B, H)`` that keys ``(B, N)`` get from rows ``(B, R)``, the mean over the latter."""
    keys, rows = keys.to(weights.device), rows.to(weights.device)
    each = (weights * keys[:, None, None]).sum(-1)
    return (each * rows[:, None]).sum(-1) / rows.sum(1)[:, None]


def contextual_scores(model: Any, samples: Iterable[FocusSample], *, progress: bool = False) -> HeadScores:
    """How much each head attends to what is relevant: the mean over a sample's rows, then over samples.

    Args:
        model: a transformers model with a causal language model in it.
        samples: prompts with their answers.
        progress: show a bar, by rich.

    Raises:
        TypeError: a model without a causal language model.
        ValueError: no samples, or masks of other shapes.

    Example::

        heads = contextual_scores(model, samples).top(20)
    """
    layers = range(len(language_layers(model)))
    found: list[Tensor] = []
    for sample in shown(samples, progress):
        at = check_sample(sample)
        read, rows, first = read_rows(model, sample.inputs, layers, at), sample.rows[:, at], sinks(sample.inputs)
        weights = (read[layer].weights() for layer in layers)
        both = [torch.stack([mass(each, keys, rows) for keys in (sample.gold, first)]).cpu() for each in weights]
        found.append(torch.stack(both, 2))  # (2, B, L, H)
    if not found:
        raise ValueError("samples must hold at least one; there was none")
    return HeadScores(*torch.cat(found, 1).mean(1))
