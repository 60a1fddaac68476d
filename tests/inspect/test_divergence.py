"""Divergence of attention against scipy, its limiting cases, and loops over sentences."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from glocal.inspect import instruction_sensitivity, jensen_shannon, layer_divergence, part_divergence


def layers(count, heads=3, seed=0, lengths=(5, 3)):
    """Maps of two sentences, zero beyond their words."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        maps = torch.zeros(len(lengths), heads, max(lengths), max(lengths)).double()
        for b, n in enumerate(lengths):
            maps[b, :, :n, :n] = (torch.rand(heads, n, n, generator=draw).double() + 0.01).tril()
        found.append(maps)
    return found


def test_scipy_says_the_same():
    torch.manual_seed(0)
    p, q = (torch.rand(7, 11).double() * (torch.rand(7, 11) > 0.3) for _ in range(2))
    wanted = [jensenshannon(a, b) ** 2 for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor(wanted), rtol=1e-10, atol=1e-12)


def test_limits():
    p = torch.rand(4, 6, dtype=torch.float64)
    assert jensen_shannon(p, 3 * p).abs().max() < 1e-15
    assert jensen_shannon(p, p).eq(0).all()
    one = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(jensen_shannon(one, one.roll(1, 1)), torch.full((6,), math.log(2), dtype=torch.float64))
    assert jensen_shannon(torch.zeros(6), torch.ones(6)).isnan()


def test_layers_by_loops():
    a, b = layers(3), layers(3, seed=1)
    got = layer_divergence(a, b)
    for n in range(3):
        for s, words in enumerate((5, 3)):
            each = [
                jensenshannon(a[n][s, h, i].numpy(), b[n][s, h, i].numpy()) ** 2 for h in range(3) for i in range(words)
            ]
            assert float(got[n, s]) == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_quarters_by_loops():
    """8 layers of 3 heads against 12 of 5: quarters of 2 and of 3 layers."""
    a, b = layers(8), layers(12, heads=5, seed=1)
    got = part_divergence(a, b)
    for part in range(4):
        x = torch.stack(a[2 * part : 2 * part + 2]).mean((0, 2))
        y = torch.stack(b[3 * part : 3 * part + 3]).mean((0, 2))
        for s, words in enumerate((5, 3)):
            each = [jensenshannon(x[s, i].numpy(), y[s, i].numpy()) ** 2 for i in range(words)]
            assert float(got[part, s]) == pytest.approx(sum(each) / words, abs=1e-12)
    assert part_divergence(a, a).eq(0).all()
    assert part_divergence(layers(5), layers(4), 2).shape == (2, 2)


def test_sensitivity_is_read_against_the_control():
    plain, other = layers(2), layers(2, seed=3)
    half = [(x / x.sum(-1, keepdim=True).clamp(min=1) + y) / 2 for x, y in zip(plain, other, strict=True)]
    found = instruction_sensitivity(plain, half, other)
    torch.testing.assert_close(found.instruction, layer_divergence(half, plain))
    torch.testing.assert_close(found.excess, found.instruction - found.control)
    assert (found.excess < 0).all()  # the control moved it more


def test_bad_input():
    with pytest.raises(ValueError, match=r"q must hold no number below 0; the least was -1"):
        jensen_shannon(torch.ones(3), torch.tensor([1.0, -1, 2]))
    with pytest.raises(ValueError, match=r"rows of one length; they were \(3,\) and \(4,\)"):
        jensen_shannon(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="maps of the same shapes"):
        layer_divergence(layers(2), layers(3))
    with pytest.raises(ValueError, match="parts must be from 1 to the layers of b, 3; it was 4"):
        part_divergence(layers(4), layers(3))
    with pytest.raises(ValueError, match="of the same sentences"):
        part_divergence(layers(4), layers(4, lengths=(6, 3)))
    with pytest.raises(ValueError, match=r"a must be \(B, H, n, n\), one a layer"):
        layer_divergence([], [])
