"""S019, S115: the selective scan by its recurrence, transformers' Mamba, gradients, limits, states, memory."""

import os
import subprocess
import sys

import pytest
import torch

import glocal
from glocal.kernels.scan import selective_scan

LENGTHS, STATES = (1, 2, 65), (1, 16)


def tensors(length, size, channels=3, lead=(2,), scan=(), dtype=torch.float64):
    """u, delta, a, b, c, d and a state."""
    torch.manual_seed(0)
    shapes = (*lead, length, channels), (*lead, length, size), (*lead, channels, size)
    u, delta, b, c, state = (torch.randn(shapes[n]) for n in (0, 0, 1, 1, 2))
    a, d = -torch.rand(*scan, channels, size) * 3, torch.randn(*scan, channels)
    return [t.to(dtype).requires_grad_() for t in (u, delta.abs(), a, b, c, d, state)]


def loop(u, delta, a, b, c, d=None, state=None):
    """The recurrence, token by token."""
    h, out = state, []
    for t in range(u.shape[-2]):
        h = torch.exp(delta[..., t, :, None] * a) * h + (delta * u)[..., t, :, None] * b[..., t, None, :]
        out.append((h * c[..., t, None, :]).sum(-1) + d * u[..., t, :])
    return torch.stack(out, -2), h


def assert_same(one, other, inputs):
    """Outputs, last states, and gradients of all inputs."""
    found = []
    for y, last in (one, other):
        weights = [torch.sin(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) for t in (y, last)]
        loss = (y * weights[0]).sum() + (last * weights[1]).sum()
        found.append((y, last, *torch.autograd.grad(loss, inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("chunk", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("size", STATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_by_its_recurrence_with_gradients(length, size, chunk):
    inputs = tensors(length, size)
    assert_same(selective_scan(*inputs[:6], state=inputs[6], chunk=chunk), loop(*inputs), inputs)


def test_weights_of_several_scans_broadcast():
    inputs = tensors(11, 2, lead=(2, 4), scan=(4,))
    assert_same(selective_scan(*inputs[:6], state=inputs[6]), loop(*inputs), inputs)
    shared = tensors(11, 2, lead=(2, 4), scan=(1,))
    assert_same(selective_scan(*shared[:6], state=shared[6]), loop(*shared), shared)


def test_a_backward_pass_in_parts_is_the_same(monkeypatch):
    inputs = tensors(65, 4)
    monkeypatch.setattr("glocal.kernels.scan._AT_ONCE", 200)
    assert_same(selective_scan(*inputs[:6], state=inputs[6], chunk=4), loop(*inputs), inputs)


@pytest.mark.parametrize("size", STATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers_mamba(length, size):
    """The whole mixer on its own weights, whose slow path is a loop over tokens."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=8, state_size=size, num_hidden_layers=1, use_mambapy=False)
    peer = MambaMixer(config, 0).eval()
    torch.nn.init.normal_(peer.D)
    x = torch.randn(2, length, 8)
    u, gate = peer.in_proj(x).chunk(2, -1)
    u = torch.nn.functional.silu(peer.conv1d(u.mT)[..., :length].mT)
    step, b, c = peer.x_proj(u).split([peer.time_step_rank, size, size], -1)
    delta = torch.nn.functional.softplus(peer.dt_proj(step))
    y, _ = selective_scan(u, delta, -peer.A_log.exp(), b, c, peer.D)
    torch.testing.assert_close(peer.out_proj(y * torch.nn.functional.silu(gate)), peer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length,chunk", [(1, None), (2, 1), (7, 3)])
def test_gradcheck(length, chunk):
    inputs = tensors(length, 2, channels=2)
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t[:6], state=t[6], chunk=chunk), inputs)


@pytest.mark.parametrize("cut", [1, 30, 64])
def test_in_pieces_and_token_by_token(cut):
    u, delta, a, b, c, d, state = (t.detach() for t in tensors(65, 16))
    whole, last = selective_scan(u, delta, a, b, c, d, state=state)
    before = whole.clone()
    outs = []
    for part in [slice(0, cut), *(slice(t, t + 1) for t in range(cut, 65))]:
        y, state = selective_scan(u[:, part], delta[:, part], a, b[:, part], c[:, part], d, state=state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)
    assert torch.equal(before, whole)


def test_nothing_reaches_back():
    u, delta, a, b, c, d, _ = (t.detach() for t in tensors(20, 4))
    changed = [torch.cat([t[:, :9], torch.rand_like(t[:, 9:])], 1) for t in (u, delta, b, c)]
    one = selective_scan(u, delta, a, b, c, d)[0]
    other = selective_scan(changed[0], changed[1], a, changed[2], changed[3], d)[0]
    torch.testing.assert_close(one[:, :9], other[:, :9])
    assert not torch.allclose(one[:, 9:], other[:, 9:])


def test_rates_that_forget_all_leave_each_token_by_itself():
    u, delta, a, b, c, d, _ = tensors(65, 4)
    delta = delta + 0.1
    pointwise = d * u + delta * u * (b * c).sum(-1, keepdim=True)
    torch.testing.assert_close(selective_scan(u, delta, a - 1e6, b, c, d)[0], pointwise)


def test_rates_of_zero_sum_up():
    u, delta, a, b, c, _, _ = tensors(65, 4)
    sums = ((delta * u)[..., None] * b[:, :, None]).cumsum(1)
    torch.testing.assert_close(selective_scan(u, delta, 0 * a, b, c)[0], (sums * c[:, :, None]).sum(-1))


def test_strong_decays_neither_overflow_nor_spoil_gradients():
    """Sums of decays whose exponentials' quotients would be infinite."""
    inputs = [t.detach().float().requires_grad_() for t in tensors(500, 16)]
    u, delta, a, b, c, d, _ = inputs
    y, last = selective_scan(u, 30 * delta, 10 * a, b, c, d)
    (y.sum() + last.sum()).backward()
    assert y.isfinite().all() and all(t.grad.isfinite().all() for t in inputs[:6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_scanned_in_float32(dtype):
    u, delta, a, b, c, d, _ = (t.detach().to(dtype) for t in tensors(300, 16))
    y, last = selective_scan(u, delta, a, b, c, d)
    wanted, exactly = selective_scan(*(t.double() for t in (u, delta, a, b, c, d)))
    assert y.dtype == dtype and last.dtype == torch.float32
    assert torch.equal(y, wanted.to(dtype)) or (y - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()
    torch.testing.assert_close(last, exactly.float())
    with torch.autocast("cpu", torch.bfloat16):
        wide = [t.float() for t in (u, delta, a, b, c, d)]
        torch.testing.assert_close(selective_scan(*wide)[0], wanted.float(), atol=1e-4, rtol=1e-4)


def test_any_layout_in_memory_and_inputs_stay_as_they_are():
    u, delta, a, b, c, d, state = (t.detach() for t in tensors(13, 4))
    wanted = selective_scan(u, delta, a, b, c, d, state=state)
    strided = [t.mT.contiguous().mT for t in (u, delta, a, b, c)]
    kept = [t.clone() for t in (*strided, state)]
    found = selective_scan(*strided, d, state=state.mT.contiguous().mT)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*strided, state), kept, strict=True))


def test_no_tokens_leave_the_state():
    u, delta, a, b, c, d, state = (t.detach() for t in tensors(0, 4))
    y, last = selective_scan(u, delta, a, b, c, d, state=state)
    assert y.shape == (2, 0, 3) and torch.equal(last, state)


def test_opcheck_and_one_graph():
    u, delta, a, b, c, d, state = tensors(9, 4)
    arguments = (u, delta, a.mT.expand(2, 4, 3).contiguous(), b, c, state.mT.contiguous(), 3)
    arguments = tuple(t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(torch.ops.glocal.selective_scan, arguments)
    inputs = (u, delta, a, b, c, d)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*inputs), selective_scan(*inputs), inputs)


SCRIPT = """
import torch
from glocal.kernels.scan import selective_scan

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def step(length):
    u, delta = (torch.rand(1, length, 16, requires_grad=True) for _ in range(2))
    b, c = (torch.rand(1, length, 16, requires_grad=True) for _ in range(2))
    y, _ = selective_scan(u, delta, -torch.rand(16, 16), b, c)
    y.sum().backward()
    assert u.grad.isfinite().all()

step(256)
before = peak()
step(2**17)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_training_never_holds_all_states():
    """131,072 tokens of 16 channels with 16 numbers of state: all states are 128 MiB, inputs and gradients 8 x 8."""
    source = os.path.dirname(os.path.dirname(glocal.__file__))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"{peak / 2**20:.0f} MiB")
    assert 64 * 2**20 < peak < 224 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3)}, "u must be floats"),
        ({"u": torch.zeros(2, 5, 3, dtype=torch.long)}, "u must be floats"),
        ({"delta": torch.zeros(2, 5, 4)}, r"delta must be \(2, 5, 3\)"),
        ({"a": torch.zeros(4, 2)}, r"a must be \(..., 3, S\)"),
        ({"a": torch.zeros(5, 3, 2)}, r"to broadcast to \(2,\)"),
        ({"b": torch.zeros(2, 5, 3)}, r"b must be \(2, 5, 2\)"),
        ({"c": torch.zeros(2, 4, 2)}, r"c must be \(2, 5, 2\)"),
        ({"d": torch.zeros(4)}, r"d must be \(..., 3\)"),
        ({"state": torch.zeros(2, 2, 3)}, r"state must be \(2, 3, 2\)"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_refuses(change, message):
    u, delta, a, b, c, d, state = (t.detach() for t in tensors(5, 2))
    with pytest.raises(ValueError, match=message):
        selective_scan(**({"u": u, "delta": delta, "a": a, "b": b, "c": c, "d": d, "state": state} | change))
