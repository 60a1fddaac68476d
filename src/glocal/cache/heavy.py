"""The tokens that have received most attention so far, and the most recent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import Cache, Kept
from glocal.condense import best, share_heads
from glocal.shapes import Bool, Float

__all__ = ["HeavyHitters"]

_PAIRS = 1 << 21  # scores of a prompt held at a time


class HeavyHitters(Cache):
    """H2O: each key head keeps its ``heavy`` tokens of the largest sums of attention, and its ``recent`` last ones.

    The sum of a token is the attention that all queries so far have given it, over the keys kept at their time; query
    heads that share a key head are added up. After each query the policy keeps the recent tokens, and of the others
    those of the largest sums (ties go to the earlier token). So a query sees at most ``heavy + recent`` past tokens
    and itself. Each item of the batch keeps its own. Sums favour early tokens, which more queries have seen.
    Zhang et al., 2023, arXiv 2306.14048; the cache of SinkLoRA (Zhang, 2024, arXiv 2406.05678).

    Args:
        heavy, recent: tokens kept of each kind.
        scale: of the scores, as in the layer; ``D ** -0.5`` where None.
        softcap: of the scores, as in the layer.
        prompt: how several tokens at the start are taken: ``"steps"``, token by token, as decoding would; ``"whole"``,
            as in the paper's code, which reads a prompt in full (every query gives its attention to all tokens before
            it) and drops tokens once, after it.

    `update` needs the signal ``queries (B, H, n, D)``, after their rotary embedding.

    Raises:
        ValueError: a negative number of tokens, another way with prompts, or queries that do not fit the keys.

    >>> import torch
    >>> from glocal.cache import HeavyHitters, replay
    >>> k = torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0]).view(1, 1, 5, 1)
    >>> replay(lambda: HeavyHitters(1, 1), k, k, queries=torch.ones_like(k))[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]
    """

    def __init__(
        self,
        heavy: int,
        recent: int,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        prompt: str = "steps",
    ) -> None:
        super().__init__()
        if prompt not in ("steps", "whole"):
            raise ValueError(f"prompt must be 'steps' or 'whole'; it was {prompt!r}")
        for name, value in (("heavy", heavy), ("recent", recent)):
            if value < 0:
                raise ValueError(f"{name} must not be negative; it was {value}")
        self.heavy, self.recent, self.scale, self.softcap, self.prompt = heavy, recent, scale, softcap, prompt
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.sums: Tensor | None = None  # (B, Hkv, T)
        self.position: Tensor | None = None  # (B, Hkv, T), ascending

    def update(self, k: Tensor, v: Tensor, *, queries: Tensor | None = None, **signals: Tensor) -> None:
        self._check(k, v)
        if queries is None or queries.dim() != 4 or queries.shape[2:] != k.shape[2:] or queries.shape[1] % k.shape[1]:
            found = None if queries is None else tuple(queries.shape)
            raise ValueError(f"queries must be (B, H, n, D) for k {tuple(k.shape)}; it was {found}")
        if self.prompt == "whole" and not self.seen and k.shape[2] > 1:
            self._read(k, v, queries.detach())
            return
        for t in range(k.shape[2]):
            at = slice(t, t + 1)
            self._add(k[:, :, at], v[:, :, at], queries[:, :, at].detach())

    def _read(self, k: Tensor, v: Tensor, q: Tensor) -> None:
        """A prompt in full: sums over all its queries, then one eviction, which leaves room for no token more."""
        count = k.shape[2]
        wide = torch.promote_types(k.dtype, torch.float32)
        self.k, self.v, self.seen = k, v, count
        self.position = torch.arange(count, device=k.device).expand(*k.shape[:2], -1)
        self.sums = torch.zeros(k.shape[:3], dtype=wide, device=k.device)
        place = torch.arange(count, device=k.device)
        for rows in place.split(max(1, _PAIRS // max(1, q.shape[0] * q.shape[1] * count))):
            last = int(rows[-1]) + 1
            self.sums[..., :last] += self.attention(q[:, :, rows], place[:last] <= rows[:, None])
        self._evict()

    def _add(self, k: Tensor, v: Tensor, q: Tensor) -> None:
        self._evict()
        position = torch.full(k.shape[:3], self.seen, device=k.device)
        wide = torch.promote_types(k.dtype, torch.float32)
        none = torch.zeros(k.shape[:3], dtype=wide, device=k.device)
        if self.k is None or self.v is None or self.sums is None or self.position is None:
            self.k, self.v, self.sums, self.position = k, v, none, position
        else:
            self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            self.sums, self.position = torch.cat([self.sums, none], 2), torch.cat([self.position, position], 2)
        self.seen += 1
        self.sums = self.sums + self.attention(q)

    def attention(
        self, q: Float[Tensor, "B H n D"], seen: Bool[Tensor, "n T"] | None = None
    ) -> Float[Tensor, "B Hkv T"]:
        """What queries give each kept token: ``exp(score - lse)``, added up over them and over a key head's heads."""
        assert self.k is not None
        k = self.k.detach() if seen is None else self.k.detach()[:, :, : seen.shape[1]]
        wide = torch.promote_types(k.dtype, torch.float32)
        grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
        scores = grouped @ k.to(wide).mT[:, :, None] * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True)).sum(-2)
        return share_heads(weights.flatten(1, 2), k.shape[1])

    def _evict(self) -> None:
        """Down to ``heavy + recent`` tokens, in their order."""
        if self.k is None or self.k.shape[2] <= self.heavy + self.recent:
            return
        assert self.v is not None and self.sums is not None and self.position is not None
        count = self.k.shape[2]
        old = count - self.recent
        chosen = best(self.worth()[..., :old], self.heavy).sort(-1).values
        recent = torch.arange(old, count, device=chosen.device).expand(*chosen.shape[:2], -1)
        keep = torch.cat([chosen, recent], -1)
        self.k, self.v = (t.gather(2, keep[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (self.k, self.v))
        self.sums, self.position = self.sums.gather(2, keep), self.position.gather(2, keep)

    def worth(self) -> Float[Tensor, "B Hkv T"]:
        """By what tokens are kept: the sums. A policy of another taste overrides this."""
        assert self.sums is not None
        return self.sums

    def kept(self) -> tuple[Kept, ...]:
        if self.k is None or self.v is None or self.position is None:
            return ()
        return (Kept(tuple(range(self.k.shape[1])), self.k, self.v, self.position),)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.k, self.v, self.sums, self.position) if t is not None)
