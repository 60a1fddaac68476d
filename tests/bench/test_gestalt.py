"""S062: probes of wholes on maps whose answers are known, principal components against numpy."""

import itertools

import numpy as np
import pytest
import torch

from glocal.bench.gestalt import (
    closure_figures,
    closure_sensitivity,
    convex_figures,
    convexity_preference,
    dot_grids,
    grouping_ratio,
    principal_maps,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Closure.


def filled(drawn, size, cells):
    """Maps of features that differ inside and outside of the squares, and noise."""
    low = drawn.inside.amin(1) / size * cells
    high = drawn.inside.amax(1) / size * cells
    at = torch.arange(cells) + 0.5
    rows = (at > low[:, :1]) & (at < high[:, :1])
    columns = (at > low[:, 1:]) & (at < high[:, 1:])
    inside = (rows[:, :, None] & columns[:, None]).float()
    maps = torch.stack([inside, 1 - inside], 1)
    return maps + 0.1 * torch.randn(maps.shape, generator=seeded(1))


def test_maps_that_fill_the_square_show_closure():
    drawn = closure_figures(40, 64, seeded())
    flat = torch.ones(40, 2, 64, 64) + 0.1 * torch.randn(40, 2, 64, 64, generator=seeded(2))
    # Points stand just inside the border, so the filled square is a little larger.
    full = filled(
        drawn._replace(inside=drawn.inside + (drawn.inside - drawn.inside.mean(1, keepdim=True)) * 0.2), 64, 64
    )
    assert closure_sensitivity(full, flat, drawn) > 3
    assert closure_sensitivity(flat, full, drawn) < -3
    assert abs(closure_sensitivity(flat, flat.flip(1), drawn)) < 1e-6


def test_d_prime_by_hand():
    drawn = closure_figures(1, 32, seeded())
    maps = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64)
    alike = []
    for one in maps:
        row = []
        for (y, x), (v, u) in zip(drawn.inside[0].long().tolist(), drawn.outside[0].long().tolist(), strict=True):
            a, b = one[0, :, y, x].numpy(), one[0, :, v, u].numpy()
            row.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        alike.append(np.array(row))
    wanted = (alike[1].mean() - alike[0].mean()) / np.sqrt((alike[0].var(ddof=1) + alike[1].var(ddof=1)) / 2)
    assert closure_sensitivity(*maps, drawn) == pytest.approx(wanted)


def test_figures_and_controls_have_the_same_ink_elsewhere():
    drawn = closure_figures(30, 96, seeded())
    ink = [(1 - images).sum((1, 2, 3)) for images in (drawn.figures, drawn.controls)]
    torch.testing.assert_close(ink[0], ink[1], rtol=0.08, atol=0)
    torch.testing.assert_close(ink[0].sum(), ink[1].sum(), rtol=0.015, atol=0)
    # Three quarters of four discs.
    half = (drawn.outside - drawn.inside).norm(dim=-1).mean(1) / 2
    assert half.allclose(torch.full((30,), 6.0), atol=1e-4)
    side = drawn.inside[:, 1, 0] - drawn.inside[:, 0, 0] + 2 * half
    area = 4 * 0.75 * torch.pi * (0.45 * side / 2) ** 2
    torch.testing.assert_close(ink[0], area, rtol=0.08, atol=0)
    torch.testing.assert_close(ink[0].sum(), area.sum(), rtol=0.01, atol=0)
    # The mouths open towards the centre: the square's inside is white, in figures alone.
    for figure, control, points in zip(drawn.figures, drawn.controls, drawn.inside, strict=True):
        top, bottom = points[:, 0].min().long() + 8, points[:, 0].max().long() - 8
        left, right = points[:, 1].min().long() + 8, points[:, 1].max().long() - 8
        assert figure[0, top:bottom, left:right].min() == 1
        assert control[0, top - 11 : bottom + 11, left - 11 : right + 11].min() == 0
        assert figure.min() == 0


# Convexity.


def test_the_side_that_bulges():
    drawn = convex_figures(40, 96, seeded())
    for image, convex in zip(drawn.images[:, 0], drawn.convex, strict=True):
        assert image[convex].unique().numel() == image[~convex].unique().numel() == 1
        assert image[convex][0] != image[~convex][0]
        # How far the convex side reaches, place by place along the border: arcs of which every chord is within.
        reach = min(convex.sum(0), convex.sum(1), key=lambda widths: widths.max())
        for bump in reach.split(32):
            assert bump[16] - bump[0] > 8 and bump[15] - bump[-1] > 8
            for i, j in itertools.combinations(range(0, 32, 2), 2):
                assert bump[(i + j) // 2] >= (bump[i] + bump[j]) / 2 - 1
    assert 0.3 < float(drawn.images[drawn.convex[:, None]].mean()) < 0.7  # which one is black is random


def test_energy_on_the_convex_side():
    drawn = convex_figures(10, 48, seeded())
    noise = torch.randn(10, 1, 48, 48, generator=seeded(3))
    on = drawn.convex[:, None]
    for maps, low, high in ((noise * on, 0.99, 1.0), (noise * ~on, 0.0, 0.01), (noise, 0.4, 0.6)):
        share = convexity_preference(maps, drawn.convex)
        assert low <= float(share.mean()) <= high


def test_smaller_maps_take_the_middle_of_their_places():
    drawn = convex_figures(4, 48, seeded())
    small = drawn.convex[:, 2::4, 2::4]
    maps = torch.randn(4, 5, 12, 12, generator=seeded())
    leading = principal_maps(maps, 1)[:, 0].square()
    torch.testing.assert_close(
        convexity_preference(maps, drawn.convex), (leading * small).sum((1, 2)) / leading.sum((1, 2))
    )


def test_principal_maps_are_numpy_s():
    maps = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    found = principal_maps(maps)
    for picture, one in zip(maps.numpy(), found.numpy(), strict=True):
        rows = picture.reshape(6, -1).T
        rows = rows - rows.mean(0)
        values, vectors = np.linalg.eigh(rows.T @ rows)
        for n in range(3):
            wanted = (rows @ vectors[:, -1 - n]).reshape(5, 7)
            border = np.concatenate([wanted[0], wanted[-1], wanted[1:-1, 0], wanted[1:-1, -1]])
            np.testing.assert_allclose(one[n], -np.sign(border.mean()) * wanted, atol=1e-10)
            assert (one[n] ** 2).sum() == pytest.approx(values[-1 - n])


# Grouping.


@pytest.mark.parametrize("by", ["proximity", "similarity"])
def test_dots_are_where_they_are_said(by):
    drawn = dot_grids(64, by=by)
    for (y, x), group in zip(drawn.places.long().tolist(), drawn.groups.tolist(), strict=True):
        grey = float(drawn.images[0, 0, y, x])
        assert grey == pytest.approx(0.0 if by == "proximity" or group % 2 == 0 else 0.6)
    rows = drawn.places[::4, 0]
    gaps = rows[1:] - rows[:-1]
    near = 0.6 if by == "proximity" else 1.0
    torch.testing.assert_close(gaps, 16 * torch.tensor([near, 2 - near, near]))


def test_grouping_by_hand():
    drawn = dot_grids(64, by="similarity")
    maps = torch.zeros(1, 2, 64, 64)
    for n, (y, x) in enumerate(drawn.places.long().tolist()):
        angle = 0.3 * n + drawn.groups[n]
        maps[0, :, y, x] = torch.stack([torch.cos(angle), torch.sin(angle)])
    same, other = [], []
    for a in range(16):
        for b in range(16):
            angles = [0.3 * n + int(drawn.groups[n]) for n in (a, b)]
            if a != b:
                (same if drawn.groups[a] == drawn.groups[b] else other).append(np.cos(angles[0] - angles[1]))
    assert grouping_ratio(maps, drawn) == pytest.approx(np.mean(same) / np.mean(other), rel=1e-4)


def test_pixels_group_by_grey():
    drawn = dot_grids(64, by="similarity")
    maps = torch.cat([drawn.images, 1 - drawn.images], 1)
    assert grouping_ratio(maps, drawn) > 1.2
    near = dot_grids(64, by="proximity")
    assert grouping_ratio(torch.cat([near.images, 1 - near.images], 1), near) == pytest.approx(1)


def test_bad_input():
    with pytest.raises(ValueError, match="count must be at least 1 and size at least 32"):
        closure_figures(1, 16, seeded())
    drawn = closure_figures(2, 32, seeded())
    with pytest.raises(ValueError, match=r"figure_maps and control_maps must be \(2, C, h, w\) both"):
        closure_sensitivity(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 9), drawn)
    with pytest.raises(ValueError, match="count and bumps must be at least 1"):
        convex_figures(1, 8, seeded())
    with pytest.raises(ValueError, match=r"convex must be booleans \(2, S, S\)"):
        convexity_preference(torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8))
    with pytest.raises(ValueError, match=r"maps must be .* at least 3 channels"):
        principal_maps(torch.rand(1, 2, 8, 8))
    with pytest.raises(ValueError, match="by must be 'proximity' or 'similarity'"):
        dot_grids(by="colour")
    with pytest.raises(ValueError, match="side must be even, from 4"):
        dot_grids(side=5)
    with pytest.raises(ValueError, match=r"maps must be \(1, C, h, w\), of dots in groups"):
        grouping_ratio(torch.rand(2, 3, 8, 8), dot_grids())
