"""S074: the network: which layers convolve, its size counted by hand, decoding and causality."""

from __future__ import annotations

import pytest
import torch

import glocal
from glocal.models.language.mta import mta
from glocal.nn import no_weight_decay
from tests.models.networks import assert_a_step_changes


def tiny(**options):
    torch.manual_seed(0)
    model = glocal.create("mta_tiny", vocab=50, **options).double().eval()
    for name, p in model.named_parameters():
        if name.split(".")[-1] in ("score_kernel", "weight_kernel", "score_mix", "weight_mix"):
            torch.nn.init.normal_(p, std=0.4)
    return model


@pytest.mark.parametrize(("name", "dim", "depth"), [("mta_300m", 1024, 20), ("mta_1b", 2048, 24)])
def test_sizes_counted_by_hand(name, dim, depth):
    heads, hidden = 16, {1024: 2816, 2048: 5632}[dim]
    width = dim // heads
    every = 4 * dim**2 + 3 * dim * hidden + 2 * dim + 2 * heads**2 + width + width + 1
    convolving = [layer for layer in range(depth) if layer in (2, 6, 10, 14, 18, 22)]
    expected = 128256 * dim + depth * every + len(convolving) * 2 * heads * 6 * 11 + dim
    assert glocal.models.parameters(name) == expected
    assert f"{expected:,}" in glocal.create.__globals__["maker"](name).__doc__


def test_every_fourth_layer_convolves_and_all_mix():
    layers = [block.attention for block in tiny(depth=8).blocks]
    for number, layer in enumerate(layers):
        assert (layer.score_kernel is not None) == (layer.weight_kernel is not None) == (number in (2, 6))
        assert layer.score_mix is not None and layer.head_norm is not None and layer.head_gate is not None
    toy = mta(30, 64, 2, 2, period=1, place=0, convolve=("scores",), mix_heads=(), head_norm=False, head_gate=False)
    assert no_weight_decay(toy) == {f"blocks.{n}.attention.score_kernel" for n in (0, 1)}


def test_decoding_equals_the_parallel_form():
    model, tokens = tiny(), torch.randint(50, (2, 24))
    caches = model.new_caches()
    with torch.no_grad():
        steps = [model(tokens[:, :9], caches=caches)]
        steps += [model(tokens[:, t : t + 1], caches=caches) for t in range(9, 24)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens))
    assert [cache.queries.shape[2] for cache in caches] == [0, 0, 4, 0]


def test_no_token_reaches_what_is_before_it():
    model, tokens = tiny(), torch.randint(50, (2, 24))
    other = tokens.clone()
    other[:, 11] = (other[:, 11] + 1) % 50
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.isclose(a[:, 11:], b[:, 11:]).all(-1).any()


def test_every_parameter_learns():
    model = tiny().train()
    model(torch.randint(50, (2, 12))).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused
    assert_a_step_changes(model)
