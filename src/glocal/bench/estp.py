"""ESTP-F1: did a streaming assistant say the right thing at the right moment, unasked?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "TASKS",
    "ESTPScore",
    "GroundTruth",
    "Judge",
    "Prediction",
    "Sweep",
    "estp_score",
    "matches",
    "overlap",
    "sweep",
    "time_score",
]

TASKS: Mapping[str, Mapping[str, str]] = {
    "explicit": dict.fromkeys(("OR", "AP", "TRU", "OL"), "start")
    | dict.fromkeys(("OSC", "EOL", "EOSC", "AR"), "middle"),
    "implicit": {"OFR": "start", "IFR": "start", "NAR": "middle", "TU": "middle"},
    "contextual": {"ORC": "start", "TRC": "middle"},
}
"""The benchmark's 14 tasks by kind, and where in a valid interval the best moment of each is."""
EARLY, LATE = 1.0, 2.0
"""Seconds before and after a valid interval at which a reply still counts."""

Judge = Callable[[str, str, str], float]
"""From a question, its answer and what was said, how well that answers: 1 to 5."""
_BEST = {task: where for tasks in TASKS.values() for task, where in tasks.items()}


@dataclass(frozen=True)
class GroundTruth:
    """One moment at which an answer is due.

    Args:
        answer: what is to be said.
        start: of the valid interval, in seconds.
        end: of it.
        task: one of the 14 of `TASKS`; it says where the best moment is.
        question: what was asked, for the judge.

    Raises:
        ValueError: an unknown task, or an interval that ends before it starts.
    """

    answer: str
    start: float
    end: float
    task: str = "OR"
    question: str = ""

    def __post_init__(self) -> None:
        if self.task not in _BEST:
            raise ValueError(f"task must be one of {', '.join(_BEST)}; it was {self.task!r}")
        if not -math.inf < self.start <= self.end < math.inf:
            raise ValueError(f"start must be finite and at most end; they were {self.start} and {self.end}")

    @property
    def best(self) -> float:
        """The best moment: the start of the interval or its middle, as the task has it."""
        return self.start if _BEST[self.task] == "start" else (self.start + self.end) / 2


@dataclass(frozen=True)
class Prediction:
    """What an assistant said, and when, in seconds."""

    answer: str
    time: float


@dataclass(frozen=True)
class ESTPScore:
    """What ESTP-F1 is made of; scores of several videos add up, from ``ESTPScore()`` on.

    Args:
        total: the sum of the ground truths' scores, each from 0 to 1.
        false_positives: replies outside all intervals.
        false_negatives: ground truths without a reply.
        truths: how many ground truths there are.
    """

    total: float = 0.0
    false_positives: int = 0
    false_negatives: int = 0
    truths: int = 0

    def __add__(self, other: ESTPScore) -> ESTPScore:
        return ESTPScore(
            self.total + other.total,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
            self.truths + other.truths,
        )

    @property
    def f1(self) -> float:
        """``2 S / (2 S + FP + FN)``; NaN where nothing was due and nothing was said."""
        whole = 2 * self.total + self.false_positives + self.false_negatives
        return 2 * self.total / whole if whole else math.nan


def overlap(question: str, answer: str, said: str) -> float:
    """The judge where no language model is at hand: the F1 of the words in common, from 1 to 5 in whole numbers.

    >>> overlap("", "The red cup", "the red cup!"), overlap("", "the red cup", "a cup"), overlap("", "red", "blue")
    (5.0, 3.0, 1.0)
    """
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, said))
    both, whole = (left & right).total(), left.total() + right.total()
    return float(math.floor(1.5 + 4 * (2 * both / whole if whole else 1.0)))


def time_score(truth: GroundTruth, time: float) -> float:
    """Five at the best moment, falling evenly to zero over the length of the interval with its tolerance.

    >>> time_score(GroundTruth("cup", 4, 6), 4), time_score(GroundTruth("cup", 4, 6), 5)
    (5.0, 4.0)
    """
    scale = max(1.0, truth.end - truth.start + EARLY + LATE)
    return 5 * max(0.0, 1 - abs(time - truth.best) / scale)


def matches(truths: Sequence[GroundTruth], predictions: Sequence[Prediction]) -> NDArray[np.bool_]:
    """Which replies came in which intervals, from a second before to two after, bounds included.

    Returns:
        Booleans ``(G, P)``. A reply where intervals touch or overlap belongs to each of them.
    """
    times = np.array([p.time for p in predictions], dtype=float)
    if not np.isfinite(times).all():
        raise ValueError(f"predictions must have finite times; they were {times.tolist()}")
    start, end = (np.array([getattr(t, name) for t in truths], dtype=float)[:, None] for name in ("start", "end"))
    found: NDArray[np.bool_] = (start - EARLY <= times) & (times <= end + LATE)
    return found


def estp_score(truths: Sequence[GroundTruth], predictions: Sequence[Prediction], judge: Judge = overlap) -> ESTPScore:
    """Score the replies to one question on one video (Zhang et al., 2025, arXiv 2510.14560).

    A ground truth's score is the mean of (answer score + time score) / 10 over the replies in its interval, 0 where
    there are none. The authors' scoring script is not published; how time score and mean are scaled is our reading.

    Args:
        truths: when something is to be said.
        predictions: what was said.
        judge: answers of 1 to 5; the authors ask a language model.

    Raises:
        ValueError: a judge that leaves 1 to 5, or a time that is not finite.

    >>> truths = [GroundTruth("a red cup", start=4, end=6)]
    >>> estp_score(truths, [Prediction("a red cup", 4.0)]).f1
    1.0
    >>> round(estp_score(truths, [Prediction("a red cup", 4.0), Prediction("a red cup", 20.0)]).f1, 3)
    0.667
    """
    table, total = matches(truths, predictions), 0.0
    for truth, row in zip(truths, table, strict=True):
        scores = []
        for prediction in (predictions[n] for n in row.nonzero()[0]):
            answer = judge(truth.question, truth.answer, prediction.answer)
            if not 1 <= answer <= 5:
                raise ValueError(f"judge must answer 1 to 5; it answered {answer} to {prediction.answer!r}")
            scores.append((answer + time_score(truth, prediction.time)) / 10)
        total += sum(scores) / len(scores) if scores else 0.0
    missed, astray = int((~table.any(1)).sum()), int((~table.any(0)).sum())
    return ESTPScore(total, astray, missed, len(truths))


@dataclass(frozen=True)
class Sweep:
    """ESTP-F1 over thresholds.

    Args:
        thresholds: that were tried.
        tuning: the score of each on the videos for tuning.
        held_out: on the others.
    """

    thresholds: tuple[float, ...]
    tuning: tuple[ESTPScore, ...]
    held_out: tuple[ESTPScore, ...]

    @property
    def chosen(self) -> int:
        """The number of the threshold that is best for tuning, the first of equals."""
        return max(range(len(self.thresholds)), key=lambda n: (_number(self.tuning[n].f1), -n))

    @property
    def threshold(self) -> float:
        """That threshold."""
        return self.thresholds[self.chosen]

    @property
    def score(self) -> ESTPScore:
        """What it gives on the held-out videos: the figure to report."""
        return self.held_out[self.chosen]


def sweep(
    thresholds: Iterable[float],
    run: Callable[[float, Any], tuple[Sequence[GroundTruth], Sequence[Prediction]]],
    tuning: Sequence[Any],
    held_out: Sequence[Any],
    judge: Judge = overlap,
) -> Sweep:
    """Choose a threshold on some videos and report it on others, with the whole curve of both.

    Args:
        thresholds: to try.
        run: plays a video, as it stands in ``tuning`` or ``held_out``, at a threshold; gives what was due and what was
            said.
        tuning: videos.
        held_out: others.
        judge: as in `estp_score`.

    Raises:
        ValueError: no thresholds, or no videos on either side.
    """
    tried = tuple(thresholds)
    for name, given in (("thresholds", tried), ("tuning", tuning), ("held_out", held_out)):
        if not len(given):
            raise ValueError(f"{name} must not be empty")

    def total(threshold: float, videos: Sequence[Any]) -> ESTPScore:
        return sum((estp_score(*run(threshold, video), judge) for video in videos), ESTPScore())

    parts = ([total(threshold, videos) for threshold in tried] for videos in (tuning, held_out))
    first, second = (tuple(part) for part in parts)
    return Sweep(tried, first, second)


def _number(value: float) -> float:
    return -1.0 if math.isnan(value) else value
