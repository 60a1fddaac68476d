"""How alike two scanpaths are: strings of cells, time warping, MultiMatch and the sequence score.

A scanpath is ``(n, 2)`` or ``(n, 3)``: x, y and, where it is given, the duration of each fixation in order, x to the
right and y down in pixels, durations in seconds. All are as the survey of Cartella et al., 2024, arXiv 2402.18673,
collects them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = [
    "MultiMatch",
    "cell_string",
    "cluster_labels",
    "dynamic_time_warping",
    "edit_similarity",
    "multimatch",
    "sequence_score",
    "simplify",
]


class MultiMatch(NamedTuple):
    """Five similarities, from 0 to 1."""

    shape: float
    direction: float
    length: float
    position: float
    duration: float


def _check(name: str, path: Tensor, least: int = 1, columns: tuple[int, ...] = (2, 3)) -> Tensor:
    if path.dim() != 2 or path.shape[1] not in columns or len(path) < least:
        kinds = " or ".join(f"(n, {c})" for c in columns)
        raise ValueError(f"{name} must be {kinds} with n of at least {least}; it was {tuple(path.shape)}")
    if not bool(path.isfinite().all()):
        raise ValueError(f"{name} must be finite; it had {int((~path.isfinite()).sum())} values that are not")
    return path.detach().double().cpu()


def cell_string(path: Float[Tensor, "n c"], size: tuple[float, float], grid: tuple[int, int] = (5, 5)) -> list[int]:
    """The cell of each fixation, counted row by row.

    Args:
        path: ``(n, 2)`` or ``(n, 3)``.
        size: width and height of the image, in the path's units.
        grid: rows and columns of cells.

    Raises:
        ValueError: a fixation outside the image; the right and the lower edge belong to it.

    >>> cell_string(torch.tensor([[0.0, 0.0], [99.0, 49.0]]), (100, 50))
    [0, 24]
    """
    at = _check("path", path)[:, :2]
    span = at.new_tensor(size)
    if bool((at < 0).any()) or bool((at > span).any()):
        raise ValueError(f"path must lie within size {tuple(size)}; it went from {at.amin(0)} to {at.amax(0)}")
    rows, columns = grid
    cell = torch.minimum((at / span * at.new_tensor([columns, rows])).floor(), at.new_tensor([columns - 1, rows - 1]))
    labels: list[int] = (cell[:, 1] * columns + cell[:, 0]).long().tolist()
    return labels


def _align(pairs: list[list[float]], gap: float) -> float:
    """Least cost of walking through both sequences: each step takes a pair, or one element of either at ``gap``."""
    above = [gap * j for j in range(len(pairs[0]) + 1)]
    for i, costs in enumerate(pairs, 1):
        row = [gap * i]
        for j, cost in enumerate(costs, 1):
            row.append(min(above[j - 1] + cost, above[j] + gap, row[j - 1] + gap))
        above = row
    return above[-1]


def edit_similarity(a: Sequence[object], b: Sequence[object]) -> float:
    """``1 - d / max(len)``, d being the insertions, deletions and replacements that turn one string into the other.

    Args:
        a, b: labels, as `cell_string` gives them.

    Raises:
        ValueError: an empty string.

    >>> round(edit_similarity("kitten", "sitting"), 4)  # 3 of 7
    0.5714
    """
    _not_empty(a, b)
    return 1 - _align([[float(x != y) for y in b] for x in a], 1.0) / max(len(a), len(b))


def sequence_score(a: Sequence[object], b: Sequence[object]) -> float:
    """Needleman and Wunsch's alignment with 1 for a match, 0 for a mismatch or a gap, over the longer length.

    Args:
        a, b: labels, as `cluster_labels` gives them.

    Raises:
        ValueError: an empty sequence.

    >>> sequence_score([1, 2, 3], [1, 3, 3, 2])  # 1 and 3, or 1 and 2
    0.5
    """
    _not_empty(a, b)
    return -_align([[-float(x == y) for y in b] for x in a], 0.0) / max(len(a), len(b))


def _not_empty(a: Sequence[object], b: Sequence[object]) -> None:
    if not len(a) or not len(b):
        raise ValueError(f"a and b must not be empty; they had {len(a)} and {len(b)} labels")


def cluster_labels(paths: Sequence[Float[Tensor, "n c"]], bandwidth: float) -> list[list[int]]:
    """Which cluster of all fixations together each one is in, by mean shift (scikit-learn).

    Args:
        paths: scanpaths of one image, by several people or models.
        bandwidth: of the kernel, in the paths' units.

    >>> one = torch.tensor([[0.0, 0.0], [50.0, 50.0]])
    >>> (a, b), (c, d) = cluster_labels([one, one.flip(0)], 10.0)
    >>> (a, b) == (d, c) and a != b
    True
    """
    from sklearn.cluster import MeanShift

    points = torch.cat([_check("paths", path)[:, :2] for path in paths])
    found = torch.as_tensor(MeanShift(bandwidth=bandwidth).fit_predict(points.numpy()))
    return [labels.tolist() for labels in found.split([len(path) for path in paths])]


def _warp(costs: list[list[float]]) -> tuple[float, list[tuple[int, int]]]:
    """The cheapest walk from corner to corner, a step right, down or both: its sum and its cells."""
    rows, columns = len(costs), len(costs[0])
    total = [[math.inf] * (columns + 1) for _ in range(rows + 1)]
    total[0][0] = 0.0
    for i in range(rows):
        for j in range(columns):
            total[i + 1][j + 1] = costs[i][j] + min(total[i][j], total[i][j + 1], total[i + 1][j])
    at, walk = (rows, columns), [(rows - 1, columns - 1)]
    while at != (1, 1):
        i, j = at
        at = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: total[cell[0]][cell[1]])
        walk.append((at[0] - 1, at[1] - 1))
    return total[rows][columns], walk[::-1]


def dynamic_time_warping(a: Float[Tensor, "n c"], b: Float[Tensor, "m c"]) -> float:
    """Sum of distances between the fixations that the best monotonic assignment pairs, in the paths' units.

    Args:
        a, b: ``(n, 2)`` or ``(n, 3)``; durations do not count.

    >>> dynamic_time_warping(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    5.0
    """
    costs = torch.cdist(_check("a", a)[:, :2], _check("b", b)[:, :2], compute_mode="donot_use_mm_for_euclid_dist")
    return _warp(costs.tolist())[0]


def simplify(
    path: Float[Tensor, "n 3"], *, amplitude: float = 0.0, direction: float = 0.0, duration: float = 0.0
) -> Float[Tensor, "m 3"]:
    """Leave out fixations between saccades that are one movement, until none is left to leave out.

    A fixation shorter than ``duration`` goes where the saccades before and after it go the same way; one where a
    saccade is short, if it or the one before is shorter than ``duration``. Two passes in turn, each from left to right;
    no pass joins three saccades at once.

    Args:
        path: ``(n, 3)``.
        amplitude: saccades shorter than this are short, in pixels.
        direction: saccades with less than this between them go the same way, in degrees.
        duration: in seconds; with 0 nothing is left out.

    >>> simplify(torch.tensor([[0, 0, 1], [5, 0, 0.1], [9, 0, 1], [9, 9, 1.0]]), direction=45, duration=0.5)[:, :2]
    tensor([[0., 0.],
            [9., 0.],
            [9., 9.]])
    """
    points: list[list[float]] = _check("path", path, columns=(3,)).tolist()
    while True:
        fewer = _join_short(_join_straight(points, direction, duration), amplitude, duration)
        if len(fewer) == len(points):
            return torch.tensor(points, dtype=path.dtype, device=path.device)
        points = fewer


def _join_straight(points: list[list[float]], direction: float, duration: float) -> list[list[float]]:
    """One pass by direction."""
    kept, i = [points[0]], 1
    while i < len(points):
        if i + 1 < len(points) and points[i][2] < duration:
            (x0, y0, _), (x1, y1, _), (x2, y2, _) = points[i - 1 : i + 2]
            before, after = (x1 - x0, y1 - y0), (x2 - x1, y2 - y1)
            if any(before) and any(after):
                turn = abs(math.atan2(*after) - math.atan2(*before))
                if math.degrees(min(turn, 2 * math.pi - turn)) < direction:
                    i += 1
        kept.append(points[i])
        i += 1
    return kept


def _join_short(points: list[list[float]], amplitude: float, duration: float) -> list[list[float]]:
    """One pass by length; a short last saccade joins the one before."""
    kept, i = [points[0]], 1
    while i < len(points):
        (x0, y0, t0), (x1, y1, t1) = points[i - 1 : i + 1]
        if math.hypot(x1 - x0, y1 - y0) < amplitude and min(t0, t1) < duration:
            if i + 1 < len(points):
                i += 1
            elif len(kept) > 1:
                kept.pop()
        kept.append(points[i])
        i += 1
    return kept


def multimatch(
    a: Float[Tensor, "n 3"],
    b: Float[Tensor, "m 3"],
    size: tuple[float, float],
    *,
    amplitude: float = 0.0,
    direction: float = 0.0,
    duration: float = 0.0,
) -> MultiMatch:
    """MultiMatch: the saccades of two paths are warped to one another; five medians of what then differs.

    Jarodzka et al., 2010; Dewhurst et al., 2012.

    Args:
        a, b: ``(n, 3)`` with at least three fixations.
        size: width and height of the screen, in pixels.
        amplitude, direction, duration: of `simplify`, before the comparison; none by default.

    Returns:
        Similarities: shape over two diagonals, direction over pi, length and position over the diagonal, duration over
        the longer one of each pair.

    >>> path = torch.tensor([[10.0, 10, 0.2], [50, 80, 0.3], [90, 20, 0.1]])
    >>> multimatch(path, path, (100, 100))
    MultiMatch(shape=1.0, direction=1.0, length=1.0, position=1.0, duration=1.0)
    """
    diagonal = math.hypot(*size)
    if diagonal <= 0:
        raise ValueError(f"size must be the width and height of the screen; it was {tuple(size)}")
    a, b = (
        simplify(_check(name, path, 3, (3,)), amplitude=amplitude, direction=direction, duration=duration)
        for name, path in (("a", a), ("b", b))
    )
    moves = a[:, :2].diff(dim=0), b[:, :2].diff(dim=0)
    costs = torch.cdist(*moves, compute_mode="donot_use_mm_for_euclid_dist")
    i, j = torch.tensor(_warp(costs.tolist())[1]).unbind(1)
    u, v = moves[0][i], moves[1][j]
    turns = (torch.atan2(u[:, 1], u[:, 0]) - torch.atan2(v[:, 1], v[:, 0])).abs()
    longer = torch.maximum(a[i, 2], b[j, 2])
    differences = (
        (u - v).norm(dim=1) / (2 * diagonal),
        torch.minimum(turns, 2 * math.pi - turns) / math.pi,
        (u.norm(dim=1) - v.norm(dim=1)).abs() / diagonal,
        (a[i, :2] - b[j, :2]).norm(dim=1) / diagonal,
        torch.where(longer > 0, (a[i, 2] - b[j, 2]).abs() / torch.where(longer > 0, longer, 1.0), 0.0),
    )
    return MultiMatch(*(1 - float(d.quantile(0.5)) for d in differences))
