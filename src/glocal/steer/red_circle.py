"""What CLIP knows about a red circle: marks that are drawn around parts of a picture choose among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.steer.clip import class_attention, clip_kind, image_features, picture_side, read, text_features
from glocal.steer.marks import MARKS, Colour, blur_outside, circle, frame, length, ring

__all__ = ["RedCircle"]

Mark = Callable[[Any, Sequence[float]], Any]
Texts = Sequence[str] | Tensor


@dataclass(frozen=True)
class RedCircle:
    """Visual prompts for CLIP (Shtedritski, Rupprecht and Vedaldi, 2023, arXiv 2304.06712).

    CLIP matches whole pictures with texts. A red circle around a part of a picture makes it match the texts about that
    part, as pictures from the web have such circles: one picture for each candidate, and the best match is what a text
    refers to. Nothing is trained. Each candidate costs a forward of the image tower for each mark.

    With a bank of captions the mean logit over it is subtracted from each marked picture: that a circle is there, and
    that a part suits many texts, no longer counts. Several models are joined by the sum of their `scores`.

    The authors warn of what else CLIP learned from such pictures: a circle around a person makes texts about crime and
    missing people match better. Do not let it judge people.

    Args:
        marks: names out of ``ring``, ``frame``, ``grey``, ``blur`` and ``crop``, or functions of a picture and a box
            that give a picture; the logits are summed.
        width: of lines, on the picture as the model sees it: pixels where an int, else a share of the height.
        colour: of lines.
        radius: of the circle around a point, likewise.
        blur: standard deviation of the blur, likewise. A re-implementation has 100 pixels at full size.
        template: what is made of a text; features are taken as they are.
        bank_size: as many captions of the bank are taken, drawn by ``seed``.
        seed: of that draw.
        side: of the square that the picture is resized to, all of it; the model's own where None.
        batch: how many pictures the model sees at a time.

    Raises:
        ValueError: a setting out of range.

    Example::

        texts = ["the dog on the left"]
        scores = RedCircle(("ring", "blur")).scores(clip, processor, photo, boxes, texts, bank=captions)
        found = boxes[scores.argmax(1)]

    >>> from PIL import Image
    >>> ((picture,),) = RedCircle(width=1).marked(Image.new("RGB", (20, 10)), [[0, 0, 10, 10]], 8)
    >>> picture.size, picture.getpixel((0, 4)), picture.getpixel((4, 4))
    ((8, 8), (255, 0, 0), (0, 0, 0))
    """

    marks: Sequence[str | Mark] = ("ring",)
    width: float = 0.01
    colour: Colour = (255, 0, 0)
    radius: float = 0.06
    blur: float = 0.2
    template: str = "a photo of {}"
    bank_size: int = 500
    seed: int = 0
    side: int | None = None
    batch: int = 64

    def __post_init__(self) -> None:
        unknown = [mark for mark in self.marks if isinstance(mark, str) and mark not in MARKS]
        if isinstance(self.marks, str) or not self.marks or unknown:
            raise ValueError(f"marks must be some of {', '.join(MARKS)}, or functions; they were {self.marks!r}")
        for name, least in (("width", 0), ("radius", 1), ("blur", 0)):
            length(getattr(self, name), 1000, name, least)
        for name in ("bank_size", "batch", "side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if "{}" not in self.template:
            raise ValueError(f"template must hold {{}}, where the text goes; it was {self.template!r}")

    def scores(
        self,
        clip: Any,
        processor: Callable[..., Any],
        image: Any,
        boxes: Any,
        texts: Texts,
        *,
        bank: Texts | None = None,
    ) -> Tensor:
        """How well each text matches the picture with each box marked.

        Args:
            clip: a ``CLIPModel`` or ``SiglipModel`` of transformers.
            processor: its processor; see `read`. Where all texts are features it need not read texts.
            image: a PIL image.
            boxes: ``(K, 4)`` numbers: left, top, right, bottom in the picture's pixels.
            texts: ``T`` of them, or their features ``(T, d)``.
            bank: captions of pictures of the same kind, or their features: their mean logit is subtracted.

        Returns:
            Logits ``(T, K)`` in float32.

        Raises:
            TypeError: a model of another kind.
            ValueError: no texts, or boxes that are none.
        """
        clip_kind(clip)
        return self._scores(clip, processor, self.marked(image, boxes, self._side(clip)), texts, bank)

    def choose(
        self,
        clip: Any,
        processor: Callable[..., Any],
        image: Any,
        boxes: Any,
        texts: Texts,
        *,
        bank: Texts | None = None,
    ) -> Tensor:
        """The number of the box that each text refers to, ``(T,)``; arguments as for `scores`."""
        return self.scores(clip, processor, image, boxes, texts, bank=bank).argmax(1)

    def name(
        self,
        clip: Any,
        processor: Callable[..., Any],
        image: Any,
        points: Any,
        names: Texts,
        *,
        bank: Texts | None = None,
        assign: bool = True,
    ) -> Tensor:
        """The number of the point that each name is for; a circle is drawn around each point.

        Args:
            clip, processor, image, bank: as for `scores`.
            points: ``(K, 2)`` numbers: x and y in the picture's pixels.
            names: ``T`` of them, or their features ``(T, d)``.
            assign: no two names for one point, the sum of the logits as great as it can be; needs ``T <= K``. Else the
                best point of each name.

        Returns:
            ``(T,)``.

        Raises:
            TypeError, ValueError: as for `scores`; more names than points to assign.
        """
        clip_kind(clip)
        if assign and len(names) > len(points):
            raise ValueError(f"{len(names)} names are more than {len(points)} points: assign=False, or fewer names")
        found = self._scores(clip, processor, self.circled(image, points, self._side(clip)), names, bank)
        if not assign:
            return found.argmax(1)
        from scipy.optimize import linear_sum_assignment

        return torch.from_numpy(linear_sum_assignment(found.cpu().numpy(), maximize=True)[1]).to(found.device)

    def marked(self, image: Any, boxes: Any, side: int) -> list[list[Any]]:
        """A list of ``K`` marked pictures for each mark: the whole picture, ``side`` x ``side``; crops as they are."""
        small, scaled = _square(image, side, boxes, 4, "boxes")
        return [[self._mark(mark)(small, box) for box in scaled] for mark in self.marks]

    def circled(self, image: Any, points: Any, side: int) -> list[list[Any]]:
        """A list of one list of ``K`` pictures, each with a circle around a point."""
        small, scaled = _square(image, side, points, 2, "points")
        return [[circle(small, at, radius=self.radius, width=self.width, colour=self.colour) for at in scaled]]

    @torch.no_grad()
    def attention_mass(self, clip: Any, processor: Callable[..., Any], image: Any, boxes: Any) -> Tensor:
        """The share of the class token's attention to patches that goes into each box: without and with its mark.

        Of the last layer, mean over heads, mean over marks; a patch that a box covers in part counts in part.

        Args:
            clip, processor, image, boxes: as for `scores`.

        Returns:
            ``(K, 2)`` in float32.

        Raises:
            TypeError, ValueError: as for `scores`; the mark ``crop``, which moves the box.
        """
        if "crop" in self.marks:
            raise ValueError("marks must leave the box where it is: a crop does not")
        clip_kind(clip)
        side = self._side(clip)
        plain, scaled = _square(image, side, boxes, 4, "boxes")
        pictures = [picture for each in self.marked(image, boxes, side) for picture in each]
        maps = [class_attention(clip, read(processor, [one], clip, whole=True))[0] for one in [plain, *pictures]]
        mass = []
        for number, box in enumerate(scaled):
            seen = [maps[0], torch.stack(maps[1 + number :: len(scaled)]).mean(0)]
            mass.append([_inside(each, box, side) for each in seen])
        return torch.tensor(mass)

    def _side(self, clip: Any) -> int:
        return picture_side(clip) if self.side is None else self.side

    def _mark(self, mark: str | Mark) -> Mark:
        if not isinstance(mark, str):
            return mark
        if mark in ("ring", "frame"):
            line = ring if mark == "ring" else frame
            return lambda image, box: line(image, box, width=self.width, colour=self.colour)
        if mark == "blur":
            return lambda image, box: blur_outside(image, box, radius=self.blur)
        return MARKS[mark]

    @torch.no_grad()
    def _scores(
        self, clip: Any, processor: Callable[..., Any], pictures: list[list[Any]], texts: Texts, bank: Texts | None
    ) -> Tensor:
        wanted = self._features(clip, processor, texts, "texts")
        others = None
        if bank is not None:
            if len(bank) > self.bank_size:
                draw = torch.Generator().manual_seed(self.seed)
                some = torch.randperm(len(bank), generator=draw)[: self.bank_size]
                bank = bank[some.to(bank.device)] if isinstance(bank, Tensor) else [bank[n] for n in some.tolist()]
            others = self._features(clip, processor, bank, "bank")
        found = wanted.new_zeros(len(wanted), len(pictures[0]))
        for each in pictures:
            parts = [
                image_features(clip, read(processor, each[at : at + self.batch], clip, whole=True))
                for at in range(0, len(each), self.batch)
            ]
            seen = F.normalize(torch.cat(parts).float(), dim=-1)
            logits = _logits(clip, wanted, seen)
            found += logits if others is None else logits - _logits(clip, others, seen).mean(0)
        return found

    def _features(self, clip: Any, processor: Callable[..., Any], texts: Texts, name: str) -> Tensor:
        if isinstance(texts, str) or not len(texts) or (isinstance(texts, Tensor) and texts.ndim != 2):
            raise ValueError(f"{name} must be a list of texts or features (T, d), at least one")
        if isinstance(texts, Tensor):
            found = texts.to(clip.logit_scale.device)
        else:
            found = text_features(clip, processor, [self.template.format(text) for text in texts])
        return F.normalize(found.float(), dim=-1)


def _logits(clip: Any, texts: Tensor, pictures: Tensor) -> Tensor:
    """``(T, K)``, with SigLIP's bias."""
    found: Tensor = texts @ pictures.T * clip.logit_scale.exp().float()
    bias = getattr(clip, "logit_bias", None)
    return found if bias is None else found + bias.float()


def _square(image: Any, side: int, places: Any, width: int, name: str) -> tuple[Any, list[tuple[float, ...]]]:
    """All of a picture as a square, and where boxes or points of it, ``(K, width)``, are then."""
    from PIL import Image

    if not hasattr(image, "convert"):
        raise ValueError(f"image must be a PIL image; it was a {type(image).__name__}")
    small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    rows = torch.as_tensor(places)
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise ValueError(f"{name} must be (K, {width}), K at least 1; it was {tuple(rows.shape)}")
    factors = side / image.width, side / image.height
    return small, [tuple(value * factors[n % 2] for n, value in enumerate(row)) for row in rows.tolist()]


def _inside(attention: Tensor, box: Sequence[float], side: int) -> float:
    """The share of a map ``(rows, columns)`` over ``side`` pixels that is in a box."""
    rows, columns = attention.shape
    device = attention.device
    y, x = (torch.arange(count, device=device) * (side / count) for count in (rows, columns))
    high = (torch.clamp(y + side / rows, max=box[3]) - torch.clamp(y, min=box[1])).clamp(min=0) * rows / side
    wide = (torch.clamp(x + side / columns, max=box[2]) - torch.clamp(x, min=box[0])).clamp(min=0) * columns / side
    return float((attention * high[:, None] * wide).sum() / attention.sum())
