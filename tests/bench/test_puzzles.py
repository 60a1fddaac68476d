"""Puzzles of connectivity against networkx: labels, frames, balance, and what their pictures give away."""

from itertools import pairwise

import networkx
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from glocal.bench.cycles import cycles, every_cycle, strings
from glocal.bench.mazes import circular_maze, rect_maze
from glocal.bench.puzzles import COLOURS, palette

TASKS = {
    "cycles": lambda draw: cycles(6, draw),
    "strings": lambda draw: strings(5, draw),
    "rect": lambda draw: rect_maze(6, draw),
    "circular": lambda draw: circular_maze(4, draw),
}
MAZES = ("rect", "circular")


def graph(puzzle):
    found = networkx.Graph()
    found.add_nodes_from(range(puzzle.nodes))
    found.add_edges_from(puzzle.edges.tolist())
    return found


def count(picture, name):
    return next((number for number, colour in picture.getcolors() if colour == COLOURS[name]), 0)


@pytest.fixture(scope="module", params=TASKS)
def many(request):
    """A task's name and 4,000 puzzles."""
    draw = torch.Generator().manual_seed(0)
    return request.param, [TASKS[request.param](draw) for _ in range(4000)]


def test_labels_and_parts(many):
    """1,000 puzzles: components say the label; mazes are two trees of nearly one size, a target to reach is far."""
    task, puzzles = many
    for puzzle in puzzles[:1000]:
        parts = list(networkx.connected_components(graph(puzzle)))
        if task in MAZES:
            assert puzzle.label == (puzzle.target in networkx.node_connected_component(graph(puzzle), puzzle.start))
            assert len(parts) == 2 and len(puzzle.edges) == puzzle.nodes - 2
            assert abs(len(parts[0]) - puzzle.nodes / 2) <= 3
            if puzzle.label:
                assert networkx.shortest_path_length(graph(puzzle), puzzle.start, puzzle.target) >= 3
        else:
            assert [len(part) for part in parts] == ([puzzle.nodes] if puzzle.label else [puzzle.nodes // 2] * 2)
            assert all(degree == 2 for _, degree in graph(puzzle).degree)
            assert puzzle.start == max(range(puzzle.nodes), key=lambda at: puzzle.points[at, 0])


def test_labels_are_balanced(many):
    assert sum(puzzle.label for puzzle in many[1]) / 4000 == pytest.approx(0.5, abs=0.03)


def test_colours_do_not_tell_the_label(many):
    """Logistic regression on how many pixels of each colour there are stays at chance."""
    puzzles = many[1][:2400]
    if many[0] == "cycles":
        assert {len(puzzle.edges) for puzzle in puzzles} == {12}
    pictures = [puzzle.draw(size=96) for puzzle in puzzles]
    counts = np.array([[count(picture, name) for name in COLOURS] for picture in pictures], float)
    labels = np.array([puzzle.label for puzzle in puzzles])
    counts = (counts - counts.mean(0)) / (counts.std(0) + 1e-9)
    probe = LogisticRegression(max_iter=1000).fit(counts[:1200], labels[:1200])
    assert probe.score(counts[1200:], labels[1200:]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("pace", [1, 2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_frames_are_breadth_first(task, pace):
    draw = torch.Generator().manual_seed(2)
    for _ in range(20):
        puzzle = TASKS[task](draw)
        away = networkx.single_source_shortest_path_length(graph(puzzle), puzzle.start)
        frames = puzzle.reached(pace)
        for t, frame in enumerate(frames):
            assert set(frame.nonzero()[:, 0].tolist()) == {node for node, d in away.items() if d <= pace * t}
        assert set(frames[-1].nonzero()[:, 0].tolist()) == set(away)


def test_cycles_are_followed_edge_by_edge_both_ways():
    draw = torch.Generator().manual_seed(3)
    for n in (3, 4, 5):
        for _ in range(10):
            puzzle = cycles(n, draw)
            length = 2 * n if puzzle.label else n
            steps = puzzle.steps.tolist()
            assert sorted(step for step in steps if step) == sorted([k // 2 + 1 for k in range(length)])
            assert len(puzzle.reached()) == -(-length // 2) + 1
            blue = [count(puzzle.draw(reach), "drawn") for reach in range(puzzle.depth + 1)]
            assert blue[0] == 0 and all(b > a for a, b in pairwise(blue))


@pytest.mark.parametrize("task", TASKS)
def test_pictures_hold_the_palette_alone(task):
    puzzle = TASKS[task](torch.Generator().manual_seed(4))
    frames = puzzle.frames(size=160)
    assert frames.shape == (len(puzzle.reached()), 3, 160, 160)
    pixels = frames.movedim(1, -1).reshape(-1, 3).unique(dim=0)
    assert all((palette() - pixel).abs().amax(1).min() < 1e-6 for pixel in pixels)
    assert not (frames[0] == palette()[2][:, None, None]).all(0).any()  # nothing is drawn yet
    for before, after in pairwise(frames):  # what is drawn stays
        drawn = [(frame == palette()[2][:, None, None]).all(0) for frame in (before, after)]
        assert not (drawn[0] & ~drawn[1]).any()


def test_walls_stand_where_no_passage_is():
    """From the picture alone: neighbouring cells of a square maze are joined where no black is between them."""
    maze = rect_maze(5, torch.Generator().manual_seed(5))
    picture = np.array(maze.draw(size=46)).sum(-1)  # 5 cells of 8 and 6 walls: no margin
    found = set()
    for cell in range(25):
        y, x = (9 * at + 5 for at in divmod(cell, 5))
        if cell % 5 < 4 and picture[y, x + 4] > 0:
            found.add((cell, cell + 1))
        if cell < 20 and picture[y + 4, x] > 0:
            found.add((cell, cell + 5))
    assert found == {tuple(sorted(edge)) for edge in maze.edges.tolist()}
    blue = np.array(maze.draw(100, 46)) == COLOURS["drawn"]
    middles = blue.all(-1)[2::9, 2::9][:5, :5].flatten()  # a corner pixel of each cell
    assert set(middles.nonzero()[0].tolist()) == set(maze.reached()[-1].nonzero()[:, 0].tolist())


def test_maps_of_cells():
    maze = rect_maze(4, torch.Generator().manual_seed(6))
    maps = maze.maps(1)
    assert maps.shape == (len(maze.reached(1)), 7, 4, 4) and maps[0, 6].sum() == 0
    edges = graph(maze)
    for cell in range(16):
        y, x = divmod(cell, 4)
        for way, (dy, dx) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
            inside = 0 <= y + dy < 4 and 0 <= x + dx < 4
            joined = inside and edges.has_edge(cell, 4 * (y + dy) + x + dx)
            assert maps[0, way, y, x] == joined
    assert maps[:, 4].flatten(1).argmax(1).eq(maze.start).all() and maps[0, 5].sum() == 1
    assert maps[-1, 5].flatten().argmax() == maze.target
    assert torch.equal(maps[1:, 6].flatten(1).bool(), maze.reached(1)[1:])


def test_all_small_cycles():
    tables, labels, chances = every_cycle(3)
    assert (tables.sum(1) == 6).all() and len(tables.unique(dim=0)) == 70 and int(labels.sum()) == 60
    assert float(chances[labels == 1].sum()) == pytest.approx(0.5)
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    for row, label in zip(tables, labels, strict=True):
        found = networkx.Graph([pair for pair, there in zip(pairs, row.tolist(), strict=True) if there])
        assert networkx.is_connected(found) == bool(label) and all(d == 2 for _, d in found.degree)
    more, which, _ = every_cycle(4)
    assert len(more.unique(dim=0)) == 2520 + 315 and int(which.sum()) == 2520


def test_bad_input():
    draw = torch.Generator()
    for make, least in ((cycles, 3), (rect_maze, 3), (circular_maze, 2)):
        with pytest.raises(ValueError, match=f"must be at least {least}; it was {least - 1}"):
            make(least - 1, draw)
    with pytest.raises(ValueError, match="n must be from 4 to 12; it was 3"):
        strings(3, draw)
    with pytest.raises(ValueError, match="n must be 3 or 4; it was 5"):
        every_cycle(5)
    with pytest.raises(ValueError, match="size must be at least 55 for 6 cells; it was 32"):
        rect_maze(6, draw).draw(size=32)
    with pytest.raises(ValueError, match="size must be at least 63; it was 32"):
        circular_maze(4, draw).draw(size=32)
    with pytest.raises(ValueError, match="pace must be at least 1; it was 0"):
        cycles(3, draw).reached(0)
