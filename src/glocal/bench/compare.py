"""Full attention against patterns on a pretrained encoder: what the embeddings keep, and what attention costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal import explain
from glocal.bench import cost, encoder, text
from glocal.bench.encoder import Batch, Encoder
from glocal.bench.run import Interrupted, Step, check_lengths, short
from glocal.hf import adapt, recorded
from glocal.patterns import Full, Pattern, parse

__all__ = ["LADDER", "Comparison", "Cost", "Fidelity", "Interrupted", "Settings", "agreement", "compare", "patterns_of"]

# From wide to narrow, each narrow one with and without the first token: where embeddings live or die.
LADDER = (
    "sliding(128, 128)",
    "sliding(64, 64)",
    "sliding(64, 64) | tokens([0])",
    "sliding(32, 32)",
    "sliding(32, 32) | prefix(1)",
    "sliding(16, 16) | tokens([0])",
    "strided(8) | sliding(16, 16)",
    "block(64)",
)
_QUICK = ("sliding(64, 64)", "sliding(64, 64) | tokens([0])", "block(64)")


@dataclass(frozen=True)
class Settings:
    """What to compare. ``model`` and ``input`` are paths; ``quick`` makes all that is not given small."""

    model: str | None = None
    input: str | None = None
    where: tuple[str, ...] = ()
    passages: int | None = None
    lengths: tuple[int, ...] = ()
    quick: bool = False

    def rungs(self) -> tuple[str, ...]:
        """The patterns' texts."""
        return self.where or (_QUICK if self.quick else LADDER)

    def count(self) -> int:
        """How many passages at most."""
        return self.passages or (12 if self.quick else 64)

    def sizes(self) -> tuple[int, ...]:
        """The lengths at which cost is measured, ascending."""
        return tuple(sorted(set(self.lengths))) or ((512, 2048) if self.quick else (512, 2048, 8192))


@dataclass(frozen=True)
class Cost:
    """One forward pass of attention at one length; ``bytes`` is None where memory could not be measured.

    ``share`` is live pairs over all pairs; ``backend`` is what ran.
    """

    length: int
    seconds: float
    bytes: int | None
    share: float
    backend: str


@dataclass(frozen=True)
class Fidelity:
    """How near a pattern's embeddings are to those of full attention, over the passages.

    ``kept`` is the share of full-attention probability on the pattern's pairs, averaged over queries, heads and
    layers; ``cosine`` and ``worst`` are the mean and the lowest cosine; ``nearest1`` and ``nearest5`` the share of a
    passage's one and five nearest neighbors that stay. ``pairs`` and ``share`` are live pairs of one head at the
    longest passage.
    """

    pattern: str
    pairs: int
    share: float
    kept: float
    cosine: float
    worst: float
    nearest1: float
    nearest5: float
    cost: tuple[Cost, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All that was measured. The first row is full attention, the reference."""

    model: str
    source: str
    passages: int
    shortest: int
    longest: int
    heads: int
    head_dim: int
    threads: int
    rows: tuple[Fidelity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def compare(settings: Settings, step: Step = lambda what, done, total: None) -> Comparison:
    """Measure it all. ``step(what, done, total)`` is called along the way.

    Raises:
        ValueError: a setting is wrong; the message names it.
        Interrupted: on Ctrl-C once there is something to show.
    """
    _check(settings)
    wheres = patterns_of(settings.rungs())
    step("loading the model", 0, 1)
    model = encoder.load(settings.model)
    step("reading passages", 0, 1)
    if settings.input is not None:
        passages = text.from_file(settings.input)[: settings.count()]
        source = Path(settings.input).name
    else:
        passages = text.from_library(settings.count())
        source = "docstrings and comments of Python's standard library"
    parts = encoder.batches(model, passages)
    lengths = [ids.shape[1] for _, ids in parts]
    for where, name in zip(wheres[1:], settings.rungs(), strict=False):
        for length in {min(lengths), max(lengths), *settings.sizes()}:
            _fits(where, name, length, model)
    result = Comparison(
        model=model.name,
        source=source,
        passages=len(passages),
        shortest=min(lengths),
        longest=max(lengths),
        heads=model.heads,
        head_dim=model.head_dim,
        threads=torch.get_num_threads(),
        rows=(),
    )
    try:
        for row in _fidelity(model, parts, wheres, len(passages), step):
            result = replace(result, rows=(*result.rows, row))
        for costs in _costs(model, wheres, settings, step):
            rows = tuple(replace(r, cost=(*r.cost, c)) for r, c in zip(result.rows, costs, strict=True))
            result = replace(result, rows=rows)
    except KeyboardInterrupt:
        raise Interrupted(result) from None
    return result


def patterns_of(rungs: Sequence[str]) -> list[Pattern]:
    """Full attention, then the patterns of these texts, each once."""
    found: dict[Pattern, None] = {Full(): None}
    for rung in rungs:
        try:
            found[parse(rung)] = None
        except (ValueError, TypeError) as error:
            raise ValueError(f"where {short(rung)}: {short(str(error), str)}") from None
    return list(found)


def agreement(reference: Tensor, other: Tensor, k: int) -> float:
    """Share of each row's ``k`` nearest other rows that stay, from ``reference (n, D)`` to ``other (n, D)``.

    Rows have unit length; equal distances are settled by the order of rows.

    >>> import torch
    >>> agreement(torch.eye(3), torch.eye(3), 1)
    1.0
    """
    k = min(k, len(reference) - 1)
    near = []
    for rows in (reference, other):
        similarity = (rows @ rows.T).fill_diagonal_(-torch.inf)
        near.append(similarity.argsort(dim=1, descending=True, stable=True)[:, :k])
    same = near[0][:, :, None] == near[1][:, None, :]
    return float(same.sum()) / (k * len(reference))


def _check(settings: Settings) -> None:
    if settings.passages is not None and settings.passages < 2:
        raise ValueError(f"passages must be at least 2, to have neighbors; it was {settings.passages}")
    check_lengths(settings.lengths)


def _fits(where: Pattern, name: str, length: int, model: Encoder) -> None:
    try:
        grid, _ = where.check(length)
        lead = where.lead(grid, grid)
    except ValueError as error:
        raise ValueError(f"where {short(name)} does not fit {length} tokens: {error}") from None
    if lead[-1:] not in ((), (1,), (model.heads,)):
        raise ValueError(f"where {short(name)} is made for {lead[-1]} heads; the model has {model.heads}")


def _fidelity(model: Encoder, parts: list[Batch], wheres: list[Pattern], count: int, step: Step) -> Iterator[Fidelity]:
    """One row a pattern, as it is ready."""
    done, total = 0, len(parts) * (len(wheres) + 1)

    def all_of(what: str) -> Tensor:
        nonlocal done
        rows: list[Tensor | None] = [None] * count
        step(what, done, total)
        for numbers, vectors in encoder.embed(model, parts):
            for number, vector in zip(numbers, vectors, strict=True):
                rows[number] = vector
            done += 1
            step(what, done, total)
        return torch.stack([r for r in rows if r is not None]).double()

    reference = all_of("full attention")
    with recorded(model.model, wheres[1:]) as mass:
        all_of("attention mass")
    kept = [1.0, *mass.share().mean((1, 2)).tolist()]
    longest = max(ids.shape[1] for _, ids in parts)
    for where, share in zip(wheres, kept, strict=True):
        if isinstance(where, Full):
            moved = reference
        else:
            with adapt(model.model, where):
                moved = all_of(repr(where))
        cosine = (reference * moved).sum(1) / (reference.norm(dim=1) * moved.norm(dim=1))
        pairs = where.count(longest) / (1 if not where.lead((longest,), (longest,)) else model.heads)
        yield Fidelity(
            pattern=repr(where),
            pairs=round(pairs),
            share=pairs / longest**2,
            kept=share,
            cosine=float(cosine.mean()),
            worst=float(cosine.min()),
            nearest1=agreement(reference, moved, 1),
            nearest5=agreement(reference, moved, 5),
        )


def _costs(model: Encoder, wheres: list[Pattern], settings: Settings, step: Step) -> Iterator[list[Cost]]:
    """For each length, one `Cost` a pattern."""
    sizes, rounds = settings.sizes(), 3 if settings.quick else 5
    done, total = 0, len(sizes) * (rounds + len(wheres))

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        step(what, done, total)

    with cost.Probe(model.heads, model.head_dim) as probe:
        for length in sizes:
            what = f"attention at {length:,} tokens"
            step(what, done, total)
            shape = (model.heads, model.head_dim, length)
            taken = cost.seconds(wheres, *shape, rounds=rounds, step=partial(tick, what))
            found = []
            for where, median in zip(wheres, taken, strict=True):
                plan = explain(*cost.inputs(*shape), where)
                backend = "torch SDPA" if isinstance(where, Full) else plan.backend
                found.append(Cost(length, median, probe.peak(where, length), plan.share, backend))
                tick(what)
            yield found
