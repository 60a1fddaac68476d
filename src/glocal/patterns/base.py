"""What every pattern is: an immutable expression that can be asked for its mask, its count and its boxes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from glocal.patterns.boxes import Box, BoxForm, Grid, NoBoxForm, coordinates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PerAxis = int | tuple[int, ...]

_CHUNK = 1 << 24  # pairs looked at together where a count has to look at pairs


def as_grid(grid: int | Sequence[int], name: str = "grid") -> Grid:
    """Check a grid: one to three axes (more are allowed), no negative length."""
    out = (grid,) if isinstance(grid, int) else tuple(int(n) for n in grid)
    if not out or any(n < 0 for n in out):
        raise ValueError(f"{name} must be one or more lengths, none negative, e.g. (28, 28); it was {grid!r}")
    return out


def per_axis(value: PerAxis | bool | tuple[bool, ...], rank: int, what: str) -> tuple[int, ...]:
    """Spread a setting over ``rank`` axes, or check that it has one value an axis."""
    if isinstance(value, tuple):
        if len(value) != rank:
            raise ValueError(f"{what} has {len(value)} values, the grid has {rank} axes; give one value an axis")
        return value
    return (value,) * rank


def whole(value: Any, what: str, least: int) -> int:
    """Check an integer setting."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer; it was {value!r}")
    if value < least:
        raise ValueError(f"{what} must be at least {least}; it was {value}")
    return value


def whole_axes(value: Any, what: str, least: int) -> PerAxis:
    """Check one integer, or one integer an axis (lists become tuples)."""
    if isinstance(value, (tuple, list)):
        if not value:
            raise ValueError(f"{what} must have one value an axis; it was {value!r}")
        return tuple(whole(v, what, least) for v in value)
    return whole(value, what, least)


@dataclass(frozen=True)
class Positions:
    """Where a mask is asked for: coordinates of some queries, in key coordinates, and of all keys.

    On every axis the queries are the *last* positions of the keys, so a decoding step with a cache needs no special
    case. ``q`` holds ``(n, 1)`` and ``k`` ``(1, Nk)`` tensors, one an axis; ``rows`` the flattened query indices.
    """

    grid_q: Grid
    grid_k: Grid
    rows: Tensor
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]

    @staticmethod
    def of(grid_q: Grid, grid_k: Grid, rows: Tensor) -> Positions:
        """Positions of the flattened query indices ``rows (n,)``."""
        shift = [k - q for q, k in zip(grid_q, grid_k, strict=True)]
        q = tuple(c.unsqueeze(-1) + s for c, s in zip(coordinates(rows, grid_q), shift, strict=True))
        keys = torch.arange(math.prod(grid_k), device=rows.device)
        return Positions(grid_q, grid_k, rows, q, tuple(c.unsqueeze(0) for c in coordinates(keys, grid_k)))

    def flat_q(self) -> Tensor:
        """Flattened query positions in the key grid, ``(n, 1)``; outside it they may fall on no key."""
        flat = torch.zeros_like(self.q[0])
        inside = torch.ones_like(flat, dtype=torch.bool)
        for position, length in zip(self.q, self.grid_k, strict=True):
            flat = flat * length + position
            inside = inside & (position >= 0)
        return torch.where(inside, flat, -1)

    def flat_k(self) -> Tensor:
        """Flattened key positions, ``(1, Nk)``."""
        return torch.arange(math.prod(self.grid_k), device=self.rows.device).unsqueeze(0)


class Pattern(ABC):
    """Which keys each query sees. Patterns combine with ``|``, ``&`` and ``~`` and print as what makes them.

    >>> from glocal import Sliding, Prefix, parse
    >>> p = Sliding(2, 0) | Prefix(1)
    >>> p
    sliding(2, 0) | prefix(1)
    >>> p.mask(5).int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    >>> p.count(5), parse(repr(p)) == p
    (14, True)
    """

    precedence: ClassVar[int] = 3

    # What a pattern writes.

    @abstractmethod
    def _live(self, at: Positions) -> Tensor:
        """The definition: booleans that broadcast to ``(*lead, n, Nk)``."""

    @abstractmethod
    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        """The compiled form; raises `NoBoxForm` where there is none."""

    @abstractmethod
    def spec(self, data: list[Tensor]) -> str:
        """The expression as text, with tensors appended to ``data`` and written ``$0``, ``$1``, ..."""

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:  # noqa: B027, most patterns fit any grid
        """Raise a ValueError where the pattern does not fit the grids."""

    def children(self) -> tuple[Pattern, ...]:
        """The patterns that this one is made of."""
        return ()

    # What everyone asks.

    def check(self, grid_q: int | Sequence[int], grid_k: int | Sequence[int] | None = None) -> tuple[Grid, Grid]:
        """The two grids as tuples, or a ValueError that says what does not fit."""
        gq = as_grid(grid_q, "grid_q")
        gk = gq if grid_k is None else as_grid(grid_k, "grid_k")
        if len(gq) != len(gk):
            raise ValueError(f"grid_q has {len(gq)} axes {gq}, grid_k has {len(gk)} axes {gk}; they must agree")
        for node in self.walk():
            node._check(gq, gk)
        return gq, gk

    def walk(self) -> Iterator[Pattern]:
        """This pattern and all that it is made of."""
        stack: list[Pattern] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children()))

    def mask(self, grid_q: int | Sequence[int], grid_k: int | Sequence[int] | None = None) -> Tensor:
        """Booleans ``(*lead, Nq, Nk)``: the definition. ``lead`` is ``()``, ``(H,)`` or ``(B, H)``."""
        gq, gk = self.check(grid_q, grid_k)
        return self.rows(torch.arange(math.prod(gq), device=self.device()), gq, gk)

    def rows(self, rows: Tensor, grid_q: Grid, grid_k: Grid) -> Tensor:
        """Rows of the mask: ``(*lead, n, Nk)`` for flattened query indices ``rows (n,)``, not checked."""
        at = Positions.of(grid_q, grid_k, rows)
        live = self._live(at)
        shape = torch.broadcast_shapes(live.shape, (len(rows), math.prod(grid_k)))
        return live.expand(shape)

    def lead(self, grid_q: Grid, grid_k: Grid) -> tuple[int, ...]:
        """Leading dimensions of the mask: ``()``, ``(H,)`` or ``(B, H)``."""
        return _lead(self, grid_q, grid_k) if self.data() else _cached_lead(self, grid_q, grid_k)

    def count(self, grid_q: int | Sequence[int], grid_k: int | Sequence[int] | None = None) -> int:
        """Live pairs, over all of ``lead``, without building the mask."""
        gq, gk = self.check(grid_q, grid_k)
        try:
            total = self.boxes(gq, gk).count()
        except NoBoxForm:
            total = None
        if total is None:
            queries, keys = math.prod(gq), max(1, math.prod(gk))
            rows = torch.arange(queries, device=self.device()).split(max(1, _CHUNK // keys))
            total = sum(int(self.rows(r, gq, gk).sum()) for r in rows)
        return total

    def boxes(self, grid_q: int | Sequence[int], grid_k: int | Sequence[int] | None = None) -> BoxForm:
        """The compiled form (`BoxForm`). Raises `NoBoxForm`, a ValueError, where there is none."""
        gq, gk = self.check(grid_q, grid_k)
        return self._boxes(gq, gk) if self.data() else _cached_boxes(self, gq, gk)

    def data(self) -> tuple[Tensor, ...]:
        """Tensors that the pattern carries (masks, gates, lists of blocks)."""
        found: list[Tensor] = []
        self.spec(found)
        return tuple(found)

    def device(self) -> torch.device:
        """Where the pattern's tensors live; the CPU where it has none."""
        data = self.data()
        return data[0].device if data else torch.device("cpu")

    def plot(self, grid: int | Sequence[int], **options: Any) -> Figure:
        """A matplotlib figure of where queries look: see `glocal.patterns.plot.figure`."""
        from glocal.patterns.plot import figure

        return figure(self, grid, **options)

    # The algebra.

    def __or__(self, other: Pattern) -> Pattern:
        return Union(self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Complement(self)

    def __repr__(self) -> str:
        data: list[Tensor] = []
        text = self.spec(data)
        for n in reversed(range(len(data))):
            text = text.replace(f"${n}", f"<{str(data[n].dtype).removeprefix('torch.')}{list(data[n].shape)}>")
        return text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        if type(self) is not type(other) or self.spec(mine) != other.spec(theirs):
            return False
        return all(a is b or (a.device == b.device and torch.equal(a, b)) for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash(self.spec([]))


def _lead(pattern: Pattern, grid_q: Grid, grid_k: Grid) -> tuple[int, ...]:
    first = torch.arange(min(1, math.prod(grid_q)), device=pattern.device())
    return tuple(pattern.rows(first, grid_q, grid_k).shape[:-2])


_cached_lead = lru_cache(maxsize=256)(_lead)


@lru_cache(maxsize=256)
def _cached_boxes(pattern: Pattern, grid_q: Grid, grid_k: Grid) -> BoxForm:
    return pattern._boxes(grid_q, grid_k)


def bracket(pattern: Pattern, precedence: int, data: list[Tensor]) -> str:
    """The pattern's text, in parentheses where it binds less tightly than its surroundings."""
    text = pattern.spec(data)
    return f"({text})" if pattern.precedence < precedence else text


class _Several(Pattern):
    """Two or more patterns joined by one operator, nested ones of the same kind flattened."""

    symbol: ClassVar[str]

    def __init__(self, *parts: Pattern) -> None:
        flat: list[Pattern] = []
        for part in parts:
            if not isinstance(part, Pattern):
                raise TypeError(f"{type(self).__name__} joins patterns; it was given {part!r}")
            flat.extend(part.children() if type(part) is type(self) else (part,))
        if len(flat) < 2:
            raise ValueError(f"{type(self).__name__} joins two or more patterns; it was given {len(flat)}")
        self.parts = tuple(flat)

    def children(self) -> tuple[Pattern, ...]:
        return self.parts

    def spec(self, data: list[Tensor]) -> str:
        return f" {self.symbol} ".join(bracket(p, self.precedence + 1, data) for p in self.parts)


class Union(_Several):
    """Pairs that any of the parts allows: ``a | b``."""

    precedence = 0
    symbol = "|"

    def _live(self, at: Positions) -> Tensor:
        live = self.parts[0]._live(at)
        for part in self.parts[1:]:
            live = live | part._live(at)
        return live

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        form = self.parts[0]._boxes(grid_q, grid_k)
        for part in self.parts[1:]:
            form = form.union(part._boxes(grid_q, grid_k))
        return form


class Intersection(_Several):
    """Pairs that all parts allow: ``a & b``."""

    precedence = 1
    symbol = "&"

    def _live(self, at: Positions) -> Tensor:
        live = self.parts[0]._live(at)
        for part in self.parts[1:]:
            live = live & part._live(at)
        return live

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        form = self.parts[0]._boxes(grid_q, grid_k)
        for part in self.parts[1:]:
            form = form.intersect(part._boxes(grid_q, grid_k))
        return form


class Complement(Pattern):
    """Pairs that the inner pattern does not allow: ``~a``."""

    precedence = 2

    def __init__(self, inner: Pattern) -> None:
        if not isinstance(inner, Pattern):
            raise TypeError(f"Complement takes a pattern; it was given {inner!r}")
        self.inner = inner

    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def spec(self, data: list[Tensor]) -> str:
        return "~" + bracket(self.inner, self.precedence, data)

    def _live(self, at: Positions) -> Tensor:
        live = self.inner._live(at)
        return ~live.expand(torch.broadcast_shapes(live.shape, (len(at.rows), math.prod(at.grid_k))))

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        return self.inner._boxes(grid_q, grid_k).complement()


def one_box(grid_q: Grid, grid_k: Grid, axes: Sequence[Any], **limits: Any) -> BoxForm:
    """A form of a single box; ``axes`` are `Spans`."""
    return BoxForm.of(grid_q, grid_k, [Box(tuple(axes), **limits)])
