"""S049: scanpaths against brute force over all alignments, scipy, multimatch-gaze, and by hand."""

import functools
import math

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from glocal.bench.scanpath import (
    cell_string,
    cluster_labels,
    dynamic_time_warping,
    edit_similarity,
    multimatch,
    sequence_score,
    simplify,
)
from tests.peers import load_port

SIZE = (100, 80)
strings = st.lists(st.integers(0, 3), min_size=1, max_size=7)


def path(seed, n=8):
    draw = torch.Generator().manual_seed(seed)
    at = torch.rand(n, 3, generator=draw, dtype=torch.double)
    return at * torch.tensor([*SIZE, 0.4], dtype=torch.double) + torch.tensor([0, 0, 0.05], dtype=torch.double)


@settings(max_examples=60, deadline=None)
@given(strings, strings)
def test_strings_against_recursion(a, b):
    """The edit distance as its definition; the score as the longest common subsequence, which it must be."""

    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    @functools.cache
    def common(i, j):
        if not i or not j:
            return 0
        return 1 + common(i - 1, j - 1) if a[i - 1] == b[j - 1] else max(common(i - 1, j), common(i, j - 1))

    longest = max(len(a), len(b))
    assert edit_similarity(a, b) == pytest.approx(1 - distance(len(a), len(b)) / longest)
    assert sequence_score(a, b) == pytest.approx(common(len(a), len(b)) / longest)


def test_strings_at_their_limits():
    assert edit_similarity([1, 2], [1, 2]) == sequence_score([1, 2], [1, 2]) == 1
    assert edit_similarity([1, 2], [3, 4, 5]) == sequence_score([1, 2], [3, 4, 5]) == 0
    # An edit may replace, which the score cannot use: a gap costs nothing there.
    assert edit_similarity("abc", "xabc") == 0.75 == sequence_score("abc", "xabc")
    assert (edit_similarity("ab", "ba"), sequence_score("ab", "ba")) == (0, 0.5)


def walks(n, m):
    """All monotonic walks from (0, 0) to (n - 1, m - 1)."""
    if (n, m) == (1, 1):
        return [[(0, 0)]]
    before = [(n - 1, m), (n, m - 1), (n - 1, m - 1)]
    return [[*walk, (n - 1, m - 1)] for i, j in before if i and j for walk in walks(i, j)]


@pytest.mark.parametrize("n,m", [(1, 1), (1, 4), (5, 3), (4, 5)])
def test_warping_against_all_walks(n, m):
    a, b = path(1, n), path(2, m)
    far = cdist(a[:, :2].numpy(), b[:, :2].numpy())
    assert dynamic_time_warping(a, b) == pytest.approx(min(sum(far[i, j] for i, j in walk) for walk in walks(n, m)))
    assert dynamic_time_warping(b, a) == pytest.approx(dynamic_time_warping(a, b))
    assert dynamic_time_warping(a, a.repeat_interleave(2, 0)) == 0  # staying longer costs nothing


def test_warping_against_the_shortest_path_in_a_graph():
    a, b = path(3, 9), path(4, 11)
    far, graph = cdist(a[:, :2].numpy(), b[:, :2].numpy()), networkx.DiGraph()
    for i, j in np.ndindex(9, 11):
        for to in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
            if to[0] < 9 and to[1] < 11:
                graph.add_edge((i, j), to, weight=far[to])
    want = far[0, 0] + networkx.dijkstra_path_length(graph, (0, 0), (8, 10))
    assert dynamic_time_warping(a, b) == pytest.approx(want)


def peer(a, b, **thresholds):
    module = load_port("multimatch_gaze.multimatch_gaze")
    kinds = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]
    rows = [np.array([tuple(row) for row in x.tolist()], dtype=kinds) for x in (a, b)]
    return module.docomparison(*rows, SIZE, grouping=bool(thresholds), **thresholds)


@pytest.mark.parametrize("seed", range(6))
def test_multimatch_against_the_peer(seed):
    a, b = path(seed, 6 + seed), path(seed + 50, 12 - seed)
    assert tuple(multimatch(a, b, SIZE)) == pytest.approx(tuple(map(float, peer(a, b))))


@pytest.mark.parametrize("seed", range(10))
def test_multimatch_with_simpler_paths_against_the_peer(seed):
    """The last fixation long: how a short last saccade is joined is ours (see the next test)."""
    a, b = path(seed, 14), path(seed + 50, 15)
    a[-2:, 2] = b[-2:, 2] = 0.9
    thresholds = {"amplitude": 35.0, "direction": 50.0, "duration": 0.3}
    simpler = simplify(a, **thresholds)
    assert len(simpler) < len(a)
    want = peer(a, b, TAmp=35.0, TDir=50.0, TDur=0.3)
    assert tuple(multimatch(a, b, SIZE, **thresholds)) == pytest.approx(tuple(map(float, want)))


def test_simpler_paths_by_hand():
    straight = torch.tensor([[0, 0, 1], [10, 0, 0.1], [20, 1, 0.1], [30, 0, 1], [30, 30, 1]])
    # The second is dropped in the first round, the third in the next: no round joins three saccades at once.
    assert simplify(straight, direction=20, duration=0.5).tolist() == straight[[0, 3, 4]].tolist()
    assert simplify(straight, direction=20).tolist() == straight.tolist()
    short_end = torch.tensor([[0, 0, 1], [50, 0, 1], [50, 50, 0.1], [52, 50, 0.1]])
    assert simplify(short_end, amplitude=10, duration=0.5).tolist() == short_end[[0, 1, 3]].tolist()
    one = torch.tensor([[0, 0, 0.1], [1, 0, 0.1]])
    assert simplify(one, amplitude=10, duration=0.5).tolist() == one.tolist()
    # Across the branch of the angle, wherever that is.
    left = torch.tensor([[100, 0, 1], [50, 1, 0.1], [0, 0, 1], [0, 80, 1]])
    for same in (left, -left, left[:, [1, 0, 2]], -left[:, [1, 0, 2]]):
        same[:, 2] = left[:, 2]
        assert len(simplify(same, direction=10, duration=0.5)) == 3


def test_multimatch_of_what_is_known():
    a = path(7)
    moved, mirrored, slow = a.clone(), a.clone(), a.clone()
    moved[:, :2] += 5
    assert tuple(multimatch(a, moved, SIZE)) == pytest.approx((1, 1, 1, 1 - 50**0.5 / math.hypot(*SIZE), 1))
    slow[:, 2] *= 4
    assert tuple(multimatch(a, slow, SIZE)) == pytest.approx((1, 1, 1, 1, 0.25))
    line = torch.tensor([[0.0, 0, 1], [10, 0, 1], [20, 0, 1]])
    mirrored = line * torch.tensor([-1.0, 1, 1])
    found = multimatch(line, mirrored, SIZE)
    assert (found.direction, found.length) == pytest.approx((0, 1))
    assert found.shape == pytest.approx(1 - 20 / (2 * math.hypot(*SIZE)))
    still = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 1, 0]])
    assert multimatch(still, still, SIZE).duration == 1


def test_cells_by_hand():
    at = torch.tensor([[0.0, 0], [19.9, 15.9], [20, 0], [0, 16], [100, 80], [50, 40]])
    assert cell_string(at, SIZE) == [0, 0, 1, 5, 24, 12]
    assert cell_string(at, SIZE, (2, 4)) == [0, 0, 0, 0, 7, 6]


def test_clusters_are_of_all_paths_together():
    spots = torch.tensor([[10.0, 10], [80, 20], [40, 70]])
    draw = torch.Generator().manual_seed(0)
    order = [torch.tensor([0, 1, 2, 1]), torch.tensor([2, 0, 1])]
    paths = [spots[o] + torch.randn(len(o), 2, generator=draw) for o in order]
    labels = cluster_labels(paths, 15.0)
    name = {int(o): label for o, label in zip(order[0], labels[0], strict=True)}
    assert len(set(name.values())) == 3 and labels[1] == [name[2], name[0], name[1]]
    assert sequence_score(*labels) == 0.5  # 0, 1 of four


def test_bad_input():
    a = path(0)
    with pytest.raises(ValueError, match=r"a must be \(n, 3\) with n of at least 3; it was \(8, 2\)"):
        multimatch(a[:, :2], a, SIZE)
    with pytest.raises(ValueError, match=r"b must be .* at least 3; it was \(2, 3\)"):
        multimatch(a, a[:2], SIZE)
    with pytest.raises(ValueError, match="size must be"):
        multimatch(a, a, (0, 0))
    with pytest.raises(ValueError, match="path must lie within size"):
        cell_string(a + 200, SIZE)
    with pytest.raises(ValueError, match="must not be empty; they had 0 and 1"):
        edit_similarity([], [1])
    with pytest.raises(ValueError, match="b must be finite; it had 1"):
        dynamic_time_warping(a, torch.tensor([[1.0, math.nan]]))
