"""S095: sparse distributed memory against enumeration, another formula, scipy, Monte Carlo and single neurons."""

import math

import pytest
import torch
from scipy.stats import binom
from torch.nn.functional import normalize

from glocal.inspect import SparseMemory, ball_overlaps, cap_overlap, hamming, neuron_read, settle


def every(bits):
    return torch.cartesian_prod(*[torch.arange(2)] * bits).view(-1, bits)


def drawn(count, bits, seed=0):
    return torch.randint(2, (count, bits), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "radii"), [(1, range(2)), (5, range(6)), (10, range(11)), (12, (3, 4))])
def test_overlap_by_enumeration(bits, radii):
    ones = every(bits).sum(1)
    for radius in radii:
        found = ball_overlaps(bits, radius)
        assert len(found) == bits + 1
        for distance in range(bits + 1):
            centre = (torch.arange(bits) < distance).long()
            other = (every(bits) != centre).sum(1)
            assert found[distance] == int(((ones <= radius) & (other <= radius)).sum())


@pytest.mark.parametrize(("bits", "radius"), [(10, 3), (64, 5), (64, 11), (64, 15), (1000, 451)])
def test_overlap_as_ball_less_lune(bits, radius):
    """The formula of Kanerva's book: each odd step away takes a piece off the ball."""
    size = sum(math.comb(bits, i) for i in range(radius + 1))
    found = ball_overlaps(bits, radius)
    for distance in {0, 1, 2, 3, radius, 2 * radius}:
        steps = range(1, distance + 1, 2)
        lune = sum(math.comb(j - 1, (j - 1) // 2) * math.comb(bits - j, radius - (j - 1) // 2) for j in steps)
        assert found[distance] == size - lune
    assert not any(found[2 * radius + 1 :])


@pytest.mark.parametrize(("bits", "radius"), [(10, 3), (64, 11), (300, 120)])
def test_a_ball_is_a_binomial(bits, radius):
    assert ball_overlaps(bits, radius)[0] / 2**bits == pytest.approx(binom.cdf(radius, bits, 0.5), rel=1e-10)


@pytest.mark.parametrize("radius", [2, 3, 4])
def test_caps_by_monte_carlo(radius):
    draw = torch.Generator().manual_seed(0)
    points = normalize(torch.randn(400_000, 8, generator=draw), dim=-1)
    cosine = torch.tensor([1.0, 0.9, 0.5, 0.0, -0.3])
    found = cap_overlap(cosine, 8, radius).exp()
    least = 1 - 2 * radius / 8
    for c, share in zip(cosine.tolist(), found.tolist(), strict=True):
        second = points[:, 0] * c + points[:, 1] * math.sqrt(1 - c * c)
        counted = float(((points[:, 0] >= least) & (second >= least)).double().mean())
        assert share == pytest.approx(counted, abs=4 * math.sqrt(max(counted, 1e-5) / 400_000))


def test_caps_in_three_dimensions_and_many():
    """In 3 dimensions a cap's area grows with its height, and two half spheres share the angle that is left."""
    whole = cap_overlap(torch.ones(1), 3, 1).exp()
    assert float(whole) == pytest.approx((1 - (1 - 2 / 3)) / 2, rel=1e-6)
    cosine = torch.tensor([0.8, 0.0, -0.8])
    for bits in (4, 64, 500):
        shared = (math.pi - cosine.double().acos()) / (2 * math.pi)
        torch.testing.assert_close(cap_overlap(cosine, bits, bits // 2).exp(), shared, rtol=1e-4, atol=0)
    assert cap_overlap(torch.tensor(-0.5), 64, 11) == -torch.inf


def test_reading_neuron_by_neuron_is_the_same_where_every_address_is_a_neuron():
    bits, radius = 10, 3
    addresses, values, query = drawn(5, bits), torch.randn(5, 3).double(), drawn(40, bits, 1)
    for given in (None, values):
        closed = SparseMemory(bits, radius).read(query, addresses, given, rounded=False)
        single = neuron_read(query, every(bits), addresses, given, radius=radius, rounded=False)
        torch.testing.assert_close(closed, single, atol=1e-6, rtol=1e-6)
    assert torch.equal(
        SparseMemory(bits, radius).read(query, addresses), neuron_read(query, every(bits), addresses, radius=radius)
    )


def test_fewer_neurons_give_about_the_same():
    addresses, query, neurons = drawn(6, 12), drawn(30, 12, 1), drawn(20_000, 12, 2)
    closed = SparseMemory(12, 4).read(query, addresses, rounded=False)
    single = neuron_read(query, neurons, addresses, radius=4, rounded=False)
    assert float((closed - single).abs().max()) < 0.05


def test_expected_neurons_are_counted():
    memory, neurons = SparseMemory(12, 4, neurons=4096 * 20), drawn(4096 * 20, 12, 3)
    for distance in (0, 3, 6, 8, 9):
        other = (torch.arange(12) < distance).long()
        both = ((neurons.sum(1) <= 4) & ((neurons != other).sum(1) <= 4)).sum()
        expected = float(memory.expected()[distance])
        assert float(both) == pytest.approx(expected, abs=5 * math.sqrt(expected) + 1e-9)


def test_whole_neurons_are_expected_ones_on_average():
    memory, draw = SparseMemory(12, 4, neurons=100), torch.Generator().manual_seed(0)
    query, addresses = torch.zeros(50_000, 12), (torch.arange(12) < 2).long()[None]
    found = memory.weights(query, addresses, generator=draw)
    expected = float(memory.expected()[2])
    assert set(found.flatten().tolist()) == {float(int(expected)), float(int(expected) + 1)}
    assert float(found.mean()) == pytest.approx(expected, abs=0.01)


def test_weights_by_loops_and_a_mask():
    memory, query, addresses = SparseMemory(9, 3), drawn(7, 9), drawn(7, 9, 1)
    causal = torch.ones(7, 7).tril().bool()
    values = torch.randn(7, 4)
    found = memory.read(query, addresses, values, live=causal, rounded=False)
    for i in range(7):
        total, weight = torch.zeros(4).double(), 0
        for j in range(i + 1):
            share = ball_overlaps(9, 3)[int((query[i] != addresses[j]).sum())]
            total, weight = total + share * values[j].double(), weight + share
        wanted = total / weight if weight else torch.zeros(4).double()
        torch.testing.assert_close(found[i].double(), wanted, atol=1e-6, rtol=1e-6)


def test_vectors_of_two_lengths_are_bits():
    bits, query, addresses = 24, drawn(30, 24), drawn(8, 24, 1)
    plain = SparseMemory(bits, 7)
    for dtype in (torch.float16, torch.float32, torch.float64):
        signs = [(2 * t - 1).to(dtype) * 3.7 for t in (query, addresses)]
        cosine = SparseMemory(bits, 7, geometry="cosine")
        torch.testing.assert_close(cosine.weights(*signs), plain.weights(query, addresses))


def test_caps_weigh_nearly_as_balls_do():
    """Normalised over distances, as in the paper's comparison."""
    memory, caps = SparseMemory(64, 15), SparseMemory(64, 15, geometry="caps")
    one = torch.zeros(1, 64)
    far = (torch.arange(64) < torch.arange(15)[:, None]).float()
    balls = memory.weights(one, far)[0]
    sphere = caps.weights(2 * one - 1, 2 * far - 1)[0]
    assert float((balls / balls.sum() - sphere / sphere.sum()).abs().sum() / 2) < 0.1


def test_a_query_out_of_reach():
    memory, addresses, query = SparseMemory(8, 1), torch.zeros(1, 8), torch.ones(8)
    assert torch.equal(memory.read(query, addresses), query)
    assert torch.equal(memory.read(query, addresses, torch.ones(1, 3)), torch.zeros(3))
    assert torch.equal(neuron_read(query, every(8), addresses, radius=1), query)


def test_reading_again_finds_the_pattern():
    memory, addresses = SparseMemory(64, 20), drawn(10, 64)
    noisy = addresses.clone()
    noisy[:, :9] = 1 - noisy[:, :9]
    found = settle(lambda x: memory.read(x, addresses), noisy)
    assert found.fixed and 1 <= found.steps < 10 and torch.equal(found.pattern, addresses.float())
    around = settle(lambda x: 1 - x, torch.tensor([0, 1]), 7)
    assert not around.fixed and around.steps == 7 and around.pattern.tolist() == [1, 0]


def test_distances_by_loops():
    a, b = drawn(3, 11), drawn(4, 11, 1)
    assert hamming(a, b.bool()).tolist() == [[float((x != y).sum()) for y in b] for x in a]
    assert hamming(a[0], b).shape == (4,)


def test_bad_input():
    with pytest.raises(ValueError, match="radius from 0 to bits"):
        ball_overlaps(8, 9)
    with pytest.raises(ValueError, match="neurons must be at least 1"):
        SparseMemory(8, 2, neurons=0)
    with pytest.raises(ValueError, match="geometry must be"):
        SparseMemory(8, 2, geometry="sphere")
    with pytest.raises(ValueError, match="'caps' needs"):
        SparseMemory(8, 5, geometry="caps")
    with pytest.raises(ValueError, match="cap_overlap needs"):
        cap_overlap(torch.ones(1), 8, 5)
    memory = SparseMemory(8, 2)
    with pytest.raises(ValueError, match=r"query must be \(..., n\) with n = 8"):
        memory.read(torch.zeros(7), torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"addresses must be \(m, n\)"):
        memory.read(torch.zeros(8), torch.zeros(8))
    with pytest.raises(ValueError, match=r"a must hold bits, 0 or 1; it was from 0\.5 to 0\.5"):
        memory.read(torch.full((8,), 0.5), torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"values must be \(3, e\)"):
        memory.read(torch.zeros(8), torch.zeros(3, 8), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"values must be \(3, e\)"):
        neuron_read(torch.zeros(8), every(8), torch.zeros(3, 8), torch.zeros(4, 2), radius=2)
    with pytest.raises(ValueError, match="neurons must be given"):
        SparseMemory(8, 2, geometry="caps").weights(
            torch.ones(8), torch.ones(3, 8), generator=torch.Generator().manual_seed(0)
        )
    with pytest.raises(ValueError, match="limit must be at least 1"):
        settle(lambda x: x, torch.zeros(3), 0)
