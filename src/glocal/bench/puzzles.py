"""Pictures whose label no few patches reveal: what is connected to what; drawn step by step from a start.

The tasks are `glocal.bench.cycles.cycles`, `glocal.bench.cycles.strings`, `glocal.bench.mazes.rect_maze` and
`glocal.bench.mazes.circular_maze`. Lotfi et al., 2024, arXiv 2410.08165.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["COLOURS", "Puzzle", "palette"]

COLOURS = {
    "paper": (255, 255, 255),
    "line": (0, 0, 0),
    "drawn": (0, 0, 255),
    "start": (255, 0, 0),
    "target": (0, 160, 0),
}
"""All that occur in a picture: lines are not smoothed, since that would tell frames apart."""


def palette() -> Float[Tensor, "5 3"]:
    """The colours as numbers from 0 to 1, for the rounding of frames that a model drew.

    >>> palette()[0]
    tensor([1., 1., 1.])
    """
    return torch.tensor(list(COLOURS.values())) / 255


@dataclass(frozen=True, eq=False)
class Puzzle(ABC):
    """A graph, where to start, and whether it is of one kind or the other.

    Args:
        nodes: how many.
        edges: pairs of nodes that a line or a passage joins, integers ``(E, 2)``.
        start: where the scratchpad starts.
        label: 1 or 0.
    """

    nodes: int
    edges: Tensor
    start: int
    label: int

    pace: ClassVar[int] = 1
    """Steps in the graph from frame to frame, unless another number is asked for."""

    def distances(self) -> Tensor:
        """Steps from the start to each node, integers ``(nodes,)``; -1 where no way leads."""
        return distances(self.edges, self.nodes, self.start)

    @property
    def depth(self) -> int:
        """Steps after which all that the start leads to is drawn."""
        return int(self.distances().max())

    def reached(self, pace: int | None = None) -> Tensor:
        """Which nodes each frame has reached, booleans ``(T + 1, nodes)``: frame 0 shows the start alone.

        Args:
            pace: steps from frame to frame; the task's own where None.
        """
        away = self.distances()
        return (away >= 0) & (away <= torch.tensor(self._reaches(pace))[:, None])

    def _reaches(self, pace: int | None) -> list[int]:
        pace = self.pace if pace is None else pace
        if pace < 1:
            raise ValueError(f"pace must be at least 1; it was {pace}")
        return [pace * t for t in range(math.ceil(self.depth / pace) + 1)]

    @abstractmethod
    def draw(self, reach: int = 0, size: int = 224) -> Any:
        """As a picture of PIL, what is within ``reach`` steps of the start coloured; 0 for the puzzle itself.

        Raises:
            ValueError: a side in which it does not fit.
        """

    def frames(self, pace: int | None = None, size: int = 224) -> Float[Tensor, "frames 3 size size"]:
        """The puzzle, then each step of the scratchpad up to its last, ``(T + 1, 3, size, size)`` from 0 to 1.

        Args:
            pace: as in `reached`.
            size: side of the picture, in pixels.
        """
        import numpy as np

        drawn = [torch.from_numpy(np.array(self.draw(reach, size))) for reach in self._reaches(pace)]
        return torch.stack(drawn).movedim(-1, 1) / 255


def _matrix(edges: Tensor, nodes: int, weights: Tensor | None = None) -> Any:
    """The graph's matrix, of scipy."""
    from scipy.sparse import coo_matrix

    data = torch.ones(len(edges)) if weights is None else weights
    return coo_matrix((data.numpy(), edges.T.numpy()), shape=(nodes, nodes)).tocsr()


def distances(edges: Tensor, nodes: int, start: int) -> Tensor:
    """Steps from ``start`` to each node, integers ``(nodes,)``; -1 where no way leads.

    >>> distances(torch.tensor([[0, 1], [1, 2]]), 4, 2).tolist()
    [2, 1, 0, -1]
    """
    from scipy.sparse.csgraph import shortest_path

    found = torch.from_numpy(shortest_path(_matrix(edges, nodes), directed=False, unweighted=True, indices=start))
    return found.masked_fill(found.isinf(), -1).long()


def random_tree(edges: Tensor, nodes: int, generator: torch.Generator) -> Tensor:
    """Edges of a spanning tree: Kruskal's, the edges in random order.

    >>> random_tree(torch.tensor([[0, 1], [1, 2], [0, 2]]), 3, torch.Generator()).shape
    torch.Size([2, 2])
    """
    from scipy.sparse.csgraph import minimum_spanning_tree

    # Weights above 0: a weight of 0 is no edge.
    weights = 1 + torch.rand(len(edges), generator=generator, dtype=torch.float64)
    tree = minimum_spanning_tree(_matrix(edges, nodes, weights)).tocoo()
    return torch.stack([torch.from_numpy(tree.row), torch.from_numpy(tree.col)], 1).long()


def tree_order(edges: Tensor, nodes: int) -> tuple[list[int], list[int]]:
    """Nodes of a tree, each after the one above it, from node 0; and which one that is, by node.

    >>> tree_order(torch.tensor([[0, 1], [1, 2]]), 3)[0]
    [0, 1, 2]
    """
    from scipy.sparse.csgraph import breadth_first_order

    order, above = breadth_first_order(_matrix(edges, nodes), 0, directed=False)
    return order.tolist(), above.tolist()
