"""How much of a model's full attention a pattern would keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glocal.hf.attention import refuse
from glocal.hf.install import Installed
from glocal.hf.masks import own
from glocal.hf.rows import Rows, product
from glocal.patterns import Pattern, parse

__all__ = ["KeptMass", "recorded"]

_BUDGET = 1 << 21  # probabilities held at a time


class KeptMass:
    """Probability of full attention that falls on the pairs a pattern allows, added up over queries."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._layers: dict[int, tuple[Tensor, int]] = {}

    def add(self, layer: int, kept: Tensor, queries: int) -> None:
        """Add sums ``kept (patterns, H)`` over ``queries`` queries of a layer."""
        before = self._layers.get(layer)
        self._layers[layer] = (kept, queries) if before is None else (before[0] + kept, before[1] + queries)

    def share(self) -> Tensor:
        """Mean over queries, ``(patterns, layers, H)`` in float64, layers in the order in which they ran.

        Raises:
            ValueError: the model has not run yet.
        """
        if not self._layers:
            raise ValueError("no attention was recorded: run the model inside the with block")
        return torch.stack([kept / max(1, queries) for kept, queries in self._layers.values()], dim=1)


@contextmanager
def recorded(model: nn.Module, patterns: Sequence[Pattern | str]) -> Iterator[KeptMass]:
    """Run a model with its full attention and record what share of it each pattern would keep.

    For each layer and head: the mean over queries of the softmax probability on the pairs that the pattern allows,
    computed from full attention in chunks of queries, exactly; padding takes no part. The model's output is that of
    full attention (causal where the model is).

    Args:
        model: as in `adapt`.
        patterns: patterns or their text; one pass serves all of them.

    Raises:
        TypeError, ValueError: as in `adapt`.

    Example::

        with recorded(model, ["sliding(64, 64)", "block(64)"]) as kept:
            model(**batch)
        kept.share().mean((1, 2))  # one number a pattern
    """
    picks = [p if isinstance(p, Pattern) else parse(p) for p in patterns]
    kept = KeptMass(len(picks))

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        out, sums, queries = _full(module, query, key, value, mask, picks, **options)
        kept.add(id(module), sums, queries)
        return out.transpose(1, 2).contiguous(), None

    place = Installed(model, forward)
    try:
        yield kept
    finally:
        place.remove()


@torch.no_grad()
def _full(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    patterns: Sequence[Pattern],
    **options: Any,
) -> tuple[Tensor, Tensor, int]:
    """Full attention ``(B, H, Nq, Dv)``, kept sums ``(patterns, H)`` and the number of real queries."""
    refuse(options)
    mine = own(module, query, key.shape[2], mask, options.get("is_causal"))
    key, value = key[:, :, : mine.end], value[:, :, : mine.end]
    batch, heads, count, _ = query.shape
    grid_q, grid_k = mine.pattern.check(count, key.shape[2])
    real = torch.ones(batch, count, dtype=torch.bool, device=query.device)
    if mask is not None and mask.dim() == 2:
        real = mask[:, -count:].bool()
    outs, sums = [], torch.zeros(len(patterns), heads, dtype=torch.float64, device=query.device)
    for rows in torch.arange(count, device=query.device).split(max(1, _BUDGET // max(1, batch * heads * key.shape[2]))):
        probability = Rows.of(mine, query, key, rows, options).weights()
        outs.append(product(probability.to(value.dtype), value))
        weighted = probability * real[:, None, rows, None]
        lives = [pattern.rows(rows, grid_q, grid_k) for pattern in patterns]
        # Patterns that all heads share are one batched product of matrices: ten times as fast as masking for each.
        shared = [n for n, live in enumerate(lives) if live.dim() == 2]
        if shared:
            live = torch.stack([lives[n] for n in shared]).to(weighted.dtype)
            sums[shared] += torch.einsum("bhnk,pnk->pbhn", weighted, live).double().sum((1, 3))
        for n in set(range(len(lives))) - set(shared):
            sums[n] += (weighted * lives[n]).sum(-1).double().sum((0, 2))
    return torch.cat(outs, 2), sums, int(real.sum())
