"""attend against the float64 oracle: random problems on every backend, values, log-sum-exp and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glocal
from glocal import Causal, Full, Keys, PerHead, Prefix, Selected, Sliding, Strided, Tokens, Where, Window
from glocal.kernels import BACKENDS
from glocal.scores import RelativePosition
from tests import oracle
from tests.strategies import BATCH, HEADS, grids, patterns

CPU_BACKENDS = ["dense", "sdpa", "native"]


def runnable(backend: str) -> str:
    """The backend, or a skip with its own reason."""
    q = torch.zeros(1, 1, 2, 8)
    try:
        glocal.attend(q, q, q, Sliding(1, 1), backend=backend)
    except ValueError as reason:
        pytest.skip(str(reason))
    return backend


def inputs(seed, grid_q, grid_k, kv_heads, dim, value_dim, dtype, contiguous=True):
    """Random q, k, v that need gradients, laid out heads-first or as a view of heads-last tensors."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for heads, grid, d in ((HEADS, grid_q, dim), (kv_heads, grid_k, dim), (kv_heads, grid_k, value_dim)):
        if contiguous:
            x = torch.randn(BATCH, heads, *grid, d, generator=generator)
        else:
            x = torch.randn(BATCH, *grid, heads, d, generator=generator).movedim(-2, 1)
        out.append(x.to(dtype).requires_grad_())
    return out


def plain(q, k, v, mask, **options):
    """The same attention in a plain computation of the inputs' own precision: what an honest peer would get.

    It reads the keys from the last to the first: in float64 it would else repeat the oracle, and its error be zero.
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).flip(2) for t in (k, v))
    mask, bias = mask.flip(-1), options["bias"]
    options["bias"] = bias if bias is None or bias.shape[-1] == 1 else bias.flip(-1)
    scores = q @ k.transpose(-1, -2) * options["scale"]
    if options["softcap"] is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options["bias"] is not None:
        scores = scores + options["bias"].to(q.dtype)
    rows = mask.any(-1, keepdim=True)
    weights = scores.masked_fill(~(mask | ~rows), -torch.inf).softmax(-1)
    return torch.where(rows, weights @ v, 0)


def grads(out, lse, weight, lse_weight, leaves):
    """Gradients of a fixed linear function of out and of the finite part of lse."""
    loss = (out.double() * weight).sum()
    if lse is not None:
        loss = loss + torch.where(lse_weight != 0, lse.double() * lse_weight, 0).sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)


def error(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@st.composite
def problems(draw):
    grid_q, grid_k = draw(grids())
    pattern = draw(patterns(grid_q, grid_k))
    return {
        "grid_q": grid_q,
        "grid_k": grid_k,
        "pattern": pattern,
        "kv_heads": draw(st.sampled_from([1, HEADS])),
        "dim": draw(st.sampled_from([1, 8, 20])),
        "value_dim": draw(st.sampled_from([1, 8, 20])),
        "contiguous": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, "tensor", "table"])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "scale": draw(st.sampled_from([0.0, 0.3])),
        "seed": draw(st.integers(0, 2**31)),
    }


def check(backend, dtype, p):
    q, k, v = inputs(
        p["seed"], p["grid_q"], p["grid_k"], p["kv_heads"], p["dim"], p["value_dim"], dtype, p["contiguous"]
    )
    nq, nk = math.prod(p["grid_q"]), math.prod(p["grid_k"])
    generator = torch.Generator().manual_seed(p["seed"] + 1)
    leaves, bias, dense_bias = [q, k, v], None, None
    if p["bias"] == "tensor":
        pick = torch.randint(0, 2, (4,), generator=generator).tolist()
        shape = [n if p else 1 for n, p in zip((BATCH, HEADS, nq, nk), pick, strict=True)]
        bias = dense_bias = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        leaves.append(bias)
    elif p["bias"] == "table":
        values = torch.randn(HEADS, *[2 * (n // 2) + 1 for n in p["grid_k"]], generator=generator).to(dtype)
        values.requires_grad_()
        bias = RelativePosition(values)
        dense_bias = bias.dense(p["grid_q"], p["grid_k"])
        leaves.append(values)
    options = {"softcap": p["softcap"], "scale": p["scale"]}
    try:
        out, lse = glocal.attend(q, k, v, p["pattern"], bias=bias, return_lse=True, backend=backend, **options)
    except ValueError as reason:
        assert "cannot run this" in str(reason) and ("box" in str(reason) or "block" in str(reason)), (
            reason
        )  # no box form: too many, or two lists
        return
    mask = p["pattern"].mask(p["grid_q"], p["grid_k"])
    flat = [t.flatten(2, -2) for t in (q, k, v)]
    want, want_lse = oracle.attend(*flat, mask, bias=dense_bias, **options)
    honest = plain(*flat, mask, bias=dense_bias, **options)
    out, lse = out.flatten(2, -2), lse.flatten(2)
    # Rounding of results of size 1 in the type itself, on top of twice the honest error.
    unit = 8 * torch.finfo(dtype).eps
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(out, want) <= 2 * error(honest, want) + unit
    seen = want_lse != -torch.inf
    assert torch.equal(lse != -torch.inf, seen)
    assert error(lse[seen], want_lse[seen]) <= 64 * torch.finfo(
        torch.float32 if dtype != torch.float64 else dtype
    ).eps * (1 + want_lse[seen].abs().max().item() if seen.any() else 1) + (
        2 * unit if dtype in (torch.float16, torch.bfloat16) else 0
    )
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    lse_weight = torch.randn(want_lse.shape, generator=generator, dtype=torch.float64) * seen
    got = grads(out, lse, weight, lse_weight, leaves)
    right = grads(want, want_lse, weight, lse_weight, leaves)
    _, honest_lse = oracle.attend(*flat, mask, bias=dense_bias, **options)
    fair = grads(honest, honest_lse, weight, lse_weight, leaves)
    for name, a, b, c in zip(("q", "k", "v", "bias"), got, right, fair, strict=False):
        b = torch.zeros_like(a) if b is None else b
        c = torch.zeros_like(a) if c is None else c
        size = 1 + b.abs().max().item() if b.numel() else 1
        assert error(a, b) <= 3 * error(c, b) + 2 * unit * size, name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=60, deadline=None)
@given(p=problems())
def test_random_problems_in_float32(backend, p):
    check(runnable(backend), torch.float32, p)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@settings(max_examples=30, deadline=None)
@given(p=problems())
def test_random_problems_in_float64(backend, p):
    check(backend, torch.float64, p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=15, deadline=None)
@given(p=problems())
def test_random_problems_in_half_precision(backend, dtype, p):
    check(runnable(backend), dtype, p)


@settings(max_examples=12, deadline=None)
@given(p=problems())
def test_random_problems_on_flex(p):
    """FlexAttention has no backward on a CPU, so values and log-sum-exp only."""
    q, k, v = inputs(p["seed"], p["grid_q"], p["grid_k"], p["kv_heads"], 8, 8, torch.float32, p["contiguous"])
    bias = None
    if p["bias"]:
        bias = RelativePosition(torch.randn(HEADS, *[2 * (n // 2) + 1 for n in p["grid_k"]]))
    options = {"softcap": p["softcap"], "scale": p["scale"]}
    with torch.no_grad():
        out, lse = glocal.attend(q, k, v, p["pattern"], bias=bias, return_lse=True, backend="flex", **options)
        dense_bias = None if bias is None else bias.dense(p["grid_q"], p["grid_k"])
        mask = p["pattern"].mask(p["grid_q"], p["grid_k"])
        want, want_lse = oracle.attend(*[t.flatten(2, -2) for t in (q, k, v)], mask, bias=dense_bias, **options)
    assert error(out.flatten(2, -2), want) < 1e-5
    assert torch.equal(lse.flatten(2) == -torch.inf, want_lse == -torch.inf)


STATIC = [
    ((11,), Sliding(3, 1) | Prefix(2)),
    ((4, 5), Window(3)),
    ((6, 4), Window((3, 2), dilation=(2, 1), stride=(2, 1), causal=(True, False))),
    ((2, 3, 4), Strided((1, 2, 2)) | Tokens([5])),
    ((9,), PerHead([Causal(), Sliding(1, 1), ~Sliding(1, 1), Full()])),
]


@pytest.mark.parametrize("grid, where", STATIC, ids=lambda x: str(x))
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_gradcheck(backend, grid, where):
    torch.manual_seed(0)
    q = torch.randn(1, 4, *grid, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, *grid, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values = torch.randn(4, *[3] * len(grid), dtype=torch.float64, requires_grad=True)

    def run(q, k, v, values):
        bias = RelativePosition(values)
        return glocal.attend(q, k, v, where, bias=bias, softcap=2.0, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(run, (q, k, v, values))


@pytest.mark.parametrize("grid, where", STATIC, ids=lambda x: str(x))
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_batch_equals_its_items(backend, grid, where):
    runnable(backend)
    q, k, v = (torch.randn(3, 4, *grid, 8) for _ in range(3))
    whole = glocal.attend(q, k, v, where, backend=backend)
    items = [glocal.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], where, backend=backend) for i in range(3)]
    assert torch.allclose(whole, torch.cat(items), atol=1e-6)


def test_opcheck_of_the_tile_operator():
    q, k, v = (torch.randn(1, 2, 10, 4, requires_grad=True) for _ in range(3))
    arguments = (q, k, v, None, None, None, [], "sliding(2, 1)", [10], [10], 0.5, 0.0, 0.0)
    torch.library.opcheck(torch.ops.glocal.tiles, arguments)


def test_text_is_a_pattern_too():
    q = torch.randn(1, 2, 10, 4)
    assert torch.equal(glocal.attend(q, q, q, "sliding(2, 0)"), glocal.attend(q, q, q, Sliding(2, 0)))


def test_explain_says_what_runs_and_why_not_the_others():
    q = torch.randn(2, 4, 64, 8)
    told = glocal.explain(q, q, q, Where(lambda i, j: i >= j))
    assert told.backend == "dense"
    assert "predicate" in told.others["sdpa"] and "predicate" in str(told)
    assert told.live_pairs == 2 * 4 * 64 * 65 // 2
    assert set(told.others) | {told.backend} == set(BACKENDS)
    real = torch.ones(2, 64, dtype=torch.bool)
    real[1, 40:] = False
    told = glocal.explain(q, q, q, Sliding(7, 0) & Keys(real))
    assert told.live_pairs == 4 * int((Sliding(7, 0) & Keys(real)).mask(64).sum())
    assert told.flops == 2 * told.live_pairs * 16


def test_explain_counts_selected_blocks():
    q = torch.randn(1, 2, 64, 8)
    told = glocal.explain(q, q, q, Selected(torch.tensor([[0, 1]] * 4), 16), backend="sdpa")
    assert told.live_pairs == 2 * 64 * 32 and told.share == 0.5


def test_forced_backends_say_why_they_cannot():
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match=r"backend 'sdpa' cannot run this: Where is a predicate"):
        glocal.attend(q, q, q, Where(lambda i, j: i >= j), backend="sdpa")
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of native, sdpa, flex, dense; it was 'cuda'"):
        glocal.attend(q, q, q, backend="cuda")
