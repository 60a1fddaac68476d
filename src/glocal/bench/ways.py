"""The ways of steering a vision-language model that a comparison knows, each with the settings it is compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glocal.bench.scenes import COLOURS, SHAPES, scenes
from glocal.bench.vlm import Vlm, Way
from glocal.steer.agla import AGLA
from glocal.steer.buckets import AttentionBuckets, own_base
from glocal.steer.carve import CARVE
from glocal.steer.head_pursuit import HeadScale, head_writes, rank_heads, top_heads, unembedding
from glocal.steer.matcher import SelfMatcher
from glocal.steer.paint import PAINT
from glocal.steer.sinks import VAR
from glocal.steer.waveform import TOOL_BASES

__all__ = ["PLAIN", "WAYS", "way"]

PLAIN = "plain"


@dataclass(frozen=True)
class _RandomParts:
    """A matcher that finds anything relevant: what fusion is worth without knowing where to look."""

    seed: int = 0

    def __call__(self, images: Sequence[Any], questions: Sequence[str]) -> list[tuple[NDArray[Any], float]]:
        draw = np.random.default_rng(self.seed)
        return [(draw.random((8, 8)), 1.0) for _ in images]


def _agla(**settings: Any) -> Callable[..., AbstractContextManager[Any]]:
    matcher = settings.pop("matcher", None)

    def enter(vlm: Vlm, images: Sequence[Any], questions: Sequence[str]) -> AGLA:
        found = matcher or SelfMatcher(vlm.model, vlm.processor, prompt=vlm.prompt, views=2)
        common: dict[str, Any] = dict(beta=0.1, keep=0.5)
        return AGLA(
            vlm.model,
            processor=vlm.processor,
            images=images,
            questions=questions,
            matcher=found,
            **(common | settings),
        )

    return enter


def _var(vlm: Vlm, *_: Any) -> VAR:
    width = vlm.model.config.get_text_config(decoder=True).hidden_size
    return VAR(vlm.model, rho=0.5, tau=min(20.0, 0.6 * width**0.5))


def _carved(vlm: Vlm, images: Sequence[Any], questions: Sequence[str]) -> list[Any]:
    carve = CARVE(
        vlm.model,
        vlm.processor,
        prompt=lambda question, count: vlm.prompt(question),
        general="Describe the picture.",
        suffix="",
        lambda_=0.25,
        relative=True,
        both=False,
    )
    return [found.picture for found in carve.refine(images, questions)]


def _buckets(vlm: Vlm, *_: Any) -> AttentionBuckets:
    base = own_base(vlm.model)
    return AttentionBuckets(vlm.model, bases=[base * other / TOOL_BASES[0] for other in TOOL_BASES])


def _heads(vlm: Vlm, *_: Any) -> HeadScale:
    return HeadScale(vlm.model, heads=_writers(vlm), factor=2.0)


@lru_cache(maxsize=1)
def _writers(vlm: Vlm) -> tuple[tuple[int, int], ...]:
    """The tenth of the heads that writes names of colours and shapes most, where other scenes are to be described."""
    words = vlm.processor.tokenizer([f" {word}" for word in (*COLOURS, *SHAPES)], add_special_tokens=False)
    images = [scene.image() for scene in scenes(32, 0)]
    writes = head_writes(vlm.model, vlm.inputs(images, ["Describe the picture."] * len(images)))
    return tuple(top_heads(rank_heads(writes, unembedding(vlm.model, words["input_ids"])), 0.1))


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way(PLAIN, "the model as it is"),
        Way("agla", "fused with the relevant half of the picture, its own cache (S001)", _agla()),
        Way("agla-first", "the same as the authors' code has it: the first token only", _agla(first_token_only=True)),
        Way("agla-random", "fused with random parts of the picture: a control", _agla(matcher=_RandomParts())),
        Way("paint", "scores of local and summary image tokens raised (S081)", lambda vlm, *_: PAINT(vlm.model)),
        Way(
            "paint-contrast",
            "the same, and contrasted with the prompt without its picture",
            lambda vlm, *_: PAINT(vlm.model, gamma=1.1),
        ),
        Way("carve", "the part that the question looks at, enlarged, all else black (S089)", pictures=_carved),
        Way("var", "attention on sinks moved to the other image tokens (S099)", _var),
        Way("heads", "the tenth of the heads that writes colours and shapes most, doubled (S097)", _heads),
        Way("buckets", "six rotary bases, chosen from all of them (S031)", _buckets),
    )
}
"""Ways of answering by name; `PLAIN` is the model as it is."""


def way(name: str) -> Way:
    """One of `WAYS`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in WAYS:
        raise ValueError(f"method must be one of {', '.join(WAYS)}; it was {name!r}")
    return WAYS[name]
