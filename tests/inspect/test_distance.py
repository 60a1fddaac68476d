"""S094: how attention falls with distance, against loops over pairs, maps with a known law, and patterns."""

import math

import pytest
import torch
from torch import nn

from glocal.inspect import Locality, layer_localities, locality
from glocal.inspect import distance as module
from glocal.nn import MLP, AgentAttention, Attention, Block, NeighborhoodAttention
from glocal.patterns import Window
from tests import oracle


def squares(rows, columns):
    """Squared distance of each pair, ``(N, N)``."""
    at = [(i, j) for i in range(rows) for j in range(columns)]
    return torch.tensor([[(y - i) ** 2 + (x - j) ** 2 for i, j in at] for y, x in at], dtype=torch.float64)


def mean_by_offset(weights, rows, columns):
    found = {}
    for query in range(rows * columns):
        for key in range(rows * columns):
            at = (key // columns - query // columns, key % columns - query % columns)
            found.setdefault(at, []).append(float(weights[query, key]))
    return {at: sum(values) / len(values) for at, values in found.items()}


@pytest.mark.parametrize("exponent", [2.0, 3.5])
@pytest.mark.parametrize("floor", [0.0, 0.002, 0.05])
def test_a_power_of_the_distance_over_a_floor_is_recovered(exponent, floor):
    found = Locality.of(0.3 * (1 + squares(12, 16)) ** (-exponent / 2) + floor, (12, 16))
    assert found.exponent == pytest.approx(exponent, abs=0.01)
    assert found.amplitude == pytest.approx(0.3, abs=1e-3) and found.floor == pytest.approx(floor, abs=1e-4)


def test_what_does_not_decay_by_a_power_is_fitted_as_well_as_one_can_without_going_below_zero():
    square = squares(9, 9)
    weights = (1 - square / 60).clamp(min=0)  # falls ever faster: without the limit the floor would be negative
    found = Locality.of(weights, (9, 9))
    assert found.floor == 0 and found.amplitude > 0

    def error(exponent, amplitude, floor):
        return float((amplitude * (1 + square) ** (-exponent / 2) + floor - weights).square().sum())

    best = error(found.exponent, found.amplitude, 0)
    for more in (0.98, 1.02):
        assert (
            error(more * found.exponent, found.amplitude, 0) > best < error(found.exponent, more * found.amplitude, 0)
        )
    assert best < error(found.exponent, found.amplitude, 0.01)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_so_it_is_from_queries_and_keys_whose_weights_sum_to_one(noise):
    """Rows near a border share their attention among fewer keys, so that the law holds only about."""
    torch.manual_seed(0)
    weights = 1 / (1 + squares(16, 16)) + 0.02
    scores = weights.log() + noise * torch.randn(256, 256).double()
    k = torch.eye(256).double().view(1, 1, 16, 16, 256)
    found = locality(scores.view(1, 1, 16, 16, 256), k, scale=1.0)
    assert found.exponent == pytest.approx(2, abs=0.1)
    assert found.floor == pytest.approx(0.02 / float(weights.sum(1).mean()), rel=0.1)


def test_weights_by_offset_and_by_distance_by_loops():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 3, 5, 6).double()
    k = k[:, :2]  # two heads of queries share one of keys
    found = locality(q, k)
    shares = (q.flatten(2, 3) @ k.flatten(2, 3).repeat_interleave(2, 1).mT / 6**0.5).softmax(-1).mean((0, 1))
    wanted = mean_by_offset(shares, 3, 5)
    assert found.weights.shape == (5, 9) and len(wanted) == 45
    for (row, column), value in wanted.items():
        assert float(found.weights[2 + row, 4 + column]) == pytest.approx(value, abs=1e-12)
    square = squares(3, 5)
    distances, means = found.histogram()
    assert distances.tolist() == pytest.approx(square.unique().sqrt().tolist())
    for distance, value in zip(distances, means, strict=True):
        assert float(value) == pytest.approx(float(shares[(square - distance**2).abs() < 1e-9].mean()), abs=1e-12)
    for radius in (0, 1, 1.5, 3, 9):
        assert found.within(radius) == pytest.approx(float(shares[square <= radius**2].sum()) / 15)
    again = Locality.of(shares.expand(2, 3, -1, -1), (3, 5))
    torch.testing.assert_close(again.weights, found.weights)


def test_tiles_change_nothing(monkeypatch):
    q, k = torch.randn(2, 2, 2, 7, 5, 8).unbind()
    whole = locality(q, k)
    sizes = []
    add = module._add
    monkeypatch.setattr(module, "_AT_ONCE", 2 * 2 * 35 * 4)
    monkeypatch.setattr(
        module, "_add", lambda sums, weights, *rest: (sizes.append(len(weights)), add(sums, weights, *rest))
    )
    torch.testing.assert_close(locality(q, k).weights, whole.weights)
    assert sizes == [4] * 8 + [3]


def test_a_pattern_is_what_is_measured():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 9, 4).double().unbind()
    found = locality(q, k, where=Window((3, 3)))
    eye = torch.eye(81).double().expand(1, 2, 81, 81)
    shares, _ = oracle.attend(q.flatten(2, 3), k.flatten(2, 3), eye, Window((3, 3)).mask((9, 9)), scale=0.5)
    for at, value in mean_by_offset(shares.mean((0, 1)), 9, 9).items():
        assert float(found.weights[8 + at[0], 8 + at[1]]) == pytest.approx(value, abs=1e-12)
    assert found.within(2 * 2**0.5) == pytest.approx(1) and found.weights[0, 0] == 0


@pytest.mark.parametrize("side", [1, 3, 7, 11])
def test_the_field_is_the_square_that_is_attended_to(side):
    offset = torch.arange(16)
    near = (offset[:, None] - offset).abs() <= side // 2
    square = (near[:, None, :, None] & near[None, :, None, :]).reshape(256, 256).double()
    found = Locality(Locality.of(square, (16, 16)).weights, 2.0, 1.0, 0.0)
    assert found.side(1.0) == found.side(0.999) == side
    # What is the same everywhere is no part of it.
    assert Locality(found.weights + 0.1, 2.0, 1.0, 0.1).side(0.999) == side


def test_the_field_by_loops():
    weights = (1 + squares(9, 6)) ** -1.5 + 0.01
    found = Locality.of(weights, (9, 6))
    far = torch.tensor([[max(abs(a // 6 - b // 6), abs(a % 6 - b % 6)) for b in range(54)] for a in range(54)])
    for share in (0.5, 0.8, 0.95, 1.0):
        held = [float((weights - 0.01)[far <= radius].sum() / (weights - 0.01).sum()) for radius in range(9)]
        radius = next(r for r, value in enumerate(held) if value >= share - 1e-4)
        assert found.side(share) == 2 * radius + 1


def test_the_kernel_is_three_fifths_made_odd():
    def kernel(side):
        weights = torch.zeros(63, 63).double()
        weights[31 - side // 2 : 32 + side // 2, 31 - side // 2 : 32 + side // 2] = 1
        found = Locality(weights, 2.0, 1.0, 0.0)
        assert found.side(1.0) >= found.side() >= side - 2
        return found.side(), found.kernel_size()

    for side in range(1, 40, 2):
        field, found = kernel(side)
        assert found % 2 == 1 and abs(found - 0.6 * field) <= 1


def test_attention_that_is_the_same_everywhere_decays_nowhere():
    found = locality(torch.zeros(1, 1, 8, 6, 4), torch.randn(1, 1, 8, 6, 4))
    assert math.isnan(found.exponent) and found.amplitude == 0 and found.floor == pytest.approx(1 / 48)
    assert (found.side(), found.kernel_size()) == (1, 1)
    single = locality(*torch.randn(2, 1, 1, 1, 1, 4).unbind())
    assert single.within(0) == 1 and single.side() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k = torch.randn(2, 1, 2, 6, 6, 8).to(dtype).unbind()
    torch.testing.assert_close(locality(q, k).weights, locality(q.double(), k.double()).weights, atol=1e-5, rtol=1e-4)


def test_layers_of_a_model_are_found_and_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(
        Block(8, Attention(8, 2, qkv_bias=True), MLP(8, 8)),
        Block(8, NeighborhoodAttention(8, 2, window=3, rpb=False), MLP(8, 8)),
        Block(8, AgentAttention(8, 2, num_agents=4), MLP(8, 8)),  # no softmax over keys: left out
    )
    x = torch.randn(2, 5, 7, 8)
    before = model(x)
    found = layer_localities(model, x)
    assert list(found) == ["0.attention", "1.attention"]
    first = model[0].attention
    q, k, _ = first.project(*[model[0].norm1(x)] * 2, None, None)
    torch.testing.assert_close(found["0.attention"].weights, locality(q, k).weights)
    assert found["1.attention"].within(2 * 2**0.5) == pytest.approx(1, abs=1e-6)
    by_name = layer_localities(first, x=model[0].norm1(x))[""]
    torch.testing.assert_close(by_name.weights, found["0.attention"].weights)
    assert torch.equal(model(x), before) and not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input():
    with pytest.raises(ValueError, match=r"weights must be \(..., 6, 6\) for grid \(2, 3\)"):
        Locality.of(torch.rand(5, 6), (2, 3))
    q = torch.randn(1, 2, 3, 4, 8)
    for k in (
        torch.randn(1, 2, 12, 8),
        torch.randn(1, 2, 4, 3, 8),
        torch.randn(2, 2, 3, 4, 8),
        q[:, :1].repeat(1, 3, 1, 1, 1),
    ):
        with pytest.raises(ValueError, match="q and k must be"):
            locality(q, k)
    with pytest.raises(ValueError, match="share must be above 0"):
        locality(q, q).side(0.0)
    layer = Attention(8, 2)
    with pytest.raises(ValueError, match="it called none"):
        layer_localities(layer, torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match="called twice"):
        layer_localities(nn.Sequential(layer, layer), torch.randn(1, 3, 4, 8))
    with pytest.raises(ValueError, match="adds to its scores"):
        layer_localities(Attention(8, 2, softcap=5.0), torch.randn(1, 3, 4, 8))
    with pytest.raises(ValueError, match="has padding"):
        layer_localities(layer, torch.randn(1, 3, 4, 8), keys=torch.ones(1, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="it called none"):  # cross-attention has no distances
        layer_localities(layer, torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 8))
    with pytest.raises(ValueError, match="it called none"):
        layer_localities(layer, x=torch.randn(1, 3, 4, 8), context=torch.randn(1, 3, 4, 8))
    assert not layer._forward_pre_hooks
