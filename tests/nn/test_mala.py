"""S021: magnitude-aware linear attention by definition, its identities, its limits, and what growing queries do."""

import pytest
import torch
from torch.nn.functional import elu

from glocal.nn import MagnitudeAwareAttention, Rope, magnitude_aware
from tests.nn.layers import project, steps


def feature(x):
    return elu(x) + 1


def weights(fq, fk, scale, mask=None):
    """P of the definition, ``(..., N, M)``; ``mask`` says which keys count."""
    mask = torch.ones(fq.shape[-2], fk.shape[-2], dtype=fq.dtype) if mask is None else mask
    count = mask.sum(-1, keepdim=True)
    scores = scale * fq @ fk.mT / count * mask
    z = scores.sum(-1, keepdim=True)
    return ((1 + 1 / z) * scores - z / count) * mask


def tensors(n=13, m=13, d=4, e=3):
    torch.manual_seed(0)
    return [torch.randn(2, 2, *size, dtype=torch.double).requires_grad_() for size in ((n, d), (m, d), (m, e))]


@pytest.mark.parametrize("n,m", [(13, 13), (5, 20), (1, 1)])
def test_by_definition(n, m):
    q, k, v = tensors(n, m)
    wanted = weights(feature(q), feature(k), 0.5) @ v
    found = magnitude_aware(q, k, v)[0]
    assert torch.allclose(found, wanted, atol=1e-12)
    one, other = (torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("n", [1, 13, 64])
def test_causal_by_definition(n, chunk):
    q, k, v = tensors(n, 64)
    mask = torch.ones(n, 64, dtype=torch.double).tril(64 - n)
    wanted = weights(feature(q), feature(k), 0.5, mask) @ v
    found = magnitude_aware(q, k, v, causal=True, chunk=chunk)[0]
    assert torch.allclose(found, wanted, atol=1e-11)
    one, other = (torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one, other, strict=True))


def test_the_first_token_has_its_own_value_and_constants_are_kept():
    q, k, v = tensors()
    assert torch.allclose(magnitude_aware(q, k, v, causal=True)[0][:, :, 0], v[:, :, 0], atol=1e-12)
    for causal in (False, True):
        assert torch.allclose(magnitude_aware(q, k, torch.ones_like(v), causal=causal)[0], torch.ones_like(v))


def test_it_is_linear_attention_plus_centred_scores():
    """Scaled queries scale the second part only; with queries that vanish the first is left."""
    fq, fk = (feature(torch.randn(7, 4, dtype=torch.double)) for _ in range(2))
    scores = 0.5 * fq @ fk.T / 7
    z = scores.sum(-1, keepdim=True)
    linear, centred = scores / z, scores - z / 7
    for t in (1e-9, 0.25, 1.0, 16.0):
        assert torch.allclose(weights(t * fq, fk, 0.5), linear + t * centred, atol=1e-12)


def test_growing_queries_sharpen_it_as_they_do_softmax_and_linear_attention_they_do_not():
    torch.manual_seed(0)
    q, k = torch.rand(32, 8, dtype=torch.double) + 0.1, torch.randn(32, 8, dtype=torch.double)
    eye = torch.eye(32, dtype=torch.double)[None, None]
    mine, linear = [], []
    for t in (0.25, 1.0, 4.0, 16.0):
        # elu(x) + 1 is x + 1 above 0: a query of t f - 1 has features t f.
        asked = (t * (q + 1) - 1)[None, None]
        shown = magnitude_aware(asked.clamp(min=0), k[None, None], eye)[0] if t >= 1 else None
        found = weights(t * feature(q), feature(k), 8**-0.5)
        if shown is not None:
            assert torch.allclose(shown[0, 0], found, atol=1e-10)
        mine.append(32 * found.std(-1).mean())
        products = t * feature(q) @ feature(k).T
        linear.append(32 * (products / products.sum(-1, keepdim=True)).std(-1).mean())
    assert mine[0] < mine[1] < mine[2] < mine[3] and mine[3] > 10 * mine[0]
    assert max(linear) == pytest.approx(min(linear))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_count(causal):
    q, k, v = tensors()
    keys = torch.arange(13) >= torch.tensor([[4], [0]])
    found = magnitude_aware(q, k, v, keys=keys, causal=causal)[0]
    alone = magnitude_aware(*(t[:1, :, 4:] for t in (q, k, v)), causal=causal)[0]
    assert torch.allclose(found[:1, :, 4:], alone, atol=1e-12)
    assert not causal or found[0, :, :4].isfinite().all()


@pytest.mark.parametrize("cut", [1, 6, 12])
def test_in_pieces(cut):
    q, k, v = tensors()
    first, state = magnitude_aware(*(t[:, :, :cut] for t in (q, k, v)), causal=True)
    then, _ = magnitude_aware(*(t[:, :, cut:] for t in (q, k, v)), causal=True, state=state)
    assert torch.allclose(torch.cat([first, then], 2), magnitude_aware(q, k, v, causal=True)[0], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_rotated_features_and_sums_of_those_that_are_not(causal):
    torch.manual_seed(0)
    rope = Rope(interleaved=True)
    layer = MagnitudeAwareAttention(24, 3, rope=rope, causal=causal).double()
    x = torch.randn(2, 11, 24).double()
    q, k, v = project(layer, x)
    at = torch.arange(11)
    mask = torch.ones(11, 11, dtype=torch.double).tril() if causal else torch.ones(11, 11, dtype=torch.double)
    count = mask.sum(-1, keepdim=True)
    z = layer.scale * (feature(q) @ feature(k).mT * mask).sum(-1, keepdim=True) / count
    scores = layer.scale * rope(feature(q), at) @ rope(feature(k), at).mT / count * mask
    wanted = ((1 + 1 / z) * scores - z / count * mask) @ v
    assert torch.allclose(layer(x), layer.o_proj(wanted.movedim(1, -2).flatten(-2)), atol=1e-11)
    if causal:
        assert torch.allclose(steps(layer, x, 4)[0], layer(x), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    q, k, v = (t.detach().to(dtype) for t in tensors(200, 200))
    found = magnitude_aware(q, k, v, causal=True)[0]
    wanted = magnitude_aware(*(t.double() for t in (q, k, v)), causal=True)[0]
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=4 * torch.finfo(dtype).eps, rtol=0.01)


def test_keys_without_features_give_no_nan():
    q, k, v = (t.detach().float() for t in tensors())
    out = magnitude_aware(q, k - 1e6, v)[0]  # elu + 1 of what is far below 0
    assert out.isfinite().all()
