"""What every cache is: a policy that says which past tokens the newest query may still read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.shapes import Bool, Float

__all__ = ["Cache", "FullCache", "Kept", "replay"]


@dataclass(frozen=True)
class Kept:
    """Entries that the newest query sees, for the key heads ``heads``.

    ``k (B, h, T, D)``, ``v (B, h, T, Dv)``, ``position (B or 1, h, T)``: the token of each entry, -1 for an empty one.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    position: Tensor


class Cache(ABC):
    """Keys and values of the past, for one layer. After `update` it holds exactly what the newest token sees.

    Keys are stored after their rotary embedding, at the positions that they had. A policy may need more than keys and
    values to decide (roles, weights, queries): those are its *signals*, keyword arguments of `update`, each
    ``(B, heads, n, ...)`` with one entry a token.
    """

    complete: bool = False
    """Whether every token is kept, so that the parallel form can run on what is kept."""

    def __init__(self) -> None:
        self.seen = 0
        """Tokens so far."""

    @abstractmethod
    def update(self, k: Float[Tensor, "B Hkv n D"], v: Float[Tensor, "B Hkv n Dv"], **signals: Tensor) -> None:
        """Add ``n`` tokens, drop what the last of them does not see. As good as ``n`` updates of one token."""

    @abstractmethod
    def kept(self) -> tuple[Kept, ...]:
        """What the newest token sees, one part for each set of key heads that keep equally many."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""
        return tuple(t for part in self.kept() for t in (part.k, part.v))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, as beam search does; a row may come several times."""
        for name, value in vars(self).items():
            setattr(self, name, _select(value, rows))

    def _check(self, k: Tensor, v: Tensor) -> None:
        if k.dim() != 4 or k.shape[:-1] != v.shape[:-1]:
            raise ValueError(
                f"k and v must be (B, Hkv, n, D) and (B, Hkv, n, Dv); they were {tuple(k.shape)} and {tuple(v.shape)}"
            )


def _select(value: Any, rows: Tensor) -> Any:
    """Rows of every tensor in a policy's state: its first axis is the batch, or 1 where all rows agree."""
    if isinstance(value, Tensor):
        if value.dim() < 2 or (value.shape[0] == 1 and bool((rows > 0).any())):
            return value
        return value.index_select(0, rows.to(value.device))
    if isinstance(value, Cache):  # a policy inside a policy
        value.select(rows)
        return value
    if isinstance(value, dict):
        return {key: _select(item, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_select(item, rows) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class FullCache(Cache):
    """Keeps everything.

    >>> import torch
    >>> from glocal.cache import FullCache
    >>> cache = FullCache()
    >>> cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> cache.seen, cache.kept()[0].k.shape
    (3, torch.Size([1, 2, 3, 4]))
    """

    complete = True

    def __init__(self) -> None:
        super().__init__()
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def k(self) -> Tensor | None:
        """All keys, ``(B, Hkv, seen, D)``."""
        return None if self._k is None else self._k[:, :, : self.seen]

    @property
    def v(self) -> Tensor | None:
        """All values, ``(B, Hkv, seen, Dv)``."""
        return None if self._v is None else self._v[:, :, : self.seen]

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        self._check(k, v)
        self._k, self._v = self._longer(self._k, k), self._longer(self._v, v)
        self.seen += k.shape[2]

    def _longer(self, held: Tensor | None, new: Tensor) -> Tensor:
        """The buffer with the new tokens in it; it grows by half, so that a step does not copy what is held."""
        count = self.seen + new.shape[2]
        if held is None:
            return new
        if torch.is_grad_enabled() or held.is_inference() != new.is_inference():
            return torch.cat([held[:, :, : self.seen], new], 2)  # what a graph has saved must not be written into
        if count > held.shape[2]:
            larger = held.new_empty(*held.shape[:2], count + count // 2, held.shape[3])
            larger[:, :, : self.seen] = held[:, :, : self.seen]
            held = larger
        held[:, :, self.seen : count] = new
        return held

    def kept(self) -> tuple[Kept, ...]:
        if self.k is None or self.v is None:
            return ()
        heads = self.k.shape[1]
        position = torch.arange(self.seen, device=self.k.device).expand(1, heads, -1)
        return (Kept(tuple(range(heads)), self.k, self.v, position),)


def replay(
    make: Callable[[], Cache], k: Float[Tensor, "B Hkv N D"], v: Float[Tensor, "B Hkv N Dv"], **signals: Tensor
) -> Bool[Tensor, "B Hkv N N"]:
    """The mask that a policy amounts to: which keys each query saw, token by token.

    >>> import torch
    >>> from glocal.cache import WindowCache, replay
    >>> k = torch.zeros(1, 1, 4, 2)
    >>> replay(lambda: WindowCache(2), k, k)[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    cache, length = make(), k.shape[2]
    mask = torch.zeros(*k.shape[:2], length, length + 1, dtype=torch.bool)  # one more: empty entries fall there
    for t in range(length):
        at = slice(t, t + 1)
        cache.update(k[:, :, at], v[:, :, at], **{name: s[:, :, at] for name, s in signals.items()})
        for part in cache.kept():
            position = part.position.expand(k.shape[0], -1, -1).cpu()
            seen = mask[:, list(part.heads), t].scatter(-1, torch.where(position < 0, length, position), True)
            mask[:, list(part.heads), t] = seen
    return mask[..., :length]
