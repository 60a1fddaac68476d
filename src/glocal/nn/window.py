"""Sliding windows of one size, and of many: per head and per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from glocal.cache import Cache, WindowCache
from glocal.nn.frame import Attention, Call
from glocal.patterns import Pattern, PerHead, Sliding

__all__ = ["MultiScaleWindowAttention", "SlidingWindowAttention"]

_NO_CROSS = "a window needs one index for queries and keys"


class SlidingWindowAttention(Attention):
    """Each query sees the last ``window`` tokens, itself included; without causality, those nearer than ``window``.

    The local layer of Zebra (Song et al., 2023, arXiv 2312.08618), Mistral, Gemma and others.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        window: keys, the query's own included: key ``j`` is seen where ``i - window < j <= i``.

    Raises:
        ValueError: a window below 1, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import SlidingWindowAttention
    >>> layer = SlidingWindowAttention(64, 4, window=8, causal=True)
    >>> cache, x = layer.new_cache(), torch.randn(1, 20, 64)
    >>> steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(20)], 1)
    >>> torch.allclose(steps, layer(x), atol=1e-5), cache.kept()[0].k.shape[2]
    (True, 8)
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {"window": 3}

    def __init__(self, dim: int, num_heads: int, *, window: int = 512, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.window = _sizes(window, 1)[0]

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return _sliding(self.window, self.causal)

    def new_cache(self) -> Cache:
        return WindowCache(self.window)

    def extra_repr(self) -> str:
        return f"window={self.window}"


class MultiScaleWindowAttention(Attention):
    """A window of its own for each head; `glocal.patterns.multiscale_windows` gives the sizes for every layer.

    Xu et al., 2025, arXiv 2501.01039. Key heads whose query heads have one window keep just that many tokens when
    decoding; a key head shared by several windows keeps the largest.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        windows: ``num_heads`` sizes, each counting the token itself.

    Raises:
        ValueError: not one size a head, a size below 1, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import MultiScaleWindowAttention
    >>> from glocal.patterns import multiscale_windows
    >>> sizes = multiscale_windows(16, num_heads=8, depth=4)
    >>> layers = [MultiScaleWindowAttention(64, 8, windows=row, causal=True) for row in sizes]
    >>> layers[0](torch.randn(1, 100, 64)).shape, layers[0].windows
    (torch.Size([1, 100, 64]), (1, 1, 2, 2, 4, 4, 8, 8))
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {"windows": (2, 4)}

    def __init__(self, dim: int, num_heads: int, *, windows: Sequence[int], **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.windows = _sizes(windows, num_heads)

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return PerHead([_sliding(w, self.causal) for w in self.windows])

    def new_cache(self) -> Cache:
        return WindowCache([max(group) for group in self._groups()])

    def _groups(self) -> list[tuple[int, ...]]:
        """The windows of the query heads that share a key head."""
        size = self.num_heads // self.num_kv_heads
        return [self.windows[n : n + size] for n in range(0, self.num_heads, size)]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if all(len(set(group)) == 1 for group in self._groups()):
            return super().decode(q, k, v, call)
        raise ValueError("decoding needs one window for all query heads of a key head: give them equal windows")

    def extra_repr(self) -> str:
        return f"windows={self.windows}"


def _sliding(window: int, causal: bool) -> Pattern:
    return Sliding(window - 1, 0) if causal else Sliding(window - 1, window - 1)


def _sizes(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    sizes = (value,) * count if isinstance(value, int) else tuple(value)
    if len(sizes) != count or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in sizes):
        raise ValueError(f"windows must be {count} integers of at least 1; it was {value!r}")
    return sizes
