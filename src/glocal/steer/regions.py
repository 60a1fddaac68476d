"""From a map of relevance over patches to a picture of what it is about: enlarge, keep the top, black out, crop."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["blacked_out", "bounding_box", "enlarged", "kept_share", "pixel_map", "top_share"]

Map = NDArray[np.floating[Any]]


def unit(values: Map) -> Map:
    """Scaled to 0..1; all ones where it is flat: everything is as relevant as everything else."""
    low, high = float(values.min()), float(values.max())
    return np.ones_like(values, dtype=np.float64) if high <= low else (values.astype(np.float64) - low) / (high - low)


def pixel_map(values: Map, size: tuple[int, int], blur: float = 0.02) -> Map:
    """A map over patches as one over pixels: cubic enlargement and a blur, each scaled to 0..1.

    Args:
        values: ``(rows, columns)``.
        size: height and width.
        blur: standard deviation of the blur as a share of the longer side.

    Returns:
        ``(height, width)``; all ones for a flat map.

    Raises:
        ValueError: values that are no map, or not finite.
    """
    from scipy.ndimage import gaussian_filter
    from skimage import transform

    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be (rows, columns); they were {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite; some were not")
    if values.max() <= values.min():
        return np.ones(size)
    # Mirrored at the border, so that what stands there does not fade.
    enlarge: Any = transform.resize
    large = enlarge(unit(values), size, order=3, mode="symmetric", anti_aliasing=False)
    return unit(gaussian_filter(large, blur * max(size)))


def top_share(values: Map, share: float) -> NDArray[np.bool_]:
    """The share of a map's pixels with the highest values; all of a flat map.

    The threshold is the value at place ``int(count * share)`` of the descending order; what equals it is kept too.

    Raises:
        ValueError: a share that is not from 0 to 1.

    >>> top_share(np.array([[0.0, 1.0], [2.0, 3.0]]), 0.25)
    array([[False, False],
           [ True,  True]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1; it was {share}")
    order = np.sort(values, axis=None)[::-1]
    kept: NDArray[np.bool_] = values >= order[min(len(order) - 1, int(len(order) * share))]
    return kept


def kept_share(similarity: float) -> float:
    """What share of a picture to keep: the better picture and question match, the less; at most 1 - 1e-5.

    >>> kept_share(0.5), kept_share(-1.0)
    (0.75, 0.99999)
    """
    return min(1 - similarity / 2, 1 - 1e-5)


def blacked_out(image: Any, kept: NDArray[np.bool_]) -> Any:
    """A copy of a picture, black where a mask is false.

    Args:
        image: a PIL image.
        kept: ``(height, width)`` booleans of the image's size.

    Raises:
        ValueError: a mask of another size.
    """
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"))
    if kept.shape != pixels.shape[:2]:
        raise ValueError(f"kept must be {pixels.shape[:2]} as the image; it was {kept.shape}")
    return Image.fromarray(pixels * kept[..., None].astype(np.uint8))


def bounding_box(kept: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest box that holds all that is true: left, top, right, bottom, the last two outside of it.

    Raises:
        ValueError: nothing is true.

    >>> bounding_box(np.array([[False, False], [False, True]]))
    (1, 1, 2, 2)
    """
    if not kept.any():
        raise ValueError("kept must be true somewhere; it was false everywhere")
    rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def enlarged(image: Any, box: tuple[int, int, int, int]) -> Any:
    """What is in a box, enlarged until both sides are at least the picture's, its aspect kept."""
    from PIL import Image

    left, top, right, bottom = box
    factor = max(image.width / (right - left), image.height / (bottom - top))
    size = (round((right - left) * factor), round((bottom - top) * factor))
    return image.crop(box).resize(size, Image.Resampling.LANCZOS)
