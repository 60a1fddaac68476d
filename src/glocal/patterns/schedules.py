"""Which layer and which head looks how far: schedules over the depth and the heads of a network."""

from __future__ import annotations

from typing import Literal

from glocal.patterns.base import whole

__all__ = ["is_global", "multiscale_windows"]


def is_global(layer: int, period: int, place: int = 0) -> bool:
    """Whether a layer (from 0) is the global one of its group of ``period`` layers; ``place`` is its place in it.

    Zebra's layerwise grouping (Song et al., 2023, arXiv 2312.08618); also Gemma's and Qwen's with ``place=period - 1``.

    Raises:
        ValueError: a place outside the group.

    >>> [is_global(layer, 4) for layer in range(5)]
    [True, False, False, False, True]
    """
    whole(period, "period", 1)
    if whole(place, "place", 0) >= period:
        raise ValueError(f"place must be less than the period {period}; it was {place}")
    return layer % period == place


def multiscale_windows(
    window: int, num_heads: int, depth: int, by: Literal["none", "heads", "layers", "both"] = "both"
) -> tuple[tuple[int, ...], ...]:
    """Window sizes of every layer and head of multi-scale window attention, each counting the token itself.

    Four equal groups of heads (and of layers, from shallow to deep) have a quarter, a half, once and twice the base.

    Args:
        window: the base size; a multiple of 4 for one scale, of 16 for both, keeps the sizes exact.
        num_heads, depth: where they do not divide by 4 the group of head ``h`` is ``4 h // num_heads``.
        by: what varies.

    Returns:
        ``depth`` tuples of ``num_heads`` sizes, rounded down.

    Raises:
        ValueError: a base so small that a window would be empty.

    Xu et al., 2025, arXiv 2501.01039.

    >>> multiscale_windows(16, 4, 1, by="heads")
    ((4, 8, 16, 32),)
    """
    whole(window, "window", 1)
    whole(num_heads, "num_heads", 1)
    whole(depth, "depth", 1)
    if by not in ("none", "heads", "layers", "both"):
        raise ValueError(f"by must be 'none', 'heads', 'layers' or 'both'; it was {by!r}")
    quarters = (1, 2, 4, 8)  # quarters of the base

    def factor(place: int, of: int, varies: bool) -> int:
        return quarters[4 * place // of] if varies else 4

    sizes = tuple(
        tuple(
            window
            * factor(layer, depth, by in ("layers", "both"))
            * factor(head, num_heads, by in ("heads", "both"))
            // 16
            for head in range(num_heads)
        )
        for layer in range(depth)
    )
    smallest = min(map(min, sizes))
    if smallest < 1:
        raise ValueError(f"window must be at least {16 if by == 'both' else 4} for by={by!r}; it was {window}")
    return sizes
