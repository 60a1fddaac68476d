"""Tokens that stay for ever, until the next of those, or for a window: as many as each head happens to need."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import Cache, Kept
from glocal.condense import best, pool_blocks
from glocal.shapes import Bool, Float

__all__ = ["GLOBAL", "LOCAL", "WINDOWED", "TokenRoles", "chunk_roles"]

GLOBAL, LOCAL, WINDOWED = range(3)
"""What a token can be."""
_OPEN = -1  # of a chunk that is not complete


def chunk_roles(
    scores: Float[Tensor, "B Hkv n 3"], chunk: int, *, real: Bool[Tensor, "*any n"] | None = None
) -> Tensor:
    """The role of each chunk of ``chunk`` tokens, ``(B, Hkv, ceil(n / chunk))``: of the highest mean score.

    ``real`` is as in `glocal.condense.pool_blocks`; ties go to global, then local.

    >>> chunk_roles(torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [2.0, 0.0, 0.0]]]]), 2).tolist()
    [[[2, 0]]]
    """
    return best(pool_blocks(scores, chunk, real=real), 1).squeeze(-1)


class TokenRoles(Cache):
    """Each key head drops a token when its role says so (Neural Attention Search; Deng et al., 2025, arXiv 2502.13251).

    A global token is never dropped. A local one is dropped after the next global token, which still sees it. A
    windowed one is seen by the ``window`` queries after it. Heads and items of the batch keep different numbers of
    tokens; a head takes as much memory as its fullest item.

    With ``chunk`` above 1 all this is said of chunks of so many tokens in place of tokens, with ``window // chunk``
    later chunks for the window. A chunk is seen by its own queries whatever its role, so the role is needed, and
    decided (`chunk_roles`), when the chunk is complete; the first chunk is global.

    Args:
        window: how many later queries see a windowed token; a multiple of ``chunk``.
        chunk: tokens that share a role.

    `update` needs the signal ``roles (B, Hkv, n)``: `GLOBAL`, `LOCAL` or `WINDOWED`; with chunks, the scores of the
    three, ``(B, Hkv, n, 3)``.

    Raises:
        ValueError: a negative window, one that is not made of chunks, or roles that do not fit the keys.

    >>> import torch
    >>> from glocal.cache import TokenRoles, replay
    >>> k, roles = torch.zeros(1, 1, 5, 2), torch.tensor([[[0, 1, 2, 0, 1]]])
    >>> replay(lambda: TokenRoles(1), k, k, roles=roles)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
    """

    def __init__(self, window: int, chunk: int = 1) -> None:
        super().__init__()
        if window < 0:
            raise ValueError(f"window must not be negative; it was {window}")
        if chunk < 1 or window % chunk:
            raise ValueError(f"chunk must be at least 1 and divide window {window}; it was {chunk}")
        self.window, self.chunk = window, chunk
        self._heads: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # k, v, position, role of each head, (B, T, ...)
        self._scores: Tensor | None = None  # of the chunk that is not complete, (B, Hkv, n, 3)

    def update(self, k: Tensor, v: Tensor, *, roles: Tensor | None = None, **signals: Tensor) -> None:
        self._check(k, v)
        wanted = k.shape[:-1] if self.chunk == 1 else (*k.shape[:-1], 3)
        if roles is None or roles.shape != wanted or roles.is_floating_point() != (self.chunk > 1):
            found = None if roles is None else f"{roles.dtype} {tuple(roles.shape)}"
            kind = "integers" if self.chunk == 1 else "scores"
            raise ValueError(f"roles must be {kind} {tuple(wanted)}; it was {found}")
        if not k.shape[2]:
            return
        if self.chunk > 1:
            roles = self._decide(roles.detach())
        position = torch.arange(self.seen, self.seen + k.shape[2], device=k.device).expand(k.shape[0], -1)
        self.seen += k.shape[2]
        for head in range(k.shape[1]):
            entries = (k[:, head].detach(), v[:, head].detach(), position, roles[:, head].to(torch.int8))
            if len(self._heads) > head:
                entries = tuple(torch.cat(pair, 1) for pair in zip(self._heads[head], entries, strict=True))  # type: ignore[assignment]
            self._heads[head : head + 1] = [self._drop(*entries)]

    def _decide(self, scores: Tensor) -> Tensor:
        """Roles of new tokens, ``(B, Hkv, n)``, as far as their chunks are complete; older ones get theirs as well."""
        new, start = scores.shape[2], self.seen // self.chunk
        scores = scores if self._scores is None else torch.cat([self._scores, scores], 2)
        done = scores.shape[2] // self.chunk * self.chunk
        decided = chunk_roles(scores[:, :, :done], self.chunk)
        if start == 0:
            decided[..., :1] = GLOBAL
        self._scores = scores[:, :, done:]
        if done:
            for head, (k, v, position, role) in enumerate(self._heads):
                now = decided[:, head, :1].to(role.dtype)
                self._heads[head] = (k, v, position, torch.where(role == _OPEN, now, role))
        opened = decided.new_full(self._scores.shape[:3], _OPEN)
        return torch.cat([decided.repeat_interleave(self.chunk, -1), opened], -1)[..., -new:]

    def _drop(self, k: Tensor, v: Tensor, position: Tensor, role: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep what the newest token sees, in order, and leave no more empty places than the batch needs."""
        newest, own = (self.seen - 1) // self.chunk, torch.div(position, self.chunk, rounding_mode="floor")
        ends = torch.where((role == GLOBAL) & (own < newest), own, -1).amax(1, keepdim=True)
        live = (role == GLOBAL) | (own == newest) | ((role == LOCAL) & (own > ends))
        live = (live | ((role == WINDOWED) & (own >= newest - self.window // self.chunk))) & (position >= 0)
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
        held = () if self._scores is None else (self._scores,)
        return (*held, *(t for entries in self._heads for t in entries))
