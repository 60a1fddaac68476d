"""Marks against skimage's ellipse, scipy's blur, slices of the pixels and symmetries."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.draw import ellipse_perimeter
from skimage.morphology import dilation, disk

from glocal.steer.marks import MARKS, blur_outside, circle, crop, frame, grey_outside, inside, length, ring


def photo(height=41, width=60, seed=0):
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = gaussian_filter(noise, (2, 2, 0))
    return Image.fromarray((np.clip(smooth * 3, -1, 1) * 127 + 128).astype(np.uint8))


def drawn(image, mark, *args, **options):
    """Where a mark in a colour that the picture does not have is."""
    blank = Image.new("RGB", image.size)
    return (np.asarray(mark(blank, *args, colour=(9, 8, 7), **options)) == (9, 8, 7)).all(-1)


@pytest.mark.parametrize("box", [(5, 6, 40, 31), (10, 2, 31, 39), (0, 0, 59, 41), (7, 9, 20, 22)])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_ring_is_the_dilated_ellipse_of_skimage(box, width):
    found = drawn(photo(), ring, box, width=width)
    left, top, right, bottom = box
    high, wide = (bottom - top - width) // 2, (right - left - width) // 2  # of the middle of the line
    line = np.zeros((41, 60), bool)
    line[ellipse_perimeter((top + bottom) // 2, (left + right) // 2, high, wide)] = True
    thick, near = dilation(line, disk(width // 2)), np.ones((3, 3))
    assert not (found & ~dilation(thick, near)).any() and not (thick & ~dilation(found, near)).any()
    # the line is as wide as asked for, and touches the box without leaving it
    assert found[(top + bottom) // 2, left : (left + right) // 2].sum() == width
    assert np.flatnonzero(found.any(1))[[0, -1]].tolist() == [top, bottom - 1]
    assert np.flatnonzero(found.any(0))[[0, -1]].tolist() == [left, right - 1]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("margin", [3, 6])
def test_a_centred_circle_is_symmetric(width, margin):
    for side in (24, 25):
        image = Image.new("RGB", (side, side))
        lines = [drawn(image, ring, (margin, margin, side - margin, side - margin), width=width)]
        lines.append(drawn(image, circle, (side / 2, side / 2), radius=8, width=width) if side == 24 else lines[0])
        for line in lines:
            assert line.any()
            for other in (line[::-1], line[:, ::-1], line.T):
                assert np.array_equal(line, other)


def test_a_circle_is_around_its_point():
    line = drawn(photo(), circle, (20, 15), radius=6, width=1)
    rows, columns = np.nonzero(line)
    away = np.hypot(rows + 0.5 - 15, columns + 0.5 - 20)
    assert away.min() >= 5 and away.max() <= 6.5
    # at an edge a part of it is left; the radius as a share is of the height
    assert 0 < drawn(photo(), circle, (0, 0), radius=6).sum() < line.sum()
    assert np.array_equal(
        drawn(photo(50, 90), circle, (30, 20), radius=0.1), drawn(photo(50, 90), circle, (30, 20), radius=5)
    )


def test_frame_against_slices():
    want = np.zeros((41, 60), bool)
    want[6:30, 5:40] = True
    want[8:28, 7:38] = False
    assert np.array_equal(drawn(photo(), frame, (5, 6, 40, 30), width=2), want)


def test_inside_covers_the_areas():
    box = (4, 5, 50, 36)
    ellipse, rectangle = (np.asarray(inside(photo(), box, name)) for name in ("ellipse", "rectangle"))
    assert set(np.unique(ellipse)) == {0, 255} and (rectangle == 255).sum() == 46 * 31
    assert (ellipse == 255).sum() == pytest.approx(np.pi * 23 * 15.5, rel=0.02)
    y, x = np.mgrid[:41, :60] + 0.5
    far = ((x - 27) / 23) ** 2 + ((y - 20.5) / 15.5) ** 2
    assert (ellipse[far < 0.9] == 255).all() and (ellipse[far > 1.1] == 0).all()


@pytest.mark.parametrize("outline", ["ellipse", "rectangle"])
def test_grey_outside_has_luma_and_keeps_the_inside(outline):
    image, box = photo(), (5, 6, 40, 30)
    pixels, found = np.asarray(image).astype(float), np.asarray(grey_outside(image, box, outline=outline)).astype(float)
    within = np.asarray(inside(image, box, outline)) == 255
    assert np.array_equal(found[within], pixels[within])
    luma = pixels @ [0.299, 0.587, 0.114]
    assert abs(found[~within] - luma[~within][:, None]).max() <= 1 and np.ptp(found[~within], axis=-1).max() == 0


@pytest.mark.parametrize("sigma", [2, 5])
def test_blur_outside_against_scipy(sigma):
    image, box = photo(60, 80), (25, 20, 50, 40)
    pixels, found = np.asarray(image).astype(float), np.asarray(blur_outside(image, box, radius=sigma)).astype(float)
    within = np.asarray(inside(image, box)) == 255
    assert np.array_equal(found[within], pixels[within])
    want = gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")
    error = np.where(within[..., None], 0, abs(found - want))
    middle = error[2 * sigma : -2 * sigma, 2 * sigma : -2 * sigma]
    assert middle.max() < 5 and error.mean() < 2  # PIL's is three box filters, and goes on otherwise at the edges
    assert abs(pixels - want)[~within].mean() > 8  # and the picture itself is far from it
    assert np.array_equal(
        np.asarray(blur_outside(image, box, radius=0.1)), np.asarray(blur_outside(image, box, radius=6))
    )
    assert np.array_equal(np.asarray(blur_outside(image, box, radius=0)), pixels)


def test_crop_against_slices():
    image = photo()
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(crop(image, (5, 6, 40, 30))), pixels[6:30, 5:40])
    assert np.array_equal(np.asarray(crop(image, (5, 6, 40, 30), margin=8)), pixels[0:38, 0:48])
    assert np.array_equal(np.asarray(crop(image, (10, 10, 30, 20), margin=0.5)), pixels[5:25, 0:40])
    assert np.array_equal(np.asarray(crop(image, (-9, 30, 10, 99))), pixels[30:, :10])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("name", [*MARKS, "circle"])
def test_the_picture_is_never_drawn_on(name, mode):
    image = photo().convert(mode)
    before = image.tobytes()
    found = circle(image, (9, 9)) if name == "circle" else MARKS[name](image, (3.4, 4.6, 30.2, 70))
    assert found.mode == "RGB" and found is not image and image.tobytes() == before and image.mode == mode


@pytest.mark.parametrize("mark", [ring, frame])
def test_width_is_pixels_or_a_share_of_the_height(mark):
    image, box = photo(50, 200), (10, 5, 150, 45)
    assert np.array_equal(drawn(image, mark, box, width=0.06), drawn(image, mark, box, width=3))
    for nothing in (0, 0.0):
        assert np.array_equal(np.asarray(mark(image, box, width=nothing)), np.asarray(image))
    assert length(0.0001, 50) == 1  # a line that was asked for is seen


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda image: ring(image, (5, 5, 5, 9)), "box must be .* it was \\(5, 5, 5, 9\\)"),
        (lambda image: ring(image, (5, 5, 9)), "box must be"),
        (lambda image: frame(image, (5, float("nan"), 9, 9)), "box must be"),
        (lambda image: crop(image, (60, 0, 70, 9)), "outside of the picture of 60 x 41"),
        (lambda image: ring(image, (0, 0, 9, 9), width=-1), "width must be at least 0"),
        (lambda image: ring(image, (0, 0, 9, 9), width=1.5), "width must be an int"),
        (lambda image: blur_outside(image, (0, 0, 9, 9), radius=-1), "radius must be at least 0"),
        (lambda image: circle(image, (0, 0), radius=0), "radius must be at least 1"),
        (lambda image: circle(image, (61, 0)), "point must be x, y"),
        (lambda image: inside(image, (0, 0, 9, 9), "round"), "outline must be .* 'round'"),
        (lambda image: crop(image, (0, 0, 9, 9), margin=-1), "margin must be at least 0"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(photo())
