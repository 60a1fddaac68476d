"""Kept mass against a computation by brute force in float64."""

import pytest
import torch

from glocal import Keys, PerHead, Sliding, parse
from glocal.hf import mass, recorded
from tests.hf.test_attention import Plain, bert, mistral, states, tokens


def brute(q, k, mask_own, pattern, real):
    """Mean over real queries of the probability on the pattern's pairs, ``(H,)``."""
    scores = (q.double() @ k.double().transpose(-1, -2)) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~mask_own, -torch.inf).softmax(-1)
    kept = (p * pattern).sum(-1)
    return torch.stack([kept[:, h][real].mean() for h in range(q.shape[1])])


@pytest.mark.parametrize("budget", [1, 1 << 22])
@pytest.mark.parametrize("causal", [False, True])
def test_against_brute_force(monkeypatch, budget, causal):
    monkeypatch.setattr(mass, "_BUDGET", budget)
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 13, 8, generator=make) * 2 for _ in range(3))
    real = torch.ones(2, 13, dtype=torch.bool)
    real[1, 9:] = False
    patterns = [parse("sliding(2, 1) | tokens([0])"), parse("block(4)"), PerHead([Sliding(n, n) for n in range(3)])]
    out, sums, queries = mass._full(Plain(), q, k, v, real, patterns, is_causal=causal)
    own = Keys(real).mask(13) & (torch.ones(13, 13).tril().bool() if causal else True)
    assert queries == 22
    for pattern, found in zip(patterns, sums, strict=True):
        assert torch.allclose(found / queries, brute(q, k, own, pattern.mask(13), real), atol=1e-6)
    assert torch.allclose(out[0], torch.nn.functional.scaled_dot_product_attention(q, k, v, own)[0], atol=1e-5)


@pytest.mark.parametrize("make", [bert, lambda: mistral(None)])
def test_recording_changes_nothing(make):
    model, batch = make(), tokens(pad=3)
    before = states(model, batch)
    with recorded(model, ["full()", "sliding(3, 3)", "sliding(0, 0)"]) as kept:
        real = batch["attention_mask"].bool()
        assert torch.allclose(states(model, batch)[real], before[real], atol=2e-5)
        states(model, batch)
    share = kept.share()
    assert share.shape == (3, model.config.num_hidden_layers, 4)
    assert torch.allclose(share[0], torch.ones_like(share[0]))
    assert (share[1] < 1).all() and (share[1] > share[2]).all() and (share[2] > 0).all()


def test_nothing_recorded():
    with recorded(bert(), ["full()"]) as kept, pytest.raises(ValueError, match="run the model"):
        kept.share()
