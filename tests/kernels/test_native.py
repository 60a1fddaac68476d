"""The native kernel against float64 attention over ``pattern.mask()``: values, gradients, isolation, bits."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from glocal.kernels import native
from glocal.patterns import Block, Causal, Full, Keys, PerHead, Prefix, Selected, Sinks, Sliding, Strided, Window
from glocal.patterns.boxes import NoBoxForm
from tests.strategies import BATCH, HEADS, places

if native.available() is not None:
    print(f"native kernel tests skipped: {native.available()}")
    pytest.skip(f"no native kernel: {native.available()}", allow_module_level=True)

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Shrinking costs minutes here, and a drawn problem is small already.
many = settings(
    max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
few = settings(many, max_examples=30)


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = torch.get_num_threads(), native.isa()
    yield
    torch.set_num_threads(threads)
    native.select(isa)


def reference(q, k, v, mask, bias=None, scale=1.0, softcap=0.0, dtype=torch.float64):
    """Dense attention in ``dtype``: the definition in float64, and in float32 what a plain computation gets wrong."""
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(dtype)
    s = s.masked_fill(~mask, -math.inf)
    top = s.amax(-1, keepdim=True).detach() if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    top = torch.where(top == -math.inf, 0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    out = torch.where(total > 0, p / torch.where(total > 0, total, 1), 0) @ v
    lse = torch.where(total > 0, top + torch.log(torch.where(total > 0, total, 1)), -math.inf)
    return out, lse.squeeze(-1)


def table_bias(table, grid_q, grid_k):
    """``(H or 1, Nq, Nk)`` read from a table of offsets, axis by axis."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for lq, lk in zip(grid_q, grid_k, strict=True):
        offset = torch.arange(lk)[None] - torch.arange(lq)[:, None] + lq - 1
        index = (index[:, None, :, None] * (lq + lk - 1) + offset[None, :, None, :]).reshape(index.shape[0] * lq, -1)
    return table[:, index]


def strided(shape, generator, dtype, how):
    """Random values in one of several memory layouts."""
    b, h, n, d = shape
    t = torch.randn(shape, generator=generator)
    if how == 1:
        t = torch.randn(b, n, h, d, generator=generator).transpose(1, 2)
    elif how == 2:
        t = torch.randn(b, h, n, d + 3, generator=generator)[..., 1 : d + 1]
    elif how == 3:
        t = torch.randn(b, h, d, n, generator=generator).mT
    return t.to(dtype)


def close(mine, exact, plain, dtype, factor, what):
    """No further from the truth than ``factor`` times a plain computation, plus rounding of the result."""
    assert mine.dtype == dtype and mine.shape == exact.shape, what
    finite = torch.isfinite(exact)
    assert torch.equal(mine.double()[~finite], exact[~finite]), what
    if not finite.any():
        return
    size = exact[finite].abs()
    error = (mine.double() - exact)[finite].abs()
    allowed = factor * (plain.double() - exact)[finite].abs().max() + 1.5 * EPS[dtype] * size
    allowed = allowed + 8 * EPS[torch.float32] * (1 + size.max())
    if dtype == torch.float16:
        allowed = allowed + 2.0**-24
    assert (error <= allowed).all(), f"{what}: {(error - allowed).max()} over"


def check(pattern, grid_q, grid_k, *, dtype=torch.float32, kv=1, dims=(8, 8), how=0, extra="", softcap=0.0, seed=0):
    """Forward, lse and every gradient of one problem against the reference."""
    generator = torch.Generator().manual_seed(seed)
    nq, nk = math.prod(grid_q), math.prod(grid_k)
    d, dv = dims
    kv_heads = 1 if kv == 1 else HEADS
    q = strided((BATCH, HEADS, nq, d), generator, dtype, how)
    k = strided((BATCH, kv_heads, nk, d), generator, dtype, how)
    v = strided((BATCH, kv_heads, nk, dv), generator, dtype, how)
    bias = table = None
    if extra == "table":
        size = math.prod(a + b - 1 for a, b in zip(grid_q, grid_k, strict=True))
        table = torch.randn(1 if seed % 2 else HEADS, size, generator=generator)
    elif extra:
        full = (BATCH, HEADS, nq, nk)
        bias = torch.randn([n if flag == "1" else 1 for n, flag in zip(full, extra, strict=True)], generator=generator)
    scale, form, mask = 0.7 * d**-0.5, pattern.boxes(grid_q, grid_k), pattern.mask(grid_q, grid_k)
    grad_out = torch.randn(BATCH, HEADS, nq, dv, generator=generator).to(dtype)
    grad_lse = torch.randn(BATCH, HEADS, nq, generator=generator) if seed % 3 else None

    inputs = [t for t in (q, k, v, bias, table) if t is not None]
    before = [t.clone() for t in inputs]
    out, lse = native.forward(q, k, v, form, bias, table, scale, softcap)
    grads = native.backward(grad_out, grad_lse, q, k, v, form, bias, table, scale, softcap, out, lse)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input changed"

    truths = []
    for precise in (torch.float64, torch.float32):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        by_name = dict(
            zip([n for n, t in zip("qkvbt", (q, k, v, bias, table), strict=True) if t is not None], leaves, strict=True)
        )
        wide = [t.to(precise) for t in leaves]
        named = dict(zip(by_name, wide, strict=True))
        added = named.get("b")
        if "t" in named:
            added = table_bias(named["t"], grid_q, grid_k)
        o, z = reference(named["q"], named["k"], named["v"], mask, added, scale, softcap, precise)
        loss = (o * grad_out.to(precise)).sum()
        if grad_lse is not None:
            loss = loss + torch.where(z.isfinite(), z, 0).mul(grad_lse.to(precise)).sum()
        found = torch.autograd.grad(loss, wide, allow_unused=True)
        truths.append(
            (
                o.detach(),
                z.detach(),
                *(torch.zeros_like(w) if g is None else g for w, g in zip(wide, found, strict=True)),
            )
        )
    exact, plain = truths
    mine = (out, lse, *(g for g in grads if g is not None))
    assert len(mine) == len(exact)
    names = ("out", "lse", "dq", "dk", "dv", "dbias" if bias is not None else "dtable")
    for n, (a, b, c) in enumerate(zip(mine, exact, plain, strict=True)):
        kind = dtype if n in (0, 2, 3, 4) else torch.float32
        # A gradient starts from the rounded out, which a plain computation in float32 never rounds.
        rounding = dtype if n >= 2 else torch.float32
        summed = nq**0.5 if n > 4 else 1  # a bias that broadcasts adds up the rounding of every row
        loose = c if rounding == torch.float32 else c + summed * EPS[dtype] * (1 + b.abs().max())
        close(a, b, loose, kind, 2 if n < 2 else 3, f"{names[n]} of {pattern} on {grid_q} {grid_k} {dtype} {extra}")


@many
@given(
    st.data(),
    places(),
    st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([1, HEADS]),
    st.sampled_from([(1, 1), (8, 8), (5, 19), (32, 32), (64, 40)]),
    st.integers(0, 3),
    st.sampled_from(["", "", "", "table", "1111", "0111", "1100", "0001", "0010"]),
    st.sampled_from([0.0, 0.0, 3.0]),
    st.integers(0, 1000),
)
def test_random_problems(data, place, dtype, kv, dims, how, extra, softcap, seed):
    grid_q, grid_k, pattern = place
    native.select(data.draw(st.sampled_from(native.isas())))
    try:
        pattern.boxes(grid_q, grid_k)
    except NoBoxForm:
        return
    check(pattern, grid_q, grid_k, dtype=dtype, kv=kv, dims=dims, how=how, extra=extra, softcap=softcap, seed=seed)


LARGER = [
    (Sliding(100, 0), (700,)),
    (Sliding(60, 0) | Sinks(4), (613,)),
    (Causal(), (600,)),
    (Full(), (300,)),
    (Window(9, dilation=7), (400,)),
    (Strided(5) | Block(16), (333,)),
    (Window(7), (23, 29)),
    (Window((5, 7), dilation=(3, 2), causal=(True, False)), (21, 26)),
    (Window((3, 5, 5)), (6, 11, 9)),
    (PerHead([Sliding(40, 0), Causal(), Window(21)]), (301,)),
    (Causal() & ~Sliding(20, 20), (260,)),
    (
        Selected(torch.randint(-1, 10, (BATCH, HEADS, 20, 3), generator=torch.Generator().manual_seed(1)), 32, 16),
        (320,),
    ),
]


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("number", range(len(LARGER)))
def test_several_tiles_and_chunks(isa, number):
    pattern, grid = LARGER[number]
    native.select(isa)
    grid_k = (320,) if isinstance(pattern, Selected) else grid
    check(pattern, grid, grid_k, dims=(32, 48), kv=1 + number % 2 * (HEADS - 1), how=number % 4, seed=number)
    check(pattern, grid, grid_k, dims=(16, 16), extra="table", softcap=5.0, seed=number)


def problem(grid_q=(200,), grid_k=(200,), heads=4, kv=2, dim=32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nq, nk = math.prod(grid_q), math.prod(grid_k)
    return (
        torch.randn(batch, heads, nq, dim, generator=generator),
        torch.randn(batch, kv, nk, dim, generator=generator),
        torch.randn(batch, kv, nk, dim, generator=generator),
    )


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize(
    "pattern, grid_q, grid_k",
    [
        (Sliding(50, 0) | Prefix(3), (300,), (300,)),
        (Causal(), (260,), (260,)),
        (Window(5), (17, 19), (17, 19)),
        (Sliding(900, 0), (1,), (4000,)),
        (Causal(), (3,), (2500,)),
    ],
)
def test_same_bits_for_any_thread_count(isa, pattern, grid_q, grid_k):
    native.select(isa)
    q, k, v = problem(grid_q, grid_k)
    size = math.prod(a + b - 1 for a, b in zip(grid_q, grid_k, strict=True))
    table, bias = torch.randn(4, size), torch.randn(1, 1, q.shape[2], k.shape[2])
    form, results = pattern.boxes(grid_q, grid_k), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        out, lse = native.forward(q, k, v, form, bias, table, 0.2, 0.0)
        grads = native.backward(torch.ones_like(out), None, q, k, v, form, bias, table, 0.2, 0.0, out, lse)
        results.append((out, lse, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("grid_q", [(120,), (2,)])
def test_nan_reaches_only_who_sees_it(poison, grid_q):
    pattern, grid_k = Sliding(20, 2) | Prefix(2), (120,)
    for which in ("k", "v"):
        q, k, v = problem(grid_q, grid_k)
        q.abs_(), k.abs_(), v.abs_()
        form, mask = pattern.boxes(grid_q, grid_k), pattern.mask(grid_q, grid_k)
        clean, clean_lse = native.forward(q, k, v, form, None, None, 0.2, 0.0)
        grad = torch.ones_like(clean)
        clean_grads = native.backward(grad, None, q, k, v, form, None, None, 0.2, 0.0, clean, clean_lse)
        (k if which == "k" else v)[:, :, 119] = poison
        out, lse = native.forward(q, k, v, form, None, None, 0.2, 0.0)
        sees = mask[:, 119]
        assert torch.equal(out[:, :, ~sees], clean[:, :, ~sees]) and torch.equal(
            lse[:, :, ~sees], clean_lse[:, :, ~sees]
        )
        assert not torch.isfinite(out[:, :, sees]).any()
        # Gradients: a query that does not see it, and a key that no such query sees, are as before.
        dq, dk, dv, _, _ = native.backward(grad, None, q, k, v, form, None, None, 0.2, 0.0, out, lse)
        assert torch.equal(dq[:, :, ~sees], clean_grads[0][:, :, ~sees])
        apart = ~mask[sees].any(0)
        assert torch.equal(dk[:, :, apart], clean_grads[1][:, :, apart])
        assert torch.equal(dv[:, :, apart], clean_grads[2][:, :, apart])


def test_forms_that_come_and_go_are_not_mixed_up():
    q, k, v = problem((40,), (40,))
    for seed in range(40):
        real = torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.5
        pattern = Keys(real) & Sliding(seed, 3)
        out, _ = native.forward(q, k, v, pattern.boxes((40,), (40,)), None, None, 0.2, 0.0)
        exact, _ = reference(q, k, v, pattern.mask((40,), (40,)), None, 0.2)
        assert torch.allclose(out.double(), exact, atol=2e-6)


def test_rows_without_keys():
    pattern = Sliding(3, 0) & Keys(torch.arange(40).lt(10)[None])
    q, k, v = problem((40,), (40,))
    form = pattern.boxes((40,), (40,))
    out, lse = native.forward(q, k, v, form, None, None, 0.2, 0.0)
    assert (out[:, :, 13:] == 0).all() and (lse[:, :, 13:] == -math.inf).all() and torch.isfinite(lse[:, :, :13]).all()
    grads = native.backward(torch.ones_like(out), torch.ones_like(lse), q, k, v, form, None, None, 0.2, 0.0, out, lse)
    assert (grads[0][:, :, 13:] == 0).all() and (grads[1][:, :, 10:] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads[:3])


@pytest.mark.parametrize("shape", [(0, 4, 2, 9, 9), (2, 0, 0, 9, 9), (2, 4, 2, 0, 9), (2, 4, 2, 9, 0), (2, 4, 2, 0, 0)])
def test_nothing_to_do(shape):
    batch, heads, kv, nq, nk = shape
    q, k, v = torch.randn(batch, heads, nq, 8), torch.randn(batch, kv, nk, 8), torch.randn(batch, kv, nk, 8)
    form = Full().boxes((nq,), (nk,))
    out, lse = native.forward(q, k, v, form, None, None, 1.0, 0.0)
    assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()
    grads = native.backward(out, None, q, k, v, form, None, None, 1.0, 0.0, out, lse)
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(grads[:3], (q, k, v), strict=True))


@few
@given(
    st.integers(1, 4),
    st.integers(1, 3000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([Causal(), Full(), Sliding(700, 0) | Prefix(4), Sliding(5, 0)]),
    st.sampled_from([(4, 4), (8, 2), (6, 1)]),
    st.sampled_from([1, 24, 64, 131]),
    st.booleans(),
    st.integers(0, 99),
)
def test_decoding(nq, nk, dtype, pattern, heads, dim, softcap, seed):
    nq = min(nq, nk)
    q, k, v = (t.to(dtype) for t in problem((nq,), (nk,), *heads, dim, seed=seed))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    form, mask, scale = pattern.boxes((nq,), (nk,)), pattern.mask((nq,), (nk,)), dim**-0.5
    cap = 4.0 if softcap else 0.0
    out, lse = native.forward(q, k, v, form, None, None, scale, cap)
    exact, plain = (reference(q, k, v, mask, None, scale, cap, d) for d in (torch.float64, torch.float32))
    close(out, exact[0], plain[0], dtype, 2, "out")
    close(lse, exact[1], plain[1], torch.float32, 2, "lse")


def test_padding_that_differs_in_a_batch_while_decoding():
    real = torch.arange(900)[None] < torch.tensor([[900], [321]])
    q, k, v = problem((1,), (900,))
    pattern = Causal() & Keys(real)
    out, _ = native.forward(q, k, v, pattern.boxes((1,), (900,)), None, None, 0.2, 0.0)
    exact, _ = reference(q, k, v, pattern.mask((1,), (900,)), None, 0.2)
    assert torch.allclose(out.double(), exact, atol=1e-6)


@pytest.mark.parametrize("isa", native.isas())
def test_exp2_is_within_two_ulp(isa):
    native.select(isa)
    x = torch.cat(
        [torch.linspace(-126, 0, 2_000_001), torch.linspace(-1, 1, 1_000_001), torch.linspace(0, 126, 100_001)]
    )
    mine, exact = native.exp2(x).double(), torch.exp2(x.double())
    ulp = 2.0 ** (torch.floor(torch.log2(exact)) - 23)
    assert ((mine - exact).abs() / ulp).max() < 2
    ends = native.exp2(torch.tensor([-math.inf, -200.0, -126.5, math.nan, 0.0]))
    assert ends[:3].eq(0).all() and ends[3].isnan() and ends[4] == 1


def test_instruction_set_by_environment():
    code = (
        "from glocal.kernels import native; print(native.isa() if native.available() is None else native.available())"
    )

    def run(isa):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "GLOCAL_ISA": isa}, capture_output=True, text=True
        )
        return done.stdout.strip().splitlines()[-1]

    for isa in native.isas():
        assert run(isa) == isa
    assert "GLOCAL_ISA asks for 'mips'" in run("mips")


def test_what_it_refuses():
    form = Full().boxes((4,), (4,))
    assert "float64" in native.supports(form, torch.float64, 8, 8)
    assert native.supports(form, torch.float16, 8, 8) is None
    assert "axes" in native.supports(Full().boxes((1,) * 5, (1,) * 5), torch.float32, 8, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_works_after_a_fork():
    q, k, v = problem()
    form = Causal().boxes((200,), (200,))
    torch.set_num_threads(2)
    before, _ = native.forward(q, k, v, form, None, None, 0.2, 0.0)
    child = os.fork()
    if child == 0:
        again, _ = native.forward(q, k, v, form, None, None, 0.2, 0.0)
        # numpy compares: torch's own threads would not survive the fork.
        os._exit(0 if (again.numpy() == before.numpy()).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
