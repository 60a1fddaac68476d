"""Ways of steering a vision-language model, beside each other: one question, or POPE's protocol for all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glocal.bench.pope import NEGATIVES, Chair, Polled, chair, poll, polled
from glocal.bench.run import Interrupted, Step
from glocal.bench.scenes import Scene, scenes
from glocal.bench.vlm import SCENES, Answer, Vlm, Way, ask
from glocal.steer.agla import AGLA, View
from glocal.steer.matcher import SelfMatcher
from glocal.steer.paint import PAINT

__all__ = ["PLAIN", "WAYS", "Asked", "Evaluation", "Row", "Settings", "ask_both", "evaluate", "views_of"]

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


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way(PLAIN, "the model as it is"),
        Way("agla", "fused with the relevant half of the picture, its own cache (S001)", _agla()),
        Way("agla-first", "the same as the authors' code has it: the first token only", _agla(first_token_only=True)),
        Way("agla-random", "fused with random parts of the picture: a control", _agla(matcher=_RandomParts())),
        Way("paint", "scores of local and summary image tokens raised (S081)", lambda vlm, *_: PAINT(vlm.model)),
    )
}
"""Ways of answering by name; `PLAIN` is the model as it is."""


@dataclass(frozen=True)
class Asked:
    """One question, answered without and with a way.

    Args:
        plain, steered: the answers.
        words: the likeliest first tokens of either, as text, with their probability in both.
        views: what AGLA saw; empty for other ways.
    """

    plain: Answer
    steered: Answer
    words: tuple[tuple[str, float, float], ...]
    views: tuple[View, ...]


def ask_both(vlm: Vlm, image: Any, question: str, name: str, *, words: int = 5, max_tokens: int = 32) -> Asked:
    """Answer a question on a picture without and with a way.

    Raises:
        ValueError: an unknown way, or what it refuses.
    """
    way = _way(name)
    views: list[View] = []
    seen = Way(way.name, way.about, lambda *args: _Kept(way.enter(*args), views), way.pictures)
    plain = ask(vlm, [image], [question], WAYS[PLAIN], max_tokens)[0]
    steered = ask(vlm, [image], [question], seen, max_tokens)[0]
    best = torch.maximum(plain.first, steered.first).topk(min(words, len(plain.first))).indices
    said = tuple(
        (vlm.processor.tokenizer.decode([int(n)]), float(plain.first[n]), float(steered.first[n])) for n in best
    )
    return Asked(plain, steered, said, tuple(views))


def _way(name: str) -> Way:
    if name not in WAYS:
        raise ValueError(f"method must be one of {', '.join(WAYS)}; it was {name!r}")
    return WAYS[name]


class _Kept(AbstractContextManager[Any]):
    """A method in its with block, whose views are kept when it is over."""

    def __init__(self, method: Any, views: list[View]) -> None:
        self.method, self.views = method, views

    def __enter__(self) -> Any:
        return self.method.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.views += getattr(self.method, "views", [])
        self.method.__exit__(*error)


def views_of(asked: Asked, image: Any) -> Any:
    """A figure: the picture, the relevance of its parts over it, and what was kept; the picture alone without views."""
    from matplotlib.figure import Figure

    view = asked.views[0] if asked.views else None
    figure = Figure(figsize=(9.6, 3.6) if view else (3.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 3 if view else 1, squeeze=False)[0]
    titles = ("picture", "relevance to the question", "what the second branch sees")
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=11)
        panel.set_axis_off()
    panels[0].imshow(image)
    if view:
        panels[1].imshow(image)
        panels[1].imshow(view.heat, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        panels[2].imshow(view.picture)
    figure.suptitle(f"plain: {asked.plain.text or '(nothing)'}   steered: {asked.steered.text or '(nothing)'}")
    return figure


@dataclass(frozen=True)
class Settings:
    """What an evaluation measures.

    Args:
        model: a folder, or the shipped model.
        methods: names of ways; all where empty.
        scenes: how many held-out scenes are asked about.
        noise, opacity: as in `glocal.bench.scenes.scenes`.
        count: kinds asked for that are there, a scene, and as many that are not.
        captions: scenes described; 0 for none.
        seed: of the scenes.
    """

    model: str = SCENES
    methods: tuple[str, ...] = ()
    scenes: int = 60
    noise: float = 20.0
    opacity: float = 0.7
    count: int = 3
    captions: int = 40
    seed: int = 5

    def __post_init__(self) -> None:
        for name in self.methods:
            _way(name)
        for name, value in (("scenes", self.scenes), ("count", self.count)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if self.captions < 0 or self.noise < 0 or not 0 <= self.opacity <= 1:
            raise ValueError("captions and noise must be at least 0, opacity from 0 to 1")


@dataclass(frozen=True)
class Row:
    """What one way gave.

    Args:
        name, about: of the way.
        polled: for random, popular and adversarial negatives.
        chair: of captions; None where none were asked for.
        token: seconds of a token of the captions, prefill and matcher included; of the answers where there are none.
        refused: why it could not run; then nothing else is told.
    """

    name: str
    about: str
    polled: tuple[Polled, ...] = ()
    chair: Chair | None = None
    token: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Evaluation:
    """All ways on the same scenes."""

    settings: Settings
    rows: tuple[Row, ...]
    threads: int

    @property
    def model(self) -> str:
        """Which model it was."""
        return self.settings.model

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(vlm: Vlm, settings: Settings, step: Step = lambda *_: None, batch: int = 30) -> Evaluation:
    """POPE-style questions and CHAIR-style captions on held-out scenes, for every way.

    Raises:
        Interrupted: Ctrl-C; it holds the rows that are done.
    """
    some = scenes(settings.scenes, settings.seed, held_out=True, noise=settings.noise, opacity=settings.opacity)
    rows: list[Row] = []
    names = settings.methods or tuple(WAYS)
    total = len(names) * (len(NEGATIVES) + (settings.captions > 0))
    try:
        for name in names:
            try:
                rows.append(_measured(vlm, WAYS[name], some, settings, step, len(rows), total, batch))
            except (ValueError, TypeError) as error:
                rows.append(Row(name, WAYS[name].about, refused=str(error)))
    except KeyboardInterrupt:
        raise Interrupted(Evaluation(settings, tuple(rows), torch.get_num_threads())) from None
    return Evaluation(settings, tuple(rows), torch.get_num_threads())


def _measured(
    vlm: Vlm, way: Way, some: list[Scene], settings: Settings, step: Step, done: int, total: int, batch: int
) -> Row:
    each = len(NEGATIVES) + (settings.captions > 0)
    found, tokens, start = [], 0, time.perf_counter()
    for n, how in enumerate(NEGATIVES):
        step(f"{way.name}, {how}", done * each + n, total)
        asked = poll(some, how, settings.count, settings.seed)
        said = list(_answers(vlm, way, [(some[n], q.text) for n, q in asked], batch, 4))
        tokens += sum(answer.tokens for answer in said)
        found.append(polled([answer.text for answer in said], [question for _, question in asked]))
    spent = time.perf_counter() - start
    described = None
    if settings.captions:
        step(f"{way.name}, captions", done * each + len(NEGATIVES), total)
        shown = some[: settings.captions]
        start = time.perf_counter()
        said = list(_answers(vlm, way, [(scene, "Describe the picture.") for scene in shown], batch, 40))
        spent, tokens = time.perf_counter() - start, sum(answer.tokens for answer in said)
        described = chair([answer.text for answer in said], shown)
    return Row(way.name, way.about, tuple(found), described, spent / max(1, tokens))


def _answers(vlm: Vlm, way: Way, asked: Sequence[tuple[Scene, str]], batch: int, max_tokens: int) -> Iterable[Answer]:
    for at in range(0, len(asked), batch):
        part = asked[at : at + batch]
        yield from ask(vlm, [scene.image() for scene, _ in part], [text for _, text in part], way, max_tokens)


def example(seed: int, noise: float = 0.0, opacity: float = 1.0) -> tuple[Any, str]:
    """A generated picture and a question about something that could be in it."""
    (scene,) = scenes(1, seed, held_out=True, noise=noise, opacity=opacity)
    draw = random.Random(seed)
    asked = poll([scene], "random", 1, seed)
    return scene.image(), draw.choice(asked)[1].text
