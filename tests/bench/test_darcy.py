"""Darcy flow: solutions that are known, what flows in flows out, and fields of two values."""

import numpy as np
import pytest
import torch

from glocal.bench.darcy import darcy, permeability, pressure, relative_error


def centres(n):
    return (np.arange(n) + 0.5) / n


def error(n, conductivity):
    """Of ``u = sin(pi x) sin(2 pi y)`` with ``a = 1 + c x y``, whose right side is written out."""
    x, y = centres(n)[:, None], centres(n)[None]
    wave = np.pi, 2 * np.pi
    u = np.sin(wave[0] * x) * np.sin(wave[1] * y)
    a = 1 + conductivity * x * y
    slope = (
        wave[0] * np.cos(wave[0] * x) * np.sin(wave[1] * y),
        wave[1] * np.sin(wave[0] * x) * np.cos(wave[1] * y),
    )
    f = a * 5 * np.pi**2 * u - conductivity * (y * slope[0] + x * slope[1])
    return np.abs(pressure(a, f) - u).max()


@pytest.mark.parametrize("conductivity", [0.0, 3.0])
def test_a_known_solution_is_met_with_second_order(conductivity):
    coarse, fine = error(16, conductivity), error(32, conductivity)
    assert fine < 0.01 and 3.5 < coarse / fine < 4.5


def test_two_cells_by_hand():
    """Between them flows 2 * 1 * 3 / (1 + 3) * 4 = 6, to each border's nearer side 8 a, above and below 2 a each."""
    assert np.allclose(pressure(np.array([[1.0, 3.0]])), [[1 / 15, 1 / 30]])  # of 18 u - 6 w = 1, 42 w - 6 u = 1


def test_all_that_is_made_leaves_through_the_border():
    a = permeability(24, np.random.default_rng(3))
    u = pressure(a) * 24  # times the cells of a side: a flow through half a cell is 2 a u n
    out = sum((2 * a[s] * u[s]).sum() / 24 for s in ((0, ...), (-1, ...), (..., 0), (..., -1)))
    assert out == pytest.approx(1.0)


def test_turned_bodies_have_turned_pressures():
    a = permeability(20, np.random.default_rng(1))
    assert np.allclose(pressure(np.rot90(a).copy()), np.rot90(pressure(a)))
    assert np.allclose(pressure(2 * a, 3.0), 1.5 * pressure(a))


def test_fields():
    fields = np.stack([permeability(32, np.random.default_rng(n)) for n in range(64)])
    assert set(np.unique(fields)) == {3.0, 12.0}
    assert 0.4 < (fields == 12).mean() < 0.6
    alike = (fields[:, 1:] == fields[:, :-1]).mean()
    assert alike > 0.9  # smooth: neighbours are mostly of one kind
    data = darcy(3, 16, seed=5)
    assert torch.equal(data.a[:2], darcy(2, 16, seed=5).a) and not torch.equal(data.a, darcy(3, 16).a)
    assert np.allclose(data.u[1, 0], pressure(data.a[1, 0].double().numpy()), atol=1e-6)


def test_relative_error():
    wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert relative_error(wanted + torch.tensor([[0.0, 5.0], [0.0, 0.0]]), wanted) == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match="a must be"):
        pressure(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="f must be"):
        pressure(np.ones((3, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="side must be"):
        permeability(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="count must be"):
        darcy(0, 8)
