"""S049, S115: metrics of saliency against closed forms, scipy and scikit-learn, and on maps that say nothing."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy, pearsonr, zscore
from sklearn.metrics import roc_auc_score

from glocal.bench.saliency import (
    auc_judd,
    auc_shuffled,
    correlation,
    divergence,
    information_gain,
    normalised_scanpath,
    roc_area,
    saliency_loss,
    similarity,
)


@pytest.fixture
def maps():
    draw = torch.Generator().manual_seed(0)
    found, wanted = torch.rand(2, 3, 8, 9, generator=draw, dtype=torch.double).unbind()
    return found, wanted, torch.rand(3, 8, 9, generator=draw) > 0.9


def test_of_a_map_and_itself(maps):
    g = maps[1]
    assert torch.allclose(divergence(g, g), torch.zeros(3, dtype=torch.double), atol=1e-12)
    assert torch.allclose(correlation(g, g), torch.ones(3, dtype=torch.double))
    assert torch.allclose(similarity(g, g), torch.ones(3, dtype=torch.double))


def test_against_scipy(maps):
    found, wanted, at = maps
    for n in range(3):
        p, g = (t[n].flatten().numpy() for t in (found, wanted))
        assert float(divergence(found, wanted)[n]) == pytest.approx(entropy(g / g.sum(), p / p.sum()))
        assert float(correlation(found, wanted)[n]) == pytest.approx(pearsonr(p, g)[0])
        assert float(normalised_scanpath(found, at)[n]) == pytest.approx(zscore(p)[at[n].flatten().numpy()].mean())
        a, b = ((x - x.min()) / (x.max() - x.min()) for x in (p, g))
        assert float(similarity(found, wanted)[n]) == pytest.approx(np.minimum(a / a.sum(), b / b.sum()).sum())


def test_the_area_by_hand_and_against_scikit_learn():
    """Judd's curve has a point at each fixation only, and straight lines between."""
    values, seen = torch.tensor([[4.0, 3.0], [2.0, 1.0]]), torch.tensor([[1, 0], [1, 0]])
    assert auc_judd(values, seen) == pytest.approx(0.5 * (0.5 + 1) / 2 + 0.5)
    large = torch.rand(100, 100, generator=torch.Generator().manual_seed(1))
    seen = torch.rand(100, 100, generator=torch.Generator().manual_seed(2)) < 0.2 + 0.5 * large
    assert auc_judd(large, seen) == pytest.approx(roc_auc_score(seen.flatten(), large.flatten()), abs=1e-3)


def test_exact_areas_are_scikit_learn_s_with_ties_too():
    draw = torch.Generator().manual_seed(3)
    for positives, negatives in ((7, 50), (40, 3), (1, 1)):
        a, b = (torch.randint(6, (n,), generator=draw).double() for n in (positives, negatives))
        labels = [1] * positives + [0] * negatives
        assert roc_area(a, b) == pytest.approx(roc_auc_score(labels, torch.cat([a, b])))


def test_judd_s_area_is_the_exact_one_and_a_gift_for_few_fixations():
    """Without ties: that of Mann and Whitney, and half a fixation's share of the last false alarms."""
    for seed in range(5):
        p = torch.rand(8, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        seen = torch.rand(8, 9, generator=torch.Generator().manual_seed(seed + 9)) < 0.1 + 0.2 * p
        last = float((p[~seen] >= p[seen].min()).double().mean())
        exact = roc_auc_score(seen.flatten(), p.flatten())
        assert auc_judd(p, seen) == pytest.approx(exact + last / (2 * int(seen.sum())))


def by_hand_judd(found, seen):
    """The points one after the other, ties at a threshold together."""
    points, fixed = [(0.0, 0.0)], sorted(found[seen], reverse=True)
    for t in fixed:
        above = sum(1 for value in found.flatten() if value >= t)
        hits = sum(1 for value in fixed if value >= t)
        points.append(((above - hits) / (found.size - len(fixed)), hits / len(fixed)))
    points.append((1.0, 1.0))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))


def test_judd_s_area_with_ties():
    draw = torch.Generator().manual_seed(4)
    for _ in range(5):
        p, seen = torch.randint(4, (6, 7), generator=draw).double(), torch.rand(6, 7, generator=draw) < 0.3
        assert auc_judd(p, seen) == pytest.approx(by_hand_judd(p.numpy(), seen.numpy()))
    assert auc_judd(torch.ones(6, 7), seen) == 0.5


def test_areas_see_only_the_order(maps):
    found, _, at = maps
    others = torch.randint(3, (2, 8, 9), generator=torch.Generator().manual_seed(5))
    for n in range(3):
        bent = (4 * found[n]).exp() - 7
        assert auc_judd(bent, at[n]) == auc_judd(found[n], at[n])
        exact = [auc_shuffled(x, at[n], others, splits=None) for x in (found[n], bent)]
        assert exact[0] == exact[1]


def test_the_shuffled_area_counts_each_fixation_elsewhere(maps):
    found, _, at = maps
    others = torch.randint(3, (2, 8, 9), generator=torch.Generator().manual_seed(5))
    count = others.sum(0).flatten()
    negatives = np.repeat(found[0].flatten().numpy(), count.numpy())
    positives = found[0][at[0]].numpy()
    labels = [1] * len(positives) + [0] * len(negatives)
    exact = roc_auc_score(labels, np.concatenate([positives, negatives]))
    assert auc_shuffled(found[0], at[0], others, splits=None) == pytest.approx(exact)
    # Draws with fine thresholds come to the same on average; coarse thresholds are near it.
    assert auc_shuffled(found[0], at[0], others, splits=2000, step=1e-4) == pytest.approx(exact, abs=0.02)
    assert auc_shuffled(found[0], at[0], others) == pytest.approx(exact, abs=0.06)
    assert auc_shuffled(torch.ones(8, 9), at[0], others) == 0.5


def test_the_shuffled_area_at_given_thresholds_by_hand():
    """One fixation and one elsewhere: no chance in the draw. Values 1 and 0.34 of a map from 0 to 1."""
    found, seen, other = torch.tensor([[1.0, 0.34, 0.0]]), torch.tensor([[0, 1, 0]]), torch.tensor([[1, 0, 0]])
    assert auc_shuffled(found, seen, other) == pytest.approx(0.0)
    assert auc_shuffled(found, other, seen) == pytest.approx(1.0)
    assert auc_shuffled(found, seen, other, step=2.0) == pytest.approx(0.5)  # the one threshold is 0


def test_information_gain_is_a_difference_of_log_likelihoods(maps):
    found, wanted, at = maps
    for n in range(3):
        p, b = (t[n].numpy() / t[n].numpy().sum() for t in (found, wanted))
        bits = [np.log2(p[y, x]) - np.log2(b[y, x]) for y, x in at[n].nonzero().tolist()]
        assert float(information_gain(found, wanted, at)[n]) == pytest.approx(np.mean(bits))
    assert float(information_gain(found, found, at).abs().max()) == 0


def test_a_map_of_another_size_is_resized_first(maps):
    _, wanted, at = maps
    small = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(6), dtype=torch.double)
    large = torch.nn.functional.interpolate(small[:, None], (8, 9), mode="bilinear")[:, 0]
    for metric in (divergence, correlation, similarity):
        assert torch.equal(metric(small, wanted), metric(large, wanted))
    assert torch.equal(normalised_scanpath(small, at), normalised_scanpath(large, at))
    assert auc_judd(small[0], at[0]) == auc_judd(large[0], at[0])


def test_maps_that_say_nothing_give_numbers(maps):
    _, wanted, at = maps
    for flat in (torch.zeros_like(wanted), torch.ones_like(wanted)):
        for x, y in ((flat, wanted), (wanted, flat)):
            found = [divergence(x, y), correlation(x, y), similarity(x, y), normalised_scanpath(x, at)]
            assert all(t.isfinite().all() for t in found)
        assert (correlation(flat, wanted) == 0).all()
    assert (normalised_scanpath(wanted, torch.zeros_like(wanted)) == 0).all()


def test_the_loss_is_its_parts_and_falls_when_it_is_followed(maps):
    found, wanted, at = maps
    parts = 10 * divergence(found, wanted) - 2 * correlation(found, wanted) - similarity(found, wanted)
    parts = parts - normalised_scanpath(found, at) + 5 * (found - wanted).square().mean((1, 2))
    assert torch.allclose(saliency_loss(found, wanted, at), parts.mean())
    x = found.clone().requires_grad_()
    losses = []
    for _ in range(30):
        loss = saliency_loss(x, wanted, at)
        (grad,) = torch.autograd.grad(loss, x)
        losses.append(float(loss.detach()))
        x = (x.detach() - 0.5 * grad).clamp(min=0.01).requires_grad_()
    assert losses[-1] < losses[0] - 0.5


def test_bad_input(maps):
    with pytest.raises(ValueError, match="same leading axes"):
        divergence(maps[0], maps[1][:2])
    with pytest.raises(ValueError, match="must not be below 0"):
        divergence(-maps[0], maps[1])
    with pytest.raises(ValueError, match="must not be empty; they had 0 and 3"):
        roc_area(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match="must not be empty"):
        auc_shuffled(maps[0][0], maps[2][0], torch.zeros(8, 9))
    with pytest.raises(ValueError, match="splits and step"):
        auc_shuffled(maps[0][0], maps[2][0], torch.ones(8, 9), step=0)
    with pytest.raises(ValueError, match="others must be"):
        auc_shuffled(maps[0][0], maps[2][0], torch.ones(4, 9))
    with pytest.raises(ValueError, match="at 0 of 72"):
        auc_judd(maps[0][0], torch.zeros(8, 9))
