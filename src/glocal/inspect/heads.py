"""How heads look, how alike their outputs are, and what the model does when these are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.inspect.calls import layer_call
from glocal.inspect.places import Operator, Place, intercept
from glocal.nn import Attention
from glocal.shapes import Float

__all__ = ["edit_heads", "head_reach", "pwcca"]


@contextmanager
def edit_heads(model: nn.Module, edit: Callable[[int, Tensor], Tensor]) -> Iterator[list[Place]]:
    """Change what heads give, before they are joined and projected, until the block ends.

    Gates, ablation and patching of heads are such edits; so is keeping them, with their gradients.

    Args:
        model: as for `intercept`.
        edit: is given a layer's number and its heads' outputs ``(B, H, Nq, D)``, grids flattened; gives what goes on
            instead.

    Yields:
        The layers, in the order of their numbers.

    Raises:
        TypeError, ValueError: as `intercept`.

    >>> layer = Attention(8, 2)
    >>> with edit_heads(layer, lambda number, heads: 0 * heads):
    ...     layer(torch.randn(1, 5, 8)).abs().sum().item()
    0.0
    """
    numbers: dict[str, int] = {}

    def make(place: Place) -> Operator:
        number = numbers.setdefault(place.name, len(numbers))

        def compute(*given: Any, **options: Any) -> Any:
            found = attend(*given, **options)
            out = found[0] if isinstance(found, tuple) else found
            out = edit(number, out.flatten(2, -2)).view_as(out)
            return (out, *found[1:]) if isinstance(found, tuple) else out

        return compute

    with intercept(model, make) as places:
        yield places


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
