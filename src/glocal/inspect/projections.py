"""The matrices that each head reads and writes the residual stream with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["HeadWeights", "head_weights"]


class HeadWeights(NamedTuple):
    """Of the heads of a layer: ``x @ q + bq`` are queries, and ``z @ o`` is what a head with outputs ``z`` writes.

    Args:
        q, k, v: ``(H, C, D)``; those of keys and values stand there once for each query head that they serve.
        o: ``(H, D, C)``.
        bq, bk, bv: ``(H, D)``, zeros where the layer has none.
        bo: ``(C,)``, likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    bq: Tensor
    bk: Tensor
    bv: Tensor
    bo: Tensor


@torch.no_grad()
def head_weights(module: nn.Module) -> HeadWeights:
    """The projections of an attention layer, head by head.

    Args:
        module: a layer of `glocal.nn`, or of transformers: with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` (or
            ``out_proj``), or GPT-2's ``c_attn`` and ``c_proj``.

    Raises:
        TypeError: no such projections.

    >>> from glocal.nn import Attention
    >>> layer = Attention(8, 4, num_kv_heads=2)
    >>> [tuple(each.shape) for each in head_weights(layer)[:4]]
    [(4, 8, 2), (4, 8, 2), (4, 8, 2), (4, 2, 8)]
    """
    names = ("c_attn", "c_proj") if hasattr(module, "c_attn") else ("q_proj", "k_proj", "v_proj", _out(module))
    layers = [getattr(module, name, None) for name in names]
    if not all(layers):
        raise TypeError(f"{type(module).__name__} has no projections named {', '.join(names)}")
    pairs = [_linear(layer) for layer in layers]
    if len(pairs) == 2:
        (weight, bias), out = pairs
        pairs = [*zip(weight.chunk(3, 1), bias.chunk(3), strict=True), out]
    count, width = _count(module), pairs[-1][0].shape[0]
    read = [_split(weight, bias, count, width // count) for weight, bias in pairs[:3]]
    o, bo = pairs[-1]
    (q, bq), (k, bk), (v, bv) = read
    return HeadWeights(q, k, v, o.unflatten(0, (count, -1)), bq, bk, bv, bo)


def _out(module: nn.Module) -> str:
    return "o_proj" if hasattr(module, "o_proj") else "out_proj"


def _count(module: Any) -> int:
    found = getattr(module, "num_heads", None)
    return int(module.config.num_attention_heads if found is None else found)


def _linear(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight ``(in, out)`` and bias ``(out,)``."""
    weight: Tensor = layer.weight.detach()
    weight = weight if type(layer).__name__ == "Conv1D" else weight.mT
    bias = getattr(layer, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()


def _split(weight: Tensor, bias: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """``(C, heads * D)`` and ``(heads * D,)`` to ``(H, C, D)`` and ``(H, D)``."""
    serves = count * width // weight.shape[1]
    heads = weight.unflatten(1, (-1, width)).movedim(1, 0)
    return heads.repeat_interleave(serves, 0), bias.unflatten(0, (-1, width)).repeat_interleave(serves, 0)
