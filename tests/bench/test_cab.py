"""The benchmark's measures against its published table, numpy, and attention that passes or fails by definition."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from glocal.bench.cab import (
    COLUMNS,
    LENGTHS,
    SUPPORT,
    compositional_index,
    consistency,
    efficiency_length,
    is_causal,
    middle_mean,
    z_index,
)

# Of the paper's repository: MiB and milliseconds at LENGTHS.
MEMORY = {"vanilla": (81, 265, 952, 3604, 14020, 55300), "abc": (42, 80, 156, 308, 612, 1220)}
TIME = {
    "vanilla": (0.472, 0.628, 0.721, 0.981, 3.67, 18.437),
    "abc": (0.648, 0.590, 0.602, 0.910, 1.006, 1.509),
}


def test_published_lengths():
    memory = efficiency_length(LENGTHS, MEMORY["vanilla"], MEMORY["abc"])
    time = efficiency_length(LENGTHS, TIME["vanilla"], TIME["abc"], drop=1)
    assert memory.length == pytest.approx(69.5, abs=0.05) and time.length == pytest.approx(1877.3, abs=0.05)


def test_fits_are_numpys():
    found = efficiency_length(LENGTHS, TIME["vanilla"], TIME["abc"], drop=1)
    curve, line = np.polyfit(LENGTHS, TIME["vanilla"], 2), np.polyfit(LENGTHS[1:], TIME["abc"][1:], 1)
    roots = np.roots(curve - np.concatenate([[0], line]))
    assert found.length == pytest.approx(max(roots), rel=1e-9)
    for explained, fit, x, y in (
        (found.vanilla, curve, LENGTHS, TIME["vanilla"]),
        (found.method, line, LENGTHS[1:], TIME["abc"][1:]),
    ):
        assert explained == pytest.approx(1 - np.var(np.polyval(fit, x) - y) / np.var(y))


def test_curves_that_never_meet():
    assert efficiency_length([1, 2, 3], [1.0, 4.0, 9.0], [-20.0, -21.0, -22.0]).length is None
    assert efficiency_length([1, 2, 3], [1.0, 2.0, 3.0], [5.0, 6.0, 7.0]).length is None


def test_published_indices():
    scores = (3.4748, 1.9735, 4.0953, 2.1985, 34.61, 6.35, 31.66, 23.18, 0.675, 3.42)
    tasks, total = compositional_index("noncausal-self", scores)
    assert list(tasks.values()) == pytest.approx([-0.3007, -0.2491, -0.0766, 0.5276], abs=6e-5)
    assert total == pytest.approx(-0.0247, abs=6e-5)
    scores = (7.425, 0.231, 0.779, 1.138167, 0.77467, 0.478, 0.508, 0.449, 0.4855)
    tasks, total = compositional_index("noncausal-cross", scores)
    assert list(tasks.values()) == pytest.approx([0.4495, 0.7442], abs=6e-5) and total == pytest.approx(
        0.5968, abs=6e-5
    )
    for use, columns in COLUMNS.items():
        assert compositional_index(use, columns.mean)[1] == 0
        assert sum(count for _, count in columns.tasks) == len(columns.names) == len(columns.better)


def test_an_index_of_ones_own_by_numpy():
    drawn = np.random.default_rng(0).normal(size=(5, 3))
    scores = {f"m{n}": dict(zip("abc", row, strict=True)) for n, row in enumerate(drawn)}
    z = (drawn - drawn.mean(0)) / drawn.std(0) * [1, -1, 1]
    found = z_index(scores, {"a": "+", "b": "-", "c": "+"})
    assert list(found.values()) == pytest.approx(z.mean(1))
    del scores["m4"]["a"]
    assert math.isnan(z_index({"m": {}, "n": {"a": 1.0}}, {"a": "+"})["m"])
    assert consistency(found, {name: -value for name, value in found.items()}) == pytest.approx(-1)


def test_middle_mean():
    values = np.random.default_rng(1).exponential(size=101)
    low, high = np.quantile(values, [0.25, 0.75])
    assert middle_mean(values.tolist()) == pytest.approx(values[(values >= low) & (values <= high)].mean())


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(-2)


def test_attention_that_passes_and_fails():
    torch.manual_seed(0)
    x, kv = torch.randn(4, 20, 16), torch.randn(4, 30, 16)
    near = lambda n: (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 2  # noqa: E731
    assert is_causal(lambda q: join(sdpa(*[heads(q)] * 3, is_causal=True)), x)
    assert not is_causal(lambda q: join(sdpa(*[heads(q)] * 3)), x)
    assert is_causal(lambda q: join(sdpa(heads(q), heads(kv), heads(kv))), x)
    assert not is_causal(lambda q: join(sdpa(*[heads(q)] * 3, attn_mask=near(q.shape[1]))), x)
    # Landmarks that are means over the queries mix them.
    assert not is_causal(lambda q: join(sdpa(heads(q), heads(kv), heads(kv))) + q.mean(1, True), x)

    def raises(q):
        raise NotImplementedError

    assert not is_causal(raises, x)


def test_support_names_uses():
    assert all(set(uses) <= set(COLUMNS) for uses in SUPPORT.values())


def test_bad_input():
    with pytest.raises(ValueError, match=r"use must be of noncausal-self, .*; it was 'cross'"):
        compositional_index("cross", ())
    with pytest.raises(ValueError, match=r"scores must be 5: TTS MCD, .*; there were 2"):
        compositional_index("causal-cross", (1.0, 2.0))
    with pytest.raises(ValueError, match="at least 3"):
        efficiency_length([1, 2], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="share at least two"):
        consistency({"a": 1.0}, {"a": 1.0})
