"""CARVE: attention under a question, divided by attention under no question in particular, says where to look again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glocal.steer.method import check_range, layer_range
from glocal.steer.record import RecordRows, attention_entropy
from glocal.steer.regions import blacked_out, bounding_box, enlarged
from glocal.steer.spans import Grid, SpanMap
from glocal.steer.steering import language_layers

__all__ = [
    "CARVE",
    "Answer",
    "Refinement",
    "contrast",
    "contrast_map",
    "main_components",
    "picture_complexity",
]

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Refinement:
    """What of one picture its question is about.

    Args:
        map: the contrast, summed over layers and steps, ``(height, width)`` in pixels.
        mask: the pixels that stay, booleans of the same shape.
        box: left, top, right, bottom of these, the last two outside.
        picture: what is in the box, all else black, enlarged.
    """

    map: NDArray[np.float64]
    mask: NDArray[np.bool_]
    box: Box
    picture: Any


class Answer(NamedTuple):
    """What the model says in the third pass: the text, its tokens ``(n,)``, and what it was shown."""

    text: str
    ids: Tensor
    refinement: Refinement


def contrast(question: Tensor, general: Tensor, lambda_: float = 1e-8) -> Tensor:
    """``question / (general + lambda_)``, elementwise and of any shape; 0 where both are 0.

    Raises:
        ValueError: shapes that differ, or a negative lambda_.

    >>> contrast(torch.tensor([0.6, 0.2]), torch.tensor([0.3, 0.4]), 0.0)
    tensor([2.0000, 0.5000])
    """
    check_range("lambda_", lambda_, 0)
    if question.shape != general.shape:
        raise ValueError(f"general must have question's shape {tuple(question.shape)}; it was {tuple(general.shape)}")
    ratio = question / (general + lambda_)
    return torch.where((question == 0) & (general == 0), 0.0, ratio)


def contrast_map(
    question: Tensor,
    general: Tensor,
    grids: Sequence[Grid],
    size: tuple[int, int],
    *,
    lambda_: float = 1e-8,
    steps: Literal["all", "first"] = "all",
    normalise: bool = False,
) -> NDArray[np.float64]:
    """The contrast of two recordings as a map over a picture's pixels: bilinear, summed over layers, steps and grids.

    Step ``t`` weighs ``t + 1``; the longer recording's last steps count for nothing. A picture in several grids, as
    the whole and as tiles, has the sum of their maps.

    Args:
        question: attention to the picture's tokens ``(T, layers, P)`` under the question.
        general: the same under the general prompt, ``(T', layers, P)``.
        grids: that the tokens form.
        size: height and width.
        lambda_: added to the general attention.
        steps: all, or the first only.
        normalise: whether each step's and layer's contrast is divided by its sum, so that no layer outweighs others.

    Returns:
        ``(height, width)``.

    Raises:
        ValueError: recordings of different layers or tokens, no grid, or a map that is not finite.
    """
    if question.dim() != 3 or question.shape[1:] != general.shape[1:]:
        shapes = f"{tuple(question.shape)} and {tuple(general.shape)}"
        raise ValueError(
            f"question and general must be (steps, layers, tokens), alike but for steps; they were {shapes}"
        )
    if not grids:
        raise ValueError(f"the {question.shape[-1]} tokens of the picture form no grid that is known")
    if steps not in ("all", "first"):
        raise ValueError(f"steps must be 'all' or 'first'; it was {steps!r}")
    common = 1 if steps == "first" else min(len(question), len(general))
    ratio = contrast(question[:common].double(), general[:common].double(), lambda_)
    if normalise:
        total = ratio.sum(-1, keepdim=True)
        ratio = ratio / torch.where(total > 0, total, 1.0)
    weight = torch.arange(1, common + 1, dtype=ratio.dtype, device=ratio.device)
    tokens = torch.einsum("tlp,t->p", ratio, weight)
    if not bool(tokens.isfinite().all()):
        raise ValueError(
            f"the contrast is not finite: general attention is 0 somewhere; lambda_ was {lambda_}, raise it"
        )
    maps = [tokens[grid.index.to(tokens.device)] for grid in grids]
    large = [F.interpolate(m[None, None], size, mode="bilinear", align_corners=False)[0, 0] for m in maps]
    found: NDArray[np.float64] = torch.stack(large).sum(0).cpu().numpy()
    return found


def main_components(
    values: NDArray[Any],
    percentile: float = 80.0,
    *,
    rank: Literal["sum", "size"] = "sum",
    least: int = 3,
    share: float = 0.2,
) -> NDArray[np.bool_]:
    """The main connected parts of a map's highest pixels; all of a flat map.

    Pixels at or above the percentile, in parts that touch by side or corner; the ``max(least, int(share * n))`` best
    of ``n`` parts.

    Args:
        values: ``(height, width)``.
        percentile: of the values, from 0 to 100.
        rank: parts by the sum of their values, or by their size.
        least: so many parts stay, if there are.
        share: so many of all parts stay.

    Returns:
        Booleans ``(height, width)``, true somewhere.

    Raises:
        ValueError: settings out of range, values that are no finite map.

    >>> main_components(np.array([[0.0, 9.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), 75, least=1)
    array([[False,  True, False, False],
           [False, False, False, False]])
    """
    from scipy.ndimage import label, sum_labels

    check_range("percentile", percentile, 0, 100)
    check_range("least", least, 1)
    check_range("share", share, 0, 1)
    if rank not in ("sum", "size"):
        raise ValueError(f"rank must be 'sum' or 'size'; it was {rank!r}")
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values must be finite, (height, width); their shape was {values.shape}")
    # What differs by rounding ties, else half of a flat map would go.
    high = values >= np.percentile(values, percentile) - 1e-9 * np.abs(values).max()
    parts, count = label(high, np.ones((3, 3)))
    numbers = np.arange(1, count + 1)
    worth = sum_labels(values if rank == "sum" else np.ones_like(values), parts, numbers)
    best = numbers[np.argsort(-worth, kind="stable")[: max(least, int(share * count))]]
    kept: NDArray[np.bool_] = np.isin(parts, best)
    return kept


def picture_complexity(image: Any) -> tuple[float, float]:
    """How cluttered a picture is: the share of pixels on edges (Canny), and the entropy of its hues in nats.

    Hues count in 36 bins, by saturation, so that greys have none; 0 for a picture without colour.
    """
    from skimage.color import rgb2gray, rgb2hsv
    from skimage.feature import canny

    pixels = np.asarray(image.convert("RGB"))
    hue, saturation, _ = np.moveaxis(rgb2hsv(pixels), -1, 0)
    bins, _ = np.histogram(hue, 36, (0, 1), weights=saturation)
    edges: Any = canny  # it has no types
    return float(edges(rgb2gray(pixels)).mean()), float(attention_entropy(torch.from_numpy(bins)))


@dataclass(frozen=True)
class CARVE:
    """Contrastive attention refinement (Ge et al., 2025, arXiv 2509.06461): see what a question is about, ask again.

    In a cluttered picture attention is drawn to what stands out, whatever is asked. The model answers the question and
    describes the picture; the attention of the one divided by that of the other is what the question adds. All else is
    made black, the rest enlarged, and the question asked again with the picture and what was found. Three short greedy
    generations, the last with twice the image tokens. Nothing of the model is changed.

    The authors have several versions; this is the latest. Prompts must be padded on the left, and a picture must have a
    grid of tokens: not BLIP-2's queries.

    Args:
        model: a vision-language model in eval mode.
        processor: ``processor(images=[[...], ...], text=[...], return_tensors="pt", padding=True)``, and
            ``batch_decode``.
        prompt: makes the text of a prompt, with the places of the pictures, from a question and a number of pictures.
        general: what is asked for instead of the question.
        suffix: added to the question and to ``general``.
        lambda_: added to the general attention. At the authors' 1e-8 tokens win that the general prompt hardly sees.
        relative: whether ``lambda_`` is in units of 1/P, attention spread evenly over the P tokens of a picture.
        depth: first and last layer read, as shares of the number of layers: 20 to 25 of 28.
        layers: their numbers instead.
        steps, normalise: as for `contrast_map`.
        percentile, rank, least, share: as for `main_components`.
        both: whether the third pass sees both pictures; else the refined one alone, for models that take one a prompt.
        max_new_tokens: of each pass.

    Raises:
        TypeError: a model without a causal language model.
        ValueError: a setting out of range.

    Example::

        chat = lambda question, count: f"USER: {'<image>' * count} {question} ASSISTANT:"
        carve = CARVE(model, processor, prompt=chat)
        (answer,) = carve.ask([photo], ["What does the sign say?"])
    """

    model: Any
    processor: Any
    _: KW_ONLY
    prompt: Callable[[str, int], str]
    general: str = "Write a general description of the image."
    suffix: str = " Answer the question using a single word or phrase."
    lambda_: float = 1e-8
    relative: bool = False
    depth: tuple[float, float] = (0.71, 0.89)
    layers: Iterable[int] | None = None
    steps: Literal["all", "first"] = "all"
    normalise: bool = False
    percentile: float = 80.0
    rank: Literal["sum", "size"] = "sum"
    least: int = 3
    share: float = 0.2
    both: bool = True
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        check_range("lambda_", self.lambda_, 0)
        check_range("max_new_tokens", self.max_new_tokens, 1)
        for name, known in (("steps", ("all", "first")), ("rank", ("sum", "size"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}; it was {getattr(self, name)!r}")
        check_range("percentile", self.percentile, 0, 100)
        check_range("least", self.least, 1)
        check_range("share", self.share, 0, 1)
        first, last = self.depth
        if not 0 <= first <= last <= 1:
            raise ValueError(f"depth must be two shares, 0 <= first <= last <= 1; it was {self.depth}")
        _ = self.numbers

    @property
    def numbers(self) -> frozenset[int]:
        """The layers that are read."""
        count = len(language_layers(self.model))
        if self.layers is not None:
            return layer_range(self.layers, count)
        first, last = (min(count - 1, round(at * count)) for at in self.depth)
        return frozenset(range(first, last + 1))

    def refine(self, images: Sequence[Any], questions: Sequence[str]) -> list[Refinement]:
        """What each picture's question is about: two passes for all of them together.

        Args:
            images: PIL pictures, one a question.
            questions: one a picture.

        Raises:
            ValueError: not as many questions as pictures, prompts padded on the right, a picture without a grid.
        """
        if not len(images) or len(images) != len(questions):
            raise ValueError(f"there are {len(images)} images and {len(questions)} questions; give one each")
        pictures = [[image] for image in images]
        asked, seen = self._record(pictures, [question + self.suffix for question in questions])
        general, _ = self._record(pictures, [self.general + self.suffix] * len(images))
        found = []
        for image, (question, grids), (other, _) in zip(images, asked, general, strict=True):
            size = (image.height, image.width)
            left, top, right, bottom = self._seen(image, seen)
            scale = self.lambda_ / question.shape[-1] if self.relative else self.lambda_
            values = np.zeros(size)
            values[top:bottom, left:right] = contrast_map(
                question,
                other,
                grids,
                (bottom - top, right - left),
                lambda_=scale,
                steps=self.steps,
                normalise=self.normalise,
            )
            mask = main_components(values, self.percentile, rank=self.rank, least=self.least, share=self.share)
            box = bounding_box(mask)
            found.append(Refinement(values, mask, box, enlarged(blacked_out(image, mask), box)))
        return found

    def ask(self, images: Sequence[Any], questions: Sequence[str], **settings: Any) -> list[Answer]:
        """Refine the pictures and ask again.

        Args:
            images, questions: as for `refine`.
            settings: of the third ``generate``; greedy with ``max_new_tokens`` where nothing is said.

        Raises:
            ValueError: as `refine`.
        """
        found = self.refine(images, questions)
        shown = [
            [image, part.picture] if self.both else [part.picture] for image, part in zip(images, found, strict=True)
        ]
        inputs = self._inputs(shown, [question + self.suffix for question in questions])
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False} | settings
        with torch.no_grad():
            ids = self.model.generate(**inputs, **options)
        prompts = inputs["input_ids"]
        length = prompts.shape[1]
        if torch.equal(ids[:, :length], prompts):
            ids = ids[:, length:]
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [Answer(text.strip(), row, part) for text, row, part in zip(texts, ids, found, strict=True)]

    def _record(
        self, pictures: list[list[Any]], texts: list[str]
    ) -> tuple[list[tuple[Tensor, tuple[Grid, ...]]], dict[str, Any]]:
        """For each prompt, attention to its picture ``(T, layers, P)`` up to where its answer ends, and the grids."""
        inputs = self._inputs(pictures, texts)
        spans = SpanMap.read(self.model, inputs)
        for images, grids in zip(spans.images_of_all(), spans.grids, strict=True):
            if len(images) != 1:
                raise ValueError(f"a prompt must hold one picture; prompt(question, 1) gave one with {len(images)}")
            if not grids[0]:
                raise ValueError(f"the {len(images[0])} tokens of the picture form no grid that is known")
        record = RecordRows(self.model, layers=self.numbers)
        with torch.no_grad(), record:
            options = dict(max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
            ids = self.model.generate(**inputs, **options)
        ids = ids[:, -len(record.steps) :]
        ends = [_length(row, self.model.generation_config) for row in ids]
        return [(record.images(row)[0][:end], spans.grids[row][0]) for row, end in enumerate(ends)], inputs

    def _inputs(self, pictures: list[list[Any]], questions: list[str]) -> dict[str, Any]:
        texts = [self.prompt(question, len(some)) for question, some in zip(questions, pictures, strict=True)]
        read = self.processor(images=pictures, text=texts, return_tensors="pt", padding=True)
        weight = next(self.model.parameters())
        return {
            name: value.to(weight.device, weight.dtype) if value.is_floating_point() else value.to(weight.device)
            for name, value in read.items()
        }

    def _seen(self, image: Any, inputs: dict[str, Any]) -> Box:
        """The part of a picture that the model sees: CLIP's reader leaves out what is not in the middle square."""
        reader = getattr(self.processor, "image_processor", self.processor)
        tiled = "image_sizes" in inputs or "image_grid_thw" in inputs
        if tiled or not getattr(reader, "do_center_crop", False):
            return 0, 0, image.width, image.height
        size, cut = (getattr(reader, name, None) or {} for name in ("size", "crop_size"))
        share = min(1.0, cut["height"] / size["shortest_edge"]) if "height" in cut and "shortest_edge" in size else 1.0
        side = round(min(image.width, image.height) * share)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return left, top, left + side, top + side


def _length(ids: Tensor, config: Any) -> int:
    """Tokens ``(n,)`` of an answer, with the one that ends it."""
    ends = config.eos_token_id
    if ends is None:
        return len(ids)
    ended = torch.isin(ids, torch.as_tensor(ends, device=ids.device)).nonzero()[:, 0]
    return int(ended[0]) + 1 if len(ended) else len(ids)
