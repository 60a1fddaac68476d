"""Where in a picture that stands which a question is about: gradients of a matcher's verdict through its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glocal.steer.relevance import attention_relevance, gradient_relevance
from glocal.steer.spans import SpanMap

__all__ = ["BlipMatcher", "Matcher", "SelfMatcher"]


class Matcher(Protocol):
    """Relevance maps ``(rows, columns)`` and similarities from -1 to 1, one of each a picture."""

    def __call__(self, images: Sequence[Any], questions: Sequence[str]) -> list[tuple[NDArray[Any], float]]: ...


@dataclass
class BlipMatcher:
    """BLIP's image-text matching head, as AGLA has it (Li et al., 2022, arXiv 2201.12086).

    Args:
        model: a ``BlipForImageTextRetrieval`` in eval mode.
        processor: its processor: ``processor(images=, text=, return_tensors="pt", padding=True)``.
        block: the layer of the text encoder whose cross-attention is read; the middle one where None (6 of 12).

    Raises:
        TypeError: a model of another class.
        ValueError: a block that is not there.
    """

    model: Any
    processor: Any
    block: int | None = None
    _probabilities: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        from transformers import BlipForImageTextRetrieval

        if not isinstance(self.model, BlipForImageTextRetrieval):
            raise TypeError(f"model must be a BlipForImageTextRetrieval; it was {type(self.model).__name__}")
        count = len(self.model.text_encoder.encoder.layer)
        if self.block is None:
            self.block = count // 2
        if not 0 <= self.block < count:
            raise ValueError(f"block must be from 0 to {count - 1}; it was {self.block}")

    def __call__(self, images: Sequence[Any], questions: Sequence[str]) -> list[tuple[NDArray[Any], float]]:
        """See `Matcher`."""
        inputs = self.processor(images=list(images), text=list(questions), return_tensors="pt", padding=True)
        device = next(self.model.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        maps = self.maps(**inputs)
        with torch.no_grad():
            alike = self.model(**inputs, use_itm_head=False).itm_score.diagonal()
        return [(m.double().cpu().numpy(), float(s)) for m, s in zip(maps, alike, strict=True)]

    def maps(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Relevance ``(B, g, g)`` of patches to texts ``(B, T)``: start and end token left out.

        Raises:
            RuntimeError: under ``torch.inference_mode``.
            ValueError: patches that form no square.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("relevance needs gradients: use torch.no_grad() rather than torch.inference_mode()")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        layer = self.model.text_encoder.encoder.layer[self.block]
        kept: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            kept.append(output[1])

        hook = layer.crossattention.self.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                score = self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=mask).itm_score
                (gradient,) = torch.autograd.grad(score[:, 1].sum(), kept)
        finally:
            hook.remove()
        found = gradient_relevance(kept[0].detach(), gradient)[..., 1:].mean(1)  # without the image's class token
        words = mask.clone().bool()
        words[:, 0] = False
        words[torch.arange(len(words)), mask.long().sum(1) - 1] = False
        each = (found * words[..., None]).sum(1) / words.sum(1).clamp(min=1)[:, None]
        side = round(each.shape[-1] ** 0.5)
        if side * side != each.shape[-1]:
            raise ValueError(f"the picture's {each.shape[-1]} patches form no square")
        return each.view(-1, side, side)


@dataclass
class SelfMatcher:
    """The vision-language model itself: which of its picture's tokens its own verdict rests on.

    It is asked whether what the question is about is there; the relevance of a token is its attention from the last
    row times the positive part of the gradient of ``yes - no``. With ``views`` of 2 it sees the four quarters of the
    picture one by one, each as large as the whole: a map twice as fine in each direction, of what the whole view has
    too few tokens for.

    Args:
        model: a vision-language model in eval mode.
        processor: ``processor(images=, text=, return_tensors="pt", padding=True)``.
        prompt: makes the text of the prompt from a question.
        yes: the token, or its text, that says that it is there.
        no: that it is not.
        views: parts in each direction.
        layers: whose attention counts, as in `attention_relevance`.

    Raises:
        ValueError: views less than 1; texts that are more than one token.
    """

    model: Any
    processor: Any
    prompt: Callable[[str], str]
    yes: int | str = "yes"
    no: int | str = "no"
    views: int = 1
    layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views must be at least 1; it was {self.views}")
        self.yes, self.no = self._token("yes"), self._token("no")

    def _token(self, which: str) -> int:
        value = getattr(self, which)
        if isinstance(value, int):
            return value
        ids = self.processor.tokenizer(value, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{which} must be one token; {value!r} is {len(ids)}")
        return int(ids[0])

    def __call__(self, images: Sequence[Any], questions: Sequence[str]) -> list[tuple[NDArray[Any], float]]:
        """See `Matcher`; the similarity is the probability of yes, of yes and no, by the best view."""
        found = []
        yes, no = int(self.yes), int(self.no)
        for image, question in zip(images, questions, strict=True):
            parts = [image.crop(box) for box in _parts(image.width, image.height, self.views)]
            inputs = dict(
                self.processor(
                    images=parts, text=[self.prompt(question)] * len(parts), return_tensors="pt", padding=True
                )
            )
            inputs = {name: value.to(next(self.model.parameters()).device) for name, value in inputs.items()}
            sure: list[Tensor] = []

            def verdict(logits: Tensor, sure: list[Tensor] = sure) -> Tensor:
                margin = logits[:, yes] - logits[:, no]
                sure.append(margin.detach().sigmoid())
                return margin

            each = attention_relevance(self.model, inputs, verdict, layers=self.layers).sum(0)
            spans = SpanMap.read(self.model, inputs)
            tiles = [_tile(each[row], spans, row) for row in range(len(parts))]
            rows = [np.concatenate(tiles[at : at + self.views], 1) for at in range(0, len(tiles), self.views)]
            found.append((np.concatenate(rows, 0), float(sure[0].max())))
        return found


def _parts(width: int, height: int, count: int) -> list[tuple[int, int, int, int]]:
    across = [round(width * n / count) for n in range(count + 1)]
    down = [round(height * n / count) for n in range(count + 1)]
    return [(across[c], down[r], across[c + 1], down[r + 1]) for r in range(count) for c in range(count)]


def _tile(relevance: Tensor, spans: SpanMap, row: int) -> NDArray[Any]:
    """The map ``(rows, columns)`` of the first image of a row, in its first grid."""
    images = spans.images(row)
    if not images:
        raise ValueError("the prompt has no image tokens")
    if not spans.grids[row][0]:
        raise ValueError(f"the {len(images[0])} tokens of the picture form no grid that is known")
    grid = spans.grids[row][0][0]
    found: NDArray[Any] = relevance[images[0]][grid.index.to(relevance.device)].double().cpu().numpy()
    return found
