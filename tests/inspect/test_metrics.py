"""Metrics of heads against loops over queries and keys, limiting cases, and heads that were planted."""

import math

import pytest
import torch

from glocal.inspect import (
    METRICS,
    entropy,
    future_influence,
    local_mass,
    mean_distance,
    measure,
    offset_mass,
    record,
    sink_mass,
    token_rhythm,
)
from glocal.nn import Attention, NeighborhoodAttention
from glocal.steer.rhythm import rhythm


def causal(batch=2, length=30, heads=3):
    torch.manual_seed(0)
    layer = Attention(12, heads, causal=True).double()
    layer.q_proj.weight.data *= 4
    return layer, torch.randn(batch, length, 12).double()


def by_loops(weights, real, number):
    """The mean over real queries of ``number(t, row)``."""
    values = [number(t, weights[b, :, t]) for b in range(len(weights)) for t in range(weights.shape[2]) if real[b, t]]
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("padded", [False, True])
def test_by_loops(padded):
    layer, x = causal()
    keys = torch.arange(30) < torch.tensor([[30], [25 if padded else 30]])
    found = record(layer, x, keys=keys)
    weights = found[0].weights()
    away = lambda t: (t - torch.arange(30)).abs()  # noqa: E731
    wanted = {
        "distance": lambda t, row: (row * away(t)).sum(-1),
        "entropy": lambda t, row: -(row[:, : t + 1] * row[:, : t + 1].log()).sum(-1),
        "local": lambda t, row: row[:, max(0, t - 4) : t + 5].sum(-1),
        "sink": lambda t, row: row[:, :2].sum(-1),
        "back": lambda t, row: row[:, t - 3] if t >= 3 else torch.zeros(3).double(),
    }
    metrics = {
        "distance": mean_distance,
        "entropy": entropy,
        "local": local_mass(5),
        "sink": sink_mass(2),
        "back": offset_mass(3),
    }
    got = measure(found, metrics)
    for name, number in wanted.items():
        torch.testing.assert_close(got[name][0], by_loops(weights, keys, number))


@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("bounds", [(10, 50), (2, 6), (0, 0)])
def test_future_influence_is_the_mean_over_tokens(padded, bounds):
    layer, x = causal()
    keys = torch.ones(2, 30, dtype=torch.bool)
    keys[1, {"none": slice(0), "right": slice(25, None), "left": slice(5)}[padded]] = False
    found = record(layer, x, keys=keys)
    weights, means = found[0].weights(), []
    for b in range(2):
        for s in range(30):
            rows = [t for t in range(30) if keys[b, t] and keys[b, s] and s + bounds[0] <= t <= s + bounds[1]]
            if rows:
                means.append(weights[b, :, rows, s].mean(-1))
    got = measure(found, {"future": future_influence(*bounds)})["future"][0]
    torch.testing.assert_close(got, torch.stack(means).mean(0))


def test_on_a_map_distance_is_euclidean():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, window=5).double()
    found = record(layer, torch.randn(1, 6, 7, 8).double())
    place = torch.cartesian_prod(torch.arange(6.0), torch.arange(7.0)).double()
    wanted = (found[0].weights() * torch.cdist(place, place)).sum(-1).mean((0, 2))
    torch.testing.assert_close(measure(found, ["distance"])["distance"][0], wanted)


def test_planted_heads_are_found():
    """A head that looks at itself, one that looks one back, one that looks at the first token."""

    class Planted(Attention):
        def score(self, call):
            back = (torch.arange(20)[:, None] - torch.arange(20)).double()
            tables = [back == 0, back == 1, (torch.arange(20) == 0).expand(20, 20)]
            return torch.stack(tables).double() * 50

    torch.manual_seed(0)
    found = measure(record(Planted(12, 3, causal=True).double(), torch.randn(1, 20, 12).double()), METRICS)
    assert found["distance"][0, 0] < 1e-6 and found["entropy"][0, 0] < 1e-6
    assert found["previous"][0].argmax() == 1 and found["previous"][0, 1] == pytest.approx(19 / 20, abs=1e-6)
    assert found["sink"][0].argmax() == 2 and found["sink"][0, 2] > 1 - 1e-6
    assert found["distance"][0].argmax() == 2 and found["distance"][0, 2] == pytest.approx(19 / 2, abs=1e-6)


def test_tokens_signals_are_those_of_whole_maps():
    layer, x = causal()
    keys = torch.arange(30) < torch.tensor([[30], [25]])
    found = record(layer, x, keys=keys)
    mine = token_rhythm(found, sinks=1, horizon=(2, 9))
    other = rhythm([found[0].weights()], keys, sinks=1, horizon=(2, 9), real=keys)
    for name in ("waad", "fai", "spans", "kurtosis"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name))
    with pytest.raises(ValueError, match="response must mark at least one"):
        token_rhythm(found, torch.zeros(2, 30, dtype=torch.bool))


def test_many_tiles_are_one(monkeypatch):
    layer, x = causal()
    found = record(layer, x)
    whole = measure(found, METRICS)
    tiles = type(found[0]).tiles
    monkeypatch.setattr(type(found[0]), "tiles", lambda self: tiles(self, at_once=600))
    for name, value in measure(found, METRICS).items():
        torch.testing.assert_close(value, whole[name])


def test_bad_input():
    layer, x = causal()
    found = record(layer, x)
    with pytest.raises(ValueError, match=r"metrics must be of distance, .*; one was 'reach'"):
        measure(found, ["entropy", "reach"])
    with pytest.raises(ValueError, match=r"0 <= low <= high; they were 5 and 2"):
        future_influence(5, 2)
    assert math.isnan(
        measure(record(layer, x, keys=torch.zeros(2, 30, dtype=torch.bool)), ["entropy"])["entropy"][0, 0]
    )
