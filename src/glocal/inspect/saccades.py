"""Eye movements of readers between words: reports of eye trackers, and a generated example.

Saccades are matrices between words, ``n x n``: from the word in the row to the word in the column, so that what is
below the diagonal goes back in the text.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.shapes import Bool, Float

__all__ = ["FIXATION_REPORT", "SACCADE_TABLE", "Saccades", "bigram_overlap", "read_saccades", "simulated_readers"]

FIXATION_REPORT = {
    "reader": "RECORDING_SESSION_LABEL",
    "sentence": "TRIAL_INDEX",
    "word": "CURRENT_FIX_INTEREST_AREA_ID",
    "duration": "CURRENT_FIX_DURATION",
}
"""Columns of a fixation report of EyeLink Data Viewer: a row a fixation, in order; interest areas are words from 1."""

SACCADE_TABLE = {"reader": "reader", "sentence": "sentence", "from": "from", "to": "to", "duration": "duration"}
"""Columns of a table of saccades: a row a saccade, from word to word, from 1."""


@dataclass(frozen=True, eq=False)
class Saccades:
    """Of several readers, each over the same sentences.

    Args:
        counts: how often a reader went from word to word, ``(S, B, n, n)``.
        durations: for how long, in milliseconds; None where it was not told.
        lengths: words of each sentence, ``(B,)``.
        seen: which sentences a reader has read, ``(S, B)``.
        readers: their names.
        sentences: names.
    """

    counts: Float[Tensor, "S B n n"]
    durations: Float[Tensor, "S B n n"] | None
    lengths: Tensor
    seen: Bool[Tensor, "S B"]
    readers: tuple[str, ...]
    sentences: tuple[str, ...]

    def complete(self) -> Saccades:
        """Of those readers alone who have read every sentence."""
        kept = self.seen.all(1)
        names = tuple(name for name, whole in zip(self.readers, kept.tolist(), strict=True) if whole)
        durations = None if self.durations is None else self.durations[kept]
        return Saccades(self.counts[kept], durations, self.lengths, self.seen[kept], names, self.sentences)


def _number(text: str, column: str, line: int, *, word: bool = False) -> Any:
    """A duration in milliseconds, or a word's number: None for none, as trackers write it."""
    if word and text.strip() in ("", ".", "NA"):
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if word and not (number >= 1 and number.is_integer()):
        raise ValueError(f"{column} must be a word's number, from 1, or '.'; line {line} has {text!r}")
    if not number >= 0:
        raise ValueError(f"{column} must be in milliseconds; line {line} has {text!r}")
    return int(number) if word else number


def _rows(
    path: str | Path, columns: Mapping[str, str], delimiter: str | None
) -> Iterator[tuple[str, str, Any, Any, Any]]:
    """Reader, sentence, word before, word, duration; a table's saccades, or fixations each with the one before it."""
    direct = "word" not in columns
    needed = ("reader", "sentence", *(("from", "to") if direct else ("word",)))
    if not set(needed) <= set(columns):
        raise ValueError(f"columns must say what {', '.join(needed)} are called; it had {', '.join(columns)}")
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        tabs = "\t" in file.readline()
        file.seek(0)
        rows = csv.DictReader(file, delimiter=delimiter or ("\t" if tabs else ","))
        there = rows.fieldnames or ()
        for what in needed:
            if columns[what] not in there:
                raise ValueError(f"{path} has no column {columns[what]!r}; it has {', '.join(there)}")
        timed = columns.get("duration") in there
        before: tuple[Any, ...] = ()
        for line, row in enumerate(rows, 2):
            cell = {what: (row[name], name, line) for what, name in columns.items() if name in there}
            who = row[columns["reader"]], row[columns["sentence"]]
            to = _number(*cell["to" if direct else "word"], word=True)
            start = _number(*cell["from"], word=True) if direct else before[1] if before[:1] == (who,) else None
            before = who, to
            yield *who, start, to, _number(*cell["duration"]) if timed else None


def read_saccades(
    path: str | Path,
    columns: Mapping[str, str] = FIXATION_REPORT,
    *,
    lengths: Mapping[str, int] | None = None,
    delimiter: str | None = None,
) -> Saccades:
    """Read what an eye tracker reported: fixations in order, or saccades from word to word.

    Of fixations, each one on a word and the next one in the same sentence make a saccade, and its duration is that of
    the fixation that it leads to. A fixation on no word ends the chain.

    Args:
        path: of a table with a header.
        columns: what its columns are called: ``reader``, ``sentence``, ``word`` (or ``from`` and ``to``, as in
            `SACCADE_TABLE`) and, where there is one, ``duration`` in milliseconds.
        lengths: words of each sentence by its name, which also gives their order; where None, the highest number, and
            the order of the table, so that a sentence's last words may be missed.
        delimiter: between columns; a comma, or a tab where the header has one.

    Raises:
        ValueError: a column that is not there, a word that is no number or that the sentence has not, an empty table.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("reader,sentence,word\\nann,1,1\\nann,1,2\\nann,1,1\\nann,1,.\\nann,1,3\\nann,1,3\\n")
    ...     file.flush()
    ...     read_saccades(file.name, {n: n for n in ("reader", "sentence", "word")}).counts[0, 0].int().tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    """
    found = list(_rows(path, columns, delimiter))
    if not found:
        raise ValueError(f"{path} must hold at least one row below the header")
    longest: dict[str, int] = {}
    for _, sentence, start, to, _ in found:
        longest[sentence] = max(longest.get(sentence, 1), start or 1, to or 1)
    if lengths is not None:
        for name, count in longest.items():
            if count > lengths.get(name, 0):
                raise ValueError(f"lengths must have {count} words of sentence {name!r}; it has {lengths.get(name, 0)}")
        longest = dict(lengths)
    readers, sentences = tuple(dict.fromkeys(row[0] for row in found)), tuple(longest)
    place = [{name: n for n, name in enumerate(names)} for names in (readers, sentences)]
    sums = torch.zeros(2, len(readers), len(sentences), *[max(longest.values())] * 2, dtype=torch.float64)
    seen = torch.zeros(len(readers), len(sentences), dtype=torch.bool)
    for reader, sentence, start, to, duration in found:
        s, b = place[0][reader], place[1][sentence]
        seen[s, b] = True
        if start is not None and to is not None:
            sums[0, s, b, start - 1, to - 1] += 1
            sums[1, s, b, start - 1, to - 1] += duration or 0
    durations = None if found[0][-1] is None else sums[1]
    return Saccades(sums[0], durations, torch.tensor(list(longest.values())), seen, readers, sentences)


def bigram_overlap(words: Sequence[str]) -> Float[Tensor, "n n"]:
    """How much words share pairs of letters: of those in either, the ones in both (Jaccard), with each earlier word.

    A pattern of attention that no position explains. Zeros on and above the diagonal.

    >>> bigram_overlap(["read", "reads", "it"])[1, 0]
    tensor(0.7500, dtype=torch.float64)
    """
    pairs = [{word[n : n + 2] for n in range(len(word) - 1)} for word in words]
    found = torch.zeros(len(words), len(words), dtype=torch.float64)
    for i, own in enumerate(pairs):
        for j, other in enumerate(pairs[:i]):
            found[i, j] = len(own & other) / max(1, len(own | other))
    return found


def simulated_readers(
    looks: Float[Tensor, "B n n"], lengths: Tensor, readers: int, generator: torch.Generator
) -> Saccades:
    """Readers who follow a pattern, with chance: counts are drawn from Poisson's distribution. No people's data.

    Args:
        looks: expected number of saccades from word to word, ``(B, n, n)``, not below 0; words beyond a sentence's
            length are not looked at.
        lengths: words of each sentence, ``(B,)``.
        readers: how many.
        generator: on the CPU.

    Returns:
        Without durations.

    Raises:
        ValueError: no readers, or looks that are no such matrices.

    >>> found = simulated_readers(torch.ones(2, 4, 4), torch.tensor([4, 3]), 5, torch.Generator().manual_seed(0))
    >>> found.counts.shape, float(found.counts[:, 1, 3].sum())
    (torch.Size([5, 2, 4, 4]), 0.0)
    """
    if readers < 1:
        raise ValueError(f"readers must be at least 1; it was {readers}")
    if looks.dim() != 3 or looks.shape[1] != looks.shape[2] or bool((looks < 0).any()):
        raise ValueError(f"looks must be (B, n, n) and not below 0; it was {tuple(looks.shape)}")
    if tuple(lengths.shape) != (len(looks),) or int(lengths.max()) > looks.shape[1]:
        raise ValueError(f"lengths must be ({len(looks)},), at most {looks.shape[1]}; it was {lengths.tolist()}")
    real = torch.arange(looks.shape[1]) < lengths[:, None]
    looks = looks.double() * (real[:, :, None] & real[:, None])
    counts = torch.poisson(looks.expand(readers, -1, -1, -1), generator=generator)
    names = tuple(f"reader {n + 1}" for n in range(readers)), tuple(str(n + 1) for n in range(len(looks)))
    return Saccades(counts, None, lengths, torch.ones(readers, len(looks), dtype=torch.bool), *names)
