"""The native kernel of causal linear attention against the N x N product in float64, on every instruction set."""

import pytest
import torch
from torch.nn.functional import elu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from glocal import linear_attend
from glocal.kernels import linear as kernel
from glocal.kernels import native

if native.available() is not None:
    print(f"native kernel tests skipped: {native.available()}")
    pytest.skip(f"no native kernel: {native.available()}", allow_module_level=True)

FEATURES = {"identity": lambda x: x, "relu": torch.relu, "elu": lambda x: elu(x) + 1}


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = torch.get_num_threads(), native.isa()
    yield
    torch.set_num_threads(threads)
    native.select(isa)


def tensors(n, m=None, *, batch=2, heads=4, kv_heads=2, dim=24, width=10, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = (heads, n, dim), (kv_heads, m or n, dim), (kv_heads, m or n, width)
    return [torch.randn(batch, *size, generator=draw) for size in sizes]


def exact(q, k, v, feature, kv, sums=None, keys=None):
    """The definition, each query's keys in a row, in float64."""
    q, k, v, kv = (t.double() for t in (q, k, v, kv))
    group, (n, m) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    fq, fk = FEATURES[feature](q), FEATURES[feature](k)
    if keys is not None:
        fk = fk * keys[:, None, :, None]
    fk, v, kv = (t.repeat_interleave(group, 1) for t in (fk, v, kv))
    scores = (fq @ fk.mT).tril(m - n)
    out = scores @ v + fq @ kv
    if sums is not None:
        total = scores.sum(-1) + (fq * sums.double().repeat_interleave(group, 1)[:, :, None]).sum(-1)
        out = out / total[..., None]
    return out


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    "n,m,dim,width", [(1, 1, 1, 1), (31, 31, 16, 16), (33, 65, 7, 70), (100, 100, 64, 64), (3, 200, 33, 5)]
)
def test_results_and_states(isa, feature, n, m, dim, width):
    native.select(isa)
    q, k, v = tensors(n, m, dim=dim, width=width)
    kv, sums = torch.randn(2, 2, dim, width), torch.rand(2, 2, dim) + 1
    keys = torch.rand(2, m) > 0.2
    out, after, total = native.linear(q, k, v, kv, None, keys, feature=feature)
    assert total is None
    wanted = exact(q, k, v, feature, kv, keys=keys)
    assert torch.allclose(out.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    fk = FEATURES[feature](k.double()) * keys[:, None, :, None]
    assert torch.allclose(after.double(), kv + fk.mT @ v.double(), atol=1e-4)
    if feature != "identity":
        out, again, total = native.linear(q, k, v, kv, sums, keys, feature=feature, least=1e-6)
        wanted = exact(q, k, v, feature, kv, sums, keys)
        rows = FEATURES[feature](q).abs().amax(-1) > 0  # a query without a feature gets zeros
        assert torch.allclose(out[rows].double(), wanted[rows], rtol=1e-4, atol=1e-5)
        assert (out[~rows] == 0).all() and torch.equal(again, after)
        assert torch.allclose(total.double(), sums + fk.sum(2), atol=1e-4)


@pytest.mark.parametrize("isa", native.isas())
def test_time_runs_backwards(isa):
    native.select(isa)
    q, k, v = tensors(45, 77)
    kv, sums, keys = torch.randn(2, 2, 24, 10), torch.rand(2, 2, 24) + 1, torch.rand(2, 77) > 0.3
    turned = native.linear(*(t.flip(2) for t in (q, k, v)), kv, sums, keys.flip(1), feature="elu")
    found = native.linear(q, k, v, kv, sums, keys, feature="elu", reverse=True)
    assert torch.equal(found[0], turned[0].flip(2))
    assert all(torch.equal(a, b) for a, b in zip(found[1:], turned[1:], strict=True))


def test_any_strides_and_any_number_of_threads():
    q, k, v = tensors(70, heads=6, kv_heads=1, batch=1)
    kv = torch.zeros(1, 1, 24, 10)
    torch.set_num_threads(1)
    one, after, _ = native.linear(q, k, v, kv)
    torch.set_num_threads(3)  # more than there are key heads: each query head goes alone
    spread = [t.movedim(1, 2).contiguous().movedim(2, 1) for t in (q, k, v)]
    three, again, _ = native.linear(*spread, kv)
    assert torch.equal(one, three) and torch.equal(after, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_summed_in_float32(dtype):
    q, k, v = (t.to(dtype) for t in tensors(3000, dim=8, batch=1))
    out = linear_attend(q, k, v, causal=True)
    wanted = exact(q, k, v, "elu", torch.zeros(1, 2, 8, 10), torch.zeros(1, 2, 8))
    assert out.dtype == dtype and torch.allclose(out.double(), wanted, atol=2.0**-8, rtol=2.0**-7)


def test_it_is_the_path_of_inference_and_learning_takes_another():
    calls = []
    q, k, v = tensors(40)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.glocal.linear.default:
                calls.append(args[6])
            return func(*args, **(kwargs or {}))

    with Seen():
        plain = linear_attend(q, k, v, causal=True)
        learned = linear_attend(q.requires_grad_(), k, v, causal=True)
        linear_attend(q.detach()[:, :, :5], k[:, :, :5], v[:, :, :5], causal=True)  # too few to be worth a call
    assert calls == ["elu", "identity"]
    assert torch.allclose(plain, learned, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_plain_product(reverse):
    q, k, v = (t[:, :2].requires_grad_() for t in tensors(70))
    state = torch.randn(2, 2, 24, 10, requires_grad=True)
    inputs = (q, k, v, state)
    found = kernel.causal_product(*inputs, reverse=reverse)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = kernel.causal_product(*wide, reverse=reverse)  # float64 goes another way, which other tests hold
    scores = (wide[0] @ wide[1].mT).triu() if reverse else (wide[0] @ wide[1].mT).tril()
    assert torch.allclose(wanted[0], scores @ wide[2] + wide[0] @ wide[3], atol=1e-10)
    grads = []
    for given, (out, last) in ((inputs, found), (wide, wanted)):
        weight = torch.sin(torch.arange(out.numel())).view(out.shape)
        grads.append(torch.autograd.grad((out * weight).sum() + (last**2).sum(), given))
    for mine, other in zip(*grads, strict=True):
        assert torch.allclose(mine.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_without_the_extension_the_result_is_the_same(monkeypatch):
    q, k, v = tensors(100)
    wanted = linear_attend(q, k, v, causal=True)
    monkeypatch.setattr(kernel.cpu, "missing", lambda: "it is not there")
    assert kernel.why_not_native(q) == "it is not there"
    assert torch.allclose(linear_attend(q, k, v, causal=True), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda q: q.to("meta"), "it runs on a CPU"),
        (lambda q: q.double(), "it computes in float32"),
        (lambda q: q[:, :, :15], "below 16 positions"),
    ],
)
def test_what_it_does_not_take(change, reason):
    assert kernel.why_not_native(change(tensors(20)[0])).startswith(reason)


def test_its_work_is_counted():
    with FlopCounterMode(display=False) as counted:
        linear_attend(*tensors(64, batch=1, heads=2), causal=True)
    pairs, state = 16 * (24 + 10), 24 * 10
    assert counted.get_total_flops() == 2 * 2 * 64 * (pairs + state + state)
