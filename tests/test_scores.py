"""Biases over offsets, against the papers' numbers, transformers' own functions and brute force."""

import math

import pytest
import torch

import glocal
from glocal import Causal, Full, Sliding, Window
from glocal.scores import ALiBi, RelativePosition, T5Buckets
from tests.conformance.cases import BACKENDS, inputs, run


def table(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Relative positions

RELATIVE = [
    # shape of the table without heads, dilation, grid of queries, grid of keys
    ((5,), 1, (7,), (7,)),
    ((13,), 1, (7,), (7,)),
    ((21,), 1, (7,), (7,)),
    ((1,), 1, (3,), (3,)),
    ((5,), 3, (11,), (11,)),
    ((5,), 2, (4,), (9,)),
    ((3, 5), 1, (4, 5), (4, 5)),
    ((3, 5), (2, 1), (5, 4), (5, 4)),
    ((3, 3), (2, 3), (2, 3), (5, 7)),
    ((3, 1, 5), (1, 2, 1), (2, 3, 3), (2, 3, 3)),
]


def brute_force(values, dilation, grid_q, grid_k):
    """The bias of every pair by loops over coordinates, queries being the last positions of the keys."""
    rank = len(grid_k)
    dilation = dilation if isinstance(dilation, tuple) else (dilation,) * rank
    queries, keys = ([torch.unravel_index(torch.tensor(n), g) for n in range(math.prod(g))] for g in (grid_q, grid_k))
    out = torch.zeros(values.shape[0], len(queries), len(keys), dtype=values.dtype)
    for i, q in enumerate(queries):
        for j, k in enumerate(keys):
            place = []
            for a in range(rank):
                offset = int(k[a]) - (int(q[a]) + grid_k[a] - grid_q[a])
                radius = (values.shape[a + 1] - 1) // 2
                if offset % dilation[a] == 0 and abs(offset // dilation[a]) <= radius:
                    place.append(offset // dilation[a] + radius)
            if len(place) == rank:
                out[:, i, j] = values[(slice(None), *place)]
    return out


@pytest.mark.parametrize(("size", "dilation", "grid_q", "grid_k"), RELATIVE)
def test_relative_position_by_brute_force(size, dilation, grid_q, grid_k):
    values = table(2, *size)
    got = RelativePosition(values, dilation).dense(grid_q, grid_k)
    assert torch.equal(got, brute_force(values, dilation, grid_q, grid_k))


@pytest.mark.parametrize(("size", "dilation", "grid"), [(3, 1, (5, 4)), (3, 2, (7, 6)), (4, 1, (5, 6)), (2, 3, (7, 6))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nat_indexing_covers_windows_at_the_border(backend, size, dilation, grid):
    """NAT (2204.07143): a table of ``2 k - 1`` an axis at ``p_key - p_query + k - 1`` in steps of the dilation group.

    Windows at borders are off centre, so offsets reach ``k - 1`` to either side and the table covers them all.
    """
    if backend == "flex" and size == 3:
        pytest.skip("two cases are enough on the slow backend")
    dtype = torch.float64 if backend in ("dense", "sdpa") else torch.float32
    rpb = table(2, 2 * size - 1, 2 * size - 1, dtype=dtype)
    q, k, v = inputs(grid, dtype=dtype)
    where = Window(size, dilation=dilation)
    out = run(backend, q, k, v, where, bias=RelativePosition(rpb, dilation))
    used = set()
    for y in range(grid[0]):
        for x in range(grid[1]):
            near = []  # for each axis: positions of the window and their places in the table
            for i, length in ((y, grid[0]), (x, grid[1])):
                members = range(i % dilation, length, dilation)
                start = min(max(i // dilation - size // 2, 0), len(members) - size)
                near.append([(members[p], p - i // dilation + size - 1) for p in range(start, start + size)])
            pairs = [(a, b) for a in near[0] for b in near[1]]
            scores = [(q[0, :, y, x] * k[0, :, a, b]).sum(-1) * 8**-0.5 + rpb[:, s, t] for (a, s), (b, t) in pairs]
            values = torch.stack([v[0, :, a, b] for (a, _), (b, _) in pairs], 1)
            want = (torch.stack(scores, 1).softmax(1)[..., None] * values).sum(1)
            torch.testing.assert_close(out[0, :, y, x], want, rtol=0, atol=1e-5)
            used |= {(s, t) for (_, s), (_, t) in pairs}
    assert len(used) == (2 * size - 1) ** 2


# ALiBi


def test_alibi_slopes_are_the_papers():
    """Press et al. (2108.12409): 8 heads have 1/2, 1/4, ..., 1/256; 16 heads interleave their square roots."""
    eight = [2.0**-n for n in range(1, 9)]
    sixteen = [2.0 ** (-n / 2) for n in range(1, 17)]
    torch.testing.assert_close(ALiBi.of(8).slopes, torch.tensor(eight))
    torch.testing.assert_close(ALiBi.of(16).slopes, torch.tensor(sixteen))
    # Not a power of two: the slopes of 8 heads, then every other one of 16.
    torch.testing.assert_close(ALiBi.of(12).slopes, torch.tensor(eight + sixteen[0:8:2]))
    assert ALiBi.of(1).slopes.tolist() == [2.0**-8]


def test_alibi_is_the_papers_picture():
    """Its figure 3, times a slope of one: 0, -1, -2, ... from the diagonal back."""
    dense = ALiBi(torch.tensor([1.0])).dense((4,), (4,))[0].tril()
    want = [[0, 0, 0, 0], [-1, 0, 0, 0], [-2, -1, 0, 0], [-3, -2, -1, 0]]
    assert dense.tolist() == want


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_alibi_of_bloom(heads):
    """Bloom adds ``slope * key``, which differs from ours by a constant a row: equal after the softmax."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="transformers is not installed")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(heads, 1, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    scores = table(heads, 9, 9, dtype=torch.float32)
    biases = (theirs, ALiBi.of(heads).dense((9,), (9,)))
    want, got = ((scores + bias).masked_fill(~causal, -torch.inf).softmax(-1) for bias in biases)
    torch.testing.assert_close(got, want)


# T5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 16), (16, 20), (32, 64), (64, 500), (12, 128)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (300, 300), (1, 700), (5, 131)])
def test_t5_buckets(bidirectional, buckets, far, queries, keys):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    offset = torch.arange(keys)[None] - (torch.arange(queries) + keys - queries)[:, None]
    want = t5.T5Attention._relative_position_bucket(offset, bidirectional, buckets, far)
    numbers = torch.arange(float(buckets))[:, None]
    got = T5Buckets(numbers, bidirectional=bidirectional, max_distance=far).dense((queries,), (keys,))[0]
    assert torch.equal(got.long(), want)


def test_t5_bias_of_a_layer():
    """The layer's own ``compute_bias`` with its own weights."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    torch.manual_seed(0)
    config = t5.T5Config(d_model=16, d_kv=8, num_heads=2, relative_attention_num_buckets=16)
    layer = t5.T5Attention(config, has_relative_attention_bias=True)
    score = T5Buckets(layer.relative_attention_bias.weight)
    torch.testing.assert_close(score.dense((40,), (40,)), layer.compute_bias(40, 40)[0])


# In attention

SCORES = [
    (lambda p: RelativePosition(p), (2, 5), (6,), (6,), Full()),
    (lambda p: RelativePosition(p), (1, 5), (6,), (6,), Sliding(2, 1)),  # one table for all heads
    (lambda p: RelativePosition(p, 2), (2, 3), (3,), (7,), Causal()),
    (lambda p: RelativePosition(p), (2, 5, 5), (3, 4), (3, 4), Window(3)),
    (lambda p: RelativePosition(p, (1, 2)), (2, 3, 3), (2, 4), (3, 4), Full()),
    (lambda p: ALiBi(p), (2,), (7,), (7,), Causal()),
    (lambda p: ALiBi(p), (2,), (2,), (7,), Sliding(3, 0)),
    (lambda p: T5Buckets(p, max_distance=6), (8, 2), (7,), (7,), Full()),
    (lambda p: T5Buckets(p, bidirectional=False, max_distance=6), (8, 2), (3,), (7,), Causal()),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "shape", "grid_q", "grid_k", "where"), SCORES)
def test_a_score_is_its_dense_bias(backend, make, shape, grid_q, grid_k, where):
    dtype = torch.float64 if backend in ("dense", "sdpa") else torch.float32
    q, k, v = inputs(grid_q, grid_k, batch=2, dtype=dtype)
    score = make(table(*shape, dtype=dtype))
    got = run(backend, q, k, v, where, bias=score)
    want = glocal.attend(q, k, v, where, bias=score.dense(grid_q, grid_k), backend="dense")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize(("make", "shape", "grid_q", "grid_k", "where"), SCORES)
def test_gradients_reach_the_parameters(backend, make, shape, grid_q, grid_k, where):
    q, k, v = inputs(grid_q, grid_k, dim=3, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (q, k, v, table(*shape))]

    def attention(q, k, v, parameter):
        return glocal.attend(q, k, v, where, bias=make(parameter), return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(attention, tensors, fast_mode=True)


def test_gradients_reach_the_parameters_natively():
    for make, shape, grid_q, grid_k, where in SCORES:
        q, k, v = inputs(grid_q, grid_k, batch=2)
        parameter = table(*shape, dtype=torch.float32)
        grads = []
        for backend in ("native", "dense"):
            leaf = parameter.clone().requires_grad_()
            out = run(backend, q, k, v, where, bias=make(leaf))
            grads.append(torch.autograd.grad(out.sin().sum(), leaf)[0])
        torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


CROSS = [
    (RelativePosition(table(2, 5)), (9,), (4,)),
    (RelativePosition(table(2, 7), 2), (9,), (1,)),
    (RelativePosition(table(2, 3, 5)), (5, 4), (2, 3)),
    (ALiBi.of(2), (9,), (1,)),
    (T5Buckets(table(8, 2), max_distance=8), (9,), (3,)),
    (T5Buckets(table(8, 2), bidirectional=False, max_distance=8), (9,), (1,)),
]


@pytest.mark.parametrize(
    ("score", "grid", "queries"), CROSS, ids=lambda x: type(x).__name__ if not isinstance(x, tuple) else str(x)
)
def test_fewer_queries_are_the_last_rows(score, grid, queries):
    """A decoding step sees the bias that its row has in the parallel form."""
    last = tuple(slice(n - m, None) for n, m in zip(grid, queries, strict=True))
    square = score.dense(grid, grid).unflatten(1, grid)[(slice(None), *last)].flatten(1, -2)
    assert torch.equal(score.dense(queries, grid), square)
    q, k, v = inputs(grid, dtype=torch.float64)
    for backend in ("dense", "sdpa"):
        whole = glocal.attend(q, k, v, bias=score, backend=backend)[(slice(None), slice(None), *last)]
        part = glocal.attend(q[(slice(None), slice(None), *last)], k, v, bias=score, backend=backend)
        torch.testing.assert_close(part, whole)
