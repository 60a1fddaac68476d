"""How evenly a model serves languages: prompt strategies, a report of fairness, and the survey's topics and figures.

Huang et al., 2024, arXiv 2405.10936.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import NamedTuple

from glocal.bench.table import Table

__all__ = [
    "ENGLISH",
    "LEADERBOARD",
    "STRATEGIES",
    "TOPICS",
    "LanguageReport",
    "SignTest",
    "Topic",
    "Wording",
    "language_report",
    "language_table",
    "pivot_translation",
    "sign_tests",
]


class Wording(NamedTuple):
    """What is said around a question, in one language.

    Args:
        language: its name, in English.
        steps: asks for reasoning step by step.
        form: asks for an answer in a form that can be read by a program.
    """

    language: str
    steps: str
    form: str


ENGLISH = Wording("English", "Let's think step by step in English.", 'Give the result on a last line, as "Answer: ".')


def _basic(question: str, source: Wording, english: Wording) -> str:
    return _lines(question, source.form)


def _en_basic(question: str, source: Wording, english: Wording) -> str:
    return _lines(question, english.form)


def _cot(question: str, source: Wording, english: Wording) -> str:
    return _lines(question, source.steps, source.form)


def _en_cot(question: str, source: Wording, english: Wording) -> str:
    return _lines(question, english.steps, english.form)


def _xlt(question: str, source: Wording, english: Wording) -> str:
    return _lines(
        f"You are an expert in tasks whose text is in {source.language}.",
        question,
        "First restate the task in English.",
        english.steps,
        english.form,
    )


def _lines(*parts: str) -> str:
    return "\n".join(parts)


STRATEGIES: Mapping[str, Callable[[str, Wording, Wording], str]] = {
    "Basic": _basic,
    "En-Basic": _en_basic,
    "CoT": _cot,
    "En-CoT": _en_cot,
    "XLT": _xlt,
}
"""Prompts of a question in its own language: ``STRATEGIES[name](question, source, english)``.

``Basic`` adds the form of the answer in the question's language, ``En-Basic`` in English; ``CoT`` and ``En-CoT`` ask
for steps before; ``XLT`` names a role, and asks in English to restate, to go in steps and for the form (Huang et al.,
2023, arXiv 2305.07004, in words of ours). `pivot_translation` is the survey's Trans-X.

>>> french = Wording("French", "Raisonnons pas à pas.", "Finis par « Réponse : ».")
>>> print(STRATEGIES["En-CoT"]("Combien font 2 et 3 ?", french, ENGLISH))
Combien font 2 et 3 ?
Let's think step by step in English.
Give the result on a last line, as "Answer: ".
"""


def pivot_translation(question: str, translate: Callable[[str], str], english: Wording = ENGLISH) -> str:
    """The question as ``translate`` puts it into English, with ``En-CoT``: the survey's Trans-X.

    >>> print(pivot_translation("Warum?", {"Warum?": "Why?"}.__getitem__).splitlines()[0])
    Why?
    """
    return _en_cot(translate(question), english, english)


LEADERBOARD: Mapping[str, Mapping[str, float]] = {
    strategy: dict(zip(("MGSM", "XCOPA", "XNLI", "PAWS-X", "MKQA"), row, strict=True))
    for strategy, row in {
        "Basic": (34.4, 72.3, 52.2, 49.7, 35.4),
        "En-Basic": (41.1, 76.1, 63.0, 62.0, 36.5),
        "CoT": (49.9, 72.4, 50.6, 50.3, 35.4),
        "En-CoT": (61.1, 78.6, 56.4, 61.6, 42.9),
        "XLT": (62.3, 79.3, 59.2, 59.4, 37.6),
        "Trans-Google": (73.9, 84.5, 60.5, 67.2, 43.8),
        "Trans-NLLB": (61.0, 79.7, 59.2, 67.5, 37.2),
    }.items()
}
"""GPT-3.5 in the survey's leaderboard, percent, mean over languages: strategy, then task."""


class Topic(NamedTuple):
    """One topic of the survey: on which axis it lies, and in which part of that axis, where it has parts."""

    axis: str
    name: str
    part: str = ""


TOPICS = tuple(
    Topic(axis, name, part)
    for axis, part, names in (
        ("pre-training transition", "", ("from pre-trained to large language models",)),
        ("training", "", ("from scratch", "continual", "instruction tuning", "alignment")),
        (
            "inference strategy",
            "",
            ("direct", "pivot translation", "chain of thought", "code-switching", "retrieval"),
        ),
        ("security", "attack", ("gradient-based", "prompt-based", "multilingual")),
        ("security", "defence", ("open-model", "closed-model")),
        ("domain", "", ("medical", "legal", "finance", "culture")),
        ("data resource", "", ("training data",)),
        ("benchmark", "", ("evaluation data",)),
    )
    for name in names
)
"""The survey's taxonomy."""


@dataclass(frozen=True)
class LanguageReport:
    """How evenly scores spread over languages; all in the scores' unit but the ratios.

    Args:
        pivot: the language that the others are compared with.
        scores: of each language, the mean over its tasks.
        ratios: of each language, its mean over the pivot's, on tasks that both have; NaN where the pivot's is 0.
        mean: over languages, each counting once.
        worst: the language of the lowest score.
        gap: how far the others are behind the pivot, on tasks that both have, on average; 0 where there are no others.
        deviation: standard deviation over languages, of the population.
        weighted: the mean under the caller's weights; None without.
    """

    pivot: str
    scores: Mapping[str, float]
    ratios: Mapping[str, float]
    mean: float
    worst: str
    gap: float
    deviation: float
    weighted: float | None


def language_report(
    scores: Mapping[str, Mapping[str, float]], pivot: str, weights: Mapping[str, float] | None = None
) -> LanguageReport:
    """Report how evenly a model serves languages.

    Args:
        scores: ``scores[language][task]``, in percent, say. A language may lack tasks: its own mean skips them, and it
            is compared with the pivot on the tasks that both have.
        pivot: the language to compare with.
        weights: of each language, with sum 1: speakers, or how much text there is.

    Raises:
        ValueError: no such pivot, a language without scores or without a task of the pivot's, a score that is not
            finite, or weights that are not one for each language, at least 0, with sum 1.

    >>> found = language_report({"en": {"MGSM": 80.0}, "de": {"MGSM": 60.0}, "sw": {"MGSM": 20.0}}, "en")
    >>> found.ratios["sw"], found.worst, found.gap, round(found.mean, 1)
    (0.25, 'sw', 40.0, 53.3)
    """
    if pivot not in scores:
        raise ValueError(f"pivot must be one of the languages {', '.join(scores) or '(none)'}; it was {pivot!r}")
    for language, row in scores.items():
        if not row or not all(math.isfinite(value) for value in row.values()):
            raise ValueError(f"scores of {language!r} must be finite numbers, at least one; they were {dict(row)}")
        if not row.keys() & scores[pivot].keys():
            raise ValueError(f"scores of {language!r} must have a task in common with the pivot {pivot!r}; none is")
    if weights is not None:
        _check(weights, scores)
    own = {language: fmean(row.values()) for language, row in scores.items()}
    pairs = {language: _on_common_tasks(row, scores[pivot]) for language, row in scores.items()}
    behind = [theirs - mine for language, (mine, theirs) in pairs.items() if language != pivot]
    return LanguageReport(
        pivot=pivot,
        scores=own,
        ratios={language: mine / theirs if theirs else math.nan for language, (mine, theirs) in pairs.items()},
        mean=fmean(own.values()),
        worst=min(own, key=own.__getitem__),
        gap=fmean(behind) if behind else 0.0,
        deviation=pstdev(own.values()),
        weighted=None if weights is None else sum(weights[language] * score for language, score in own.items()),
    )


def _on_common_tasks(row: Mapping[str, float], pivot: Mapping[str, float]) -> tuple[float, float]:
    common = [task for task in row if task in pivot]
    return fmean(row[task] for task in common), fmean(pivot[task] for task in common)


def _check(weights: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> None:
    if weights.keys() != scores.keys() or min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(
            f"weights must be at least 0, one for each of {', '.join(scores)}, with sum 1; they were {dict(weights)}"
        )


def language_table(report: LanguageReport) -> Table:
    """The report as a table, the best language first."""
    order = sorted(report.scores, key=report.scores.__getitem__, reverse=True)
    return Table(
        f"Languages beside {report.pivot}",
        ("language", "score", "ratio"),
        ("", "mean over tasks", f"over {report.pivot}'s score on the same tasks"),
        tuple((language, f"{report.scores[language]:.1f}", f"{report.ratios[language]:.2f}") for language in order),
    )


class SignTest(NamedTuple):
    """Of two strategies, in how many languages each is better.

    Args:
        first, second: the strategies.
        wins, losses, ties: languages in which the first is better, worse, alike.
        p: how probable so uneven a split of wins and losses is by chance, two-sided; ties are left out.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    p: float


def sign_tests(scores: Mapping[str, Mapping[str, float]]) -> list[SignTest]:
    """Compare strategies pair by pair, over languages.

    Args:
        scores: ``scores[strategy][language]``.

    Raises:
        ValueError: strategies that were not tried on the same languages.

    >>> sign_tests({"CoT": {"de": 50.0, "sw": 20.0, "th": 30.0}, "En-CoT": {"de": 61.0, "sw": 42.0, "th": 30.0}})
    [SignTest(first='CoT', second='En-CoT', wins=0, losses=2, ties=1, p=0.5)]
    """
    found = []
    for (first, a), (second, b) in itertools.combinations(scores.items(), 2):
        if a.keys() != b.keys():
            missing = ", ".join(sorted(a.keys() ^ b.keys()))
            raise ValueError(f"scores of {first!r} and {second!r} must be of the same languages; one lacks {missing}")
        wins, losses = sum(a[key] > b[key] for key in a), sum(a[key] < b[key] for key in a)
        count = wins + losses
        tail = sum(math.comb(count, n) for n in range(min(wins, losses) + 1)) / 2**count
        found.append(SignTest(first, second, wins, losses, len(a) - count, min(1.0, 2 * tail)))
    return found
