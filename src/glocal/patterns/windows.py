"""Patterns over grid positions: neighborhood and sliding windows, blocks, strides. All work axis by axis."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.base import Pattern, PerAxis, Positions, one_box, per_axis, whole_axes
from glocal.patterns.boxes import BoxForm, Grid, Spans
from glocal.patterns.order import positions


class _Axes(Pattern):
    """A pattern that is a product over axes: it says, for one axis, which keys a position sees."""

    @abstractmethod
    def _axis_live(self, axis: int, rank: int, q: Tensor, k: Tensor, keys: int) -> Tensor:
        """Booleans for query positions ``q (n, 1)`` and key positions ``k (1, Nk)`` of one axis."""

    @abstractmethod
    def _axis_spans(self, axis: int, rank: int, q: Tensor, keys: int) -> Spans:
        """Intervals for the query positions ``q (Lq,)`` of one axis with ``keys`` positions."""

    def _live(self, at: Positions) -> Tensor:
        rank = len(at.grid_k)
        live = self._axis_live(0, rank, at.q[0], at.k[0], at.grid_k[0])
        for axis in range(1, rank):
            live = live & self._axis_live(axis, rank, at.q[axis], at.k[axis], at.grid_k[axis])
        return live

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        axes = enumerate(zip(grid_q, grid_k, strict=True))
        return one_box(grid_q, grid_k, [self._axis_spans(a, len(grid_k), positions(q, k), k) for a, (q, k) in axes])

    def _fits(self, rank: int, **settings: PerAxis) -> None:
        for name, value in settings.items():
            per_axis(value, rank, f"{name} of {type(self).__name__}")


@dataclass(frozen=True, repr=False, eq=False)
class Window(_Axes):
    """Neighborhood attention: each query sees ``size`` keys an axis, the window moving inward at borders.

    Every argument is one value, or one an axis.

    Args:
        size: keys an axis. An odd window is centred; an even one has one key more on the left.
        dilation: keys are this far apart; a query sees keys of its own residue class.
        stride: so many neighbouring queries share the window of their group's leader (the centre one; the last one
            on a causal axis). 1 is a sliding window, ``size`` is blocked attention.
        causal: on a causal axis the window ends at the query and is clipped at the start, not moved.

    Raises:
        ValueError: at use, where ``size * dilation`` exceeds an axis, or the queries outnumber the keys.

    Hassani et al., 2022, arXiv 2204.07143 and 2209.15001; Hassani et al., 2025, arXiv 2504.16922 (stride).

    >>> from glocal import Window
    >>> Window(3).mask(5).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    >>> Window((3, 5), dilation=(2, 1), causal=(False, True))
    window((3, 5), dilation=(2, 1), causal=(False, True))
    """

    size: PerAxis
    dilation: PerAxis = 1
    stride: PerAxis = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        for name in ("size", "dilation", "stride"):
            object.__setattr__(self, name, whole_axes(getattr(self, name), f"{name} of Window", 1))
        causal = tuple(self.causal) if isinstance(self.causal, (tuple, list)) else self.causal
        for flag in causal if isinstance(causal, tuple) else (causal,):
            if not isinstance(flag, bool):
                raise TypeError(f"causal of Window must be a bool or one bool an axis; it was {self.causal!r}")
        object.__setattr__(self, "causal", causal)
        if isinstance(self.size, int) and isinstance(self.stride, int) and self.stride > self.size:
            raise ValueError(f"stride of Window must be at most its size {self.size}; it was {self.stride}")

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        rank = len(grid_k)
        self._fits(rank, size=self.size, dilation=self.dilation, stride=self.stride, causal=self.causal)
        for axis, (q, k) in enumerate(zip(grid_q, grid_k, strict=True)):
            size, dilation, stride, _ = self._settings(axis, rank)
            if size > k:
                raise ValueError(
                    f"size of Window is {size} on axis {axis}, larger than the grid's {k}; use at most {k}"
                )
            if size * dilation > k:
                raise ValueError(
                    f"dilation of Window is {dilation} on axis {axis}: {size} keys that far apart need "
                    f"{size * dilation} positions, the grid has {k}; use at most {k // size}"
                )
            if stride > size:
                raise ValueError(f"stride of Window is {stride} on axis {axis}, more than its size {size}")
            if q > k:
                raise ValueError(f"Window needs at most as many queries as keys; axis {axis} has {q} and {k}")

    def _settings(self, axis: int, rank: int) -> tuple[int, int, int, bool]:
        values = (self.size, self.dilation, self.stride, self.causal)
        size, dilation, stride, causal = (per_axis(v, rank, "Window")[axis] for v in values)
        return size, dilation, stride, bool(causal)

    def spec(self, data: list[Tensor]) -> str:
        text = repr(self.size)
        for name, default in (("dilation", 1), ("stride", 1), ("causal", False)):
            if getattr(self, name) != default or isinstance(getattr(self, name), tuple):
                text += f", {name}={getattr(self, name)!r}"
        return f"window({text})"

    @staticmethod
    def _bounds(p: Tensor, n: Tensor, size: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Start and end of the window of index ``p`` among the ``n`` members of its dilation group."""
        if causal:
            leader = torch.minimum(p // stride * stride + stride - 1, n - 1)
            return (leader - size + 1).clamp(min=0), p + 1
        leader = torch.minimum(p // stride * stride + stride // 2, n - 1)
        start = torch.minimum((leader - size // 2).clamp(min=0), n - size)
        return start, start + size

    def _axis_live(self, axis: int, rank: int, q: Tensor, k: Tensor, keys: int) -> Tensor:
        size, dilation, stride, causal = self._settings(axis, rank)
        residue = q % dilation
        start, end = self._bounds(q // dilation, (keys - residue - 1) // dilation + 1, size, stride, causal)
        member = k // dilation
        return (k % dilation == residue) & (member >= start) & (member < end)

    def _axis_spans(self, axis: int, rank: int, q: Tensor, keys: int) -> Spans:
        size, dilation, stride, causal = self._settings(axis, rank)
        residue = q % dilation
        start, end = self._bounds(q // dilation, (keys - residue - 1) // dilation + 1, size, stride, causal)
        return Spans.of(residue + start * dilation, residue + (end - 1) * dilation + 1, dilation, keys)


@dataclass(frozen=True, repr=False, eq=False)
class Sliding(_Axes):
    """Keys from ``left`` before the query to ``right`` after it, both included, clipped at the borders.

    Reaches are one value, or one an axis. ``Sliding(w - 1, 0)`` is the causal window of ``w`` keys that language
    models mean by ``sliding_window=w``.

    >>> from glocal import Sliding
    >>> Sliding(1, 0).mask(3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    left: PerAxis
    right: PerAxis

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            object.__setattr__(self, name, whole_axes(getattr(self, name), f"{name} of Sliding", 0))

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        self._fits(len(grid_k), left=self.left, right=self.right)

    def spec(self, data: list[Tensor]) -> str:
        return f"sliding({self.left!r}, {self.right!r})"

    def _reach(self, axis: int, rank: int) -> tuple[int, int]:
        return per_axis(self.left, rank, "left")[axis], per_axis(self.right, rank, "right")[axis]

    def _axis_live(self, axis: int, rank: int, q: Tensor, k: Tensor, keys: int) -> Tensor:
        left, right = self._reach(axis, rank)
        return (k >= q - left) & (k <= q + right)

    def _axis_spans(self, axis: int, rank: int, q: Tensor, keys: int) -> Spans:
        left, right = self._reach(axis, rank)
        return Spans.of(q - left, q + right + 1, 1, keys)


@dataclass(frozen=True, repr=False, eq=False)
class Block(_Axes):
    """Keys of the query's own block of a partition into blocks of ``size``, its borders moved by ``shift``.

    A shifted partition is cut at the grid's borders and does not wrap around: the blocks that Swin's rolled windows
    leave after masking (Liu et al., 2021, arXiv 2103.14030). A last block may be short.

    >>> from glocal import Block
    >>> Block(2, shift=1).mask(4).int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    """

    size: PerAxis
    shift: PerAxis = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_axes(self.size, "size of Block", 1))
        object.__setattr__(self, "shift", whole_axes(self.shift, "shift of Block", 0))

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        rank = len(grid_k)
        self._fits(rank, size=self.size, shift=self.shift)
        for size, shift in zip(per_axis(self.size, rank, ""), per_axis(self.shift, rank, ""), strict=True):
            if shift >= size:
                raise ValueError(f"shift of Block must be less than its size {size}; it was {shift}")

    def spec(self, data: list[Tensor]) -> str:
        shift = f", shift={self.shift!r}" if self.shift != 0 else ""
        return f"block({self.size!r}{shift})"

    def _partition(self, axis: int, rank: int) -> tuple[int, int]:
        return per_axis(self.size, rank, "size")[axis], per_axis(self.shift, rank, "shift")[axis]

    def _axis_live(self, axis: int, rank: int, q: Tensor, k: Tensor, keys: int) -> Tensor:
        size, shift = self._partition(axis, rank)
        return (q - shift) // size == (k - shift) // size

    def _axis_spans(self, axis: int, rank: int, q: Tensor, keys: int) -> Spans:
        size, shift = self._partition(axis, rank)
        lo = (q - shift) // size * size + shift
        return Spans.of(lo, lo + size, 1, keys)


@dataclass(frozen=True, repr=False, eq=False)
class Strided(_Axes):
    """Keys whose index agrees with the query's own modulo ``step``, on every axis.

    The grid attention of MaxViT (Tu et al., 2022, arXiv 2204.01697) with windows spread over the whole map.

    >>> from glocal import Strided
    >>> Strided(2).mask(4).int().tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    step: PerAxis

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", whole_axes(self.step, "step of Strided", 1))

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        self._fits(len(grid_k), step=self.step)

    def spec(self, data: list[Tensor]) -> str:
        return f"strided({self.step!r})"

    def _axis_live(self, axis: int, rank: int, q: Tensor, k: Tensor, keys: int) -> Tensor:
        step = per_axis(self.step, rank, "step")[axis]
        return q % step == k % step

    def _axis_spans(self, axis: int, rank: int, q: Tensor, keys: int) -> Spans:
        step = per_axis(self.step, rank, "step")[axis]
        return Spans.of(q % step, torch.full_like(q, keys), step, keys)
