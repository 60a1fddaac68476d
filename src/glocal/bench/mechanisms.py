"""Any mechanism of the library on any task: scores, the length from which it is cheaper, and the uses that it has."""

from __future__ import annotations

import difflib
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import glocal.nn
from glocal.bench.cab import Efficiency, efficiency_length, middle_mean, z_index
from glocal.bench.run import Interrupted, Step, check_lengths
from glocal.bench.table import Table, time
from glocal.bench.tasks import TASKS, Reader, Task, evaluate, train
from glocal.hf.mechanism import parse_call
from glocal.inspect import verify
from glocal.nn import USES, Attention

__all__ = ["DEFAULT", "Result", "Row", "Settings", "cheaper_from", "compare_mechanisms", "headline", "kinds", "tables"]

DEFAULT = (
    "Attention",
    "SlidingWindowAttention(window=16)",
    "MixtureOfBlocksAttention(block_size=16, top_k=2)",
    "LinearAttention",
)
"""Mechanisms of a first look."""
_USUAL: dict[str, dict[str, Any]] = {
    "CausalMultiHeadLinearAttention": {"chunk": 64, "max_blocks": 64},
    "MultiScaleWindowAttention": {"windows": (4, 8, 16, 32)},
    "MultiWindowAttention": {"windows": (16, 16, 0, 0)},
    "SlidingWindowAttention": {"window": 16},
}
"""For four heads and dozens of tokens, of mechanisms whose settings for a dozen tokens do not fit these."""
_SHORT = dict(zip(USES, ("NS", "CS", "NC", "CC"), strict=True))
_REPEATS = 9


def kinds() -> dict[str, type[Attention]]:
    """Every mechanism of `glocal.nn` by name.

    >>> kinds()["Attention"].uses
    ('noncausal-self', 'causal-self', 'noncausal-cross', 'causal-cross')
    """
    found = {name: getattr(glocal.nn, name) for name in glocal.nn.__all__}
    return {name: each for name, each in found.items() if isinstance(each, type) and issubclass(each, Attention)}


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Args:
        mechanisms: names of `glocal.nn`, with settings, e.g. ``"SlidingWindowAttention(window=16)"``; a name alone has
            small settings of ours. ``"all"`` are all.
        tasks: of `glocal.bench.tasks.TASKS`.
        length: tokens of a task's items.
        steps: of training.
        seeds: how often each is trained.
        lengths: at which a layer is timed, for the efficiency length; none for no timing.

    Raises:
        ValueError: no such mechanism or task, settings that a mechanism refuses, numbers out of range.
    """

    mechanisms: tuple[str, ...] = DEFAULT
    tasks: tuple[str, ...] = tuple(TASKS)
    length: int = 64
    steps: int = 300
    seeds: int = 1
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"task must be of {', '.join(TASKS)}; it was {name!r}")
        for name, least, value in (("length", 36, self.length), ("steps", 1, self.steps), ("seeds", 1, self.seeds)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; it was {value}")
        if self.lengths and len(set(self.lengths)) < 3:
            raise ValueError(f"lengths must be at least three, or none; they were {self.lengths}")
        check_lengths(self.lengths, 16)
        self.chosen()

    def chosen(self) -> dict[str, Mechanism]:
        """The mechanisms by their text."""
        texts = tuple(kinds()) if self.mechanisms == ("all",) else self.mechanisms
        return {text: Mechanism.parse(text) for text in dict.fromkeys(("Attention", *texts))}


@dataclass(frozen=True)
class Mechanism:
    """A class of `glocal.nn` and its settings."""

    kind: type[Attention]
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Mechanism:
        """Read ``Name(setting=value)``, and try it.

        Raises:
            ValueError: no such mechanism, or settings that it refuses.
        """
        name, settings = parse_call(text)
        known = kinds()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise ValueError(
                f"mechanism must be a layer of glocal.nn; it was {name!r}"
                + (f"; near it are {', '.join(near)}" if near else "")
            )
        kind = known[name]
        if not settings:
            settings = dict(_USUAL.get(name, kind.tiny))
            if len(settings.get("grid", ())) == 1:
                del settings["grid"]
        found = cls(kind, settings)
        try:
            found.layer(64, 4, False, 64) if "noncausal-self" in kind.uses else found.layer(64, 4, True, 64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{text}: {error}") from None
        return found

    def grid(self, length: int) -> tuple[int, ...] | None:
        """The map on which tokens are laid out, for mechanisms of maps: as square as the length lets it be."""
        if len(self.kind.tiny.get("grid", ())) < 2:
            return None
        rows = next(n for n in range(int(length**0.5), 0, -1) if length % n == 0)
        return rows, length // rows

    def layer(self, dim: int, num_heads: int, causal: bool, length: int) -> Attention:
        """A layer for items of so many tokens."""
        settings = dict(self.settings)
        num_heads = settings.pop("num_heads", num_heads)
        if "max_length" in settings:  # of kernels over all places
            settings["max_length"] = max(settings["max_length"], length)
        if dim % num_heads:  # 6 heads of 64 channels
            settings.setdefault("head_dim", dim // num_heads)
        if "grid" in settings:
            settings["grid"] = self.grid(length) or settings["grid"]
            if "grid" not in _parameters(self.kind):
                del settings["grid"]
        return self.kind(dim, num_heads, causal=causal, **settings)


def _parameters(kind: type) -> set[str]:
    import inspect

    return {name for each in kind.__mro__ if "__init__" in vars(each) for name in inspect.signature(each).parameters}


@dataclass
class Row:
    """What one mechanism did.

    Args:
        mechanism: its text.
        parameters: of a layer, against those of plain attention.
        uses: those that were verified.
        scores: by task, the mean over seeds.
        seconds: of a layer, by length.
        efficiency: the length from which on it is cheaper than plain attention.
        why: it has not a task, by the task's name.
    """

    mechanism: str
    parameters: float
    uses: tuple[str, ...]
    scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    efficiency: Efficiency | None = None
    why: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """Rows as far as they were measured; plain attention is the first."""

    settings: Settings
    rows: list[Row]
    threads: int

    @property
    def model(self) -> str:
        """For the page's title."""
        return "mechanisms"

    def index(self) -> dict[str, float]:
        """How good each is over the tasks that it did, in z-scores."""
        return z_index(
            {row.mechanism: row.scores for row in self.rows}, {n: TASKS[n].better for n in self.settings.tasks}
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers."""
        return {"settings": asdict(self.settings), "rows": [asdict(row) for row in self.rows], "index": self.index()}


def compare_mechanisms(settings: Settings, step: Step = lambda what, done, total: None) -> Result:
    """Train each mechanism on each task that it has a use for, and time it.

    Every mechanism stands in the same network and sees the same items.

    Args:
        settings: what.
        step: is told how far it is.

    Raises:
        Interrupted: the user stopped; it holds what was measured before.
    """
    result = Result(settings, [], torch.get_num_threads())
    chosen = settings.chosen()
    total = len(chosen) * len(settings.tasks) * settings.seeds * settings.steps
    done = 0
    try:
        for text, mechanism in chosen.items():
            base = sum(p.numel() for p in Attention(64, 4).parameters())
            causal = "noncausal-self" not in mechanism.kind.uses
            step(f"trying {text}", done, total)
            own = sum(p.numel() for p in mechanism.layer(64, 4, causal, settings.length).parameters())
            row = Row(text, own / base, tuple(use for use in USES if verify(mechanism.kind, use).holds))
            result.rows.append(row)
            for name in settings.tasks:
                _task(row, mechanism, TASKS[name], settings, partial(step, f"{text} learns {name}"), done, total)
                done += settings.seeds * settings.steps
        if settings.lengths:
            _times(result, chosen, step)
    except KeyboardInterrupt:
        raise Interrupted(result) from None
    return result


def _task(row: Row, mechanism: Mechanism, task: Task, settings: Settings, step: Any, done: int, total: int) -> None:
    if task.use not in mechanism.kind.uses:
        row.why[task.name] = mechanism.kind.refuses.get(task.use, f"it has no {task.use} form")
        return
    scores = []
    make = lambda dim, heads: mechanism.layer(dim, heads, task.use.startswith("causal"), settings.length)  # noqa: E731
    for seed in range(settings.seeds):
        torch.manual_seed(seed)
        try:
            model = Reader(task, settings.length, make, grid=mechanism.grid(settings.length))
            before = done + seed * settings.steps
            train(model, task, settings.length, settings.steps, seed=seed, step=partial(_tell, step, before, total))
            scores.append(evaluate(model, task, settings.length))
        except ValueError as error:
            row.why[task.name] = str(error)
            return
    row.scores[task.name] = sum(scores) / len(scores)


def _tell(step: Callable[[int, int], None], before: int, total: int, n: int) -> None:
    step(before + n, total)


def _times(result: Result, chosen: dict[str, Mechanism], step: Step) -> None:
    """Seconds of a layer, mechanisms taking turns."""
    lengths = sorted(set(result.settings.lengths))
    for at, length in enumerate(lengths):
        step(f"timing at {length:,} tokens", at, len(lengths))
        calls = {}
        for row, mechanism in zip(result.rows, chosen.values(), strict=True):
            causal = "noncausal-self" not in mechanism.kind.uses
            try:
                torch.manual_seed(0)
                layer = mechanism.layer(64, 4, causal, length).eval()
                grid = mechanism.grid(length)
                x = torch.randn(1, *(grid or (length,)), 64)
                _seconds(layer, x)  # the first call builds what later ones find
                calls[row.mechanism] = layer, x
            except ValueError as error:
                row.why["time"] = str(error)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(_REPEATS):
            for name, (layer, x) in calls.items():
                samples[name].append(_seconds(layer, x))
        for row in result.rows:
            if row.mechanism in samples:
                row.seconds[length] = middle_mean(samples[row.mechanism])
    full = result.rows[0].seconds
    for row in result.rows[1:]:
        if len(row.seconds) == len(lengths) and len(full) == len(lengths):
            row.efficiency = efficiency_length(
                lengths, [full[n] for n in lengths], [row.seconds[n] for n in lengths], drop=1
            )


@torch.no_grad()
def _seconds(layer: Attention, x: Tensor) -> float:
    begin = clock.perf_counter()
    layer(x)
    return clock.perf_counter() - begin


def tables(result: Result) -> tuple[Table, ...]:
    """Scores, and cost: what the command prints and the page shows."""
    tasks = [TASKS[name] for name in result.settings.tasks]
    index = result.index()
    header = ("mechanism", *(f"{task.name} ({task.unit})" for task in tasks), "index", "uses", "parameters")
    legend = (
        "a layer of glocal.nn",
        *(f"{task.about}; {task.use}; {'more' if task.better == '+' else 'less'} is better" for task in tasks),
        "mean of its z-scores among these mechanisms, over the tasks that it did",
        "verified on a dozen tokens: N or C, noncausal or causal; S or C, self- or cross-attention",
        "of a layer, against plain attention",
    )
    rows = tuple(
        (
            row.mechanism,
            *(f"{row.scores[task.name]:.3f}" if task.name in row.scores else "-" for task in tasks),
            f"{index[row.mechanism]:+.2f}" if row.scores else "-",
            " ".join(_SHORT[use] for use in row.uses),
            f"{row.parameters:.2f}x",
        )
        for row in result.rows
    )
    title = f"Scores after {result.settings.steps:,} steps on {result.settings.length} tokens"
    found = [Table(title, header, legend, rows)]
    lengths = sorted({n for row in result.rows for n in row.seconds})
    if lengths:
        full = result.rows[0]
        cost = tuple(
            (row.mechanism, *(time(row.seconds[n]) if n in row.seconds else "-" for n in lengths), *met)
            for row in result.rows
            for met in [cheaper_from(row, full)]
        )
        note = "where its time, a line, cuts that of plain attention, a parabola; any: cheaper at each length; -: never"
        found.append(
            Table(
                "Time of a layer, 64 channels in 4 heads, forward",
                ("mechanism", *(f"{n:,}" for n in lengths), "efficiency length", "fits"),
                (
                    "a layer of glocal.nn",
                    *("a pass over so many tokens" for _ in lengths),
                    note,
                    "share of the variance that the two curves explain",
                ),
                cost,
            )
        )
    return tuple(found)


def cheaper_from(row: Row, full: Row) -> tuple[str, str]:
    """The length from which a mechanism is cheaper than plain attention, and what the two fits explain, as text.

    ``any`` where it is cheaper at each length that was timed and the fits do not meet, ``-`` where it never is.
    """
    if row.efficiency is None:
        return "-", "-"
    if row.efficiency.length is not None:
        length = f"{row.efficiency.length:,.0f}"
    else:
        length = "any" if all(row.seconds[n] < full.seconds[n] for n in row.seconds) else "-"
    return length, f"{row.efficiency.vanilla:.3f}, {row.efficiency.method:.3f}"


def headline(result: Result) -> str:
    """One sentence."""
    index, most = result.index(), max((len(row.scores) for row in result.rows), default=0)
    if not most:
        return "No mechanism has a use for these tasks."
    # An index over fewer tasks, perhaps the easier ones, does not compare.
    did = [row.mechanism for row in result.rows if len(row.scores) == most]
    best = max(did, key=lambda name: index[name])
    parts = [f"of the {len(did)} that did {most} tasks, {best} is best (index {index[best]:+.2f})"]
    met = [row for row in result.rows if row.efficiency is not None and row.efficiency.length is not None]
    if met:
        first = min(met, key=lambda row: row.efficiency.length or 0.0 if row.efficiency else 0.0)
        assert first.efficiency is not None and first.efficiency.length is not None
        parts.append(f"{first.mechanism} is cheaper than plain attention from {first.efficiency.length:,.0f} tokens on")
    found = "; ".join(parts)
    return f"{found[0].upper()}{found[1:]}."


def missing(result: Result) -> Sequence[tuple[str, str, str]]:
    """Mechanism, task, and why it did not do it."""
    return [(row.mechanism, task, why) for row in result.rows for task, why in row.why.items()]
