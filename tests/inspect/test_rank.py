"""S057: what heads of low rank can do, against Monte Carlo, exact solutions and linear algebra."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from glocal.bench.nearest import NearestPoint, squared_error
from glocal.inspect import (
    equally_spaced_heads,
    exact_heads,
    head_overlaps,
    head_targets,
    map_rank,
    random_heads,
    random_projection_heads,
    weigh_heads,
)
from glocal.nn import low_rank_attention

DRAWS = 400_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def units(count, dim, seed=0):
    return normalize(torch.randn(count, dim, generator=seeded(seed)), dim=-1)


def choices(q, k, dim, seed=5):
    """What each hard head chooses of two points, ``(draws, H, dim)``, and the nearer one."""
    points, query = normalize(torch.randn(DRAWS, 3, dim, generator=seeded(seed)), dim=-1).split((2, 1), 1)
    scores = torch.einsum("bd,hd,he,bpe->bhp", query[:, 0], q, k, points)
    nearer = (points @ query.mT).argmax(1)
    pick = torch.arange(DRAWS)
    return points[pick[:, None], scores.argmax(-1)], points[pick, nearer[:, 0]]


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_overlaps_by_monte_carlo(dim):
    q, k = units(4, dim), units(4, dim, 1)
    chosen, _ = choices(q, k, dim)
    found = torch.einsum("bhd,bgd->hg", chosen, chosen) / DRAWS
    torch.testing.assert_close(head_overlaps(q, k), found.double(), atol=4 / DRAWS**0.5, rtol=0)


def test_targets_and_error_by_monte_carlo():
    q, k = units(6, 2), units(6, 2, 1)
    q = torch.cat([q, q[:1], q[:1]])
    k = torch.cat([k, q[:1], -q[:1]])  # the best head there is, and the worst
    chosen, nearer = choices(q, k, 2)
    found = torch.einsum("bhd,bd->h", chosen, nearer) / DRAWS
    torch.testing.assert_close(head_targets(q, k), found.double(), atol=4 / DRAWS**0.5, rtol=0)
    weighed = weigh_heads(q, k)
    for weights, error in ((weighed.weights, weighed.error), (torch.full((8,), 1 / 8), weighed.uniform)):
        answer = torch.einsum("bhd,h->bd", chosen, weights.float())
        assert error == pytest.approx(float((answer - nearer).square().sum(1).mean()), abs=0.01)


@pytest.mark.parametrize("heads", [1, 2, 7, 30])
def test_best_weights_are_no_worse_than_equal_ones(heads):
    for seed in range(5):
        q, k = units(heads, 2, seed), units(heads, 2, 100 + seed)
        found = weigh_heads(q, k)
        assert 0 <= found.error <= found.uniform + 1e-12
        # No small change of the weights is better.
        overlaps, targets = head_overlaps(q, k), head_targets(q, k)
        for step in 0.01 * torch.eye(heads).double():
            for a in (found.weights + step, found.weights - step):
                assert float(1 - 2 * targets @ a + a @ overlaps @ a) > found.error - 1e-12
    twice = weigh_heads(units(3, 2).repeat(2, 1), units(3, 2, 1).repeat(2, 1))
    assert twice.error == pytest.approx(weigh_heads(units(3, 2), units(3, 2, 1)).error)


@pytest.mark.parametrize(("dim", "points"), [(2, 3), (5, 16), (8, 40)])
def test_one_head_of_full_rank_is_exact_as_it_gets_sharp(dim, points):
    """So is its opposite for the farthest point, and hard attention at once."""
    for task, farthest in ((NearestPoint(dim, points, queries=7), False), (NearestPoint(dim, points), True)):
        batch = task.batch(50, seeded())
        errors = []
        for sharpness in (1, 10, 100, 1e5):
            heads = exact_heads(dim, sharpness, farthest=farthest)
            errors.append(float(squared_error(low_rank_attention(batch.points, batch.queries, *heads), batch.targets)))
        assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-2
        hard = low_rank_attention(batch.points, batch.queries, *exact_heads(dim, farthest=farthest), hard=True)
        torch.testing.assert_close(hard, batch.targets)


def test_more_heads_of_low_rank_come_nearer_but_not_near():
    batch = NearestPoint(6, 8, queries=8).batch(500, seeded())

    def error(heads):
        return float(squared_error(low_rank_attention(batch.points, batch.queries, *heads, hard=True), batch.targets))

    few, many = (error(random_projection_heads(6, 2, count, seeded(1))) for count in (2, 200))
    wide = error(random_projection_heads(6, 5, 200, seeded(1)))
    assert few > many > wide > 0.05
    assert error(random_projection_heads(6, 6, 1, seeded(1))) == pytest.approx(0, abs=1e-9)


def test_heads_in_the_plane():
    """Averaged heads at every angle, by hand: ``1 - 2 b + C`` with their means over the circle."""
    spaced = equally_spaced_heads(60)
    assert torch.equal(spaced.q, spaced.k) and spaced.q.shape == (60, 1, 2)
    batch = NearestPoint(2, 2, queries=1).batch(200_000, seeded())
    found = squared_error(low_rank_attention(batch.points, batch.queries, *spaced, hard=True), batch.targets)
    assert float(found) == pytest.approx(weigh_heads(spaced.q[:, 0], spaced.k[:, 0]).uniform, abs=0.01)
    # A head with q = k has b = 3/4; asin of the cosine goes round the circle evenly, so that C is 1/2 + 2/12.
    assert weigh_heads(spaced.q[:, 0], spaced.k[:, 0]).uniform == pytest.approx(1 - 1.5 + 0.5 + 1 / 6, abs=1e-3)
    drawn = random_heads(2, 9, seeded())
    weights = drawn.vo[:, 0, 0].double()
    torch.testing.assert_close(weights, weigh_heads(drawn.q[:, 0], drawn.k[:, 0]).weights, atol=1e-4, rtol=1e-4)


def test_rank_of_maps():
    q, k = torch.randn(3, 20, 4, generator=seeded()), torch.randn(3, 20, 4, generator=seeded(1))
    scores = q @ k.mT
    assert map_rank(scores).rank.tolist() == map_rank(q.double() @ k.double().mT).rank.tolist() == [4, 4, 4]
    maps = scores.softmax(-1)
    assert bool((map_rank(maps).rank > 4).all())
    found = map_rank(torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.0])), share=0.9)
    assert (int(found.rank), int(found.held)) == (3, 2)  # 9 of 11 are less than nine tenths, 10 are more
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert float(found.effective) == pytest.approx(math.exp(entropy))
    uniform = map_rank(torch.full((2, 5, 7), 1 / 7))
    assert uniform.rank.tolist() == uniform.held.tolist() == [1, 1]


def test_bad_input():
    with pytest.raises(ValueError, match="rank must be from 1 to dim 3"):
        random_projection_heads(3, 4, 2, seeded())
    with pytest.raises(ValueError, match="k must be"):
        head_overlaps(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="q must hold unit vectors"):
        head_overlaps(2 * torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="in the plane"):
        head_targets(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="share must be"):
        map_rank(torch.eye(3), share=0.0)
