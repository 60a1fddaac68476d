"""The pursuit against scikit-learn, a plain loop with least squares, and planted atoms."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import OrthogonalMatchingPursuit

from glocal.steer.pursuit import lens, pursuit, read_atoms


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(x, dictionary, steps, score="sum"):
    """Textbook: the best atom, then least squares on all of them."""
    x = x.numpy() - x.numpy().mean(0)
    atoms = dictionary.numpy() / np.linalg.norm(dictionary.numpy(), axis=1, keepdims=True)
    chosen, explained, residual = [], [], x
    for _ in range(steps):
        products = residual @ atoms.T
        worth = np.abs(products).sum(0) if score == "sum" else products.std(0, ddof=1)
        worth[chosen] = -1
        chosen.append(int(worth.argmax()))
        solution = np.linalg.lstsq(atoms[chosen].T, x.T, rcond=None)[0]
        residual = x - (atoms[chosen].T @ solution).T
        explained.append(1 - (residual**2).sum() / (x**2).sum())
    return chosen, explained, solution.T, residual


@pytest.mark.parametrize("seed", range(5))
def test_one_vector_as_scikit_learn_has_it(seed):
    x, dictionary = drawn(1, 30, seed=seed), drawn(50, 30, seed=seed + 100)
    unit = dictionary / dictionary.norm(dim=1, keepdim=True)
    found = pursuit(x, dictionary, 7, center=False)
    peer = OrthogonalMatchingPursuit(n_nonzero_coefs=7, fit_intercept=False).fit(unit.T.numpy(), x[0].numpy())
    assert sorted(found.atoms.tolist()) == np.flatnonzero(peer.coef_).tolist()
    assert np.allclose(found.coefficients[0].numpy(), peer.coef_[found.atoms.numpy()], atol=1e-5)


@pytest.mark.parametrize("score", ["sum", "std"])
def test_many_vectors_as_a_loop_has_them(score):
    x, dictionary = drawn(3, 20, 16), drawn(40, 16, seed=1)
    dictionary[1] = dictionary[0] + 1e-3 * drawn(16, seed=2)  # nearly the same atom twice
    found = pursuit(x, dictionary, 6, score=score)
    for head in range(3):
        chosen, explained, coefficients, residual = loop(x[head], dictionary, 6, score)
        assert found.atoms[head].tolist() == chosen
        assert np.allclose(found.explained[head], explained)
        assert np.allclose(found.coefficients[head], coefficients)
        assert np.allclose(found.residual[head], residual)
        assert np.allclose(found.weights[head], np.linalg.norm(coefficients, axis=0))


def test_correlated_atoms_in_single_precision():
    """Normal equations would square a condition of 1e4."""
    base = drawn(1, 24)
    dictionary = torch.cat([base + 1e-4 * drawn(6, 24, seed=1), drawn(2, 24, seed=2)])
    x = drawn(10, 8, seed=3) @ dictionary
    found = pursuit(x.float(), dictionary.float(), 8, center=False)
    unit = dictionary / dictionary.norm(dim=1, keepdim=True)
    assert (found.residual.double() @ unit.T).abs().max() < 1e-5 * x.norm(dim=1).max()
    assert found.explained[-1] > 1 - 1e-6


def test_planted_atoms_are_found():
    dictionary = drawn(200, 64)
    planted = [17, 90, 133]
    x = drawn(100, 3, seed=1) @ dictionary[planted]
    x = x + 0.01 * x.std() * drawn(100, 64, seed=2)
    found = pursuit(x + 5 * drawn(64, seed=3), dictionary, 3)  # a constant write does not matter
    assert sorted(found.atoms.tolist()) == planted and found.explained[-1] > 0.999


def test_residuals_are_orthogonal_and_the_share_grows_to_one():
    x, dictionary = drawn(2, 12, 8), drawn(30, 8, seed=1)
    unit = dictionary / dictionary.norm(dim=1, keepdim=True)
    for steps in (1, 4, 8, 12):  # 8 span the space; what comes after takes no part
        found = pursuit(x, dictionary, steps)
        for head in range(2):
            assert (found.residual[head] @ unit[found.atoms[head]].T).abs().max() < 1e-5
            assert len(set(found.atoms[head].tolist())) == steps
        assert (found.explained.diff(dim=-1) >= -1e-12).all()
        whole = found.coefficients @ unit[found.atoms] + found.residual
        assert torch.allclose(whole, x - x.mean(1, keepdim=True))
    assert torch.allclose(found.explained[:, 7:], torch.ones(2, 5, dtype=torch.float64))


def test_one_vector_and_one_atom_are_the_logit_lens():
    x, dictionary = drawn(20, 1, 16), drawn(50, 16, seed=1)
    for normalise in (True, False):
        unit = dictionary / dictionary.norm(dim=1, keepdim=True) if normalise else dictionary
        logits = (x[:, 0] @ unit.T).abs()
        found = pursuit(x, dictionary, 1, center=False, normalise=normalise)
        assert torch.equal(found.atoms[:, 0], logits.argmax(1))
        assert torch.allclose(lens(x, dictionary, normalise=normalise), logits.amax(1))


def test_what_does_not_vary_is_not_explained():
    """A constant in single precision leaves rounding when its mean is taken off: that is nothing to explain."""
    constant = (drawn(1, 16).float() * 1e3).expand(50, 16) + 0.0
    x = torch.stack([constant, drawn(50, 16, seed=1).float()])
    found = pursuit(x, torch.eye(16), 16)
    assert (found.explained[0] == 0).all() and (found.coefficients[0] == 0).all() and found.explained[1, -1] > 0.999


def test_inputs_stay_as_they_are_and_low_precision_works():
    x, dictionary = drawn(6, 8).bfloat16(), drawn(9, 8, seed=1).half()
    before = x.clone(), dictionary.clone()
    found = pursuit(x.requires_grad_(), dictionary, 3)
    assert found.residual.dtype == torch.float32 and not found.residual.requires_grad
    assert torch.equal(x.detach(), before[0]) and torch.equal(dictionary, before[1])
    wide = pursuit(before[0].double(), before[1].double(), 3)
    assert torch.equal(found.atoms, wide.atoms) and torch.allclose(found.explained.double(), wide.explained, atol=1e-5)


def test_a_dictionary_in_pieces(monkeypatch):
    x, dictionary = drawn(6, 8), drawn(40, 8, seed=1)
    wanted, seen = pursuit(x, dictionary, 4), lens(x, dictionary)
    monkeypatch.setattr("glocal.steer.pursuit._BUDGET", 18)
    assert torch.equal(pursuit(x, dictionary, 4).atoms, wanted.atoms)
    assert torch.allclose(lens(x, dictionary), seen)


def test_atoms_by_name():
    found = pursuit(torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 1.0]]), torch.eye(3), 2, center=False)
    assert [name for name, _, _ in read_atoms(found, lambda row: f"token {row}")] == ["token 1", "token 2"]
    assert read_atoms(found, "abc")[1][1:] == (pytest.approx(1.0), pytest.approx(1.0))
    with pytest.raises(ValueError, match="of one head"):
        read_atoms(pursuit(torch.randn(2, 5, 3), torch.eye(3), 2), "abc")


def test_what_is_refused():
    x, dictionary = drawn(4, 8), drawn(9, 8)
    for given, message in (
        ((x[0], dictionary, 1), "x must be"),
        ((x, dictionary[:, :7], 1), "of the same C"),
        ((x, dictionary, 0), "steps must be from 1 to the 9 atoms; it was 0"),
        ((x, dictionary, 10), "it was 10"),
        ((x[:1], dictionary, 1), "pass center=False"),
    ):
        with pytest.raises(ValueError, match=message):
            pursuit(*given)
    with pytest.raises(ValueError, match="score must be"):
        pursuit(x, dictionary, 1, score="mean")
