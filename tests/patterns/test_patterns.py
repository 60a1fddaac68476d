"""Patterns: the mask is the definition; boxes, counts and text must agree with it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glocal.patterns import (
    Block,
    Causal,
    Choose,
    Full,
    Keys,
    NoBoxForm,
    PerHead,
    Prefix,
    Segments,
    Selected,
    Sinks,
    Sliding,
    Strided,
    Tokens,
    Where,
    Window,
    parse,
)
from tests.strategies import places

LARGE = settings(max_examples=100, deadline=None)


@LARGE
@given(places())
def test_boxes_rebuild_the_mask(place):
    grid_q, grid_k, pattern = place
    mask = pattern.mask(grid_q, grid_k)
    try:
        form = pattern.boxes(grid_q, grid_k)
    except NoBoxForm as reason:
        assert "blocks" in str(reason) or "boxes" in str(reason)
        return
    assert form.lead == mask.shape[:-2]
    assert torch.equal(form.mask(), mask)


@LARGE
@given(places())
def test_count_is_the_sum_of_the_mask(place):
    grid_q, grid_k, pattern = place
    assert pattern.count(grid_q, grid_k) == int(pattern.mask(grid_q, grid_k).sum())


@LARGE
@given(places(data=False))
def test_text_reads_back(place):
    pattern = place[2]
    again = parse(repr(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert repr(again) == repr(pattern)


@LARGE
@given(places())
def test_text_with_tensors_reads_back(place):
    grid_q, grid_k, pattern = place
    data: list[torch.Tensor] = []
    again = parse(pattern.spec(data), data)
    assert again == pattern
    assert torch.equal(again.mask(grid_q, grid_k), pattern.mask(grid_q, grid_k))


@LARGE
@given(places(data=False), st.randoms(use_true_random=False))
def test_rows_are_rows_of_the_mask(place, random):
    grid_q, grid_k, pattern = place
    rows = torch.tensor([random.randrange(math.prod(grid_q)) for _ in range(5)])
    assert torch.equal(pattern.rows(rows, grid_q, grid_k), pattern.mask(grid_q, grid_k)[rows])


@LARGE
@given(places(data=False))
def test_queries_are_the_last_positions(place):
    """On unequal grids the mask is the last rows of the square one, axis by axis (but for Window's own border rule)."""
    grid_q, grid_k, pattern = place
    inside = torch.ones(grid_k, dtype=torch.bool)
    for axis, (q, k) in enumerate(zip(grid_q, grid_k, strict=True)):
        inside &= (torch.arange(k) >= k - q).view([-1 if a == axis else 1 for a in range(len(grid_k))])
    assert torch.equal(pattern.mask(grid_q, grid_k), pattern.mask(grid_k)[inside.flatten()])


def brute(grid, sees):
    """A mask by loops over grid positions, from a predicate on coordinate tuples."""
    places = list(itertools.product(*map(range, grid)))
    return torch.tensor([[sees(i, j) for j in places] for i in places])


def test_each_pattern_against_loops():
    grid = (5, 6)
    cases = [
        (Full(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i),
        (Sliding((1, 2), (0, 1)), lambda i, j: -1 <= j[0] - i[0] <= 0 and -2 <= j[1] - i[1] <= 1),
        (Block((2, 4)), lambda i, j: i[0] // 2 == j[0] // 2 and i[1] // 4 == j[1] // 4),
        (Strided((2, 3)), lambda i, j: i[0] % 2 == j[0] % 2 and i[1] % 3 == j[1] % 3),
        (Prefix(8), lambda i, j: j < (1, 2)),
        (Tokens([7]), lambda i, j: (1, 1) in (i, j)),
        (
            Window((3, 3)),
            lambda i, j: all(abs(b - min(max(a, 1), n - 2)) <= 1 for a, b, n in zip(i, j, grid, strict=True)),
        ),
    ]
    for pattern, sees in cases:
        assert torch.equal(pattern.mask(grid), brute(grid, sees)), pattern


def test_window_of_even_size_has_its_extra_key_on_the_left():
    assert Window(4).mask(8)[4].nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_window_keeps_its_size_at_every_border():
    mask = Window((3, 4), dilation=(2, 1)).mask((7, 9))
    assert mask.sum(-1).unique().tolist() == [12]


def test_data_patterns_by_hand():
    real = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(Keys(real).mask(2, 3), real[:, None, None, :].expand(2, 1, 2, 3))
    gate = torch.tensor([[True, False], [False, False]])
    chosen = Choose(gate, Full(), Sliding(0, 0)).mask(2)
    assert chosen.int().tolist() == [[[1, 1], [0, 1]], [[1, 0], [0, 1]]]
    assert PerHead([Full(), Causal()]).mask(2).int().tolist() == [[[1, 1], [1, 1]], [[1, 0], [1, 1]]]
    listed = Selected(torch.tensor([[1], [-1]]), 2).mask(3)
    assert listed.int().tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_algebra_is_flat_and_prints_with_few_parentheses():
    a, b, c = Full(), Causal(), Prefix(1)
    assert (a | b | c) == (a | (b | c))
    assert repr((a | b) & ~c) == "(full() | causal()) & ~prefix(1)"
    assert repr(a | b & c) == "full() | causal() & prefix(1)"
    assert repr(~(a | b)) == "~(full() | causal())"


def test_de_morgan():
    a, b = Sliding(2, 1), Strided(3)
    assert torch.equal((~(a | b)).mask(11), (~a & ~b).mask(11))
    assert (~(a | b)).count(11) == (~a & ~b).count(11)


def test_equality_looks_at_data():
    mask = torch.tensor([[True, False]])
    assert Keys(mask) == Keys(mask.clone())
    assert Keys(mask) != Keys(~mask)
    assert Where(len) != Where(sum)
    assert Full() != "full()"


def test_patterns_are_immutable():
    with pytest.raises(AttributeError):
        Sliding(1, 2).left = 5
    assert len({Sliding(1, 2), Sliding(1, 2), Sliding(2, 1)}) == 2


def test_boxes_of_a_long_sequence_are_small():
    """Nothing of size N x N: a million tokens compile to tables of a few megabytes, at once."""
    n = 1 << 20
    where = Sliding(255, 0) | Sinks(4)
    form = where.boxes(n)
    tables = [t for box in form for axis in box.axes for t in (axis.lo, axis.hi)]
    assert sum(t.numel() for t in tables) <= 4 * n
    assert where.count(n) == sum(min(i, 255) + 1 + min(max(i - 255, 0), 4) for i in range(n))


def test_segments_of_packed_sequences():
    assert torch.equal(Segments([3, 2]).mask(5), torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool())


def test_where_has_no_boxes_but_a_count():
    even = Where(lambda q, k: (q[0] + k[1]) % 2 == 0)
    with pytest.raises(NoBoxForm, match="predicate"):
        even.boxes((3, 4))
    assert even.count((3, 4)) == int(even.mask((3, 4)).sum()) == 72
