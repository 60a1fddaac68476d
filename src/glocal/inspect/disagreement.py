"""How much heads of a layer differ from one another, and how far they look, from a record."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.inspect.metrics import Metric, stacked
from glocal.inspect.recording import Record, Tile

__all__ = ["argmax_offset", "attention_agreement", "head_kl", "output_agreement"]


def head_kl(tile: Tile) -> Tensor:
    """Between heads: the Kullback-Leibler divergence of each head's weights from each other's, ``(B, H, R, H)``.

    In nats; of head ``h`` at ``[:, h, :, g]`` against head ``g``. A weight that has become zero counts as the least
    number there is.
    """
    p = tile.weights
    logs = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    return (p * logs).sum(-1, keepdim=True) - torch.einsum("bhrk,bgrk->bhrg", p, logs)


def attention_agreement(tile: Tile) -> Tensor:
    """How much a head looks where the others look: the mean over heads of the products of weights, ``(B, H, R)``.

    The mean over heads is the attention disagreement of Li et al. (2018, arXiv 1810.10183), without its sign.
    """
    return torch.einsum("bhrk,bgrk->bhr", tile.weights, tile.weights) / tile.weights.shape[1]


def argmax_offset(power: int = 1, *, absolute: bool = False) -> Metric:
    """How far before a query the key stands to which it pays most attention, in tokens, on a sequence.

    Args:
        power: of the distance, 2 for squares.
        absolute: whether keys after the query count as those before.
    """

    def metric(tile: Tile) -> Tensor:
        offset = (tile.at[:, None] - tile.weights.argmax(-1, keepdim=True))[..., 0].double()
        return (offset.abs() if absolute else offset) ** power

    return metric


@torch.no_grad()
def output_agreement(record: Record) -> Tensor:
    """How alike a head's outputs are to the others': the mean cosine over all heads, itself among them.

    The mean over heads is the output disagreement of Li et al. (2018, arXiv 1810.10183), without its sign.

    Args:
        record: with outputs, ``record(..., keep=["outputs"])``.

    Returns:
        ``(layers, H)`` in float64, the mean over queries that are no padding; NaN for heads that a layer has not.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> layer = Attention(8, 2)
    >>> for p in (layer.q_proj, layer.k_proj, layer.v_proj):
    ...     p.weight.data[4:] = p.weight.data[:4]
    >>> output_agreement(record(layer, torch.randn(1, 5, 8), keep=["outputs"])).round(decimals=4).tolist()
    [[1.0, 1.0]]
    """
    rows = []
    for layer in record:
        units = torch.nn.functional.normalize(layer.outputs.double(), dim=-1)
        each = torch.einsum("bhqd,bgqd->bhq", units, units) / units.shape[1]
        real = torch.ones(each.shape[0], each.shape[2], device=each.device) if layer.real is None else layer.real
        rows.append((each * real[:, None]).sum((0, 2)) / real.sum())
    return stacked(rows)
