"""VPTracker: a vision-language model follows an object; a rectangle on the frame says where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from glocal.progress import shown
from glocal.steer.marks import RED, Colour, frame
from glocal.steer.method import check_range

__all__ = [
    "PROMPT",
    "TOKENS",
    "Box",
    "Track",
    "VPTracker",
    "ask_with",
    "jitter",
    "seen_size",
]

Box = tuple[float, float, float, float]
Size = tuple[int, int]
Ask = Callable[[Any, Any, str], str]

TOKENS = ("<ref>", "</ref>", "<template>", "</template>", "<search>", "</search>")
"""What to add to a tokenizer before training, as one token each."""

PROMPT = (
    "<template><image></template> shows <ref>{description}</ref>. Find it in <search><image></search>. "
    "It was in the red rectangle: look inside first, then outside. "
    'Answer in JSON: {{"visible": "yes" or "no", "bbox": [x1, y1, x2, y2]}}.'
)
"""What is asked of each frame. ``<image>`` stands for the two pictures."""


class Track(NamedTuple):
    """One entry a frame: the box, whether the model found the object there, and what it said (nothing of the first)."""

    boxes: list[Box]
    found: list[bool]
    answers: list[str]


@dataclass(frozen=True)
class VPTracker:
    """Global tracking with a location-aware visual prompt (Wang et al., 2025, arXiv 2512.22799).

    The model sees a crop of the first frame around the object and the whole of the current frame, on which a red
    rectangle is drawn around the last box: look-alikes elsewhere are ignored, yet an object that jumped can be found.
    A frame without an answer keeps the last box. One ``generate`` a frame.

    A model that was not trained for it may follow the prompt or not; `jitter` and `answer` make training examples.
    A wrong box moves the next rectangle, so train with some rectangles off the object.

    A box is left, top, right and bottom in the frame's pixels, the last two outside of it.

    Args:
        scale: the rectangle is so many times as wide and as high as the last box.
        width: of its line, in pixels.
        colour: of the line: red, green, blue.
        template_factor: the first crop is a square whose side is this times the root of the box's area.
        form: of the answer's numbers: ``absolute`` pixels, or ``normalised``: 0 to 1000 over each side.
        seen: for absolute numbers: the size, width and height, of the picture that a model makes of a frame of a
            size and that its numbers count on; the frame's own where None. See `seen_size`.
        prompt: with ``{description}``, and two ``<image>``.

    Raises:
        ValueError: a setting out of range.

    Example::

        tracker = VPTracker(form="normalised")
        track = tracker.track(frames, (40, 60, 90, 120), ask_with(model, processor), "the dog on the left")
    """

    scale: float = 4.0
    width: int = 3
    colour: Colour = RED
    template_factor: float = 2.0
    form: Literal["absolute", "normalised"] = "absolute"
    seen: Callable[[Size], Size] | None = None
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 1)
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width must be an int of at least 1 pixel; it was {self.width!r}")
        if not 0 < self.template_factor < math.inf:
            raise ValueError(f"template_factor must be above 0; it was {self.template_factor}")
        if self.form not in ("absolute", "normalised"):
            raise ValueError(f"form must be 'absolute' or 'normalised'; it was {self.form!r}")
        if self.seen is not None and self.form == "normalised":
            raise ValueError("seen is for absolute numbers: normalised ones are the same at any size")
        if self.prompt.count("<image>") != 2:
            raise ValueError(f"prompt must hold <image> twice; it was {self.prompt!r}")

    def region(self, box: Sequence[float], size: Size) -> Box:
        """A box scaled about its centre, cut at the borders of a frame of ``size``: width, height.

        Raises:
            ValueError: a box without area in the frame.

        >>> VPTracker().region((40, 40, 50, 60), (100, 90))
        (25.0, 10.0, 65.0, 90.0)
        """
        left, top, right, bottom = _inside(box, size)
        x, y = (right - left) / 2 * (self.scale - 1), (bottom - top) / 2 * (self.scale - 1)
        return _cut((left - x, top - y, right + x, bottom + y), size)

    def template(self, image: Any, box: Sequence[float]) -> Any:
        """The square around a box, as far as the picture reaches: a new PIL image in RGB.

        Raises:
            ValueError: a box without area in the picture.
        """
        left, top, right, bottom = _inside(box, image.size)
        side = math.ceil(math.sqrt((right - left) * (bottom - top)) * self.template_factor)
        x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
        edges = _cut((x, y, x + side, y + side), image.size)
        return image.convert("RGB").crop(tuple(int(edge) for edge in edges))

    def search(self, image: Any, box: Sequence[float]) -> Any:
        """The picture with the rectangle around the last box: a new PIL image in RGB.

        Raises:
            ValueError: a box without area in the picture.
        """
        return self.marked(image, self.region(box, image.size))

    def marked(self, image: Any, region: Sequence[float]) -> Any:
        """The picture with a rectangle: that of `jitter`, say."""
        left, top, right, bottom = region
        # The last pixel column and row for what lies between it and the border.
        return frame(
            image,
            (min(left, image.width - 1), min(top, image.height - 1), right, bottom),
            width=self.width,
            colour=self.colour,
        )

    def answer(self, box: Sequence[float] | None, size: Size) -> str:
        """What the model is trained to say of a frame of a size: of an object that cannot be seen, a zero box.

        >>> VPTracker(form="normalised").answer((10, 20, 30, 40), (100, 200))
        '{"visible": "yes", "bbox": [100, 100, 300, 200]}'
        """
        if box is None:
            return json.dumps({"visible": "no", "bbox": [0, 0, 0, 0]})
        across, down = self._units(size)
        numbers = [round(edge * unit) for edge, unit in zip(box, (across, down) * 2, strict=True)]
        return json.dumps({"visible": "yes", "bbox": numbers})

    def parse(self, text: str, size: Size) -> Box | None:
        """The box in an answer, in the pixels of a frame of a size; None where there is none.

        That is what is no JSON, what says that the object cannot be seen, and boxes without area in the frame. The
        first object in the text counts that has ``visible`` or ``bbox`` in it; text around it does not matter.

        >>> VPTracker().parse('Here: {"visible": "yes", "bbox": [3, 4, 8, 99]}', (50, 40))
        (3.0, 4.0, 8.0, 40.0)
        >>> VPTracker().parse('{"visible": "no", "bbox": [0, 0, 0, 0]}', (50, 40)) is None
        True
        """
        found = _json_object(text)
        if found is None or str(found.get("visible", "yes")).strip().lower() not in ("yes", "true", "1"):
            return None
        numbers = found.get("bbox", found.get("bbox_2d"))
        if not isinstance(numbers, list) or len(numbers) != 4:
            return None
        try:
            left, top, right, bottom = (math.nan if isinstance(n, bool) else float(n) for n in numbers)
        except (TypeError, ValueError, OverflowError):
            return None
        if not all(math.isfinite(n) for n in (left, top, right, bottom)):
            return None
        across, down = self._units(size)
        box = _cut((left / across, top / down, right / across, bottom / down), size)
        return box if box[0] < box[2] and box[1] < box[3] else None

    def track(
        self,
        frames: Iterable[Any],
        box: Sequence[float],
        ask: Ask,
        description: str = "the object",
        *,
        progress: bool = False,
    ) -> Track:
        """Follow an object from the first frame on.

        Args:
            frames: PIL images, one after the other; a generator will do.
            box: the object's in the first frame.
            ask: says what stands in two pictures: ``ask(template, search, text)``; `ask_with` makes one of a model.
            description: of the object, in words.
            progress: show a bar, by rich.

        Returns:
            The boxes of all frames, the given one first.

        Raises:
            ValueError: no frames, or a box without area in the first one.
        """
        text = self.prompt.format(description=description)
        track, template = Track([], [], []), None
        for image in shown(frames, progress, "tracking"):
            if template is None:
                template = self.template(image, box)
                first: Box | None = _inside(box, image.size)
                found, said = first, ""
            else:
                said = ask(template, self.search(image, track.boxes[-1]), text)
                found = self.parse(said, image.size)
            track.boxes.append(track.boxes[-1] if found is None else found)
            track.found.append(found is not None)
            track.answers.append(said)
        if template is None:
            raise ValueError("frames must hold at least one picture; there was none")
        return track

    def _units(self, size: Size) -> tuple[float, float]:
        """What a pixel of the frame is in the answer's numbers, across and down."""
        whole = (1000, 1000) if self.form == "normalised" else size if self.seen is None else self.seen(size)
        return whole[0] / size[0], whole[1] / size[1]


def jitter(
    box: Sequence[float] | None,
    size: Size,
    draw: torch.Generator,
    *,
    scales: tuple[int, int] = (2, 8),
    inside: float = 0.9,
) -> Box:
    """A rectangle to train with, in place of the one around a last box.

    Its sides are the box's times a whole number, and it is shifted so that it still holds the box; else, with the
    probability that is left, it lies off the box, on a side where the frame has a pixel of room. Without a box, of an
    object that cannot be seen, it is anywhere.

    Args:
        box: of the object in the frame; None where it cannot be seen.
        size: of the frame: width, height.
        draw: what random numbers come from.
        scales: least and greatest.
        inside: probability that it holds the object.

    Returns:
        The rectangle, cut at the frame's borders.

    Raises:
        ValueError: a box without area in the frame; scales below 1; a probability that is none.
    """
    low, high = scales
    if not 1 <= low <= high:
        raise ValueError(f"scales must be from 1 on, the greater last; they were {scales}")
    check_range("inside", inside, 0, 1)

    def uniform(start: float, end: float) -> float:
        return start + (end - start) * float(torch.rand((), generator=draw))

    if box is None:
        wide, tall = (uniform(side / 8, side / 2) for side in size)
        left, top = uniform(0, size[0] - wide), uniform(0, size[1] - tall)
        return left, top, left + wide, top + tall
    box = _inside(box, size)
    scale = int(torch.randint(low, high + 1, (), generator=draw))
    sides = [(box[axis + 2] - box[axis]) * scale for axis in (0, 1)]
    # Where it may begin, along each axis, so that it holds the box.
    starts = [uniform(box[axis + 2] - sides[axis], box[axis]) for axis in (0, 1)]
    off = float(torch.rand((), generator=draw)) >= inside
    room = [box[0] - 1, box[1] - 1, size[0] - 1 - box[2], size[1] - 1 - box[3]]
    choices = [side for side in range(4) if room[side] >= 0]
    if off and choices:
        side = choices[int(torch.randint(len(choices), (), generator=draw))]
        axis, beyond = side % 2, uniform(0, room[side])
        starts[axis] = box[side] + beyond if side >= 2 else box[side] - beyond - sides[axis]
    return _cut((starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1]), size)


def ask_with(model: Any, processor: Any, *, max_new_tokens: int = 64) -> Ask:
    """A vision-language model of transformers as the one that is asked; it decodes greedily.

    Args:
        model: in eval mode.
        processor: its processor. Without a chat template the text is the prompt, and ``<image>`` in it the
            processor's ``image_token``.
        max_new_tokens: of an answer.

    Returns:
        ``ask(template, search, text)`` for `VPTracker.track`.
    """

    @torch.no_grad()
    def ask(template: Any, search: Any, text: str) -> str:
        if getattr(processor, "chat_template", None):
            parts = text.split("<image>")
            content: list[dict[str, str]] = []
            for n, part in enumerate(parts):
                content += [{"type": "image"}] * (n > 0) + [{"type": "text", "text": part}] * bool(part)
            messages = [{"role": "user", "content": content}]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            prompt = text.replace("<image>", getattr(processor, "image_token", "<image>"))
        inputs = dict(processor(images=[template, search], text=[prompt], return_tensors="pt"))
        weight = next(model.parameters())
        inputs = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        ids = inputs["input_ids"]
        out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        if out.shape[1] >= ids.shape[1] and torch.equal(out[:, : ids.shape[1]], ids):
            out = out[:, ids.shape[1] :]
        said: str = processor.batch_decode(out, skip_special_tokens=True)[0]
        return said

    return ask


def seen_size(processor: Any) -> Callable[[Size], Size]:
    """What Qwen's processors make of a frame: its size in the pixels that their models count in, for `VPTracker.seen`.

    Raises:
        TypeError: when used, a processor that does not say: its pictures have no ``image_grid_thw``.
    """

    @lru_cache(maxsize=64)
    def seen(size: Size) -> Size:
        from PIL import Image

        reader = getattr(processor, "image_processor", processor)
        made = reader(images=[Image.new("RGB", size)], return_tensors="pt")
        if "image_grid_thw" not in made:
            raise TypeError(f"{type(reader).__name__} does not say how large a picture it makes: use form='normalised'")
        rows, columns = (int(count) for count in made["image_grid_thw"][0][1:])
        return columns * reader.patch_size, rows * reader.patch_size

    return seen


def _cut(box: Sequence[float], size: Size) -> Box:
    """What of a box is in a frame, which may be nothing: then it has no area."""
    wide, high = size
    left, top, right, bottom = box
    edges = min(max(left, 0), wide), min(max(top, 0), high), min(max(right, 0), wide), min(max(bottom, 0), high)
    return float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3])


def _inside(box: Sequence[float], size: Size) -> Box:
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        raise ValueError(f"box must be left, top, right, bottom; it was {tuple(box)}")
    found = _cut(box, size)
    if not (found[0] < found[2] and found[1] < found[3]):
        raise ValueError(f"box must have an area in the frame of {size[0]} x {size[1]} pixels; it was {tuple(box)}")
    return found


def _json_object(text: str) -> dict[str, Any] | None:
    """The first object in a text that says something of a box."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            found, _ = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and any(name in found for name in ("visible", "bbox", "bbox_2d")):
            return found
        at = text.find("{", at + 1)
    return None
