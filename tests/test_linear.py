"""Linear attention: all at once, in chunks and step by step are one and the same as the N x N product, safely."""

import itertools

import pytest
import torch
from torch.nn.functional import elu, scaled_dot_product_attention

from glocal.kernels.linear import causal_product
from glocal.linear import FEATURES, linear_attend

DOUBLE = torch.double


def tensors(n, *, m=None, heads=2, kv_heads=2, d=4, e=3, dtype=DOUBLE, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = (heads, n, d), (kv_heads, m or n, d), (kv_heads, m or n, e)
    return [torch.randn(2, *size, generator=draw, dtype=torch.double).to(dtype).requires_grad_() for size in sizes]


def brute(q, k, v, feature=FEATURES["elu"], *, causal=False, decay=None, keys=None, normalise=True):
    """The N x N product, in the inputs' type."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("bhnf,bhmf->bhnm", feature(q), feature(k))
    if causal:
        scores = scores.tril()
    if decay is not None:
        n = q.shape[2]
        fades = [decay[:, :, j + 1 : i + 1].sum(-1).exp() for i, j in itertools.product(range(n), repeat=2)]
        scores = scores * torch.stack(fades, -1).unflatten(-1, (n, n)).repeat_interleave(group, 1)
    if keys is not None:
        scores = scores * keys[:, None, None]
    if normalise:
        scores = scores / scores.sum(-1, keepdim=True)
    return scores @ v


def assert_same(found, wanted, inputs):
    """Forward and gradient."""
    assert torch.allclose(found, wanted, atol=1e-10)
    weight = torch.sin(torch.arange(found.numel(), dtype=found.dtype)).view(found.shape)
    one, other = (torch.autograd.grad((t * weight).sum(), inputs) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("feature", ["elu", "relu"])
@pytest.mark.parametrize("n,m", [(9, 9), (5, 23), (1, 1)])
def test_all_keys_at_once(feature, n, m):
    q, k, v = tensors(n, m=m, heads=4)
    with torch.no_grad():
        q += 2  # else relu leaves rows without any score, which have no quotient
        k += 2
    assert_same(linear_attend(q, k, v, feature=feature), brute(q, k, v, FEATURES[feature]), (q, k, v))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("n", [1, 64, 100])
def test_causal_in_chunks(chunk, n):
    q, k, v = tensors(n, heads=4)
    assert_same(linear_attend(q, k, v, causal=True, chunk=chunk), brute(q, k, v, causal=True), (q, k, v))


@pytest.mark.parametrize("fades", [False, True])
def test_queries_are_the_last_positions(fades):
    q, k, v = tensors(20)
    decay = -torch.rand(2, 2, 20, dtype=DOUBLE) if fades else None
    found = linear_attend(q[:, :, 13:], k, v, causal=True, decay=decay, chunk=6)
    assert torch.allclose(found, brute(q, k, v, causal=True, decay=decay)[:, :, 13:], atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_what_fades(chunk):
    q, k, v = tensors(19, heads=4)
    decay = (-torch.rand(2, 2, 19, dtype=DOUBLE)).requires_grad_()
    found = linear_attend(q, k, v, causal=True, decay=decay, chunk=chunk)
    assert_same(found, brute(q, k, v, causal=True, decay=decay), (q, k, v, decay))


def test_a_constant_decay_is_a_power_of_the_distance():
    q, k, v = tensors(12)
    rate = torch.full((2, 2, 12), 0.5, dtype=DOUBLE).log()
    at = torch.arange(12)
    powers = 0.5 ** (at[:, None] - at).clamp(min=0).double()
    scores = (q @ k.mT).tril() * powers
    found = linear_attend(q, k, v, feature="identity", causal=True, decay=rate, normalise=False, chunk=5)
    assert torch.allclose(found, scores @ v, atol=1e-12)


@pytest.mark.parametrize("fades", [False, True])
@pytest.mark.parametrize("cut", [1, 20, 33, 49])
def test_a_prompt_in_pieces_and_then_token_by_token(cut, fades):
    q, k, v = tensors(50, heads=4)
    decay = -torch.rand(2, 2, 50, dtype=DOUBLE) if fades else None
    whole = linear_attend(q, k, v, causal=True, decay=decay, chunk=8)
    state, found = None, []
    for part in (slice(0, cut), *(slice(t, t + 1) for t in range(cut, 50))):
        some = None if decay is None else decay[:, :, part]
        out, state = linear_attend(
            q[:, :, part], k[:, :, part], v[:, :, part], causal=True, decay=some, state=state, return_state=True
        )
        found.append(out)
    assert torch.allclose(torch.cat(found, 2), whole, atol=1e-12)
    last = linear_attend(q, k, v, causal=True, decay=decay, return_state=True)[1]
    assert all(torch.allclose(a, b) for a, b in zip(last, state, strict=True))


def test_ten_thousand_steps_agree_with_chunks_in_float32():
    q, k, v = tensors(10_000, heads=1, kv_heads=1, d=8, e=8, dtype=torch.float32)
    with torch.no_grad():
        whole = linear_attend(q, k, v, causal=True)
        state = None
        for t in range(10_000):
            at = slice(t, t + 1)
            out, state = linear_attend(
                q[:, :, at], k[:, :, at], v[:, :, at], causal=True, state=state, return_state=True
            )
            assert (out - whole[:, :, at]).abs().max() < 1e-5, t


def test_a_state_carries_gradients():
    q, k, v = tensors(13)
    first, state = linear_attend(*(t[:, :, :6] for t in (q, k, v)), causal=True, return_state=True)
    then = linear_attend(*(t[:, :, 6:] for t in (q, k, v)), causal=True, state=state, chunk=3)
    assert_same(torch.cat([first, then], 2), brute(q, k, v, causal=True), (q, k, v))


def test_all_keys_at_once_after_a_state():
    q, k, v = tensors(7)
    _, state = linear_attend(q[:, :, :0], k[:, :, :4], v[:, :, :4], return_state=True)
    found = linear_attend(q, k[:, :, 4:], v[:, :, 4:], state=state)
    assert torch.allclose(found, brute(q, k, v), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_if_it_were_not_there(causal):
    q, k, v = tensors(11)
    keys = torch.arange(11) >= torch.tensor([[3], [0]])
    found = linear_attend(q, k, v, keys=keys, causal=causal, chunk=4)
    wanted = brute(q, k, v, keys=keys, causal=causal)
    assert torch.allclose(found[0, :, 3:], wanted[0, :, 3:]) and torch.allclose(found[1], wanted[1])
    alone = linear_attend(*(t[:1, :, 3:] for t in (q, k, v)), causal=causal)
    assert torch.allclose(found[:1, :, 3:], alone)
    assert not causal or (found[0, :, :3] == 0).all()  # no key before them


def test_a_change_in_the_future_leaves_the_past_bit_for_bit():
    q, k, v = tensors(100, dtype=torch.float32)
    before = linear_attend(q, k, v, causal=True, chunk=16)
    with torch.no_grad():
        for t in (q, k, v):
            t[:, :, 70:] = 1e6
    after = linear_attend(q, k, v, causal=True, chunk=16)
    assert torch.equal(before[:, :, :70], after[:, :, :70]) and not torch.equal(before, after)


def test_derivatives_by_finite_differences():
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 9, 4), (2, 9, 4), (2, 9, 3), (2, 4, 3)
    inputs = [torch.randn(*shape, generator=draw, dtype=DOUBLE).requires_grad_() for shape in shapes]
    decay = (-torch.rand(2, 9, generator=draw, dtype=DOUBLE)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: causal_product(*t, chunk=4), inputs)
    assert torch.autograd.gradcheck(lambda *t: causal_product(*t, 4), (*inputs, decay))
    assert torch.autograd.gradgradcheck(lambda *t: causal_product(*t, 4), (*inputs, decay))


def test_more_states_than_are_held_at_a_time(monkeypatch):
    from glocal.kernels import linear

    q, k, v = tensors(50)
    wanted = linear_attend(q, k, v, causal=True, chunk=4)
    monkeypatch.setattr(linear, "_AT_ONCE", 1)
    assert_same(linear_attend(q, k, v, causal=True, chunk=4), wanted, (q, k, v))


def test_softmax_attention_is_its_limit():
    """With the features of the exponential's series, of small scores: constant, linear and square."""

    def series(x):
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) / 2**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)

    q, k, v = tensors(40)
    errors = []
    for size in (0.2, 0.1):
        found = linear_attend(q * size, k * size, v, feature=series, causal=True)
        exact = scaled_dot_product_attention(q * size, k * size, v, is_causal=True, scale=1.0)
        errors.append((found - exact).abs().max())
    assert errors[1] < 1e-4 and errors[0] / errors[1] > 30  # the next power of the scores: 2 ** 6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_float32(dtype, causal):
    q, k, v = tensors(3000, dtype=dtype)
    found = linear_attend(q, k, v, causal=causal)
    wanted = brute(*(t.double() for t in (q, k, v)), causal=causal)
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=torch.finfo(dtype).eps)
    state = linear_attend(q, k, v, causal=causal, return_state=True)[1]
    assert state.kv.dtype == state.k.dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e15, 1e25])
def test_large_and_small_scores(causal, size):
    """Scores to 1e50, beyond float32: the quotient is what it is for scores of one."""
    q, k, v = tensors(60, dtype=torch.float32)
    with torch.no_grad():
        q.abs_()
        k.abs_()
    wanted = linear_attend(q, k, v, feature="relu", causal=causal)
    found = linear_attend(q * size, k * (size if size > 1 else 1), v, feature="relu", causal=causal)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_divisor_that_vanishes(causal):
    q, k, v = tensors(20, dtype=torch.float32)
    with torch.no_grad():
        q[:, :, 3] = -1.0  # relu gives it nothing
        k[:, :, :5] = -1.0
    out = linear_attend(q, k, v, feature="relu", causal=causal)
    out.sum().backward()
    assert (out[:, :, 3] == 0).all() and all(t.grad.isfinite().all() for t in (q, k, v))
    assert not causal or (out[:, :, :5] == 0).all()
    # Scores of both signs whose sum is nearly none: bounded, not infinite.
    one = torch.ones(1, 1, 2, 1)
    signed = linear_attend(one, torch.tensor([1.0, -1.0]).view(1, 1, 2, 1), one, feature="identity", least=0.1)
    assert signed.abs().max() == 0


def test_empty_sequences():
    q, k, v = tensors(4)
    assert linear_attend(q[:, :, :0], k[:, :, :0], v[:, :, :0], causal=True).shape == (2, 2, 0, 3)
    assert (linear_attend(q, k[:, :, :0], v[:, :, :0]) == 0).all()


def test_the_features_by_name():
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(FEATURES["elu"](x), elu(x) + 1)
    assert FEATURES["elu"](torch.tensor(-60.0)) == torch.tensor(-60.0).exp()  # which elu(x) + 1 rounds to 0
    assert torch.equal(FEATURES["identity"](x), x)


def test_it_compiles_and_exports():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attend(q, k, v, causal=True, chunk=8)

    q, k, v = (t.detach() for t in tensors(20, dtype=torch.float32))
    wanted = Layer()(q, k, v)
    exported = torch.export.export(Layer(), (q, k, v)).module()
    assert torch.allclose(exported(q, k, v), wanted, atol=1e-6)
    assert torch.allclose(torch.compile(Layer(), backend="eager", fullgraph=True)(q, k, v), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "change,match",
    [
        (dict(feature="magic"), "feature must be a function or one of elu"),
        (dict(chunk=0), "chunk must be at least 1"),
        (dict(decay=torch.zeros(2, 2, 9)), "needs causal=True"),
        (dict(decay=torch.zeros(2, 2, 8), causal=True), r"decay must be \(2, 2, 9\)"),
        (dict(keys=torch.ones(2, 8, dtype=torch.bool)), r"keys must be booleans \(2, 9\)"),
        (dict(keys=torch.ones(2, 9)), "keys must be booleans"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ValueError, match=match):
        linear_attend(*tensors(9), **change)


def test_bad_shapes():
    q, k, v = tensors(9)
    with pytest.raises(ValueError, match="9 queries cannot be the last positions of 3 keys"):
        linear_attend(q, k[:, :, :3], v[:, :, :3], causal=True)
    with pytest.raises(ValueError, match="k must have q's batch"):
        linear_attend(q, k[..., :3], v)
    with pytest.raises(ValueError, match="v must be"):
        linear_attend(q, k, v[:, :, :3])
    with pytest.raises(ValueError, match=r"q must be floats"):
        linear_attend(q[0], k, v)
    state = linear_attend(q, k, v, return_state=True)[1]
    with pytest.raises(ValueError, match=r"state.kv must be \(2, 2, 4, 2\)"):
        linear_attend(q, k, v[..., :2], state=state)
