"""Masses of near and far keys against loops in numpy, the estimate where it is exact, decisions in a model."""

import math

import numpy as np
import pytest
import torch

from glocal.hf import adapt
from glocal.inspect import KeyMoments, adaptive_heads, far_mass, far_moments, local_report, record
from glocal.nn import Attention, Rope
from glocal.scores import ALiBi
from tests.hf.models import build, inputs

SIZES = {"sinks": 2, "window": 5}


def grouped(**settings):
    torch.manual_seed(0)
    layer = Attention(16, 4, num_kv_heads=2, causal=True, rope=Rope(), **settings).double()
    layer.q_proj.weight.data *= 4
    return layer, torch.randn(2, 30, 16).double()


def loops(layer, tau):
    """In numpy: log-ratios, Gaussian ones, and which queries are local."""
    q, k = layer.q.numpy(), layer.k.repeat_interleave(2, 1).numpy()
    ratio, estimate = np.full(q.shape[:3], np.inf), np.full(q.shape[:3], np.inf)
    for b, h, t in np.ndindex(q.shape[:3]):
        scores = k[b, h, : t + 1] @ q[b, h, t] / np.sqrt(q.shape[-1])
        far = [j for j in range(t + 1) if j >= 2 and j <= t - 5]
        near = [j for j in range(t + 1) if j not in far]
        if far:
            ours = np.log(np.exp(scores[near]).sum())
            ratio[b, h, t] = ours - np.log(np.exp(scores[far]).sum())
            estimate[b, h, t] = ours - (np.log(len(far)) + scores[far].mean() + scores[far].var() / 2)
    share = 1 / (1 + np.exp(-ratio))
    return torch.tensor(ratio), torch.tensor(estimate), torch.tensor(share >= tau)


def test_by_loops():
    """The variance by the covariance is that of the scores."""
    layer, x = grouped()
    found = record(layer, x)
    (got,) = far_mass(found, **SIZES)
    ratio, estimate, local = loops(found[0], 0.6)
    torch.testing.assert_close(got.ratio, ratio)
    torch.testing.assert_close(got.estimate, estimate)
    assert torch.equal(got.local(0.6), local) and 0.1 < local[..., 7:].double().mean() < 0.9
    assert got.far.tolist() == [max(0, t + 1 - 7) for t in range(30)]


def test_gaussian_keys():
    torch.manual_seed(0)
    mix, mean = torch.randn(64, 64).double() / 8, torch.randn(64).double() / 4
    keys = (torch.randn(1, 1, 20000, 64).double() @ mix) + mean
    q = torch.randn(1, 1, 200, 64).double()
    scale = 1 / 8
    q *= (2 / (q @ (mix.T @ mix) * q).sum(-1, keepdim=True) / scale**2).sqrt() * torch.rand(200, 1).double()
    true = (q @ keys.mT * scale).logsumexp(-1)
    got = KeyMoments.of(keys).log_mass(q, torch.full((200,), 20000), scale)
    assert (got - true).abs().mean() < 0.05
    calibrated = KeyMoments(mean[None], (mix.T @ mix)[None]).log_mass(q, torch.full((200,), 20000), scale)
    assert (calibrated - true).abs().mean() < 0.1
    assert (got - true).std() < 0.2 * true.std()


def test_moments_of_other_prompts():
    """Those of a record are numpy's, over all prompts; used on the same prompt they are those of its last query."""
    layer, x = grouped()
    found = record(layer, x)
    (moments,) = far_moments(found, **SIZES)
    for h in range(2):
        keys = found[0].k[:, h, 2:25].flatten(0, 1).numpy()
        np.testing.assert_allclose(moments.mean[h], keys.mean(0))
        np.testing.assert_allclose(moments.covariance[h], np.cov(keys.T, bias=True))
    alone = record(layer, x[:1])
    (own,), (given,) = far_mass(alone, **SIZES), far_mass(alone, **SIZES, moments=far_moments(alone, **SIZES))
    torch.testing.assert_close(own.estimate[:, :, -1], given.estimate[:, :, -1])
    assert not torch.allclose(own.estimate[:, :, 15], given.estimate[:, :, 15])


def test_invariances():
    """One vector added to all keys, and one rotation of queries and keys, change no decision."""
    layer, x = grouped()
    layer.rope = None
    found = record(layer, x)
    (before,) = far_mass(found, **SIZES)
    turn = torch.linalg.qr(torch.randn(4, 4).double())[0]
    for q, k in ((lambda q: q, lambda k: k + 3.0), (lambda q: q @ turn, lambda k: k @ turn)):
        tensors = dict(found[0].tensors)
        tensors.update(q=q(tensors["q"]), k=k(tensors["k"]))
        changed = type(found)([type(found[0])(**{**vars(found[0]), "tensors": tensors})])
        (after,) = far_mass(changed, **SIZES)
        torch.testing.assert_close(after.ratio, before.ratio)
        torch.testing.assert_close(after.estimate, before.estimate)


@pytest.mark.parametrize("tau", [0.3, 0.6])
def test_adaptive_heads_by_hand(tau):
    """Queries that are told to be local attend near keys alone, the others all."""
    layer, x = grouped()
    (mass,) = far_mass(record(layer, x), **SIZES)
    found = record(layer, x, keep=["attention", "values"])[0]
    local = mass.local(tau, estimated=True)
    assert 0.1 < local[..., 7:].double().mean() < 0.9
    i, j = torch.arange(30)[:, None], torch.arange(30)
    near, scores = (j < 2) | (i - j < 5), found.scores(torch.arange(30))
    weights = scores.masked_fill(local[..., None] & ~near, -torch.inf).softmax(-1)
    mixed = weights @ found.v.repeat_interleave(2, 1)
    wanted = layer.o_proj(mixed.transpose(1, 2).flatten(2))
    with adaptive_heads(layer, **SIZES, tau=tau):
        torch.testing.assert_close(layer(x), wanted)
        one = torch.cat([layer(x[:, t : t + 1], x[:, : t + 1]) for t in range(20, 30)], 1)
    torch.testing.assert_close(one, wanted[:, 20:])  # token by token, as when decoding
    assert "operator" not in vars(layer)


def test_limits():
    """No far key: bit-equal. All heads told to read everything: equal to torch's attention."""
    layer, x = grouped()
    plain = layer(x)
    with adaptive_heads(layer, sinks=2, window=28):
        assert torch.equal(layer(x), plain)
    (mass,) = far_mass(record(layer, x), sinks=2, window=30)
    assert mass.local(0.999).all() and mass.local(0.999, estimated=True).all()
    found = record(layer, x, keep=["attention", "values"])[0]
    k, v = (t.repeat_interleave(2, 1) for t in (found.k, found.v))
    torchs = torch.nn.functional.scaled_dot_product_attention(found.q, k, v, is_causal=True)
    with adaptive_heads(layer, **SIZES, tau=1 - 1e-12):
        torch.testing.assert_close(layer(x), layer.o_proj(torchs.transpose(1, 2).flatten(2)), atol=1e-6, rtol=0)
    with adaptive_heads(layer, **SIZES, tau=1e-12):
        near = record(layer, x)  # of attention that another `intercept` computes
    assert len(near) == 1


def test_in_a_model_of_transformers():
    torch.manual_seed(0)
    model, batch = build("llama").eval(), inputs("llama")
    moments = far_moments(record(model, batch), sinks=1, window=3)
    with torch.no_grad(), adaptive_heads(model, moments, sinks=1, window=3, tau=1e-9):
        got = model(**batch).logits
    with torch.no_grad(), adapt(model, "causal() & (sliding(2, 0) | sinks(1))"):
        torch.testing.assert_close(got, model(**batch).logits, atol=1e-5, rtol=1e-4)


def test_report():
    layer, x = grouped()
    mass = far_mass(record(layer, x), **SIZES)
    local, taken = [mass[0].local()], [mass[0].local(estimated=True)]
    got = local_report(local, taken, mass)
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for a, b in zip(local[0][..., 7:].flatten().tolist(), taken[0][..., 7:].flatten().tolist(), strict=False):
        counts[a, b] += 1
    total = sum(counts.values())
    assert total == 2 * 4 * 23
    assert got.sparsity == pytest.approx((counts[True, True] + counts[False, True]) / total)
    assert got.agreement == pytest.approx((counts[True, True] + counts[False, False]) / total)
    assert got.recall == pytest.approx(counts[False, False] / (counts[False, False] + counts[False, True]))
    assert got.precision == pytest.approx(counts[False, False] / (counts[False, False] + counts[True, False]))
    none = local_report(local, [torch.ones(4, 1, dtype=torch.bool)], mass)
    assert (
        none.sparsity == 1
        and none.recall == 0
        and max(none.agreement, 1 - none.agreement) == pytest.approx(none.majority)
    )
    assert math.isnan(none.precision)


def test_bad_input():
    layer, x = grouped()
    found = record(layer, x)
    for sizes in ({"sinks": -1, "window": 3}, {"sinks": 1, "window": 0}):
        with pytest.raises(ValueError, match="sinks must be at least 0 and window at least 1; they were"):
            far_mass(found, **sizes)
        with pytest.raises(ValueError, match="window at least 1"), adaptive_heads(layer, **sizes):
            pass
    with pytest.raises(ValueError, match="tau must be between 0 and 1; it was 1"):
        far_mass(found, **SIZES)[0].local(1)
    with pytest.raises(ValueError, match="sinks 2 and window 28 leave no far keys in 30 tokens"):
        far_moments(found, sinks=2, window=28)
    with pytest.raises(ValueError, match="without padding"):
        far_mass(record(layer, x, keys=torch.arange(30).expand(2, -1) > 3), **SIZES)
    with pytest.raises(ValueError, match="one sequence"):
        far_mass(record(Attention(8, 2), torch.randn(1, 3, 8), context=torch.randn(1, 4, 8)), **SIZES)

    with pytest.raises(ValueError, match="without padding, of one length; those of ''"), adaptive_heads(layer, **SIZES):
        layer(x, keys=torch.arange(30).expand(2, -1) > 3)

    class Sloped(Attention):
        def score(self, call):
            return ALiBi.of(self.num_heads)

    sloped = Sloped(8, 2, causal=True)
    with pytest.raises(ValueError, match="plain scores; those of '' have"), adaptive_heads(sloped, **SIZES):
        sloped(torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match="plain scores; those of '' have a bias or a cap"):
        far_mass(record(Sloped(8, 2, causal=True), torch.randn(1, 9, 8)), **SIZES)
