"""Questions on pairs of optical and radar pictures of one place, asked of either sensor alone and of both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ANSWER_TYPES",
    "SETTINGS",
    "Answerer",
    "EarthSample",
    "Judge",
    "SensorScores",
    "earth_scores",
    "read_samples",
    "same_words",
    "score",
]

SETTINGS = ("optical", "radar", "fused")
"""What is shown: one sensor's picture, or both."""
ANSWER_TYPES = ("choice", "yes-no", "number", "open")
"""How an answer is compared; only open ones need a judge."""

Answerer = Callable[[Sequence[Any], str], str]
"""From the pictures shown, optical before radar, and the question with its options, what a model says."""
Judge = Callable[[str, str, str], float]
"""From a question, its answer and what was said, how right that is: 0 to 1."""


@dataclass(frozen=True)
class EarthSample:
    """One question of a benchmark such as EarthMind-Bench (Shu et al., 2025, arXiv 2506.01667).

    Args:
        optical: the picture, whatever the model takes, or the path of one.
        radar: the picture of the same place by radar.
        question: without its options.
        answer: a letter for ``choice``, ``yes`` or ``no``, a number, or text.
        answer_type: one of `ANSWER_TYPES`.
        task: its name in the benchmark.
        options: of a choice, in order, A first.
        level: ``perception`` or ``reasoning``, or what groups tasks otherwise.

    Raises:
        ValueError: an unknown type, or an answer that is none of its type.
    """

    optical: Any
    radar: Any
    question: str
    answer: str
    answer_type: str
    task: str
    options: tuple[str, ...] = ()
    level: str = "perception"

    def __post_init__(self) -> None:
        if self.answer_type not in ANSWER_TYPES:
            raise ValueError(f"answer_type must be one of {', '.join(ANSWER_TYPES)}; it was {self.answer_type!r}")
        if (self.answer_type == "choice") != bool(self.options):
            raise ValueError(f"options are for choices, and a choice needs them; {self.answer_type} had {self.options}")
        if not self.task:
            raise ValueError("task must have a name")
        letters = _letters(self.options)
        right = {
            "choice": self.answer in letters,
            "yes-no": self.answer in ("yes", "no"),
            "number": _number(self.answer) is not None,
            "open": bool(self.answer.strip()),
        }[self.answer_type]
        if not right:
            wanted = {"choice": f"one of {letters}", "yes-no": "yes or no", "number": "a number", "open": "not empty"}
            raise ValueError(f"answer must be {wanted[self.answer_type]}; it was {self.answer!r}")

    def prompt(self) -> str:
        """The question, a choice's options under it, a line each."""
        lines = [f"{letter}. {text}" for letter, text in zip(_letters(self.options), self.options, strict=True)]
        return "\n".join([self.question, *lines])

    def pictures(self, setting: str) -> list[Any]:
        """What a setting shows.

        Raises:
            ValueError: an unknown setting, or a picture that the sample lacks.
        """
        if setting not in SETTINGS:
            raise ValueError(f"setting must be one of {', '.join(SETTINGS)}; it was {setting!r}")
        wanted = ("optical", "radar") if setting == "fused" else (setting,)
        missing = [name for name in wanted if getattr(self, name) is None]
        if missing:
            raise ValueError(f"setting {setting!r} needs a picture by {missing[0]}, which the sample lacks")
        return [getattr(self, name) for name in wanted]


@dataclass(frozen=True)
class SensorScores:
    """Accuracy of one setting.

    Args:
        setting: one of `SETTINGS`.
        tasks: of each task, in the samples' order, the mean score and how many questions it has.
        levels: the same of each level.
    """

    setting: str
    tasks: dict[str, tuple[float, int]]
    levels: dict[str, tuple[float, int]]

    @property
    def accuracy(self) -> float:
        """Over all questions."""
        return sum(mean * count for mean, count in self.tasks.values()) / sum(n for _, n in self.tasks.values())

    @property
    def task_mean(self) -> float:
        """The mean over tasks, whatever their size."""
        return sum(mean for mean, _ in self.tasks.values()) / len(self.tasks)


def earth_scores(
    samples: Iterable[EarthSample],
    answerer: Answerer,
    *,
    settings: Sequence[str] = SETTINGS,
    judge: Judge | None = None,
) -> list[SensorScores]:
    """Ask all questions in each setting.

    Args:
        samples: questions, all with the pictures that the settings show.
        answerer: the model.
        settings: of `SETTINGS`.
        judge: of open answers; `same_words` where None, which is stricter than a language model.

    Returns:
        One a setting.

    Raises:
        ValueError: no samples, no or unknown settings, a missing picture, a judge that leaves 0 to 1.

    >>> field = EarthSample("rgb.png", "sar.png", "Is there a river?", "yes", "yes-no", "existence")
    >>> blind = lambda pictures, question: "Yes." if "sar.png" in pictures else "No."
    >>> [(found.setting, found.accuracy) for found in earth_scores([field], blind)]
    [('optical', 0.0), ('radar', 1.0), ('fused', 1.0)]
    """
    given = list(samples)
    if not given or not settings:
        raise ValueError("samples and settings must not be empty")
    shown = {setting: [sample.pictures(setting) for sample in given] for setting in settings}
    found = []
    for setting, pictures in shown.items():
        scores = [score(s, answerer(some, s.prompt()), judge) for s, some in zip(given, pictures, strict=True)]
        tables: list[dict[str, list[float]]] = [{}, {}]
        for sample, each in zip(given, scores, strict=True):
            tables[0].setdefault(sample.task, []).append(each)
            tables[1].setdefault(sample.level, []).append(each)
        tasks, levels = ({k: (sum(v) / len(v), len(v)) for k, v in table.items()} for table in tables)
        found.append(SensorScores(setting, tasks, levels))
    return found


def score(sample: EarthSample, said: str, judge: Judge | None = None) -> float:
    """How right an answer is, 0 to 1.

    A choice: the first letter that stands by itself, ``(B)``, ``B.`` or ``B``; else the one option whose text is said.
    Yes or no: whichever word comes first. A number: the first one. What says nothing of the kind is wrong.

    Raises:
        ValueError: a judge that leaves 0 to 1.

    >>> river = EarthSample(None, None, "What is it?", "B", "choice", "scene", options=("a field", "a river"))
    >>> [score(river, said) for said in ("B", "The answer is (B).", "A river, I think", "a field", "C")]
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    if sample.answer_type == "choice":
        return float(_chosen(sample, said) == sample.answer)
    if sample.answer_type == "yes-no":
        words = [word for word in re.findall(r"[a-z]+", said.lower()) if word in ("yes", "no")]
        return float(words[:1] == [sample.answer])
    if sample.answer_type == "number":
        return float(_number(said) == _number(sample.answer))
    given = (judge or same_words)(sample.question, sample.answer, said)
    if not 0 <= given <= 1:
        raise ValueError(f"judge must answer 0 to 1; it answered {given} to {said!r}")
    return float(given)


def same_words(question: str, answer: str, said: str) -> float:
    """The judge where no language model is at hand: 1 where the words are the same, case and signs apart.

    >>> same_words("", "A dry river.", "a dry river"), same_words("", "river", "a river")
    (1.0, 0.0)
    """
    return float(re.findall(r"\w+", answer.lower()) == re.findall(r"\w+", said.lower()))


def read_samples(path: str | Path) -> list[EarthSample]:
    """Samples of a file of JSON lines; paths of pictures are from its folder on.

    Each line has ``optical``, ``radar`` (either may be null), ``question``, ``answer``, ``answer_type`` and ``task``,
    and may have ``options`` and ``level``. A benchmark published in another form needs a few lines that write this one.

    Raises:
        ValueError: a line that is no such thing, by its number.
    """
    file = Path(path)
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            each = json.loads(line)
            if not isinstance(each, dict):
                raise TypeError("it must be an object")
            for name in ("optical", "radar"):
                each[name] = None if each[name] is None else file.parent / each[name]
            found.append(EarthSample(**each | {"options": tuple(each.get("options", ()))}))
        except (ValueError, TypeError, KeyError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{str(file)!r}, line {number}: {missing}") from None
    return found


def _letters(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + n) for n in range(len(options))]


def _chosen(sample: EarthSample, said: str) -> str | None:
    letters = _letters(sample.options)
    known = "".join(letters)
    text = said.strip()
    # A letter with a sign at it, or nothing but a letter: "A river" begins with an article.
    for pattern in (rf"\(([{known}])\)", rf"\b([{known}])(?=[.):,])", rf"^([{known}])$", rf"\b([{known}])\W*$"):
        match = re.search(pattern, text)
        if match:
            return match[1]
    words = _words(text)
    named = [letter for letter, option in zip(letters, sample.options, strict=True) if _words(option) in words]
    return named[0] if len(named) == 1 else None


def _words(text: str) -> str:
    """In lower case, without signs, a space on either side of each."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def _number(text: str) -> float | None:
    match = re.search(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    if match is None:
        return None
    value = float(match[0].replace(",", ""))
    return value if math.isfinite(value) else None
