"""Random grids, patterns and attention problems for hypothesis: odd sizes, size 1, cross grids, grouped queries."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from glocal.patterns import (
    Between,
    Block,
    Causal,
    Choose,
    Full,
    Keys,
    PerHead,
    Prefix,
    Segments,
    Selected,
    Sinks,
    Sliding,
    Strided,
    Tokens,
    Window,
)

LONGEST = {1: 90, 2: 11, 3: 5}
BATCH, HEADS = 2, 3


@st.composite
def grids(draw, longest=LONGEST):
    """A key grid and a query grid that is as long or shorter on every axis."""
    rank = draw(st.integers(1, 3))
    grid_k = tuple(draw(st.integers(1, longest[rank])) for _ in range(rank))
    if draw(st.booleans()):
        return grid_k, grid_k
    return tuple(draw(st.integers(1, n)) for n in grid_k), grid_k


def leads():
    """Leading dimensions of data, for a batch of 2 and 3 heads."""
    return st.sampled_from([(), (HEADS,), (BATCH, HEADS), (BATCH, 1), (1, HEADS)])


def tensor(draw, shape, dtype=torch.bool, low=0, high=2):
    """Random integers (or booleans) of a drawn seed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


@st.composite
def windows(draw, grid):
    size = tuple(draw(st.integers(1, n)) for n in grid)
    dilation = tuple(draw(st.integers(1, n // s)) for n, s in zip(grid, size, strict=True))
    stride = tuple(draw(st.integers(1, s)) for s in size)
    return Window(size, dilation, stride, tuple(draw(st.booleans()) for _ in grid))


@st.composite
def blocks(draw, grid):
    size = tuple(draw(st.integers(1, n)) for n in grid)
    return Block(size, tuple(draw(st.integers(0, s - 1)) for s in size))


@st.composite
def segments(draw, grid):
    first = draw(st.integers(0, grid[0]))
    return Segments([first, 0, grid[0] - first])


@st.composite
def selections(draw, grid_q, grid_k):
    size = tuple(draw(st.integers(1, n)) for n in grid_k)
    query_size = tuple(draw(st.integers(1, n)) for n in grid_q)
    rows = math.prod(-(-n // s) for n, s in zip(grid_q, query_size, strict=True))
    columns = math.prod(-(-n // s) for n, s in zip(grid_k, size, strict=True))
    shape = (*draw(leads()), rows, draw(st.integers(1, 3)))
    return Selected(tensor(draw, shape, torch.long, -1, columns), size, query_size)


@st.composite
def intervals(draw, grid_q, grid_k):
    lo, hi = (tensor(draw, (*draw(leads()), grid_q[0]), torch.long, -2, grid_k[0] + 3) for _ in range(2))
    return Between(lo, hi)


def leaves(grid_q, grid_k, data=True):
    """A pattern without parts."""
    size = math.prod(grid_k)
    kinds = [
        st.just(Full()),
        st.just(Causal()),
        windows(grid_k),
        blocks(grid_k),
        st.builds(Prefix, st.integers(0, size + 1)),
        st.builds(Sinks, st.integers(0, size + 1)),
        st.builds(Tokens, st.lists(st.integers(0, size - 1), max_size=20)),
        st.builds(Strided, st.tuples(*[st.integers(1, n) for n in grid_k])),
        st.builds(Sliding, *[st.tuples(*[st.integers(0, n) for n in grid_k])] * 2),
    ]
    if len(grid_k) == 1:
        kinds.append(segments(grid_k))
    if data:
        kinds.append(selections(grid_q, grid_k))
        kinds.append(st.composite(lambda draw: Keys(tensor(draw, (BATCH, size))))())
        kinds.append(st.composite(lambda draw: Keys(tensor(draw, (BATCH, HEADS, size)), per_head=True))())
        if len(grid_k) == 1:
            kinds.append(intervals(grid_q, grid_k))
    return st.one_of(kinds)


def patterns(grid_q, grid_k, data=True):
    """Random trees of patterns under ``|``, ``&``, ``~`` and, with ``data``, per-head patterns and gates."""

    def grow(inner):
        joined = [
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a, b: a & b, inner, inner),
            inner.map(lambda a: ~a),
        ]
        if data:
            gate = st.composite(lambda draw: tensor(draw, (*draw(leads()), *grid_q)))()
            joined.append(st.builds(Choose, gate, inner, inner))
            joined.append(st.builds(PerHead, st.lists(inner, min_size=HEADS, max_size=HEADS)))
        return st.one_of(joined)

    return st.recursive(leaves(grid_q, grid_k, data), grow, max_leaves=4)


@st.composite
def places(draw, data=True):
    """Two grids and a pattern that fits them."""
    grid_q, grid_k = draw(grids())
    return grid_q, grid_k, draw(patterns(grid_q, grid_k, data))
