"""How heads look, and how alike their outputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.inspect.calls import layer_call
from glocal.nn import Attention
from glocal.shapes import Float

__all__ = ["head_reach", "pwcca"]


@torch.no_grad()
def head_reach(layer: Attention, x: Float[Tensor, "B N dim"]) -> tuple[Tensor, Tensor]:
    """How far and how evenly each head looks: mean distance of what it attends to, and entropy in nats, ``(H,)``.

    For looking at short sequences: it asks the layer for all probabilities.

    >>> _, entropy = head_reach(Attention(8, 2, scale=0.0), torch.randn(1, 16, 8))
    >>> torch.allclose(entropy.exp(), torch.tensor(16.0))
    True
    """
    shares = layer_call(layer, x).weights
    at = torch.arange(x.shape[1], device=x.device)
    distance = (shares * (at[:, None] - at).abs()).sum(-1)
    entropy = torch.special.entr(shares).sum(-1)
    return distance.mean((0, 2)), entropy.mean((0, 2))


def pwcca(a: Float[Tensor, "samples p"], b: Float[Tensor, "samples q"]) -> float:
    """How alike two sets of features are, from 0 to 1: canonical correlations weighted by what they explain of ``a``.

    Projection weighted canonical correlation analysis. Morcos et al., 2018, arXiv 1806.05759.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> round(pwcca(x, x @ torch.tensor([[2.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 3, 0], [0, 1, 0, 1]])), 3)
    1.0
    """
    a, b = (t.double() - t.double().mean(0) for t in (a, b))
    bases = []
    for t in (a, b):
        u, s, _ = torch.linalg.svd(t, full_matrices=False)
        bases.append(u[:, s > s[0] * 1e-6])
    u, correlations, _ = torch.linalg.svd(bases[0].mT @ bases[1])
    directions = bases[0] @ u[:, : len(correlations)]
    weights = (directions.mT @ a).abs().sum(1)
    return float((weights * correlations).sum() / weights.sum())
