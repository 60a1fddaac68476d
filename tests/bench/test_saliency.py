"""S115: metrics of saliency against closed forms, scipy and scikit-learn, and on maps that have nothing to say."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy, pearsonr, zscore
from sklearn.metrics import roc_auc_score

from glocal.bench.saliency import (
    auc_judd,
    correlation,
    divergence,
    normalised_scanpath,
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
    with pytest.raises(ValueError, match="of one shape"):
        divergence(maps[0], maps[1][:, :4])
    with pytest.raises(ValueError, match="at 0 of 72"):
        auc_judd(maps[0][0], torch.zeros(8, 9))
