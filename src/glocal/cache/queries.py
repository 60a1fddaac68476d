"""All tokens, and the last queries: for weights that depend on the scores of queries before."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import FullCache

__all__ = ["QueryCache"]


class QueryCache(FullCache):
    """Keeps all keys and values, as `FullCache`, and the queries of the last ``count`` tokens.

    Multi-token attention computes the scores of those queries again, as its weights depend on them (Golovneva et al.,
    2025, arXiv 2504.00927). `update` needs the signal ``queries (B, H, n, D)``, after their rotary embedding.

    Args:
        count: queries, 0 or more.

    Raises:
        ValueError: a negative count; queries that are not as many as the keys.

    >>> import torch
    >>> cache = QueryCache(2)
    >>> for _ in range(3):
    ...     cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), queries=torch.ones(1, 2, 1, 4))
    >>> cache.seen, cache.queries.shape
    (3, torch.Size([1, 2, 2, 4]))
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        if count < 0:
            raise ValueError(f"count must be at least 0; it was {count}")
        self.count = count
        self.queries: Tensor | None = None

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        queries = signals.get("queries")
        if queries is None or queries.dim() != 4 or queries.shape[2] != k.shape[2]:
            found = None if queries is None else tuple(queries.shape)
            raise ValueError(f"queries must be (B, H, {k.shape[2]}, D), as many as keys; it was {found}")
        super().update(k, v)
        held = queries if self.queries is None else torch.cat([self.queries, queries], 2)
        # A copy: a view would keep a prompt's queries alive.
        self.queries = held[:, :, max(0, held.shape[2] - self.count) :].clone()

    def tensors(self) -> tuple[Tensor, ...]:
        return super().tensors() + (() if self.queries is None else (self.queries,))
