"""Windows as other libraries mean them. Each converter says what a query sees, border included."""

from __future__ import annotations

from collections.abc import Sequence

from glocal.patterns.base import Pattern, whole
from glocal.patterns.order import Causal, Full
from glocal.patterns.windows import Sliding, Window


def from_natten(
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Pattern:
    """NATTEN's ``na1d``, ``na2d``, ``na3d``: ``kernel_size`` keys an axis, the window moving inward at borders.

    >>> from glocal.patterns import from_natten
    >>> from_natten((7, 7), dilation=2)
    window((7, 7), dilation=2)
    """
    settings = [tuple(s) if isinstance(s, Sequence) else s for s in (kernel_size, dilation, stride, is_causal)]
    return Window(*settings)  # type: ignore[arg-type]


def from_flash(window_size: tuple[int, int] = (-1, -1), causal: bool = False) -> Pattern:
    """flash-attention's ``window_size=(left, right)``, both included, -1 for no limit, clipped at borders.

    With ``causal`` nothing after the query is seen. Queries are the last positions of the keys, as there.

    >>> from glocal.patterns import from_flash
    >>> from_flash((255, 0)), from_flash((-1, 0))
    (sliding(255, 0), causal())
    """
    left, right = window_size
    whole(left, "left of window_size", -1), whole(right, "right of window_size", -1)
    if causal:
        right = 0
    if left < 0 and right < 0:
        return Full()
    if left < 0:
        return Causal() if right == 0 else Causal() | Sliding(0, right)
    if right < 0:
        return ~Causal() | Sliding(left, 0)
    return Sliding(left, right)


def from_hf(sliding_window: int | None, causal: bool = True) -> Pattern:
    """transformers' ``sliding_window=W``: in a causal model W keys with the query itself, clipped at the start.

    Without ``causal`` the window is transformers' bidirectional one, ``W`` keys to each side at most
    (``abs(i - j) <= W``, as in ModernBERT's local layers with ``W = local_attention // 2``).

    >>> from glocal.patterns import from_hf
    >>> from_hf(4096), from_hf(None)
    (sliding(4095, 0), causal())
    """
    if sliding_window is None:
        return Causal() if causal else Full()
    width = whole(sliding_window, "sliding_window", 1)
    return Sliding(width - 1, 0) if causal else Sliding(width, width)
