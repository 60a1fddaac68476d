"""Marks on a picture that point at a part of it: a line around it, its surroundings grey or blurred, or a cut.

All take a PIL image and give a new one in RGB; the picture itself is never drawn on. A box is left, top, right and
bottom in pixels, the last two outside of it, as in ``Image.crop``; it may reach over the picture's edges. A length is
in pixels where it is an int and a share of the picture's height where it is a float: ``width=2`` or ``width=0.01``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["MARKS", "Colour", "blur_outside", "circle", "crop", "frame", "grey_outside", "inside", "length", "ring"]

Colour = tuple[int, int, int]
Outline = Literal["ellipse", "rectangle"]
RED: Colour = (255, 0, 0)


def length(value: float, height: int, name: str = "width", least: int = 0) -> int:
    """A length in pixels: ints as they are, floats times the height, rounded; a share above 0 gives at least 1.

    Raises:
        ValueError: a length below ``least``, or a share over 1.

    >>> length(2, 384), length(0.01, 384), length(0.001, 384), length(0.0, 384)
    (2, 4, 1, 0)
    """
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ValueError(
                f"{name} must be an int in pixels or a float from 0 to 1, a share of the height; got {value}"
            )
        value = max(1, round(value * height)) if value > 0 else 0
    if value < least:
        raise ValueError(f"{name} must be at least {least} pixels; it was {value}")
    return value


def ring(image: Any, box: Sequence[float], *, width: float = 0.01, colour: Colour = RED) -> Any:
    """The ellipse that a box holds, as a line on the inside of the box.

    Args:
        image: a PIL image.
        box: left, top, right, bottom.
        width: of the line; 0 draws none.
        colour: red, green, blue.

    Raises:
        ValueError: a box without area, or that misses the picture; a width that is none.

    >>> from PIL import Image
    >>> marked = ring(Image.new("RGB", (9, 9)), (2, 2, 7, 7), width=1)
    >>> marked.getpixel((2, 4)), marked.getpixel((4, 4))
    ((255, 0, 0), (0, 0, 0))
    """
    from PIL import ImageDraw

    edges, line = _box(image, box), length(width, image.height)
    marked = image.convert("RGB")
    if line:
        ImageDraw.Draw(marked).ellipse(_last(edges), outline=colour, width=line)
    return marked


def frame(image: Any, box: Sequence[float], *, width: float = 0.01, colour: Colour = RED) -> Any:
    """The box itself, as a line on its inside; arguments and errors as for `ring`."""
    from PIL import ImageDraw

    edges, line = _box(image, box), length(width, image.height)
    marked = image.convert("RGB")
    if line:
        ImageDraw.Draw(marked).rectangle(_last(edges), outline=colour, width=line)
    return marked


def circle(
    image: Any, point: Sequence[float], *, radius: float = 0.06, width: float = 0.01, colour: Colour = RED
) -> Any:
    """A circle around a point, its line on the inside.

    Args:
        image: a PIL image.
        point: x and y in pixels, inside of the picture; ``(2.5, 2.5)`` is the middle of the third pixel.
        radius: of the outer edge, in pixels or as a share of the height.
        width, colour: of the line, as for `ring`.

    Raises:
        ValueError: a point outside of the picture, a radius below one pixel, a width that is none.
    """
    reach = length(radius, image.height, "radius", 1)
    if len(point) != 2 or not (0 <= point[0] <= image.width and 0 <= point[1] <= image.height):
        raise ValueError(f"point must be x, y inside of {image.width} x {image.height} pixels; it was {tuple(point)}")
    x, y = point
    return ring(image, (x - reach, y - reach, x + reach, y + reach), width=width, colour=colour)


def inside(image: Any, box: Sequence[float], outline: Outline = "ellipse") -> Any:
    """A mask of the picture's size, PIL mode L: 255 in the box or the ellipse in it, 0 outside.

    Raises:
        ValueError: as for `ring`, or an outline of another name.
    """
    from PIL import Image, ImageDraw

    if outline not in ("ellipse", "rectangle"):
        raise ValueError(f"outline must be 'ellipse' or 'rectangle'; it was {outline!r}")
    edges = _box(image, box)
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if outline == "ellipse" else draw.rectangle)(_last(edges), fill=255)
    return mask


def grey_outside(image: Any, box: Sequence[float], *, outline: Outline = "ellipse") -> Any:
    """Without colours outside of the ellipse in a box, or of the box; errors as for `inside`."""
    from PIL import Image

    return Image.composite(image.convert("RGB"), image.convert("L").convert("RGB"), inside(image, box, outline))


def blur_outside(image: Any, box: Sequence[float], *, radius: float = 0.2, outline: Outline = "ellipse") -> Any:
    """Blurred outside of the ellipse in a box, or of the box.

    Args:
        image: a PIL image.
        box: left, top, right, bottom.
        radius: standard deviation of the blur, in pixels or as a share of the height.
        outline: of what stays sharp.

    Raises:
        ValueError: as for `inside`, or a radius that is none.
    """
    from PIL import Image, ImageFilter

    mask, sigma = inside(image, box, outline), length(radius, image.height, "radius")
    sharp = image.convert("RGB")
    return Image.composite(sharp, sharp.filter(ImageFilter.GaussianBlur(sigma)), mask)


def crop(image: Any, box: Sequence[float], *, margin: float = 0.0) -> Any:
    """What is in a box, and around it a margin, as far as the picture reaches.

    Args:
        image: a PIL image.
        box: left, top, right, bottom.
        margin: in pixels where an int, else a share of the box's own width and height.

    Raises:
        ValueError: as for `ring`, or a margin below 0.
    """
    left, top, right, bottom = _box(image, box)
    if margin < 0:
        raise ValueError(f"margin must be at least 0; it was {margin}")
    x, y = (round(margin * side) if isinstance(margin, float) else margin for side in (right - left, bottom - top))
    return image.convert("RGB").crop(
        (max(0, left - x), max(0, top - y), min(image.width, right + x), min(image.height, bottom + y))
    )


MARKS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"ring": ring, "frame": frame, "grey": grey_outside, "blur": blur_outside, "crop": crop}
)
"""Marks of a box by their names: each takes a picture and a box."""


def _box(image: Any, box: Sequence[float]) -> tuple[int, int, int, int]:
    """A checked box in whole pixels, at least one wide and high."""
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box must be left, top, right, bottom with an area; it was {tuple(box)}")
    left, top = round(box[0]), round(box[1])
    right, bottom = max(left + 1, round(box[2])), max(top + 1, round(box[3]))
    if not (left < image.width and top < image.height and right > 0 and bottom > 0):
        raise ValueError(f"box {tuple(box)} is outside of the picture of {image.width} x {image.height} pixels")
    return left, top, right, bottom


def _last(edges: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """For PIL's drawing, which counts the last column and row in."""
    return edges[0], edges[1], edges[2] - 1, edges[3] - 1
