"""An evaluation of ways of steering in words: the tables and the sentence that terminal, report and docs share."""

from __future__ import annotations

from glocal.bench.pope import NEGATIVES
from glocal.bench.steered import Evaluation, Row
from glocal.bench.table import Table, size, time
from glocal.bench.ways import PLAIN

__all__ = ["caption_table", "headline", "poll_table", "refusals", "tables"]


def poll_table(result: Evaluation) -> Table:
    """Answers to yes-or-no questions."""
    header = ("method", "negatives", "accuracy", "precision", "recall", "F1", "yes", "vs plain")
    legend = (
        "the way of steering",
        "how what is asked for and absent was chosen",
        "share of right answers",
        "share of right ones among the answers yes",
        "share of what is there that was said to be there",
        "harmonic mean of precision and recall",
        "share of answers that were yes; half would be right",
        "accuracy less the plain model's",
    )
    plain = next((row for row in result.rows if row.name == PLAIN), None)
    rows = []
    for row in _measured(result):
        for n, (how, found) in enumerate(zip(NEGATIVES, row.polled, strict=True)):
            gain = "-" if plain is None or row is plain else f"{found.accuracy - plain.polled[n].accuracy:+.3f}"
            figures = (found.accuracy, found.precision, found.recall, found.f1, found.yes)
            rows.append((row.name, how, *(f"{figure:.3f}" for figure in figures), gain))
    return Table("Is it there?", header, legend, tuple(rows))


def caption_table(result: Evaluation) -> Table:
    """Captions, and what a token takes."""
    header = ("method", "CHAIR_i", "CHAIR_s", "recall", "words", "a token", "times plain", "memory", "times plain")
    legend = (
        "the way of steering",
        "share of things named that are not there",
        "share of captions that name such a thing",
        "share of things that are named",
        "length of a caption",
        "time of a token, with prefill and all that the method adds",
        "this time relative to the plain model's",
        "the most that tensors held at once for one picture, weights aside",
        "this memory relative to the plain model's",
    )
    plain = next((row for row in result.rows if row.name == PLAIN), None)
    rows = []
    for row in _measured(result):
        times, held = "-", "-"
        if plain is not None:
            times, held = f"{row.token / plain.token:.1f}x", f"{row.held / plain.held:.1f}x"
        c = row.chair
        figures = ("-",) * 4 if c is None else (f"{c.instances:.3f}", f"{c.sentences:.3f}", f"{c.recall:.3f}")
        words = () if c is None else (f"{c.length:.1f}",)
        rows.append((row.name, *figures, *words, time(row.token), times, size(row.held), held))
    return Table("Describe the picture", header, legend, tuple(rows))


def refusals(result: Evaluation) -> Table:
    """Ways that this model does not fit."""
    rows = tuple((row.name, row.refused) for row in result.rows if row.refused)
    return Table("What does not fit this model", ("method", "why"), ("the way of steering", "its own words"), rows)


def tables(result: Evaluation) -> tuple[Table, ...]:
    """All of them."""
    return poll_table(result), caption_table(result), refusals(result)


def headline(result: Evaluation) -> str:
    """What came out, in a sentence or two."""
    measured = _measured(result)
    plain = next((row for row in measured if row.name == PLAIN), None)
    others = [row for row in measured if row is not plain]
    if plain is None or not others:
        return "Nothing was measured beside the plain model."
    best = max(others, key=_accuracy)
    about = f"{result.settings.scenes} held-out scenes"
    said = (
        f"{best.name} answers {_accuracy(best):.1%} of the questions on {about} right, the plain model "
        f"{_accuracy(plain):.1%}."
    )
    worse = [row.name for row in others if _accuracy(row) < _accuracy(plain)]
    return said + (f" Worse than plain: {', '.join(worse)}." if worse else "")


def _measured(result: Evaluation) -> list[Row]:
    return [row for row in result.rows if not row.refused]


def _accuracy(row: Row) -> float:
    return sum(found.accuracy for found in row.polled) / len(row.polled)
