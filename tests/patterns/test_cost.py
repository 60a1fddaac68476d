"""The simulator against the published setting's figures, and against tiles counted on the dense mask."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glocal.patterns import Causal, Choose, Full, NoBoxForm, PerHead, Prefix, Sliding, Strided, Tokens, Where, Window
from glocal.patterns.cost import Cost, best_stride, simulate
from tests.strategies import places


@pytest.mark.parametrize("tile, bound", [(128, 15.11), (256, 14.32)])
def test_a_long_sequence(tile, bound):
    found = simulate(Window(2048), 32768, tile, 128)
    assert round(found.bound, 2) == bound and found.flop_bound == 16 and not found.perfect
    stride, best = best_stride(2048, 32768, tile, 128)
    assert stride == (256,) and best.perfect and best.bound == 16


def test_an_image():
    found = simulate(Window(80), (256, 256), (16, 8), (16, 8))
    figures = (found.bound, found.dynamic_bound, found.flop_bound)
    # 16 x 32 key tiles; 102 visits by 16 query tiles on one axis, 342 by 32 on the other.
    assert found.bound == pytest.approx(16 * 32 / (102 / 16 * 342 / 32))
    assert [round(f, 2) for f in figures] == [7.51, 8.33, 10.24]
    found = simulate(Window(80, stride=16), (256, 256), (16, 8), (16, 8))
    assert found.perfect and found.bound == pytest.approx(10.24) and found.efficiency == pytest.approx(1)


@pytest.mark.parametrize(
    "stride, tile, bound, perfect",
    [((16, 8, 8), (2, 8, 8), 11.11, True), ((16, 8, 8), (4, 4, 8), 10.67, False), (1, (2, 8, 8), 5.44, False)],
)
def test_a_video(stride, tile, bound, perfect):
    found = simulate(Window((18, 24, 24), stride=stride), (30, 48, 80), tile, tile)
    assert (round(found.bound, 2), found.perfect) == (bound, perfect)


def orders(queries, keys, tile_q, tile_k, step):
    """For one axis: a list of query tiles, each with a list of its key tiles, as positions."""
    shift, out = keys - queries, []
    for group in range(step):
        mine = [q for q in range(queries) if q % step == group]
        theirs = [k for k in range(keys) if k % step == (group + shift) % step]
        cut = [theirs[n : n + tile_k] for n in range(0, len(theirs), tile_k)]
        out += [(mine[n : n + tile_q], theirs, cut) for n in range(0, len(mine), tile_q)]
    return out


def brute(mask, grid_q, grid_k, tile_q, tile_k, step):
    """Visited tiles of every query tile and head, and whether no visited tile has a dead pair."""
    lead = mask.shape[:-2]
    mask = mask.reshape(-1, *grid_q, *grid_k)
    visited, perfect = [], True
    for head in mask:
        for tiles in itertools.product(*map(orders, grid_q, grid_k, tile_q, tile_k, step)):
            rows = head[torch.meshgrid(*[torch.tensor(t[0]) for t in tiles], indexing="ij")].reshape(-1, *grid_k)
            count = 0
            for keys in itertools.product(*[t[2] for t in tiles]):
                part = rows[(slice(None), *torch.meshgrid(*[torch.tensor(k) for k in keys], indexing="ij"))]
                count += bool(part.any())
                perfect = perfect and (bool(part.all()) or not bool(part.any()))
            visited.append(count)
    return visited, perfect, lead


def agree(pattern, grid_q, grid_k, tile_q, tile_k):
    found = simulate(pattern, grid_q, tile_q, tile_k, keys=grid_k)
    visited, perfect, lead = brute(pattern.mask(grid_q, grid_k), grid_q, grid_k, tile_q, tile_k, found.layout)
    assert found.mean == pytest.approx(sum(visited) / len(visited)) and found.most == max(visited)
    assert found.perfect == perfect
    assert found.full == math.prod(-(-n // t) for n, t in zip(grid_k, tile_k, strict=True))
    slots = len(visited) / math.prod(lead) * math.prod(tile_q)
    assert found.padded == pytest.approx(1 - math.prod(grid_q) / slots)
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiles_are_those_with_a_live_pair(data):
    grid_q, grid_k, pattern = data.draw(places().filter(lambda p: math.prod(p[1]) <= 48))
    tile_q, tile_k = (tuple(data.draw(st.integers(1, min(n, 5) + 1)) for n in grid) for grid in (grid_q, grid_k))
    try:
        pattern.boxes(grid_q, grid_k)
    except NoBoxForm:
        return
    agree(pattern, grid_q, grid_k, tile_q, tile_k)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_windows_of_any_dilation(data):
    axes = [data.draw(window_axis()) for _ in range(data.draw(st.integers(1, 2)))]
    keys, queries, size, dilation, stride, causal, tile_q, tile_k = map(tuple, zip(*axes, strict=True))
    found = agree(Window(size, dilation, stride, causal), queries, keys, tile_q, tile_k)
    # Tiles that start at the first key: the section's formula, from the first to the last key in class order.
    counts = []
    for axis in axes:
        keys, queries, size, dilation, stride, causal, tile_q, tile_k = axis
        mask = Window(size, dilation, stride, causal).mask(queries, keys)
        step = simulate(Window(size, dilation, stride, causal), queries, tile_q, tile_k, keys=keys).layout[0]
        own = []
        for rows, theirs, _ in orders(queries, keys, tile_q, tile_k, step):
            seen = mask[rows][:, theirs].any(0).nonzero()
            own.append(math.ceil((int(seen.max()) - int(seen.min()) + 1) / tile_k) if len(seen) else 0)
        counts.append(own)
    products = [math.prod(c) for c in itertools.product(*counts)]
    assert found.dynamic_mean == pytest.approx(sum(products) / len(products)) and found.dynamic_most == max(products)


@st.composite
def window_axis(draw):
    keys = draw(st.integers(1, 18))
    size = draw(st.integers(1, keys))
    dilation = draw(st.integers(1, keys // size))
    tiles = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return keys, draw(st.integers(1, keys)), size, dilation, draw(st.integers(1, size)), draw(st.booleans()), *tiles


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_no_setting_beats_its_flops_where_tiles_divide_the_grid(tile_q, tile_k, dilation, times, data):
    length = math.lcm(tile_q, tile_k) * dilation * times
    size = data.draw(st.integers(1, length // dilation))
    pattern = Window(size, dilation, data.draw(st.integers(1, size)), data.draw(st.booleans()))
    if data.draw(st.booleans()):
        pattern = pattern | Prefix(data.draw(st.integers(0, length)))
    found = simulate(pattern, length, tile_q, tile_k)
    assert found.bound <= found.flop_bound * (1 + 1e-9) and found.worst <= found.bound
    if found.perfect and found.padded == 0:
        assert found.bound == pytest.approx(found.flop_bound) and found.efficiency == pytest.approx(1)


def test_unions_count_a_tile_once():
    one = simulate(Sliding(3, 0), 32, 4, 4)
    assert simulate(Sliding(3, 0) | Sliding(2, 0), 32, 4, 4) == one
    sinks = simulate(Sliding(3, 0) | Prefix(4), 32, 4, 4)
    assert (one.mean, sinks.mean) == (15 / 8, (15 + 6) / 8)


def test_a_dilated_window_is_tiled_by_residue_class():
    found = simulate(Window(8, dilation=4, stride=8), 64, 8, 8)
    assert found.layout == (4,) and found.perfect and found.mean == 1 and found.bound == 8
    assert simulate(Window(8, dilation=4) | Prefix(1), 64, 8, 8).layout == (1,)
    assert simulate(Strided(4), (16, 16), 4, 4).perfect


def test_heads_are_averaged():
    found = simulate(PerHead([Full(), Sliding(0, 0)]), 32, 4, 4)
    assert (found.mean, found.most, found.full) == ((8 + 1) / 2, 8, 8)


def test_rows_of_tokens_and_nothing_at_all():
    agree(Tokens([5, 30]) | Window(3), (6, 7), (6, 7), (2, 3), (3, 2))
    gate = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.1  # on in one head, off in another
    agree(Choose(gate, Full(), Sliding(0, 0)), (4, 6), (4, 6), (2, 3), (3, 2))
    nothing = simulate(~Full(), 8, 4, 4)
    assert (nothing.mean, nothing.bound, nothing.efficiency) == (0, math.inf, 1.0)
    assert simulate(Causal(), 10, 4, 4).padded == pytest.approx(1 / 6)


def test_no_mask_is_built(monkeypatch):
    monkeypatch.setattr("glocal.patterns.base.Pattern.rows", lambda *_: pytest.fail("the mask was built"))
    assert isinstance(simulate(Window((7, 7), stride=3), (512, 512), 8, 8), Cost)


@pytest.mark.parametrize(
    "size, grid, tile_q, tile_k, dilation",
    [
        (6, 24, 4, 3, 1),
        (7, 7, 4, 4, 1),
        (5, 22, 4, 4, 2),
        ((4, 6), (12, 16), (2, 4), (4, 2), (1, 2)),
        ((3, 4), (9, 12), 3, 4, 1),
    ],
)
def test_the_best_stride_is_the_one_found_by_trying_all(size, grid, tile_q, tile_k, dilation):
    sizes = (size,) if isinstance(size, int) else size
    tried = {
        s: simulate(Window(size, dilation, s if len(s) > 1 else s[0]), grid, tile_q, tile_k)
        for s in itertools.product(*[range(1, n + 1) for n in sizes])
    }
    stride, found = best_stride(size, grid, tile_q, tile_k, dilation)
    assert found == tried[stride]
    perfect = [s for s, cost in tried.items() if cost.perfect]
    if perfect:
        assert stride == min(perfect, key=math.prod) and found.perfect
    else:
        assert found.bound == pytest.approx(max(cost.bound for cost in tried.values()))


@pytest.mark.parametrize(
    "pattern, grid, tile_q, tile_k, message",
    [
        (Full(), 8, 0, 4, "query_tile must be at least 1; it was 0"),
        (Full(), (8, 8), 4, (4, 4, 4), "key_tile has 3 values, the grid has 2 axes; give one value an axis"),
        (Full(), (8, 0), 4, 4, r"grid must have no empty axis; it was \(8, 0\) queries"),
        (Window(9), 8, 4, 4, "size of Window is 9 on axis 0, larger than the grid's 8"),
        (Where(lambda q, k: q >= k), 8, 4, 4, "Where is a predicate, with no box form"),
    ],
)
def test_what_is_wrong_is_said(pattern, grid, tile_q, tile_k, message):
    with pytest.raises(ValueError, match=message) as caught:
        simulate(pattern, grid, tile_q, tile_k)
    assert isinstance(caught.value, NoBoxForm) == isinstance(pattern, Where)


def test_the_search_says_which_axis_is_wrong():
    with pytest.raises(ValueError, match="size of Window is 9 on axis 1, larger than the grid's 8"):
        best_stride((4, 9), (8, 8), 4, 4)
