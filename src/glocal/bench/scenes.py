"""Scenes of shapes on photographs, with questions whose answers are known: what a small model can be right about."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOURS", "KINDS", "SHAPES", "SIDE", "Kind", "Question", "Scene", "Thing", "ask_all", "caption", "scenes"]

SIDE = 96
"""Pixels of a picture's side."""
CELL = 12
"""Pixels of the cells that can be black."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (222, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
Kind = tuple[str, str]
"""Colour and shape."""
KINDS: tuple[Kind, ...] = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)
_TRAINING = ("astronaut", "coffee", "rocket", "brick", "grass", "hubble_deep_field")
_HELD_OUT = ("chelsea", "gravel", "retina")
_HABITS, _FAVOURITES, _HABITUAL = 6, 8, 0.75


@dataclass(frozen=True)
class Thing:
    """An object in a picture.

    Args:
        colour, shape: what it is.
        box: left, top, right, bottom in pixels, the last two outside.
    """

    colour: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def kind(self) -> Kind:
        """Colour and shape."""
        return self.colour, self.shape

    @property
    def centre(self) -> tuple[float, float]:
        """x and y of its middle."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and what can be seen in it, from left to right.

    Args:
        pixels: ``(SIDE, SIDE, 3)`` in uint8.
        things: what is not black.
    """

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]

    def image(self) -> Any:
        """The picture for PIL."""
        from PIL import Image

        return Image.fromarray(self.pixels)

    def kinds(self) -> set[Kind]:
        """The kinds of things in it."""
        return {thing.kind for thing in self.things}

    def cells(self) -> NDArray[np.int64]:
        """Which of the things holds the centre of each cell, ``(SIDE // CELL, SIDE // CELL)``; -1 for none."""
        centres = np.arange(CELL // 2, SIDE, CELL)
        found = np.full((len(centres), len(centres)), -1)
        for n, thing in enumerate(self.things):
            left, top, right, bottom = thing.box
            rows, columns = (centres >= top) & (centres < bottom), (centres >= left) & (centres < right)
            found[np.ix_(rows, columns)] = n
        return found


@dataclass(frozen=True)
class Question:
    """A question on a scene.

    Args:
        text: as it is asked.
        answer: as it would be right.
        about: presence (of a kind), shape (presence of one in any colour), colour, count, position or caption.
    """

    text: str
    answer: str
    about: str


@cache
def habits() -> tuple[tuple[Kind, ...], ...]:
    """Kinds that like to come together, in six groups: what makes a model expect what is not there."""
    draw = random.Random(11)
    kinds = list(KINDS)
    draw.shuffle(kinds)
    return tuple(tuple(kinds[n * _FAVOURITES : (n + 1) * _FAVOURITES]) for n in range(_HABITS))


def scenes(
    count: int,
    seed: int,
    *,
    held_out: bool = False,
    things: tuple[int, int] = (2, 5),
    noise: float | tuple[float, float] = 0.0,
    opacity: float | tuple[float, float] = 1.0,
    black: float = 0.0,
) -> list[Scene]:
    """Pictures from a seed.

    Args:
        count: how many.
        seed: of all that is drawn; training and held-out scenes of a seed differ.
        held_out: backgrounds from photographs that are used for no other scenes.
        things: least and greatest number of objects.
        noise: standard deviation of grey levels from 0 to 255, or a range from which each picture draws.
        opacity: of the objects, or a range.
        black: the share of pictures in which a random part of the cells is black; what is hidden is not among `things`.

    Raises:
        ValueError: numbers out of range.
    """
    if count < 0 or not 1 <= things[0] <= things[1] <= 8:
        raise ValueError(f"count must be at least 0 and things within 1 to 8; they were {count} and {things}")
    draw = random.Random(f"{seed} {held_out}")
    return [_scene(draw, held_out, things, noise, opacity, black) for _ in range(count)]


def _scene(
    draw: random.Random,
    held_out: bool,
    things: tuple[int, int],
    noise: float | tuple[float, float],
    opacity: float | tuple[float, float],
    black: float,
) -> Scene:
    from PIL import Image

    ground = _background(draw, held_out)
    habit, favourites = draw.randrange(_HABITS), habits()
    found: list[Thing] = []
    for _ in range(draw.randint(*things)):
        colour, shape = draw.choice(favourites[habit] if draw.random() < _HABITUAL else KINDS)
        if found and draw.random() < 0.2:
            shape = draw.choice(found).shape  # so that there is something to count
        for _ in range(30):
            side = draw.randint(16, 30)
            left, top = draw.randint(0, SIDE - side), draw.randint(0, SIDE - side)
            box = (left, top, left + side, top + side)
            if all(_apart(box, other.box) for other in found):
                found.append(Thing(colour, shape, box))
                break
    layer = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    for thing in found:
        _paint(layer, thing)
    shown = _within(opacity, draw)
    paint = np.asarray(layer, dtype=np.float32)
    strength = paint[..., 3:] / 255 * shown
    pixels = ground * (1 - strength) + paint[..., :3] * strength
    sigma = _within(noise, draw)
    if sigma > 0:
        pixels = pixels + np.random.default_rng(draw.getrandbits(32)).normal(0, sigma, pixels.shape)
    shown_pixels = pixels.clip(0, 255).astype(np.uint8)
    if draw.random() < black:
        shown_pixels, found = _blacked(shown_pixels, found, draw)
    found.sort(key=lambda thing: thing.centre)
    return Scene(shown_pixels, tuple(found))


def _within(value: float | tuple[float, float], draw: random.Random) -> float:
    return draw.uniform(*value) if isinstance(value, tuple) else value


def _apart(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return box[0] >= other[2] or other[0] >= box[2] or box[1] >= other[3] or other[1] >= box[3]


@cache
def _photographs(held_out: bool) -> tuple[NDArray[np.uint8], ...]:
    from skimage import data

    found = [getattr(data, name)() for name in (_HELD_OUT if held_out else _TRAINING)]
    return tuple(picture.repeat(3).reshape(*picture.shape, 3) if picture.ndim == 2 else picture for picture in found)


def _background(draw: random.Random, held_out: bool) -> NDArray[np.float32]:
    from PIL import Image

    photograph = draw.choice(_photographs(held_out))
    side = draw.randint(SIDE, min(photograph.shape[:2], default=SIDE))
    top, left = (draw.randint(0, length - side) for length in photograph.shape[:2])
    part = Image.fromarray(photograph[top : top + side, left : left + side])
    return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)


def _paint(layer: Any, thing: Thing) -> None:
    from PIL import ImageDraw

    pen, (left, top, right, bottom) = ImageDraw.Draw(layer), thing.box
    right, bottom = right - 1, bottom - 1
    x, y, reach = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif thing.shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=colour, width=max(3, round(reach * 0.4)))
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif thing.shape == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    elif thing.shape == "diamond":
        pen.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=colour)
    elif thing.shape == "cross":
        arm = reach * 0.35
        pen.rectangle((x - arm, top, x + arm, bottom), fill=colour)
        pen.rectangle((left, y - arm, right, y + arm), fill=colour)
    elif thing.shape == "star":
        points = []
        for n in range(10):
            length, angle = reach * (1.0 if n % 2 == 0 else 0.42), math.pi * n / 5 - math.pi / 2
            points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        pen.polygon(points, fill=colour)
    else:
        half = reach * 0.55
        pen.ellipse((left, top, left + 2 * half, top + 2 * half), fill=colour)
        pen.ellipse((right - 2 * half, top, right, top + 2 * half), fill=colour)
        pen.polygon([(left + 1, y - reach * 0.15), (right - 1, y - reach * 0.15), (x, bottom)], fill=colour)


def _blacked(
    pixels: NDArray[np.uint8], things: list[Thing], draw: random.Random
) -> tuple[NDArray[np.uint8], list[Thing]]:
    """Cells at random black, up to four fifths; a thing is hidden as a whole, or not at all."""
    count, share = SIDE // CELL, draw.uniform(0.1, 0.8)
    dark = np.array([draw.random() < share for _ in range(count * count)]).reshape(count, count)
    seen = []
    for thing in things:
        left, top, right, bottom = thing.box
        cells = (slice(top // CELL, (bottom - 1) // CELL + 1), slice(left // CELL, (right - 1) // CELL + 1))
        dark[cells] = hidden = draw.random() < share
        if not hidden:
            seen.append((thing, cells))
    for _, cells in seen:  # a hidden neighbour has a cell in common
        dark[cells] = False
    wide = dark.repeat(CELL, 0).repeat(CELL, 1)
    kept = [thing for thing in things if not _covered(thing, wide)]
    # What is only half hidden is made black whole, or there would be no answer that is right.
    for thing in things:
        if thing not in kept:
            left, top, right, bottom = thing.box
            wide[top:bottom, left:right] = True
    return pixels * ~wide[..., None], kept


def _covered(thing: Thing, dark: NDArray[np.bool_]) -> bool:
    left, top, right, bottom = thing.box
    return bool(dark[top:bottom, left:right].any())


def name(kind: Kind) -> str:
    """A kind in words."""
    return f"{kind[0]} {kind[1]}"


def presence(kind: Kind, there: bool) -> Question:
    """Whether a kind is there."""
    return Question(f"Is there a {name(kind)}?", "yes" if there else "no", "presence")


def caption(scene: Scene) -> str:
    """All that is in a picture, from left to right."""
    words = [f"a {name(thing.kind)}" for thing in scene.things]
    if not words:
        return "nothing"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ask_all(scene: Scene, draw: random.Random) -> list[Question]:
    """A question of each sort that has one right answer, in random order, the caption last."""
    kinds = scene.kinds()
    found = []
    if kinds:
        found.append(presence(draw.choice(sorted(kinds)), True))
    absent = [kind for kind in KINDS if kind not in kinds]
    # Half of what is asked for and absent shares its colour or its shape with something that is there.
    near = [kind for kind in absent if any(kind[0] == k[0] or kind[1] == k[1] for k in kinds)]
    found.append(presence(draw.choice(near if near and draw.random() < 0.5 else absent), False))
    shapes = sorted({thing.shape for thing in scene.things})
    there = bool(shapes) and (len(shapes) == len(SHAPES) or draw.random() < 0.5)
    shape = draw.choice(shapes if there else [shape for shape in SHAPES if shape not in shapes])
    found.append(Question(f"Is there a {shape}?", "yes" if there else "no", "shape"))
    alone = [t for t in scene.things if sum(t.shape == other.shape for other in scene.things) == 1]
    if alone:
        thing = draw.choice(alone)
        found.append(Question(f"What colour is the {thing.shape}?", thing.colour, "colour"))
    shape = draw.choice([t.shape for t in scene.things] if scene.things and draw.random() < 0.8 else SHAPES)
    number = sum(thing.shape == shape for thing in scene.things)
    found.append(Question(f"How many {_plural(shape)} are there?", str(number), "count"))
    single = [t for t in scene.things if sum(t.kind == other.kind for other in scene.things) == 1]
    if single:
        thing = draw.choice(single)
        found.append(Question(f"Where is the {name(thing.kind)}?", _where(thing), "position"))
    draw.shuffle(found)
    return [*found, Question("Describe the picture.", caption(scene), "caption")]


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _where(thing: Thing) -> str:
    x, y = thing.centre
    return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


def vocabulary() -> tuple[str, ...]:
    """All words of questions and answers, in lower case, and the signs between them."""
    asked = (
        presence(KINDS[0], True).text,
        "What colour is the",
        "How many are there",
        "Where is",
        "Describe the picture",
    )
    said = ("yes", "no", "top", "bottom", "left", "right", "nothing", "and", "answer", *map(str, range(9)))
    words = [word for text in asked for word in text.lower().rstrip("?").split()]
    return tuple(dict.fromkeys([*words, *said, *COLOURS, *SHAPES, *map(_plural, SHAPES), *"?,.:"]))
