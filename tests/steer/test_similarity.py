"""Losses against scikit-learn and scipy, the fit against scipy's optimiser."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, ortho_group
from sklearn.metrics.pairwise import cosine_similarity

from glocal.bench.similarity import neighbourhood_overlap, object_folds, odd_one_out_accuracy
from glocal.steer.similarity import (
    GlocalTransform,
    align,
    identity_penalty,
    neighbourhood_loss,
    odd_one_out_loss,
)
from tests.steer.judged import normal, planted, some_triplets


def without_self(x):
    """Cosines to the other rows, by scikit-learn."""
    found = cosine_similarity(x.numpy())
    return np.array([np.delete(row, n) for n, row in enumerate(found)])


def local_by_hand(x, y, temperature):
    teacher = softmax(without_self(x) / temperature, axis=1)
    return -(teacher * log_softmax(without_self(y) / temperature, axis=1)).sum(1).mean()


def global_by_hand(x, triplets):
    a, b, c = x.numpy()[triplets.numpy()].transpose(1, 0, 2)
    logits = np.stack([(a * b).sum(1), (a * c).sum(1), (b * c).sum(1)], 1)
    return -log_softmax(logits, axis=1)[:, 0].mean()


# Losses.


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_the_neighbourhood_loss_of_the_identity_is_the_entropy_and_flat(temperature):
    x = normal(20, 8)
    weight = torch.eye(8, dtype=torch.float64, requires_grad=True)
    loss = neighbourhood_loss(x, x @ weight, temperature)
    wanted = entropy(softmax(without_self(x) / temperature, axis=1), axis=1).mean()
    assert loss.item() == pytest.approx(wanted, abs=1e-12)
    loss.backward()
    assert weight.grad.abs().max() < 1e-10
    # Elsewhere it is neither.
    other = normal(8, 8, seed=1).requires_grad_()
    loss = neighbourhood_loss(x, x @ other, temperature)
    loss.backward()
    assert loss.item() > wanted + 1e-3 and other.grad.abs().max() > 1e-4
    assert loss.item() == pytest.approx(local_by_hand(x, (x @ other).detach(), temperature), abs=1e-10)


def test_the_teacher_gets_no_gradient():
    x, weight = normal(6, 4).requires_grad_(), normal(4, 4, seed=1).requires_grad_()
    neighbourhood_loss(x, x.detach() @ weight, 0.5).backward()
    assert x.grad is None and weight.grad is not None


def test_the_neighbourhood_loss_stays_finite_where_exponentials_do_not():
    x = normal(9, 4, dtype=torch.float32)
    assert math.isfinite(neighbourhood_loss(x, -x, 1e-3).item())
    assert math.isfinite(neighbourhood_loss(torch.zeros(4, 3), torch.zeros(4, 3)).item())


def test_the_odd_one_out_loss_against_torch():
    x, triplets = normal(12, 5), some_triplets(12, 40)
    gram = x @ x.T
    logits = torch.stack([gram[triplets[:, a], triplets[:, b]] for a, b in ((0, 1), (0, 2), (1, 2))], 1)
    wanted = F.cross_entropy(logits, torch.zeros(40, dtype=torch.long))
    assert odd_one_out_loss(x, triplets).item() == pytest.approx(wanted.item(), abs=1e-12)
    # Dot products and no cosines: scale counts.
    assert abs(odd_one_out_loss(2 * x, triplets).item() - wanted.item()) > 0.1
    assert odd_one_out_loss(torch.zeros(3, 2), torch.tensor([[0, 1, 2]])).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("factor", [-2.0, 0.0, 1e-3, 1.0, 7.0])
def test_multiples_of_the_identity_cost_nothing(factor):
    assert identity_penalty(factor * torch.eye(9, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-24)


def test_the_penalty_is_the_squared_distance_from_the_nearest_multiple_of_the_identity():
    weight = normal(6, 6)
    nearest = minimize_scalar(lambda c: ((weight.numpy() - c * np.eye(6)) ** 2).sum())
    assert identity_penalty(weight).item() == pytest.approx(nearest.fun, rel=1e-9)


def test_a_rotation_leaves_the_loss_of_neighbours():
    x, rotation = normal(40, 7), torch.from_numpy(ortho_group.rvs(7, random_state=0))
    assert neighbourhood_loss(x, x @ rotation).item() == pytest.approx(neighbourhood_loss(x, x).item(), abs=1e-12)


# The fit.


@pytest.mark.parametrize("kind", ["glocal", "global", "naive"])
def test_the_fit_against_an_optimiser_of_scipy(kind):
    """The whole loss written down in numpy, at the weights found and at those that scipy finds from the same start."""
    (x, triplets), others = planted(12, 4, 50), normal(15, 4, seed=1) - 0.5
    x = x + 1
    alpha, temperature, penalty = 0.3, 0.2, 0.05
    standard = torch.from_numpy((x.numpy() - x.numpy().mean()) / x.numpy().std())

    def loss(flat):
        weight = torch.from_numpy(flat.reshape(4, 4).copy())
        found = global_by_hand(standard @ weight, triplets)
        if kind == "glocal":
            found = (1 - alpha) * found + alpha * local_by_hand(others, others @ weight, temperature)
        off = weight - weight.diagonal().mean() * torch.eye(4) if kind != "naive" else weight
        norm = np.linalg.norm(off.numpy())
        return found + penalty * (norm if kind == "naive" else norm**2)

    best = minimize(loss, 0.1 * np.eye(4).ravel(), method="L-BFGS-B")
    found = align(
        x, triplets, kind=kind, local_features=others, alpha=alpha, temperature=temperature, penalty=penalty,
        optimizer="adam", lr=1e-2, epochs=600, scale=0.1,
    )  # fmt: skip
    assert found.weight.dtype == torch.float64
    assert loss(0.1 * np.eye(4).ravel()) > best.fun + 0.01
    assert loss(found.weight.detach().numpy().ravel()) == pytest.approx(best.fun, abs=2e-4)


def test_a_great_penalty_gives_a_multiple_of_the_identity_and_the_same_choices():
    x, triplets = planted()
    options = dict(optimizer="adam", lr=1e-3, epochs=150, batch=1500, scale=0.1, kind="global")
    standard = (x - x.mean()) / x.std()

    def share(penalty):
        weight = align(x, triplets, penalty=penalty, **options).weight.detach()
        return (identity_penalty(weight) / weight.square().sum()).item(), weight

    off, weights = zip(*[share(penalty) for penalty in (0.0, 1.0, 1e3)], strict=True)
    assert off[0] > 5 * off[1] > 25 * off[2] and off[2] < 1e-4
    weight = weights[2]
    assert odd_one_out_accuracy(standard @ weight, triplets) == pytest.approx(
        odd_one_out_accuracy(standard, triplets), abs=0.01
    )


def test_judgments_are_learned_and_neighbours_are_kept():
    x, triplets = planted(count=4000)
    train, test = object_folds(triplets)[0]
    others = normal(200, 16, seed=5)
    options = dict(optimizer="adam", lr=1e-2, epochs=60, batch=4000, scale=0.1, penalty=1e-2, local_features=others)
    fits = {kind: align(x, train, kind=kind, **options) for kind in ("glocal", "global", "naive")}
    right = {kind: odd_one_out_accuracy(fit(x), test) for kind, fit in fits.items()}
    overlap = {kind: neighbourhood_overlap(others, fit(others)) for kind, fit in fits.items()}
    before = odd_one_out_accuracy(x, test)
    print(before, right, overlap)
    assert all(value > before + 0.1 for value in right.values())
    assert overlap["glocal"] > overlap["global"] + 0.05
    assert all(len(fit.history) == 60 and not fit.weight.grad for fit in fits.values())
    assert fits["global"].history[-1]["odd"] < fits["global"].history[0]["odd"]


def test_published_settings_run_and_train():
    x, triplets = planted()
    found = align(x.float(), triplets, local_features=normal(50, 16, seed=5, dtype=torch.float32), local_batch=32)
    assert len(found.history) == 100 and found.weight.dtype == torch.float32
    assert found.history[-1]["odd"] < found.history[0]["odd"] < math.log(3) + 1e-3


def test_it_stops_and_keeps_the_best():
    x, triplets = planted()
    noise = some_triplets(60, 200, seed=9)  # judgments of nobody: what is learned makes them worse
    options = dict(optimizer="adam", lr=1e-2, scale=0.1, epochs=40, kind="global", penalty=0.0)
    found = align(x, triplets, held_out=noise, patience=3, least_epochs=7, **options)
    losses = [each["held_out"] for each in found.history]
    best = losses.index(min(losses))
    assert len(losses) == max(7, best + 4) < 40
    standard = (x - x.mean()) / x.std(correction=0)
    assert odd_one_out_loss(standard @ found.weight, noise).item() == pytest.approx(losses[best], abs=1e-9)
    assert len(align(x, triplets, **options).history) == 40


def test_what_is_held_out_counts_by_the_plain_sum():
    x, triplets = planted()
    near = normal(40, 16, seed=6)
    fit = align(x, triplets, held_out=triplets[:50], held_out_local=near, epochs=1, alpha=0.1)
    standard = (x - x.mean()) / x.std(correction=0)
    wanted = global_by_hand((standard @ fit.weight).detach(), triplets[:50])
    wanted += local_by_hand(near, (near @ fit.weight).detach(), 0.1)
    assert fit.history[0]["held_out"] == pytest.approx(wanted, abs=1e-9)


def test_local_features_are_standardised_on_request():
    x, triplets = planted()
    x, near = x + 3, normal(40, 16, seed=6) + 3
    options = dict(held_out=triplets, local_features=near, epochs=1)
    first = [align(x, triplets, standardise_local=on, **options) for on in (False, True)]
    moved = (near - x.mean()) / x.std(correction=0)
    for fit, each in zip(first, (near, moved), strict=True):
        odd = odd_one_out_loss(((x - x.mean()) / x.std(correction=0)) @ fit.weight, triplets)
        wanted = odd.item() + local_by_hand(each, (each @ fit.weight).detach(), 0.1)
        assert fit.history[0]["held_out"] == pytest.approx(wanted, abs=1e-9)


def test_equal_seeds_give_equal_weights():
    x, triplets = planted()
    options = dict(epochs=2, local_batch=20)
    a, b, c = (align(x, triplets, seed=seed, **options).weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# The transform.


def test_the_transform_is_saved_with_its_two_numbers():
    x, triplets = planted()
    x = x * 3 + 5
    fit = align(x, triplets, bias=True, epochs=3, optimizer="adam", lr=1e-2)
    assert list(fit.state_dict()) == ["weight", "bias", "mean", "std"]
    assert list(GlocalTransform(4).state_dict()) == ["weight", "mean", "std"]
    again = GlocalTransform(16, bias=True).double()
    again.load_state_dict(load(save(fit.state_dict())))
    numbers = x.numpy()
    wanted = (numbers - numbers.mean()) / numbers.std() @ fit.weight.detach().numpy() + fit.bias.detach().numpy()
    for each in (fit, again):
        assert np.allclose(each(x).detach().numpy(), wanted, atol=1e-10)
    assert fit(x[None, :7]).shape == (1, 7, 16)
    assert not torch.equal(fit.bias, torch.full_like(fit.bias, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_features(dtype):
    x, triplets = planted()
    low = x.to(dtype)
    fit = align(low, triplets, epochs=2, local_features=low[:30])
    assert fit.weight.dtype == torch.float32
    assert fit(low).dtype == dtype
    torch.testing.assert_close(fit(low).float(), fit(low.float()), atol=1e-4, rtol=1e-2)
    assert odd_one_out_loss(low, triplets).dtype == torch.float32
    assert neighbourhood_loss(low, low).item() == pytest.approx(neighbourhood_loss(low.float(), low.float()).item())


def test_bad_input_is_named():
    x, triplets = planted()
    cases = [
        (lambda: align(x[0], triplets), "features must be numbers"),
        (lambda: align(x, triplets.double()), "triplets must be whole numbers"),
        (lambda: align(x, triplets + 1), "from 0 to 59; they went from 1 to 60"),
        (lambda: align(x, triplets - 1), "they went from -1 to 58"),
        (lambda: align(x, torch.tensor([[1, 1, 2]])), "three different objects"),
        (lambda: align(x, torch.tensor([[1, 3, 1]])), "three different objects"),
        (lambda: align(x, triplets, held_out=triplets + 1), "held_out must be"),
        (lambda: align(x, triplets, local_features=x[:, :3]), r"local_features must be numbers \(N, 16\)"),
        (lambda: align(torch.ones(60, 4), triplets), "features must differ"),
        (lambda: align(x, triplets, kind="local"), "kind must be"),
        (lambda: align(x, triplets, optimizer="lion"), "optimizer must be"),
        (lambda: align(x, triplets, alpha=1.5), "alpha must be from 0 to 1; it was 1.5"),
        (lambda: align(x, triplets, penalty=-1), "penalty must be at least 0"),
        (lambda: align(x, triplets, temperature=0), "temperature must be above 0"),
        (lambda: align(x, triplets, local_batch=2), "local_batch must be at least 3"),
        (lambda: align(x, triplets, epochs=0), "epochs must be at least 1"),
        (lambda: neighbourhood_loss(x, x[1:]), "x and y must be"),
        (lambda: neighbourhood_loss(x[:2], x[:2]), "B at least 3"),
        (lambda: neighbourhood_loss(x, x, 0), "temperature must be above 0"),
        (lambda: identity_penalty(x), "weight must be"),
        (lambda: GlocalTransform(0), "dim must be at least 1"),
        (lambda: GlocalTransform(3, scale=0), "scale must be above 0"),
        (lambda: GlocalTransform(3)(x), "x must have 3 features"),
    ]
    for call, named in cases:
        with pytest.raises(ValueError, match=named):
            call()


def test_a_loss_that_is_not_finite_is_an_error():
    x, triplets = planted()
    with pytest.raises(FloatingPointError, match="lower lr"):
        align(x.float() * 1e3, triplets, scale=1e30, epochs=1, kind="global")
