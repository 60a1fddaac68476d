"""S037: linear attention with a bounded divisor by definition and against timm, and the local concentration."""

import pytest
import torch

from glocal.linear import LinearState
from glocal.nn.concentration import LinearGlobalAttention, clamped_linear_attend
from tests.nn.layers import project, steps
from tests.peers import load_timm


def tensors(n=13, m=13, d=4, e=3, heads=2, kv_heads=2):
    torch.manual_seed(0)
    sizes = ((heads, n, d), (kv_heads, m, d), (kv_heads, m, e))
    return [torch.randn(2, *size, dtype=torch.double).requires_grad_() for size in sizes]


def brute(q, k, v, least, causal=False):
    """The N x M products, and their sum where it is more than ``least``."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q.relu() @ k.relu().mT
    scores = scores.tril(k.shape[2] - q.shape[2]) if causal else scores
    return scores @ v / scores.sum(-1, keepdim=True).clamp(min=least)


def assert_same(found, wanted, inputs):
    assert torch.allclose(found, wanted, atol=1e-10)
    weight = torch.sin(torch.arange(found.numel(), dtype=found.dtype)).view(found.shape)
    one, other = (torch.autograd.grad((t * weight).sum(), inputs) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("least", [1e-3, 8.0, 100.0])
@pytest.mark.parametrize("n,m", [(13, 13), (5, 20), (1, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_by_definition(least, n, m, causal):
    q, k, v = tensors(n, m, heads=4)
    found, _ = clamped_linear_attend(q, k, v, denom_min=least, causal=causal, chunk=4)
    assert_same(found, brute(q, k, v, least, causal), (q, k, v))


def test_the_clamp_holds_for_some_queries_and_not_for_others():
    """What the middle setting above is worth."""
    q, k, _ = tensors(13, 13, heads=4)
    total = (q.relu() @ k.relu().repeat_interleave(2, 1).mT).sum(-1)
    assert 0.2 < (total < 8).double().mean() < 0.8 and (total < 100).all()


@pytest.mark.parametrize("causal", [False, True])
def test_without_the_clamp_weights_sum_to_one(causal):
    q, k, v = (t.detach() for t in tensors())
    q, k = q + 2, k + 2
    found, _ = clamped_linear_attend(q, k, torch.ones_like(v), denom_min=1e-9, causal=causal)
    assert torch.allclose(found, torch.ones_like(found), atol=1e-12)


def test_where_the_clamp_holds_outputs_shrink_with_the_length():
    """64 tokens of 32 channels: below 100 the divisor is no sum, and half as many tokens give about half."""
    q, k, v = (t.detach().float() / 2 for t in tensors(64, 64, d=32, e=32))
    ones = torch.ones_like(v)
    found, fewer = clamped_linear_attend(q, k, ones)[0], clamped_linear_attend(q, k[:, :, :32], ones[:, :, :32])[0]
    assert found.mean() < 0.9 and fewer.mean() / found.mean() == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(clamped_linear_attend(q, k, ones, denom_min=1.0)[0], ones, atol=1e-5)


def test_equals_timms_efficientvit():
    """Its core adds 1e-5 to the sum where this has a least one."""
    module = load_timm("models.efficientvit_mit")
    peer = module.LiteMLA(16, 16, heads=2, dim=4)
    q, k, v = (t.detach().float() for t in tensors(e=4))
    q, k = q + 1, k + 1
    theirs = peer._attn(q.relu(), k.relu(), torch.nn.functional.pad(v, (0, 1), value=1.0))
    torch.testing.assert_close(clamped_linear_attend(q, k, v, denom_min=1e-5)[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 6, 12])
def test_in_pieces(cut):
    q, k, v = tensors(heads=4)
    options = dict(causal=True, denom_min=5.0)
    first, state = clamped_linear_attend(*(t[:, :, :cut] for t in (q, k, v)), **options)
    then, last = clamped_linear_attend(*(t[:, :, cut:] for t in (q, k, v)), state=state, **options)
    assert_same(torch.cat([first, then], 2), brute(q, k, v, 5.0, causal=True), (q, k, v))
    assert isinstance(last, LinearState) and torch.allclose(last.k, k.relu().sum(2))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_count(causal):
    q, k, v = tensors()
    keys = torch.arange(13) >= torch.tensor([[4], [0]])
    found, _ = clamped_linear_attend(q, k, v, keys=keys, causal=causal, denom_min=3.0)
    alone, _ = clamped_linear_attend(*(t[:1, :, 4:] for t in (q, k, v)), causal=causal, denom_min=3.0)
    assert torch.allclose(found[:1, :, 4:], alone, atol=1e-12)


def test_gradients_by_differences():
    given = [t.detach()[:1, :1].requires_grad_() for t in tensors(9, 9)]

    def call(*t):
        out, state = clamped_linear_attend(*t, denom_min=3.0, causal=True, chunk=4)
        return out, *state

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    q, k, v = (t.detach().to(dtype) for t in tensors(500, 500))
    found, _ = clamped_linear_attend(q, k, v)
    wanted, _ = clamped_linear_attend(*(t.double() for t in (q, k, v)))
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=torch.finfo(dtype).eps, rtol=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_multiplies_each_head_by_its_factor(causal):
    layer = LinearGlobalAttention(24, 3, denom_min=2.0, causal=causal, qkv_bias=True).double()
    assert torch.allclose(layer.factor, torch.full((3,), 8**-0.5).double())
    torch.nn.init.normal_(layer.factor)
    x = torch.randn(2, 11, 24).double()
    mixed = brute(*project(layer, x), 2.0, causal) * layer.factor[:, None, None]
    assert torch.allclose(layer(x), layer.o_proj(mixed.movedim(1, -2).flatten(-2)))
    if causal:
        assert torch.allclose(steps(layer, x, 4)[0], layer(x), atol=1e-12)


def test_bad_settings():
    for make in (
        lambda: LinearGlobalAttention(24, 3, denom_min=0.0),
        lambda: clamped_linear_attend(*tensors(), denom_min=0),
    ):
        with pytest.raises(ValueError, match="denom_min must be more than 0; it was 0"):
            make()
    with pytest.raises(ValueError, match="feature does not apply"):
        LinearGlobalAttention(24, 3, feature="elu")
