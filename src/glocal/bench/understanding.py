"""Does what a participant can make run ahead of what it understands: items, records, scores.

The generative AI paradox; West et al., 2023, arXiv 2311.00059. `glocal.bench.understanding_effects` compares a model
with a reference, `glocal.bench.participants` has those who take part.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple, Protocol

from glocal.bench.table import Table

__all__ = [
    "Item",
    "Participant",
    "Probe",
    "Record",
    "Selective",
    "evaluate",
    "load_records",
    "preferred",
    "save_records",
    "score_table",
    "selective_scores",
]


@dataclass(frozen=True)
class Probe:
    """A question about an output, and who knows the answer.

    Args:
        text: the question.
        gold: the answer, from the prompt and the output: an oracle, or a look-up of what annotators said.
    """

    text: str
    gold: Callable[[str, str], str]


@dataclass(frozen=True)
class Item:
    """One task, in which the same kind of output is made, chosen and asked about.

    Args:
        prompt: what is asked for.
        candidates: outputs to choose from, all different.
        correct: which of them is right; only this one is.
        difficulty: whether the wrong ones are easy or hard to tell from it.
        references: outputs that are good.
        probes: questions about an output.

    Raises:
        ValueError: fewer than two candidates, or two alike; no such candidate; another difficulty.
    """

    prompt: str
    candidates: tuple[str, ...]
    correct: int
    difficulty: Literal["easy", "hard"] = "easy"
    references: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        if len(self.candidates) < 2 or len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"candidates must be at least two, all different; they were {self.candidates!r}")
        if not 0 <= self.correct < len(self.candidates):
            raise ValueError(f"correct must be from 0 to {len(self.candidates) - 1}; it was {self.correct}")
        if self.difficulty not in ("easy", "hard"):
            raise ValueError(f"difficulty must be 'easy' or 'hard'; it was {self.difficulty!r}")


class Participant(Protocol):
    """A model or a person."""

    def generate(self, prompt: str) -> str:
        """Make an output."""
        ...

    def select(self, prompt: str, candidates: Sequence[str]) -> int:
        """Choose a candidate; what a participant cannot tell apart it chooses from at random, not by its place."""
        ...

    def answer(self, prompt: str, output: str, question: str) -> str:
        """Answer a question about an output."""
        ...


@dataclass(frozen=True)
class Record:
    """What a participant did with one item.

    Args:
        prompt, difficulty: of the item.
        candidates: how many there were to choose from.
        output: what it made.
        generation: how good that is, from 0 to 1.
        chosen: the candidate it chose.
        selective: 1 where that is the right one, else 0.
        asked: the output that it was asked about.
        answers: what it said.
        interrogative: the share of answers that are right; None where nothing was asked.
    """

    prompt: str
    difficulty: str
    candidates: int
    output: str
    generation: float
    chosen: str
    selective: float
    asked: str
    answers: tuple[str, ...]
    interrogative: float | None


def evaluate(
    participant: Participant,
    items: Sequence[Item],
    quality: Callable[[Item, str], float],
    *,
    outputs: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Record]:
    """Let a participant make, choose and answer.

    Candidates are shown in an order that depends on the seed, the item's number and what they are, not on how the
    item lists them.

    Args:
        participant: who takes part.
        items: the tasks.
        quality: of an output, from 0 to 1: a validator, or `preferred`.
        outputs: for each item, the output to answer questions about; its own where None. The reference participant
            answers about the model's: ``[record.output for record in records]``.
        seed: of the orders.

    Raises:
        ValueError: no items, another number of outputs, a quality outside 0 to 1, or a choice that is no candidate.

    >>> class Careful:
    ...     def generate(self, prompt):
    ...         return "4"
    ...     def select(self, prompt, candidates):
    ...         return list(candidates).index("4")
    ...     def answer(self, prompt, output, question):
    ...         return "yes"
    >>> item = Item("2 + 2 = ", ("4", "5"), 0, probes=(Probe("Is it even?", lambda prompt, output: "Yes"),))
    >>> record, = evaluate(Careful(), [item], lambda item, output: output == "4")
    >>> record.generation, record.selective, record.interrogative
    (1.0, 1.0, 1.0)
    """
    if not items:
        raise ValueError("items must be at least one; there are none")
    if outputs is not None and len(outputs) != len(items):
        raise ValueError(f"outputs must be one for each of {len(items)} items; there are {len(outputs)}")
    records = []
    for number, item in enumerate(items):
        output = participant.generate(item.prompt)
        good = float(quality(item, output))
        if not 0 <= good <= 1:
            raise ValueError(f"quality must give from 0 to 1; it gave {good} for item {number}")
        shown = sorted(item.candidates)
        random.Random(f"{seed}/{number}").shuffle(shown)
        choice = participant.select(item.prompt, shown)
        if not 0 <= choice < len(shown):
            raise ValueError(f"select must give from 0 to {len(shown) - 1}; it gave {choice} for item {number}")
        asked = output if outputs is None else outputs[number]
        answers = tuple(participant.answer(item.prompt, asked, probe.text) for probe in item.probes)
        right = [
            _plain(said) == _plain(probe.gold(item.prompt, asked))
            for said, probe in zip(answers, item.probes, strict=True)
        ]
        records.append(
            Record(
                prompt=item.prompt,
                difficulty=item.difficulty,
                candidates=len(shown),
                output=output,
                generation=good,
                chosen=shown[choice],
                selective=float(shown[choice] == item.candidates[item.correct]),
                asked=asked,
                answers=answers,
                interrogative=fmean(right) if right else None,
            )
        )
    return records


def _plain(text: str) -> str:
    return text.strip().casefold()


def preferred(judge: Callable[[str, str, str], float], outputs: Mapping[Item, str]) -> Callable[[Item, str], float]:
    """A quality for `evaluate`: whether an output is preferred to another participant's. Its mean is the win rate.

    Args:
        judge: from the prompt and two outputs, 1 where the first is better, 0 where the second is, 1/2 for a tie.
            Outputs that are alike are a tie unasked.
        outputs: of the other participant, for each item.

    >>> item = Item("Name a colour.", ("red", "two"), 0)
    >>> longer = preferred(lambda prompt, a, b: (len(a) > len(b)) + 0.5 * (len(a) == len(b)), {item: "blue"})
    >>> longer(item, "green"), longer(item, "red"), longer(item, "gray")
    (1.0, 0.0, 0.5)
    """

    def quality(item: Item, output: str) -> float:
        return 0.5 if output == outputs[item] else float(judge(item.prompt, output, outputs[item]))

    return quality


class Selective(NamedTuple):
    """Accuracy of choosing, among items of one difficulty and number of candidates; ``chance`` is 1 / candidates."""

    difficulty: str
    candidates: int
    items: int
    accuracy: float
    chance: float


def selective_scores(records: Sequence[Record]) -> list[Selective]:
    """Accuracy of choosing by difficulty and number of candidates, with the level of chance."""
    groups: dict[tuple[str, int], list[float]] = {}
    for record in records:
        groups.setdefault((record.difficulty, record.candidates), []).append(record.selective)
    return [Selective(*key, len(found), fmean(found), 1 / key[1]) for key, found in sorted(groups.items())]


def score_table(participants: Mapping[str, Sequence[Record]]) -> Table:
    """Participants by scores: what they make, choose and answer.

    >>> from glocal.bench.participants import Understander
    >>> items = [Item(str(n), ("good", "bad"), 0, references=("good",)) for n in range(8)]
    >>> records = evaluate(Understander(items, accuracy=1.0), items, lambda item, output: output == "good")
    >>> score_table({"understander": records}).rows
    (('understander', '1.000', '1.000', '-', '0.500', '-'),)
    """

    def shown(values: Sequence[float | None]) -> str:
        there = [value for value in values if value is not None]
        return f"{fmean(there):.3f}" if there else "-"

    rows = []
    for name, records in participants.items():
        easy, hard = ([r.selective for r in records if r.difficulty == which] for which in ("easy", "hard"))
        chance = [1 / record.candidates for record in records]
        rows.append(
            (
                name,
                shown([record.generation for record in records]),
                shown(easy),
                shown(hard),
                shown(chance),
                shown([record.interrogative for record in records]),
            )
        )
    return Table(
        "Making and understanding",
        ("participant", "makes", "chooses, easy", "chooses, hard", "chance", "answers"),
        (
            "",
            "mean quality of what it makes",
            "share of right choices among candidates that are easy to tell apart",
            "the same, hard to tell apart",
            "of the choices, by chance",
            "share of right answers about outputs",
        ),
        tuple(rows),
    )


def save_records(records: Sequence[Record], path: str | Path) -> None:
    """Write records as JSON, one a line: how people's records come to be a reference."""
    Path(path).write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")


def load_records(path: str | Path) -> list[Record]:
    """Read what `save_records` wrote, or a file of that form.

    Raises:
        ValueError: a line that is no record; it is named.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            record = Record(**{**fields, "answers": tuple(fields["answers"])})
            scores = [record.generation, record.selective, 0 if record.interrogative is None else record.interrogative]
            if not all(math.isfinite(score) and 0 <= score <= 1 for score in scores):
                raise ValueError(f"scores must be from 0 to 1; they were {scores}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"path {str(path)!r}, line {number}, is no record: {error}") from None
        records.append(record)
    return records
