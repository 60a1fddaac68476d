"""S046: normalisers by their formulas, the projection onto the simplex, and how thin weights must become."""

import math

import pytest
import torch

from glocal.inspect import dilution_bounds, normalise

F = {
    "softmax": math.exp,
    "power": lambda x: max(x, 0.0) ** 3.0 + 1e-4,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
}
SETTINGS = {"power": 3.0, "floor": 1e-4}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", F)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_formulas_by_loops(kind, temperature):
    logits = 3 * drawn(4, 9)
    live = drawn(4, 9, seed=1) > -0.5
    found = normalise(logits, kind, temperature=temperature, live=live, **SETTINGS)
    for row in range(4):
        values = [F[kind](float(x) / temperature) * bool(s) for x, s in zip(logits[row], live[row], strict=True)]
        torch.testing.assert_close(found[row], torch.tensor(values).double() / sum(values))


def test_scalable_softmax_counts_the_keys_of_its_row():
    logits = drawn(2, 8)
    live = torch.arange(8) < torch.tensor([[8], [5]])
    found = normalise(logits, "scalable", sharpness=0.7, live=live)
    for row, count in ((0, 8), (1, 5)):
        wanted = (0.7 * math.log(count) * logits[row, :count]).softmax(-1)
        torch.testing.assert_close(found[row, :count], wanted)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """What nearest means: no other weights are nearer, by the optimality of a projection on a convex set."""
    logits, others = 2 * drawn(30, 7), drawn(500, 7, seed=1).softmax(-1)
    corners = torch.cat([others, torch.eye(7).double()])
    found = normalise(logits, "sparsemax", temperature=1.5)
    torch.testing.assert_close(found.sum(-1), torch.ones(30).double())
    assert float(found.min()) >= 0 and bool((found == 0).any())
    inner = ((logits / 1.5 - found)[:, None] * (corners - found[:, None])).sum(-1)
    assert float(inner.max()) < 1e-9
    live = drawn(30, 7, seed=2) > 0
    live[0] = False
    live[1] = True
    some = normalise(logits, "sparsemax", live=live)
    assert not bool(some[~live].any())
    for row in range(1, 30):
        if bool(live[row].any()):
            torch.testing.assert_close(some[row][live[row]], normalise(logits[row][live[row]], "sparsemax"))


@pytest.mark.parametrize("kind", [*F, "scalable", "sparsemax"])
def test_rows_without_keys_give_zeros(kind):
    logits = drawn(3, 5).requires_grad_()
    live = torch.tensor([[True] * 5, [False] * 5, [False, True, False, False, False]])
    found = normalise(logits, kind, live=live)
    assert found.detach().sum(-1).tolist() == pytest.approx([1, 0, 1]) and float(found[2, 1].detach()) == pytest.approx(
        1
    )
    found[1].sum().backward()
    assert not bool(logits.grad.isnan().any())


def test_far_below_zero():
    """Where softplus and sigmoid are exponentials: their weights are those of softmax."""
    logits = drawn(6) - 40
    for kind in ("sigmoid", "softplus"):
        torch.testing.assert_close(normalise(logits.float(), kind), logits.float().softmax(-1))
    assert normalise(logits.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", [*F, "scalable"])
@pytest.mark.parametrize("length", [8, 64, 512, 4096])
def test_dilution_bounds_hold(kind, length):
    low, high = -1.5, 2.0
    least, greatest = dilution_bounds(low, high, length, kind, temperature=2.0, **SETTINGS)
    logits = low + (high - low) * torch.rand(20, length, generator=torch.Generator().manual_seed(0)).double()
    logits[:10, 0], logits[:10, 1:] = high, low  # the most uneven there is
    logits[10:15, 0], logits[10:15, 1:] = low, high
    weights = normalise(logits, kind, temperature=2.0, **SETTINGS)
    assert least <= float(weights.min()) and float(weights.max()) <= greatest
    # The lower bound is reached but for one key in the sum.
    assert float(weights.min()) <= least * (1 + 1e-9) * length / (length - 1)


def test_weights_vanish_with_the_length_unless_the_length_is_known():
    for kind in F:
        ends = [dilution_bounds(-1.0, 1.0, length, kind, **SETTINGS) for length in (10, 1000)]
        assert ends[1][0] == pytest.approx(ends[0][0] / 100) and ends[1][1] == pytest.approx(ends[0][1] / 100)
    logits = torch.cat([torch.ones(1), torch.zeros(9999)]).double()
    assert float(normalise(logits, "scalable", sharpness=2.0)[0]) > 0.99 and float(normalise(logits)[0]) < 1e-3


def test_bad_input():
    with pytest.raises(ValueError, match="kind must be one of softmax, power"):
        normalise(torch.zeros(3), "entmax")
    for name in ("temperature", "power", "floor", "sharpness"):
        with pytest.raises(ValueError, match=f"{name} must be above 0"):
            normalise(torch.zeros(3), **{name: 0.0})
    with pytest.raises(ValueError, match="'sparsemax' is not"):
        dilution_bounds(0.0, 1.0, 3, "sparsemax")
    with pytest.raises(ValueError, match="low must be at most high"):
        dilution_bounds(2.0, 1.0, 3)
