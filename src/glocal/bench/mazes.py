"""Mazes of two parts, square and round: does a way lead from the start to the target?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from glocal.bench.puzzles import COLOURS, Puzzle, distances, random_tree, tree_order
from glocal.shapes import Float

__all__ = ["CircularMaze", "Maze", "RectMaze", "circular_maze", "rect_maze"]

UNEVEN, FAR = 3, 3


@dataclass(frozen=True, eq=False)
class Maze(Puzzle):
    """Cells, and passages between neighbours, without a way round; label 1 if one leads to the target.

    Args:
        target: a cell.
        extent: cells along a side, or rings.
    """

    target: int
    extent: int

    pace: ClassVar[int] = 2


@dataclass(frozen=True, eq=False)
class RectMaze(Maze):
    """Square cells, counted row by row. Made by `rect_maze`."""

    CELL: ClassVar[int] = 8
    """Pixels, without the wall of one pixel."""

    def draw(self, reach: int = 0, size: int = 224) -> Any:
        from PIL import Image, ImageDraw

        step = self.CELL + 1
        side = self.extent * step + 1
        if size < side:
            raise ValueError(f"size must be at least {side} for {self.extent} cells; it was {size}")
        picture = Image.new("RGB", (size, size), COLOURS["paper"])
        pen, corner = ImageDraw.Draw(picture), (size - side) // 2
        away = self.distances().tolist() if reach else [-1] * self.nodes
        open_to = {tuple(sorted(edge)) for edge in self.edges.tolist()}
        pen.rectangle((corner, corner, corner + side - 1, corner + side - 1), outline=COLOURS["line"])
        for cell in range(self.nodes):
            y, x = (corner + step * at for at in divmod(cell, self.extent))
            if 0 <= away[cell] <= reach:
                pen.rectangle((x + 1, y + 1, x + self.CELL, y + self.CELL), COLOURS["drawn"])
            if (cell + 1) % self.extent and (cell, cell + 1) not in open_to:
                pen.line((x + step, y, x + step, y + step), COLOURS["line"])
            if cell + self.extent < self.nodes and (cell, cell + self.extent) not in open_to:
                pen.line((x, y + step, x + step, y + step), COLOURS["line"])
            for name, place in (("start", self.start), ("target", self.target)):
                if cell == place:  # smaller than the cell, so that it can be seen in a coloured one
                    pen.rectangle((x + 3, y + 3, x + self.CELL - 2, y + self.CELL - 2), COLOURS[name])
        return picture

    def maps(self, pace: int | None = None) -> Float[Tensor, "frames 7 G G"]:
        """The frames as numbers of each cell, ``(T + 1, 7, G, G)``: ways up, down, left, right; start; target; drawn.

        Args:
            pace: as in `reached`.
        """
        cells = torch.zeros(6, self.nodes)
        low, high = self.edges.amin(1), self.edges.amax(1)
        beside = high - low == 1
        for way, cell in ((0, high[~beside]), (1, low[~beside]), (2, high[beside]), (3, low[beside])):
            cells[way, cell] = 1
        cells[4, self.start] = cells[5, self.target] = 1
        reached = self.reached(pace)
        reached[0] = False  # the puzzle itself, as it is drawn
        whole = torch.cat([cells.expand(len(reached), -1, -1), reached[:, None].float()], 1)
        laid: Tensor = whole.unflatten(-1, (self.extent, self.extent))
        return laid


@dataclass(frozen=True, eq=False)
class CircularMaze(Maze):
    """Rings around a hole, counted from the inside, each from the right and clockwise. Made by `circular_maze`."""

    def draw(self, reach: int = 0, size: int = 224) -> Any:
        from PIL import Image, ImageDraw

        counts, firsts = _rings(self.extent)
        width = (size - 3) / 2 / (self.extent + 1)
        if width < 6:
            raise ValueError(f"size must be at least {12 * (self.extent + 1) + 3}; it was {size}")
        picture = Image.new("RGB", (size, size), COLOURS["paper"])
        pen, middle = ImageDraw.Draw(picture), (size - 1) / 2
        away = self.distances().tolist() if reach else [-1] * self.nodes
        open_to = {tuple(sorted(edge)) for edge in self.edges.tolist()}

        def box(radius: float) -> tuple[float, float, float, float]:
            return middle - radius, middle - radius, middle + radius, middle + radius

        def at(radius: float, angle: float) -> tuple[float, float]:
            return middle + radius * math.cos(math.radians(angle)), middle + radius * math.sin(math.radians(angle))

        # From the outside, so that each ring leaves only its own width of the one around it.
        for ring in reversed(range(self.extent)) if reach else ():
            turn, outer = 360 / counts[ring], (ring + 2) * width
            for n in range(counts[ring]):
                filled = 0 <= away[firsts[ring] + n] <= reach
                colour = COLOURS["drawn" if filled else "paper"]
                pen.pieslice(box(outer), n * turn, (n + 1) * turn, colour, colour)
        pen.ellipse(box(width), COLOURS["paper"], COLOURS["line"])
        for ring in range(self.extent):
            turn, inner, outer = 360 / counts[ring], (ring + 1) * width, (ring + 2) * width
            for n in range(counts[ring]):
                cell = firsts[ring] + n
                beside = firsts[ring] + (n + 1) % counts[ring]
                if tuple(sorted((cell, beside))) not in open_to:
                    pen.line((*at(inner, (n + 1) * turn), *at(outer, (n + 1) * turn)), COLOURS["line"])
                if ring and tuple(sorted((_inward(ring, n, counts, firsts), cell))) not in open_to:
                    pen.arc(box(inner), n * turn, (n + 1) * turn, COLOURS["line"])
                for name, place in (("start", self.start), ("target", self.target)):
                    if cell == place:
                        x, y = (round(v) for v in at((inner + outer) / 2, (n + 0.5) * turn))
                        pen.rectangle((x - 1, y - 1, x + 2, y + 2), COLOURS[name])
        pen.ellipse(box((self.extent + 1) * width), outline=COLOURS["line"])
        return picture


def _rings(rings: int) -> tuple[list[int], list[int]]:
    """How many cells each ring has, and the number of its first one."""
    counts = [6 * 2 ** int(math.log2(ring + 1)) for ring in range(rings)]
    return counts, [0, *accumulate(counts)]


def _inward(ring: int, n: int, counts: list[int], firsts: list[int]) -> int:
    """The neighbour of a ring's cell in the ring inside it."""
    return firsts[ring - 1] + n * counts[ring - 1] // counts[ring]


@cache
def _square(extent: int) -> Tensor:
    cell = torch.arange(extent**2).view(extent, extent)
    pairs = [
        torch.stack([a.flatten(), b.flatten()], 1) for a, b in ((cell[:, :-1], cell[:, 1:]), (cell[:-1], cell[1:]))
    ]
    return torch.cat(pairs)


@cache
def _round(rings: int) -> Tensor:
    counts, firsts = _rings(rings)
    pairs = []
    for ring, count in enumerate(counts):
        for n in range(count):
            pairs.append(sorted((firsts[ring] + n, firsts[ring] + (n + 1) % count)))
            if ring:
                pairs.append([_inward(ring, n, counts, firsts), firsts[ring] + n])
    return torch.tensor(pairs)


def _split(neighbours: Tensor, nodes: int, generator: torch.Generator) -> Tensor | None:
    """A spanning tree without the edge that leaves two parts of nearly one size; None where no edge does."""
    order, above = tree_order(random_tree(neighbours, nodes, generator), nodes)
    sizes = [1] * nodes
    for node in reversed(order[1:]):
        sizes[above[node]] += sizes[node]
    fit = [node for node in order[1:] if abs(sizes[node] - nodes / 2) <= UNEVEN]
    if not fit:
        return None
    cut = fit[int(torch.randint(len(fit), (), generator=generator))]
    return torch.tensor([[above[node], node] for node in order[1:] if node != cut])


def _maze(kind: type[Maze], extent: int, neighbours: Tensor, generator: torch.Generator) -> Maze:
    nodes = int(neighbours.max()) + 1
    label = int(torch.randint(2, (), generator=generator))  # first, so that nothing that is drawn again favours one
    while True:
        edges = _split(neighbours, nodes, generator)
        if edges is None:
            continue
        start = int(torch.randint(nodes, (), generator=generator))
        away = distances(edges, nodes, start)
        fit = (away >= FAR if label else away < 0).nonzero()[:, 0]
        if len(fit):
            target = int(fit[torch.randint(len(fit), (), generator=generator)])
            return kind(nodes, edges, start, label, target, extent)


def rect_maze(extent: int, generator: torch.Generator) -> RectMaze:
    """Two trees of nearly one size that together fill a square of cells; is the target in the tree of the start?

    Sizes differ from half of the cells by at most 3; a target that can be reached is at least 3 steps away.

    Args:
        extent: cells along a side, at least 3.
        generator: on the CPU.

    Raises:
        ValueError: fewer cells.

    >>> maze = rect_maze(6, torch.Generator().manual_seed(0))
    >>> len(maze.edges), maze.frames(size=64).shape[1:], maze.maps().shape[1:]
    (34, torch.Size([3, 64, 64]), torch.Size([7, 6, 6]))
    """
    if extent < 3:
        raise ValueError(f"extent must be at least 3; it was {extent}")
    made = _maze(RectMaze, extent, _square(extent), generator)
    assert isinstance(made, RectMaze)
    return made


def circular_maze(rings: int, generator: torch.Generator) -> CircularMaze:
    """The same over rings of cells; ring r, from 0, has 6 times the greatest power of two up to r + 1.

    Args:
        rings: at least 2.
        generator: on the CPU.

    Raises:
        ValueError: fewer rings.

    >>> maze = circular_maze(3, torch.Generator().manual_seed(0))
    >>> maze.nodes, len(maze.edges)
    (30, 28)
    """
    if rings < 2:
        raise ValueError(f"rings must be at least 2; it was {rings}")
    made = _maze(CircularMaze, rings, _round(rings), generator)
    assert isinstance(made, CircularMaze)
    return made
