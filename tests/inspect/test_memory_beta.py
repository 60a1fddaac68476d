"""S095: the softmax that a memory is like, against numpy's fit, the published figures, a grid, and loops over heads."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from glocal.inspect import ball_overlaps, effective_beta, fit_beta, optimal_radius

PUBLISHED = {5: 35.5, 11: 15.9, 15: 10.1}


@pytest.mark.parametrize(("bits", "radius", "upto"), [(64, 5, None), (64, 11, 23), (64, 15, 64), (10, 4, 3)])
def test_slope_of_numpy(bits, radius, upto):
    overlaps = [value for value in ball_overlaps(bits, radius)[: radius if upto is None else upto] if value]
    x = 1 - 2 * np.arange(len(overlaps)) / bits
    y = np.log(np.array(overlaps, dtype=float))
    slope, bias = np.polyfit(x, y, 1)
    found = fit_beta(bits, radius, upto=upto)
    assert found.beta == pytest.approx(slope) and found.bias == pytest.approx(bias)
    assert found.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.parametrize("radius", PUBLISHED)
def test_published_slopes_come_with_their_degrees_of_freedom(radius):
    legacy, plain = (fit_beta(64, radius, legacy_ddof=flag) for flag in (True, False))
    assert round(legacy.beta, 1) == PUBLISHED[radius]
    x = np.array([1 - 2 * d / 64 for d in range(radius)])
    y = np.log(np.array(ball_overlaps(64, radius)[:radius], dtype=float))
    assert legacy.beta == pytest.approx(np.cov(x, y)[0, 1] / np.var(x))
    assert legacy.beta / plain.beta == pytest.approx(radius / (radius - 1)) and legacy.r2 == plain.r2


def test_total_variation_by_loops():
    found = fit_beta(64, 11)
    memory = [ball_overlaps(64, 11)[d] for d in range(11)]
    soft = [math.exp(found.beta * (1 - 2 * d / 64)) for d in range(11)]
    apart = sum(abs(a / sum(memory) - b / sum(soft)) for a, b in zip(memory, soft, strict=True)) / 2
    assert found.total_variation == pytest.approx(apart)


def test_radius_for_signal_against_noise():
    for bits, neurons, patterns in ((64, 2**64, 1024), (1000, 10**6, 10**4), (256, 10**5, 100)):
        share = (2 * patterns * neurons) ** (-1 / 3)
        assert optimal_radius(bits, neurons, patterns) == int(binom.ppf(share, bits, 0.5))
    # It is where signal (p R) against the noise of other patterns is largest: R p / (1 + p m + p^3 m R).
    p = np.logspace(-6, -1, 200_001)
    best = p[np.argmax(1e6 * p / (1 + 1e4 * p + p**3 * 1e10))]
    assert best == pytest.approx((2 * 1e10) ** (-1 / 3), rel=1e-3)


@pytest.mark.parametrize(("bits", "neurons", "recall"), [(64, 2**64, 0.5), (1000, 10**6, 0.99), (1000, 100, 0.99)])
def test_radius_for_capacity(bits, neurons, recall):
    z = norm.ppf(recall ** (1 / bits))
    p = np.logspace(-16, -0.5, 2_000_001)
    kept = ((p * neurons) ** 2 / z**2 - p * neurons) / (p**2 * neurons + (p**2 * neurons) ** 2)
    wanted = int(binom.ppf(p[np.argmax(kept)], bits, 0.5))
    assert optimal_radius(bits, neurons, by="capacity", recall=recall) == wanted


def test_published_radii():
    assert optimal_radius(64, 2**64, by="capacity") == 5
    assert optimal_radius(64, 2**64, 1024) == 11


def test_effective_beta_by_loops():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8).double(), torch.randn(2, 2, 5, 8).double()
    found = effective_beta(q, k)
    for head in range(4):
        each = [q[b, head, i].norm() * k[b, head // 2, j].norm() for b in range(2) for i in range(3) for j in range(5)]
        assert float(found[head]) == pytest.approx(float(sum(each)) / len(each) / 8**0.5)


def test_unit_vectors_have_their_scale():
    units = torch.nn.functional.normalize(torch.randn(1, 3, 4, 4, 16), dim=-1)
    scale = torch.tensor([10.3, 15.0, 24.8])
    torch.testing.assert_close(effective_beta(units, units, scale=scale), scale)
    torch.testing.assert_close(
        effective_beta(units.half(), units.half(), scale=2.0), torch.full((3,), 2.0), rtol=1e-3, atol=0
    )


def test_bad_input():
    with pytest.raises(ValueError, match="two distances or more"):
        fit_beta(64, 1)
    with pytest.raises(ValueError, match="patterns must be at least 1"):
        optimal_radius(64, 100)
    with pytest.raises(ValueError, match="by must be"):
        optimal_radius(64, 100, 10, by="noise")
    with pytest.raises(ValueError, match="recall must be"):
        optimal_radius(64, 100, by="capacity", recall=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        optimal_radius(0, 100, 10)
    with pytest.raises(ValueError, match="q and k must be"):
        effective_beta(torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8))
