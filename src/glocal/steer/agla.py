"""AGLA: what the whole picture says, fused with what its part that the question is about says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glocal.steer.branch import Branch, fuse, lowered
from glocal.steer.hooks import Run
from glocal.steer.matcher import Matcher
from glocal.steer.method import Method, check_range
from glocal.steer.regions import blacked_out, kept_share, pixel_map, top_share

__all__ = ["AGLA", "View"]


@dataclass(frozen=True)
class View:
    """The augmented view of one picture.

    Args:
        relevance: of the question to each patch, ``(rows, columns)``.
        heat: the same over pixels, ``(height, width)`` from 0 to 1.
        kept: which pixels stay, booleans ``(height, width)``.
        picture: the picture with the others black.
    """

    relevance: NDArray[Any]
    heat: NDArray[Any]
    kept: NDArray[np.bool_]
    picture: Any


@dataclass
class AGLA(Method):
    """Assembly of global and local attention (An et al., 2024, arXiv 2406.12718): fewer invented objects.

    At each step the next token's logits are ``z + alpha * z'``: ``z`` of the picture, ``z'`` of the same picture where
    all that the question is not about is black; tokens that ``z`` finds implausible are ruled out. The second branch
    has a cache of its own. Greedy decoding and sampling, any batch; no beams. It costs a second prefill, a second
    forward a token, a second cache, and the matcher once.

    The augmented view is made from ``images`` and ``questions`` by a matcher when ``generate`` begins, or given as
    ``augmented``.

    Args:
        model: a vision-language model of transformers.
        processor: the model's; its image processor reads the masked pictures.
        images: PIL pictures, one a row of the batch.
        questions: what to look for, one a picture.
        matcher: says where in a picture what is asked for stands: `BlipMatcher`, `SelfMatcher`, or any function of
            images and questions.
        augmented: instead of these four, the model's arguments that differ in the second branch (``pixel_values``, or
            ``inputs_embeds``).
        alpha: weight of the augmented view; 0 leaves the model as it is.
        beta: least probability of a token relative to the likeliest, by the whole picture; 0 rules none out. The
            paper's 0.5 holds one-word answers back; 0.1 does less so.
        keep: share of the picture to keep; by the matcher's similarity where None.
        blur: of the map, a share of the longer side.
        first_token_only: as the authors' code does it: from the second token on both branches go on with the cache of
            the whole picture.

    Attributes:
        views: of the newest ``generate``, one a picture; empty where ``augmented`` was given.

    Raises:
        TypeError, ValueError: as in `Method`; neither pictures nor an augmented view, settings out of range, a prompt
            without image tokens.

    Example::

        with AGLA(model, processor=processor, images=[photo], questions=[text], matcher=BlipMatcher(blip, reader)):
            model.generate(**inputs)
    """

    _: KW_ONLY
    processor: Any = None
    images: Sequence[Any] = ()
    questions: Sequence[str] = ()
    matcher: Matcher | None = None
    augmented: Mapping[str, Tensor] | None = None
    alpha: float = 2.0
    beta: float = 0.5
    keep: float | None = None
    blur: float = 0.02
    first_token_only: bool = False
    views: list[View] = field(default_factory=list, init=False)

    fuses = True
    acts_in_attention = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        if self.keep is not None:
            check_range("keep", self.keep, 0, 1)
        if self.augmented is None:
            missing = [name for name in ("processor", "images", "questions", "matcher") if not getattr(self, name)]
            if missing:
                raise ValueError(f"AGLA needs {', '.join(missing)}, or augmented=...")
            if len(self.images) != len(self.questions):
                raise ValueError(f"{len(self.images)} images have {len(self.questions)} questions; give one each")
        self._branch: Branch | None = None
        self._inputs: dict[str, Any] = {}

    def begin(self, run: Run) -> None:
        """Make the augmented view of this prompt's pictures."""
        self._branch, self.views = None, []
        if run.spans is not None:
            run.spans.check_images("AGLA")
        changed = self.augmented
        if changed is None:
            changed = self._see(run)
        self._inputs = run.inputs | dict(changed)

    def _see(self, run: Run) -> Mapping[str, Tensor]:
        assert self.matcher is not None
        if run.spans is not None and len(run.spans.kinds) != len(self.images):
            raise ValueError(f"the batch has {len(run.spans.kinds)} rows, AGLA was given {len(self.images)} images")
        found = self.matcher(self.images, self.questions)
        for image, (relevance, similarity) in zip(self.images, found, strict=True):
            heat = pixel_map(relevance, (image.height, image.width), self.blur)
            kept = top_share(heat, kept_share(similarity) if self.keep is None else self.keep)
            self.views.append(View(relevance, heat, kept, blacked_out(image, kept)))
        read = getattr(self.processor, "image_processor", self.processor)
        pixels = read(images=[view.picture for view in self.views], return_tensors="pt")
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in pixels.items() if name in run.inputs}

    def logits(self, run: Run, logits: Tensor) -> Tensor:
        """Both branches, fused."""
        other = logits
        if not (self.first_token_only and run.step):
            if self._branch is None:
                self._branch = Branch(self.model, self._inputs, len(logits))
            other = self._branch.logits(run.chosen).to(logits.device)
        return lowered(fuse(logits, other, self.alpha), logits, self.beta)

    def end(self, run: Run) -> None:
        """Drop the branch and its cache."""
        self._branch, self._inputs = None, {}
