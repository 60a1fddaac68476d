"""The verifier finds what is wrong: layers that leak, that forget, that claim what they have not."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import WindowCache
from glocal.inspect import layers, reach, uses, verify
from glocal.nn import Attention, SlidingWindowAttention
from glocal.patterns import Full, Sliding


class Leaking(Attention):
    """Says that it is causal and sees everything."""

    def where(self, q, k, call):
        return Full()


class LeakingByChoice(Attention):
    """No gradient from the future, but a choice that looks at it."""

    def mix(self, q, k, v, call):
        nearest = Sliding(0, 0)
        wide = Sliding(2, 0)
        return self.attend(q, k, v, wide if float(k.detach().mean()) > 0 else nearest, call)


class Forgetful(SlidingWindowAttention):
    """Decodes with too small a cache."""

    def new_cache(self):
        return WindowCache(self.window - 1)


class Blind(Attention):
    """Says that it is noncausal and sees only the past."""

    def where(self, q, k, call):
        return Sliding(2, 0)


class Deaf(Attention):
    """Says that it has cross-attention and attends to itself."""

    def mix(self, q, k, v, call):
        return self.attend(q, q, q, Full(), call)


def test_a_leak_is_found_in_every_way():
    verdict = verify(Leaking, "causal-self")
    assert not verdict.holds
    assert not any(verdict.checks[name] for name in ("truncation", "perturbation", "gradients"))


def test_a_leak_through_a_choice_is_found_without_gradients():
    found = [verify(LeakingByChoice, "causal-self", seed=seed) for seed in range(4)]
    assert all(verdict.checks["gradients"] for verdict in found)
    assert not all(verdict.checks["truncation"] for verdict in found)


def test_a_cache_that_forgets_is_found():
    verdict = verify(Forgetful, "causal-self")
    assert [name for name, holds in verdict.checks.items() if not holds] == ["decoding"]


def test_what_sees_only_the_past_is_not_noncausal():
    assert not any(verify(Blind, "noncausal-self").checks.values())


def test_cross_attention_must_see_the_context():
    verdict = verify(Deaf, "noncausal-cross")
    assert not verdict.checks["perturbation"] and not verdict.checks["gradients"]


def test_plain_attention_has_all_uses():
    assert uses(Attention) == ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")


def test_reach_is_the_pattern():
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 2, window=3, causal=True).double()
    found = reach(layer, torch.randn(1, 9, 16, dtype=torch.float64))
    assert torch.equal(found, Sliding(2, 0).mask(9))


def test_layers_among_names():
    assert layers(["glocal.nn.Attention", "glocal.Window", "glocal.nn.nothing", "no.such.module"]) == [Attention]


def test_an_unknown_use_is_refused():
    with pytest.raises(ValueError, match="use must be one of noncausal-self"):
        verify(Attention, "sideways")
