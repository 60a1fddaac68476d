"""Maps and masks against scipy, scikit-image and counting."""

import numpy as np
import pytest
from PIL import Image
from scipy.interpolate import RectBivariateSpline
from scipy.ndimage import gaussian_filter

from glocal.steer.regions import blacked_out, bounding_box, enlarged, kept_share, pixel_map, top_share


def test_pixels_are_splines_and_a_blur():
    """A cubic spline of another kind, fitted to all patches at once, far from the border where the two differ."""
    values = np.random.default_rng(0).random((14, 14))
    found = pixel_map(values, (112, 112), blur=0.02)
    at = (np.arange(112) + 0.5) / 8 - 0.5
    large = RectBivariateSpline(np.arange(14), np.arange(14), values, kx=3, ky=3)(at, at).clip(
        values.min(), values.max()
    )
    inner = (slice(40, -40), slice(40, -40))
    wanted = gaussian_filter(large, 0.02 * 112)[inner].ravel()
    # Both are scaled to 0..1 over the whole picture, of which only the inner part agrees.
    slope, level = np.polyfit(wanted, found[inner].ravel(), 1)
    assert np.abs(slope * wanted + level - found[inner].ravel()).max() < 5e-3
    assert found.shape == (112, 112) and found.min() == 0 and found.max() == 1


def test_the_brightest_patch_stays_where_it_is():
    values = np.zeros((8, 4))
    values[6, 1] = 1
    found = pixel_map(values, (160, 40))
    top, left = np.unravel_index(found.argmax(), found.shape)
    assert 120 <= top < 140 and 10 <= left < 20


def test_a_flat_map_keeps_all():
    flat = pixel_map(np.full((4, 4), 0.3), (20, 20))
    assert (flat == 1).all() and top_share(flat, 0.1).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_kept(share):
    values = np.random.default_rng(1).permutation(400).reshape(20, 20).astype(float)  # no two alike
    kept = top_share(values, share)
    assert abs(kept.mean() - share) <= 1 / 400
    assert values[kept].min() > values[~kept].max() if 0 < kept.mean() < 1 else True
    if share == 1.0:
        assert kept.all()


def test_a_better_match_keeps_less():
    assert kept_share(0.9) < kept_share(0.1) < 1 and kept_share(-0.5) == 1 - 1e-5


def test_black_where_nothing_is_kept_and_the_picture_stays():
    picture = Image.fromarray(np.full((4, 6, 3), 200, np.uint8))
    kept = np.zeros((4, 6), bool)
    kept[1, 2:4] = True
    pixels = np.asarray(blacked_out(picture, kept))
    assert (pixels[1, 2:4] == 200).all() and pixels.sum() == 2 * 3 * 200
    assert np.asarray(picture).min() == 200


def test_boxes_and_crops():
    kept = np.zeros((10, 20), bool)
    kept[2:5, 7] = kept[4, 9] = True
    assert bounding_box(kept) == (7, 2, 10, 5)
    picture = Image.new("RGB", (20, 10))
    assert enlarged(picture, (7, 2, 10, 5)).size == (20, 20)


def test_bad_input():
    with pytest.raises(ValueError, match=r"rows, columns"):
        pixel_map(np.zeros(4), (8, 8))
    with pytest.raises(ValueError, match="finite"):
        pixel_map(np.array([[np.nan, 1.0]]), (8, 8))
    with pytest.raises(ValueError, match="share"):
        top_share(np.zeros((2, 2)), 1.2)
    with pytest.raises(ValueError, match="kept must be"):
        blacked_out(Image.new("RGB", (4, 4)), np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="true somewhere"):
        bounding_box(np.zeros((2, 2), bool))
