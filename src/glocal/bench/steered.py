"""Ways of steering a vision-language model, beside each other: one question, or POPE's protocol for all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from glocal.bench.held import HeldBytes
from glocal.bench.pope import NEGATIVES, Chair, Polled, chair, poll, polled
from glocal.bench.run import Interrupted, Step
from glocal.bench.scenes import Scene, scenes
from glocal.bench.vlm import SCENES, Answer, Vlm, Way, ask
from glocal.bench.ways import PLAIN, WAYS, way
from glocal.steer.agla import View

__all__ = ["Asked", "Evaluation", "Row", "Settings", "ask_both", "evaluate", "views_of"]


@dataclass(frozen=True)
class Asked:
    """One question, answered without and with a way.

    Args:
        plain, steered: the answers.
        words: the likeliest first tokens of either, as text, with their probability in both.
        views: what AGLA saw; empty for other ways.
        shown: the picture that the steered answer is of, where the way has put another in its place.
    """

    plain: Answer
    steered: Answer
    words: tuple[tuple[str, float, float], ...]
    views: tuple[View, ...]
    shown: Any = None


def ask_both(vlm: Vlm, image: Any, question: str, name: str, *, words: int = 5, max_tokens: int = 32) -> Asked:
    """Answer a question on a picture without and with a way.

    Raises:
        ValueError: an unknown way, or what it refuses.
    """
    chosen = way(name)
    views: list[View] = []
    pictures: list[Any] = []

    def show(*args: Any) -> Sequence[Any]:
        pictures[:] = chosen.pictures(*args)
        return pictures

    seen = replace(chosen, enter=lambda *args: _Kept(chosen.enter(*args), views), pictures=show)
    plain = ask(vlm, [image], [question], WAYS[PLAIN], max_tokens)[0]
    steered = ask(vlm, [image], [question], seen, max_tokens)[0]
    best = torch.maximum(plain.first, steered.first).topk(min(words, len(plain.first))).indices
    said = tuple(
        (vlm.processor.tokenizer.decode([int(n)]), float(plain.first[n]), float(steered.first[n])) for n in best
    )
    return Asked(plain, steered, said, tuple(views), None if pictures[0] is image else pictures[0])


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
    """A figure: the picture; the relevance of its parts over it and what was kept, or what was shown in its place."""
    from matplotlib.figure import Figure

    drawn: list[tuple[str, Any, Any]] = [("picture", image, None)]
    for view in asked.views[:1]:
        drawn.append(("relevance to the question", image, view.heat))
        drawn.append(("what the second branch sees", view.picture, None))
    if asked.shown is not None:
        drawn.append(("what is asked about instead", asked.shown, None))
    figure = Figure(figsize=(max(3.6, 3.2 * len(drawn)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (title, picture, heat) in zip(panels, drawn, strict=True):
        panel.set_title(title, fontsize=11)
        panel.set_axis_off()
        panel.imshow(picture)
        if heat is not None:
            panel.imshow(heat, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
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
            way(name)
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
        held: the most bytes that tensors held at once while one picture was described, the model's weights aside.
        refused: why it could not run; then nothing else is told.
    """

    name: str
    about: str
    polled: tuple[Polled, ...] = ()
    chair: Chair | None = None
    token: float = 0.0
    held: int = 0
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
    vlm: Vlm, chosen: Way, some: list[Scene], settings: Settings, step: Step, done: int, total: int, batch: int
) -> Row:
    each = len(NEGATIVES) + (settings.captions > 0)
    found, tokens, start = [], 0, time.perf_counter()
    for n, how in enumerate(NEGATIVES):
        step(f"{chosen.name}, {how}", done * each + n, total)
        asked = poll(some, how, settings.count, settings.seed)
        said = list(_answers(vlm, chosen, [(some[n], q.text) for n, q in asked], batch, 4))
        tokens += sum(answer.tokens for answer in said)
        found.append(polled([answer.text for answer in said], [question for _, question in asked]))
    spent = time.perf_counter() - start
    described = None
    if settings.captions:
        step(f"{chosen.name}, captions", done * each + len(NEGATIVES), total)
        shown = some[: settings.captions]
        start = time.perf_counter()
        said = list(_answers(vlm, chosen, [(scene, "Describe the picture.") for scene in shown], batch, 40))
        spent, tokens = time.perf_counter() - start, sum(answer.tokens for answer in said)
        described = chair([answer.text for answer in said], shown)
    with HeldBytes() as held:
        list(_answers(vlm, chosen, [(some[0], "Describe the picture.")], 1, 40))
    return Row(chosen.name, chosen.about, tuple(found), described, spent / max(1, tokens), held.peak)


def _answers(
    vlm: Vlm, chosen: Way, asked: Sequence[tuple[Scene, str]], batch: int, max_tokens: int
) -> Iterable[Answer]:
    for at in range(0, len(asked), batch):
        part = asked[at : at + batch]
        yield from ask(vlm, [scene.image() for scene, _ in part], [text for _, text in part], chosen, max_tokens)


def example(seed: int, noise: float = 0.0, opacity: float = 1.0) -> tuple[Any, str]:
    """A generated picture and a question about something that could be in it."""
    (scene,) = scenes(1, seed, held_out=True, noise=noise, opacity=opacity)
    draw = random.Random(seed)
    asked = poll([scene], "random", 1, seed)
    return scene.image(), draw.choice(asked)[1].text
