"""What linear attention keeps: a state of fixed size instead of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from glocal.cache.base import Cache, Kept

__all__ = ["StateCache"]


class StateCache(Cache):
    """The state of a layer whose past has a fixed size; it counts tokens, the layer does the rest.

    Attributes:
        state: a named tuple of tensors ``(B, ...)``, or None before the first token.

    >>> import torch
    >>> from glocal.nn import LinearAttention
    >>> layer = LinearAttention(16, 2, causal=True)
    >>> cache = layer.new_cache()
    >>> for _ in range(3):
    ...     _ = layer(torch.randn(1, 5, 16), cache=cache)
    >>> cache.seen, cache.nbytes  # 2 heads of 8 x 8 + 8 floats
    (15, 576)
    """

    complete = True

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        raise TypeError("a state is updated by its layer: LinearAttention.step")

    def kept(self) -> tuple[Kept, ...]:
        raise TypeError("a state keeps no keys and values of single tokens")

    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.state is None else tuple(self.state)
