"""S016: the network, its layers in turn, its size counted by hand, decoding and causality."""

from __future__ import annotations

import torch

import glocal
from glocal.cache import FullCache


def tiny(**options):
    torch.manual_seed(0)
    return glocal.create("asa_tiny", vocab=50, **options).double().eval()


def test_layers_alternate_and_the_first_is_local():
    layers = [block.attention for block in tiny(depth=5).blocks]
    assert [layer.branches for layer in layers] == [("slide",), ("compress", "select")] * 2 + [("slide",)]
    assert [layer.num_groups for layer in layers] == [1, 2, 1, 2, 1]


def test_size_of_the_340m_variant():
    with torch.device("meta"):
        model = glocal.create("asa_340m")
    common = 1024 * 32 * (32 + 32) + 32 * 64 * 1024 + 1024 * (224 + 32)  # queries, output, latents with rotary key
    local = common + 224 + 224 * 32 * (32 + 64)  # norm, keys and values of heads
    far = common + 112 + 112 * 32 * (32 + 64) + 1024 * 32 * 2  # and two gates
    blocks = 12 * (local + far) + 24 * (3 * 1024 * 2816 + 2 * 1024)
    assert sum(p.numel() for p in model.parameters()) == blocks + 32000 * 1024 + 1024 == 360_567_744


def test_decoding_equals_the_parallel_form_from_small_caches():
    model = tiny()
    tokens = torch.randint(50, (2, 70))
    caches = model.new_caches()
    with torch.no_grad():
        steps = [model(tokens[:, :40], caches=caches)]
        steps += [model(tokens[:, t : t + 1], caches=caches) for t in range(40, 70)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens))
    full = FullCache()
    full.update(*torch.zeros(2, 2, 4, 70, 16, dtype=torch.float64))
    local, far = caches[0].nbytes, caches[1].nbytes
    assert local == 2 * 16 * (32 + 8) * 8 and far < full.nbytes / 2


def test_generates_greedily_and_causally():
    model = tiny().float()
    tokens = torch.randint(50, (2, 30))
    slow = tokens
    with torch.no_grad():
        for _ in range(8):
            slow = torch.cat([slow, model(slow)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(model.generate(tokens, 8), slow)
        other = slow.clone()
        other[:, 25] = (other[:, 25] + 1) % 50
        a, b = model(slow), model(other)
    torch.testing.assert_close(a[:, :25], b[:, :25])
    assert not torch.allclose(a[:, 25:], b[:, 25:])
