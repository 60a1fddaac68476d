"""Does a model see what is not there: yes-or-no questions after POPE, and captions after CHAIR."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from glocal.bench.scenes import COLOURS, KINDS, SHAPES, Kind, Question, Scene, presence

__all__ = ["NEGATIVES", "Chair", "Polled", "chair", "mentioned", "negatives", "poll", "polled", "verdict"]

NEGATIVES = ("random", "popular", "adversarial")
"""How what is asked for and absent is chosen."""
_Choose = Callable[[Scene, random.Random], list[Kind]]


@dataclass(frozen=True)
class Polled:
    """Of yes-or-no questions (Li et al., 2023, arXiv 2305.10355): yes is the positive answer.

    Args:
        accuracy, precision, recall, f1: from 0 to 1; precision is 0 where nothing was said to be there.
        yes: the share of questions that were answered yes.
        count: how many there were.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    count: int


@dataclass(frozen=True)
class Chair:
    """Of captions (Rohrbach et al., 2018, arXiv 1809.02156).

    Args:
        instances: the share of mentioned things that are not there (CHAIR_i).
        sentences: the share of captions that mention any such thing (CHAIR_s).
        recall: the share of things that are mentioned.
        length: words of a caption, on average.
    """

    instances: float
    sentences: float
    recall: float
    length: float


def negatives(scenes: Sequence[Scene], how: str, count: int, seed: int = 0) -> list[list[Kind]]:
    """For each scene ``count`` kinds that are absent from it.

    ``random``: any. ``popular``: those that are in most of the scenes. ``adversarial``: those that stand in most
    scenes beside what is there.

    Raises:
        ValueError: an unknown way, or more kinds than there are.

    >>> from glocal.bench.scenes import scenes
    >>> some = scenes(4, 0)
    >>> [kind in scene.kinds() for scene, kinds in zip(some, negatives(some, "popular", 1)) for kind in kinds]
    [False, False, False, False]
    """
    if how not in NEGATIVES:
        raise ValueError(f"how must be one of {', '.join(NEGATIVES)}; it was {how!r}")
    if not 0 <= count <= len(KINDS) - max((len(scene.kinds()) for scene in scenes), default=0):
        raise ValueError(f"count must leave kinds to ask for, of {len(KINDS)}; it was {count}")
    draw = random.Random(seed)
    often = Counter(kind for scene in scenes for kind in scene.kinds())
    beside: dict[Kind, Counter[Kind]] = {kind: Counter() for kind in KINDS}
    for scene in scenes:
        for kind in scene.kinds():
            beside[kind].update(scene.kinds() - {kind})
    found = []
    for scene in scenes:
        absent = [kind for kind in KINDS if kind not in scene.kinds()]
        draw.shuffle(absent)  # kinds that are alike in number come in no order
        if how == "popular":
            absent.sort(key=often.__getitem__, reverse=True)
        elif how == "adversarial":
            near: Counter[Kind] = sum((beside[kind] for kind in scene.kinds()), Counter())
            absent.sort(key=near.__getitem__, reverse=True)
        found.append(absent[:count])
    return found


def poll(scenes: Sequence[Scene], how: str, count: int = 3, seed: int = 0) -> list[tuple[int, Question]]:
    """Scene numbers and questions: up to ``count`` kinds that are there, and as many that are not.

    Raises:
        ValueError: as in `negatives`.
    """
    draw = random.Random(seed)
    found = []
    for n, (scene, absent) in enumerate(zip(scenes, negatives(scenes, how, count, seed), strict=True)):
        there = sorted(scene.kinds())
        draw.shuffle(there)
        there = there[:count]
        found += [(n, presence(kind, True)) for kind in there]
        found += [(n, presence(kind, False)) for kind in absent[: len(there)]]
    return found


def verdict(text: str) -> bool | None:
    """Whether an answer says yes; None where it says neither.

    >>> verdict("Yes, there is."), verdict("no"), verdict("a cat")
    (True, False, None)
    """
    words = re.findall(r"[a-z]+", text.lower())
    said = [word for word in words if word in ("yes", "no")]
    return None if not said else said[0] == "yes"


def polled(answers: Iterable[str], questions: Iterable[Question]) -> Polled:
    """What answers are worth; one that is neither yes nor no counts as no.

    Raises:
        ValueError: no questions, or another number of answers.
    """
    pairs = [(bool(verdict(said)), question.answer == "yes") for said, question in zip(answers, questions, strict=True)]
    if not pairs:
        raise ValueError("there must be at least one question")
    hits = sum(said and true for said, true in pairs)
    said, true = sum(s for s, _ in pairs), sum(t for _, t in pairs)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    right = sum(s == t for s, t in pairs)
    return Polled(right / len(pairs), precision, recall, f1, said / len(pairs), len(pairs))


def mentioned(caption: str) -> list[Kind]:
    """The kinds that a caption names: a colour right before a shape.

    >>> mentioned("a red square, a blue and a green star.")
    [('red', 'square'), ('green', 'star')]
    """
    words = re.findall(r"[a-z]+", caption.lower())
    return [(a, b) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES]


def chair(captions: Sequence[str], scenes: Sequence[Scene]) -> Chair:
    """What captions are worth.

    Raises:
        ValueError: no captions, or another number of scenes.
    """
    if not captions or len(captions) != len(scenes):
        raise ValueError(f"there must be a caption for each scene; there were {len(captions)} for {len(scenes)}")
    named, wrong, bad, hit, there, words = 0, 0, 0, 0, 0, 0
    for caption, scene in zip(captions, scenes, strict=True):
        kinds = mentioned(caption)
        false = [kind for kind in kinds if kind not in scene.kinds()]
        named, wrong, bad = named + len(kinds), wrong + len(false), bad + bool(false)
        hit, there = hit + len(scene.kinds() & set(kinds)), there + len(scene.kinds())
        words += len(re.findall(r"\w+", caption))
    count = len(captions)
    return Chair(wrong / named if named else 0.0, bad / count, hit / there if there else 0.0, words / count)
