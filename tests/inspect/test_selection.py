"""S046: selection by loops and in closed form, the softmax's Jacobian by autograd, and reports of known heads."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from glocal.inspect import (
    critical_size,
    finite_sensitivity,
    gradient_sensitivity,
    layer_call,
    record_heads,
    selection_distance,
    selection_report,
    separability,
)
from glocal.nn import Attention, SlidingWindowAttention
from tests.hf.test_attention import bert, tokens


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(weights, x, size, live):
    """Mean distance, its sum, and the separable share of one row."""
    seen = [j for j in range(len(weights)) if bool(live[j])]
    inside = sorted(seen, key=lambda j: (-float(weights[j]), j))[:size]
    outside = [j for j in seen if j not in inside]
    total = sum((weights[i] * x[i] for i in inside), torch.zeros_like(x[0]))
    far = {j: float((total - weights[j] * x[j]).norm()) for j in seen}
    distances = [far[j] for j in outside]
    if not outside:
        return math.nan, math.nan, math.nan
    near = sum(far[i] <= min(distances) + 1e-9 for i in inside)
    return sum(distances) / len(outside), sum(distances), near / len(inside)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 11])
def test_selection_by_loops(size):
    weights, x = (3 * drawn(2, 3, 4, 9)).softmax(-1), drawn(2, 3, 9, 5, seed=1)
    weights[0, 0, 0, :] = 1 / 9  # ties
    weights[0, 0, 1, 3:] = 0
    live = drawn(2, 1, 4, 9, seed=2) > -0.7
    distance, share = selection_distance(weights, x, size, live=live), separability(weights, x, size, live=live)
    for b in range(2):
        for h in range(3):
            for row in range(4):
                wanted = by_loops(weights[b, h, row], x[b, h], size, live[b, 0, row])
                found = [float(t[b, h, row]) for t in (distance.mean, distance.total, share)]
                assert found == pytest.approx(wanted, abs=1e-7, nan_ok=True)
    assert size < 9 or bool(share.isnan().all())


@pytest.mark.parametrize(("length", "size"), [(8, 1), (8, 3), (64, 16)])
def test_equal_weights_in_closed_form(length, size):
    """On orthogonal tokens of unit length the sum has N parts of 1/L, each other token one more of its own."""
    weights, x = torch.full((1, length), 1 / length).double(), torch.eye(length).double()
    found = selection_distance(weights, x, size)
    assert float(found.mean) == pytest.approx((size + 1) ** 0.5 / length)
    assert float(found.total) == pytest.approx((length - size) * (size + 1) ** 0.5 / length)
    # A chosen token lacks one part: it is nearer than any other.
    assert float(separability(weights, x, size)) == 1
    # Equal tokens: every one is N - 1 parts away, inside as outside.
    same = torch.ones(length, 1).double()
    assert float(selection_distance(weights, same, size).mean) == pytest.approx((size - 1) / length, abs=1e-9)
    assert float(separability(weights, same, size)) == 1
    # Tokens on a line, the chosen ones far from their sum.
    line = torch.cat([torch.tensor([[9.0], [-9.0]]), torch.full((6, 1), 0.1)]).double()
    assert float(separability(torch.full((1, 8), 1 / 8).double(), line, 2)) == 0


def test_one_hot_weights_are_separable():
    x = normalize(drawn(6, 4), dim=-1)
    assert separability(torch.eye(6).double(), x, 1).tolist() == [1.0] * 6
    found = selection_distance(torch.eye(6).double(), x, 1)
    assert found.mean.tolist() == pytest.approx([1.0] * 6) and found.total.tolist() == pytest.approx([5.0] * 6)
    # Others of weight 0 are chosen by their index; the sum stays where it was.
    assert selection_distance(torch.eye(6).double(), x, 4).mean.tolist() == pytest.approx([1.0] * 6)


def test_critical_size():
    distances = torch.tensor([[4.0, 1.0, 0.39, 0.41, 0.1], [4.0, 3.0, 2.0, 1.0, 0.5], [math.nan, 1.0, 0.05, 0.0, 0.0]])
    assert critical_size(distances, [1, 2, 4, 8, 16]).tolist() == pytest.approx([4, math.nan, 4], nan_ok=True)
    assert critical_size(distances[1], [1, 2, 4, 8, 16], 0.3).item() == 8


def jacobian(logits, temperature):
    return torch.autograd.functional.jacobian(lambda x: (x / temperature).softmax(-1), logits)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 5.0])
def test_jacobian_of_autograd(temperature):
    rows = [drawn(9), 5 * drawn(3, seed=1), torch.zeros(6).double(), torch.tensor([0.0, 0.0, -1.0]).double()]
    rows += [torch.tensor([0.0, -1e-9, -1.0, -40.0]).double(), drawn(1, seed=2), drawn(200, seed=3)]
    for logits in rows:
        matrix = jacobian(logits, temperature)
        found = gradient_sensitivity(logits, temperature)
        assert float(found.norm) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9, abs=1e-12)
        assert float(found.entry) == pytest.approx(float(matrix.abs().max()), rel=1e-9, abs=1e-12)


def test_bounds_are_reached_by_two_equal_logits_only():
    for temperature in (0.05, 1.0, 4.0):
        found = gradient_sensitivity(torch.zeros(2), temperature)
        assert float(found.norm) == pytest.approx(1 / (2 * temperature))
        assert float(found.entry) == pytest.approx(1 / (4 * temperature))
        many = gradient_sensitivity(3 * drawn(2000, 7), temperature)
        assert float(many.norm.max()) < 1 / (2 * temperature) and float(many.entry.max()) < 1 / (4 * temperature)
        # The bound that is often quoted for the norm is none.
        assert float(many.norm.max()) > 1 / (4 * temperature)


def test_weights_are_never_farther_apart_than_corners():
    a, b = (20 * drawn(500, 6, seed=n) for n in (0, 1))
    apart = finite_sensitivity(a, b - a) * (b - a).norm(dim=-1)
    assert float(apart.max()) == pytest.approx(2**0.5, abs=1e-3) and float(apart.max()) <= 2**0.5
    torch.testing.assert_close(apart, (a.softmax(-1) - b.softmax(-1)).norm(dim=-1))


def test_small_changes_follow_the_norm():
    """None moves the weights more than the norm says, and the leading direction moves them as much."""
    logits = drawn(1, 8)
    norm = float(gradient_sensitivity(logits, 0.5).norm)
    some = finite_sensitivity(logits, 1e-5 * drawn(3000, 8, seed=1), 0.5)
    assert norm * 0.5 < float(some.max()) <= norm * (1 + 1e-4)
    direction = torch.linalg.eigh(jacobian(logits[0], 0.5)).eigenvectors[:, -1]
    assert float(finite_sensitivity(logits, 1e-5 * direction[None], 0.5)) == pytest.approx(norm, rel=1e-4)


def test_keys_that_are_not_seen_do_not_count():
    logits, live = drawn(3, 7), torch.arange(7) < torch.tensor([[7], [4], [2]])
    found = gradient_sensitivity(logits, live=live)
    for row, count in ((0, 7), (1, 4), (2, 2)):
        assert float(found.norm[row]) == pytest.approx(float(gradient_sensitivity(logits[row, :count]).norm))


@pytest.mark.parametrize("sink", [0, 2])
def test_report_of_a_layer_by_loops(sink):
    torch.manual_seed(0)
    layer = SlidingWindowAttention(12, 2, window=5, causal=True).double()
    x, keys = 3 * drawn(2, 10, 12), torch.arange(10) < torch.tensor([[10], [8]])
    call = layer_call(layer, x, keys=keys)
    rows = selection_report([call], share=0.3, temperatures=(0.1, 1.0), sink=sink)
    size = round(0.3 * (10 - sink))
    assert [(row.layer, row.head, row.keys) for row in rows] == [("", 0, 10 - sink), ("", 1, 10 - sink)]
    for head, row in enumerate(rows):
        distance, share, entropy, worst = [], [], [], [0.0, 0.0]
        for b, count in ((0, 10), (1, 8)):
            for q in range(count):
                weights, values = call.weights[b, head, q], normalize(call.v[b, head], dim=-1)
                live = (torch.arange(10) <= q) & (torch.arange(10) > q - 5) & (torch.arange(10) >= sink)
                mean, _, apart = by_loops(weights, values, size, live)
                if not math.isnan(mean):
                    distance.append(mean)
                    share.append(apart)
                kept = weights[live]
                if len(kept) > 1:
                    parts = kept / kept.sum()
                    entropy.append(float(-(parts * parts.log()).sum()) / math.log(len(kept)))
                if len(kept):
                    for n, temperature in enumerate((0.1, 1.0)):
                        norm = torch.linalg.matrix_norm(jacobian(kept.log(), temperature), 2)
                        worst[n] = max(worst[n], float(norm))
        assert row.distance == pytest.approx(sum(distance) / len(distance))
        assert row.separable == pytest.approx(sum(share) / len(share))
        assert row.entropy == pytest.approx(sum(entropy) / len(entropy))
        assert row.sensitivity == pytest.approx(worst)


def test_critical_share_of_a_head():
    """Equal weights on equal values: the summed distance is ``(L - N)(N - 1) / L``; it falls far only at the end."""
    layer = Attention(8, 1, scale=0.0).double()
    call = layer_call(layer, torch.ones(1, 64, 8).double())
    (row,) = selection_report([call])
    sizes = sorted({max(1, round(64 * step / 32)) for step in range(1, 32)})
    totals = [(64 - n) * (n - 1) / 64 for n in sizes]
    wanted = next(n for n, total in zip(sizes, totals, strict=True) if total < 0.1 * max(totals)) / 64
    assert row.critical == pytest.approx(wanted) and row.entropy == pytest.approx(1)
    assert row.distance == pytest.approx(15 / 64)
    assert row.sensitivity == pytest.approx((1 / 64,))


def test_a_model_of_transformers():
    calls = record_heads(bert(), **tokens(pad=3))
    rows = selection_report(calls)
    assert len(rows) == sum(call.weights.shape[1] for call in calls)
    assert all(0 < row.entropy <= 1 and 0 <= row.separable <= 1 and row.distance > 0 for row in rows)


def test_bad_input():
    weights, x = torch.rand(2, 4), torch.rand(4, 3)
    with pytest.raises(ValueError, match=r"weights must be \(..., Q, L\)"):
        selection_distance(weights, x[:3], 1)
    with pytest.raises(ValueError, match="size must be at least 1"):
        separability(weights, x, 0)
    with pytest.raises(ValueError, match="sizes must be as many"):
        critical_size(torch.rand(3), [1, 2])
    with pytest.raises(ValueError, match="fraction must be"):
        critical_size(torch.rand(2), [1, 2], 1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        gradient_sensitivity(torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="share must be"):
        selection_report([], share=1.0)
