"""Tokens that stay for ever, until the next of those, or for a window: as many as each head happens to need."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import Cache, Kept

__all__ = ["GLOBAL", "LOCAL", "WINDOWED", "TokenRoles"]

GLOBAL, LOCAL, WINDOWED = range(3)
"""What a token can be."""


class TokenRoles(Cache):
    """Each key head drops a token when its role says so (Neural Attention Search; Deng et al., 2025, arXiv 2502.13251).

    A global token is never dropped. A local one is dropped after the next global token, which still sees it. A
    windowed one is seen by the ``window`` queries after it. Heads and items of the batch keep different numbers of
    tokens; a head takes as much memory as its fullest item.

    Args:
        window: how many later queries see a windowed token.

    `update` needs the signal ``roles (B, Hkv, n)``: `GLOBAL`, `LOCAL` or `WINDOWED`.

    Raises:
        ValueError: a negative window, or roles that do not fit the keys.

    >>> import torch
    >>> from glocal.cache import TokenRoles, replay
    >>> k, roles = torch.zeros(1, 1, 5, 2), torch.tensor([[[0, 1, 2, 0, 1]]])
    >>> replay(lambda: TokenRoles(1), k, k, roles=roles)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 0:
            raise ValueError(f"window must not be negative; it was {window}")
        self.window = window
        self._heads: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # k, v, position, role of each head, (B, T, ...)

    def update(self, k: Tensor, v: Tensor, *, roles: Tensor | None = None, **signals: Tensor) -> None:
        self._check(k, v)
        if roles is None or roles.shape != k.shape[:-1] or roles.is_floating_point():
            found = None if roles is None else f"{roles.dtype} {tuple(roles.shape)}"
            raise ValueError(f"roles must be integers {tuple(k.shape[:-1])}; it was {found}")
        if not k.shape[2]:
            return
        position = torch.arange(self.seen, self.seen + k.shape[2], device=k.device).expand(k.shape[0], -1)
        self.seen += k.shape[2]
        for head in range(k.shape[1]):
            entries = (k[:, head].detach(), v[:, head].detach(), position, roles[:, head].to(torch.int8))
            if len(self._heads) > head:
                entries = tuple(torch.cat(pair, 1) for pair in zip(self._heads[head], entries, strict=True))  # type: ignore[assignment]
            self._heads[head : head + 1] = [self._drop(*entries)]

    def _drop(self, k: Tensor, v: Tensor, position: Tensor, role: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep what the newest token sees, in order, and leave no more empty places than the batch needs."""
        newest = self.seen - 1
        ends = torch.where((role == GLOBAL) & (position < newest), position, -1).amax(1, keepdim=True)
        live = (role == GLOBAL) | ((role == LOCAL) & (position > ends))
        live = (live | ((role == WINDOWED) & (position >= newest - self.window))) & (position >= 0)
        order = (~live).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(live.sum(1).max())]
        position = torch.where(live, position, -1).gather(1, order)
        each = order[..., None]
        k, v = (t.gather(1, each.expand(-1, -1, t.shape[-1])) for t in (k, v))
        return k, v, position, role.gather(1, order)

    def kept(self) -> tuple[Kept, ...]:
        parts = []
        for count in sorted({position.shape[1] for _, _, position, _ in self._heads}):
            heads = tuple(h for h, entries in enumerate(self._heads) if entries[2].shape[1] == count)
            k, v, position = (torch.stack([self._heads[h][n] for h in heads], 1) for n in range(3))
            parts.append(Kept(heads, k, v, position))
        return tuple(parts)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for entries in self._heads for t in entries)
