"""One closed line or two: straight ones over points of a circle, and curved ones that may cross."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glocal.bench.puzzles import COLOURS, Puzzle
from glocal.shapes import Float

__all__ = ["Loops", "cycles", "every_cycle", "strings"]


@dataclass(frozen=True, eq=False)
class Loops(Puzzle):
    """Points joined by one closed line (label 1) or by two, which are followed both ways. Made by `cycles`.

    Args:
        points: in shares of the picture's side, x to the right and y down, ``(nodes, 2)``.
        curved: whether lines are smooth curves through the points.
    """

    points: Float[Tensor, "nodes 2"]
    curved: bool = False

    pieces: ClassVar[int] = 16
    """Straight parts of a curve from point to point."""

    @property
    def steps(self) -> Tensor:
        """The step at which each edge is coloured, integers ``(E,)``; 0 for those of the other line."""
        return self.distances()[self.edges].amin(1) + 1

    @property
    def depth(self) -> int:
        # The last edge of an odd cycle joins two points that are as far.
        return int(self.steps.max())

    def draw(self, reach: int = 0, size: int = 224) -> Any:
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (size, size), COLOURS["paper"])
        pen = ImageDraw.Draw(picture)
        steps = self.steps.tolist() if reach else [0] * len(self.edges)
        lines = [(line * (size - 1)).flatten().tolist() for line in self._lines()]
        # What is coloured comes last, so that crossings do not hide it.
        for wanted in ("line", "drawn"):
            for line, step in zip(lines, steps, strict=True):
                if (0 < step <= reach) == (wanted == "drawn"):
                    pen.line(line, COLOURS[wanted], width=2)
        for x, y in (self.points * (size - 1)).round().int().tolist():
            pen.rectangle((x - 1, y - 1, x + 1, y + 1), COLOURS["line"])
        return picture

    def _lines(self) -> list[Tensor]:
        """The corners of each edge's line, ``(k, 2)``."""
        if not self.curved:
            return [self.points[edge] for edge in self.edges]
        beside = torch.full((self.nodes, 2), -1)
        for a, b in self.edges.tolist():  # edges go round: b comes after a
            beside[a, 1], beside[b, 0] = b, a
        slope = (self.points[beside[:, 1]] - self.points[beside[:, 0]]) / 6
        t = torch.linspace(0, 1, self.pieces + 1)[:, None]
        lines = []
        for a, b in self.edges.tolist():  # Catmull-Rom as a cubic Bezier curve
            p = self.points[a], self.points[a] + slope[a], self.points[b] - slope[b], self.points[b]
            lines.append((1 - t) ** 3 * p[0] + 3 * t * (1 - t) ** 2 * p[1] + 3 * t**2 * (1 - t) * p[2] + t**3 * p[3])
        return lines


def _around(order: Tensor) -> Tensor:
    """Edges of the cycle through nodes in this order."""
    return torch.stack([order, order.roll(-1)], 1)


def _loops(points: Tensor, generator: torch.Generator, curved: bool) -> Loops:
    count = len(points)
    label = int(torch.randint(2, (), generator=generator))
    order = torch.randperm(count, generator=generator)
    edges = torch.cat([_around(part) for part in ([order] if label else order.chunk(2))])
    return Loops(count, edges, int(points[:, 0].argmax()), label, points.float(), curved)


def cycles(n: int, generator: torch.Generator) -> Loops:
    """2n points on a circle, joined by straight lines to one cycle, or to two of n, with even chances.

    Args:
        n: at least 3.
        generator: on the CPU.

    Raises:
        ValueError: fewer points.

    >>> puzzle = cycles(6, torch.Generator().manual_seed(0))
    >>> puzzle.frames(size=64).shape[1:], len(puzzle.edges)
    (torch.Size([3, 64, 64]), 12)
    """
    if n < 3:
        raise ValueError(f"n must be at least 3; it was {n}")
    angle = torch.arange(2 * n) * (math.pi / n)
    return _loops(0.5 + 0.45 * torch.stack([angle.cos(), angle.sin()], 1), generator, False)


def every_cycle(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """All puzzles of `cycles` as tables of edges, for exact information: which pairs of the 2n points are joined.

    Args:
        n: 3 or 4; there are 70 and 2,835 of them.

    Returns:
        Zeros and ones ``(puzzles, pairs)``, labels ``(puzzles,)``, and how likely each one is, ``(puzzles,)``.

    >>> tables, labels, chances = every_cycle(3)
    >>> tables.shape, labels.sum().item(), round(chances.sum().item(), 9)
    (torch.Size([70, 15]), 60, 1.0)
    """
    import itertools

    if n not in (3, 4):
        raise ValueError(f"n must be 3 or 4; it was {n}")
    pair = {p: at for at, p in enumerate(itertools.combinations(range(2 * n), 2))}

    def rounds(nodes: tuple[int, ...]) -> list[frozenset[int]]:
        first, *others = nodes
        turns = (order for order in itertools.permutations(others) if order[0] < order[-1])
        return [
            frozenset(pair[a, b] if a < b else pair[b, a] for a, b in _around(torch.tensor([first, *order])).tolist())
            for order in turns
        ]

    one = rounds(tuple(range(2 * n)))
    two = []
    for half in itertools.combinations(range(1, 2 * n), n - 1):
        rest = tuple(node for node in range(2 * n) if node not in (0, *half))
        two += [a | b for a in rounds((0, *half)) for b in rounds(rest)]
    tables = torch.zeros(len(one) + len(two), len(pair), dtype=torch.long)
    for row, edges in enumerate([*one, *two]):
        tables[row, sorted(edges)] = 1
    labels = (torch.arange(len(tables)) < len(one)).long()
    chances = 0.5 / torch.tensor([len(two), len(one)], dtype=torch.float64)[labels]
    return tables, labels, chances


def strings(n: int, generator: torch.Generator) -> Loops:
    """2n points anywhere, joined by smooth curves to one loop, or to two of n, with even chances; curves may cross.

    Points are at least 0.12 of the side apart.

    Args:
        n: from 4, since in a loop of three points curves bend otherwise, to 12, for more do not fit.
        generator: on the CPU.

    Raises:
        ValueError: other numbers of points.

    >>> strings(4, torch.Generator().manual_seed(0)).points.shape
    torch.Size([8, 2])
    """
    if not 4 <= n <= 12:
        raise ValueError(f"n must be from 4 to 12; it was {n}")
    points = torch.empty(0, 2)
    tries = 0
    while len(points) < 2 * n:
        tries += 1
        point = 0.1 + 0.8 * torch.rand(1, 2, generator=generator)
        if not len(points) or float(torch.cdist(point, points).min()) >= 0.12:
            points = torch.cat([points, point])
        elif tries > 1000:
            points, tries = points[:0], 0
    return _loops(points, generator, True)
