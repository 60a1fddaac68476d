"""How dense attention is: whether heads spread their weight over all keys or pick a few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from glocal.inspect.calls import HeadCall

__all__ = ["HeadDensity", "attention_density"]


class HeadDensity(NamedTuple):
    """One head, means over queries that are no padding, in nats. Made by `attention_density`."""

    layer: str
    head: int
    entropy: float
    """Of the weights of a query."""
    dense: float
    """Entropy of equal weights on what a query sees: log N where it sees N keys."""


@torch.no_grad()
def attention_density(calls: Iterable[HeadCall]) -> list[HeadDensity]:
    """Mean entropy of the attention of each head of each layer, beside that of the densest attention.

    Trained vision transformers are dense, near log N, in many layers (Hyeon-Woo et al., 2022, arXiv 2210.08457).

    Args:
        calls: of `glocal.inspect.record_heads` or `layer_call`.

    Returns:
        One row a head, layers in order; nan where no query is real and sees a key.

    >>> from glocal.inspect import layer_call
    >>> from glocal.nn import Attention
    >>> row, _ = attention_density([layer_call(Attention(8, 2, scale=0.0), torch.randn(1, 16, 8))])
    >>> round(row.entropy, 4), round(row.dense, 4)  # log 16
    (2.7726, 2.7726)
    """
    found = []
    for call in calls:
        weights = call.weights.double()
        count = call.live.sum(-1)
        asks = call.real[:, None] & (count > 0)
        both = [torch.special.entr(weights).sum(-1), count.double().log()]
        means = [each.masked_fill(~asks, torch.nan).nanmean((0, 2)).tolist() for each in both]
        found += [HeadDensity(call.name, head, *pair) for head, pair in enumerate(zip(*means, strict=True))]
    return found
