"""What the heads of a model compute with, layer by layer: queries, keys, values and weights of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.inspect.recorder import record
from glocal.inspect.recording import LayerRecord
from glocal.nn import Attention
from glocal.shapes import Bool, Float

__all__ = ["HeadCall", "layer_call", "record_heads"]


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One layer's attention, grids flattened. Made by `record_heads` or `layer_call`; for inputs that are short."""

    name: str
    """The layer's path in the model."""
    q: Float[Tensor, "B H N D"]
    """Queries, after norms and rotation."""
    k: Float[Tensor, "B Hkv M D"]
    v: Float[Tensor, "B Hkv M E"]
    weights: Float[Tensor, "B H N M"]
    """After the softmax."""
    live: Bool[Tensor, "B H N M"]
    """Which keys a query sees."""
    real: Bool[Tensor, "B N"]
    """Which queries are no padding."""
    scale: float

    @classmethod
    def of(cls, layer: LayerRecord) -> HeadCall:
        """Of a record with attention and values, all rows at once."""
        rows = torch.arange(layer.queries, device=layer.q.device)
        live = ~layer.scores(rows).isneginf()
        real = live.new_ones(len(live), layer.queries) if layer.real is None else layer.real
        weights = layer.weights(rows).to(layer.v.dtype)
        return cls(layer.name, layer.q, layer.k, layer.v, weights, live, real, layer.scale)


def layer_call(
    layer: Attention,
    x: Float[Tensor, "B *grid_q dim"],
    context: Float[Tensor, "B *grid_k kv_dim"] | None = None,
    *,
    keys: Bool[Tensor, "B *grid_k"] | None = None,
) -> HeadCall:
    """What a layer of `glocal.nn` computes with that is softmax under a pattern.

    Args:
        layer: whose ``mix`` is that of `Attention`.
        x: ``(B, *grid_q, dim)``.
        context: what it attends to, ``(B, *grid_k, kv_dim)``; ``x`` where None.
        keys: which keys are no padding, ``(B, *grid_k)``.

    Raises:
        ValueError: a layer with another ``mix``.

    >>> layer_call(Attention(8, 2, causal=True), torch.randn(1, 5, 8)).weights.shape
    torch.Size([1, 2, 5, 5])
    """
    if type(layer).mix is not Attention.mix:
        raise ValueError(f"layer must be softmax under a pattern; {type(layer).__name__} mixes in another way")
    return record_heads(layer, x, context, keys=keys)[0]


def record_heads(model: nn.Module, *inputs: Any, **options: Any) -> list[HeadCall]:
    """What each layer computes with, in the order in which they run, in one call of the model.

    `glocal.inspect.record` is for inputs that are long.

    Args:
        model: of transformers, or with layers of `glocal.nn` that are softmax under a pattern; layers of other kinds
            are left out. It is called as ``model(*inputs, **options)``, and left as it was.

    Raises:
        TypeError: a model of transformers whose attention is fixed.
        ValueError: it has no such layer, or none ran.

    >>> from glocal.nn import MLP, Block
    >>> [call.name for call in record_heads(Block(8, Attention(8, 2), MLP(8, 8)), torch.randn(1, 5, 8))]
    ['attention']
    """
    kept = ("attention", "values")
    found = record(model, inputs, keep=kept, **options) if inputs else record(model, options, keep=kept)
    return [HeadCall.of(layer) for layer in found]
