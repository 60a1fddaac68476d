"""S049: losses that teach attention, by finite differences, by hand, and on maps that they should pull together."""

import pytest
import torch
from torch.nn.functional import kl_div

from glocal.bench.supervision import SUPERVISIONS, attention_map, log_error, supervision_loss


@pytest.fixture
def maps():
    draw = torch.Generator().manual_seed(0)
    found, wanted = torch.rand(2, 2, 5, 6, generator=draw, dtype=torch.double).add(0.05).unbind()
    return found, wanted, torch.rand(2, 5, 6, generator=draw) > 0.8


@pytest.mark.parametrize("kind", SUPERVISIONS)
def test_gradients_by_finite_differences(maps, kind):
    found, wanted, at = maps
    target = at if kind == "scanpath" else wanted
    assert torch.autograd.gradcheck(lambda x: supervision_loss(x, target, kind), found.requires_grad_())


@pytest.mark.parametrize("kind", SUPERVISIONS)
def test_a_flat_map_gives_finite_gradients(maps, kind):
    _, wanted, at = maps
    for flat in (torch.ones_like(wanted), torch.zeros_like(wanted)):
        flat.requires_grad_()
        loss = supervision_loss(flat, at if kind == "scanpath" else wanted, kind)
        (grad,) = torch.autograd.grad(loss, flat)
        assert bool(loss.isfinite()) and bool(grad.isfinite().all())


def test_divergence_has_the_people_s_map_first(maps):
    """torch's own, whose second argument is the truth."""
    found, wanted, _ = maps
    p, g = (t / t.sum((1, 2), keepdim=True) for t in (found, wanted))
    want = kl_div(p.log(), g, reduction="batchmean")
    assert torch.allclose(supervision_loss(found, wanted), want)
    assert not torch.allclose(supervision_loss(wanted, found), want, rtol=1e-3)


def test_log_error_by_hand_and_without_scale(maps):
    found, wanted, _ = maps
    by_hand = torch.stack(
        [
            ((p / p.mean() + 1e-3).log() - (g / g.mean() + 1e-3).log()).pow(2).mean()
            for p, g in zip(found, wanted, strict=True)
        ]
    )
    assert torch.allclose(log_error(found, wanted), by_hand)
    assert torch.allclose(log_error(7 * found, wanted), by_hand)


@pytest.mark.parametrize("kind", SUPERVISIONS)
def test_following_a_loss_brings_attention_to_the_people_s(kind):
    """Attention as a softmax of free scores, learned by each loss alone: the place looked at gets the most."""
    wanted = torch.zeros(1, 4, 4, dtype=torch.double)
    wanted[0, 1, 2] = 1.0
    # Not from a flat map, which correlation and standardised maps have no gradient at.
    scores = 0.1 * torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert int(scores.argmax()) != 6
    for _ in range(100):
        scores.requires_grad_()
        found = attention_map(scores.softmax(-1), (4, 4))
        target = wanted > 0 if kind == "scanpath" else wanted
        (grad,) = torch.autograd.grad(supervision_loss(found, target, kind), scores)
        scores = (scores - 0.5 * grad / grad.norm().clamp(min=1e-9)).detach()
    assert int(scores.argmax()) == 6


def test_attention_maps_by_loops():
    weights = torch.rand(2, 3, 4, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    found = attention_map(weights, (2, 3), heads=[0, 2], skip=1)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                want = sum(float(weights[b, h, q, 1 + 3 * y + x]) for h in (0, 2) for q in range(4)) / 8
                assert float(found[b, y, x]) == pytest.approx(want)
    # Enlarging keeps a flat map flat, and the middle of an odd enlargement is the patch itself.
    assert torch.allclose(attention_map(torch.ones(1, 1, 1, 6), (2, 3), (8, 9)), torch.ones(1, 8, 9))
    large = attention_map(weights, (2, 3), (6, 9), skip=1)
    assert torch.allclose(large[:, 1::3, 1::3], attention_map(weights, (2, 3), skip=1))


def test_bad_input(maps):
    with pytest.raises(ValueError, match=r"kind must be one of divergence, .* it was 'x'"):
        supervision_loss(maps[0], maps[1], "x")
    with pytest.raises(ValueError, match=r"weights must be \(B, H, Nq, 1 \+ 2 \* 3\)"):
        attention_map(torch.rand(1, 1, 1, 6), (2, 3), skip=1)
    with pytest.raises(ValueError, match="found must have the shape of wanted"):
        log_error(maps[0], maps[1][:1])
