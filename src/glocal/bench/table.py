"""A comparison in words: the tables and the sentence that the terminal, the report and JSON share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glocal.bench.compare import Comparison, Cost, Fidelity

__all__ = [
    "Table",
    "best",
    "cost_table",
    "fidelity_table",
    "headline",
    "markdown",
    "markdown_row",
    "size",
    "tables",
    "time",
]

_NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; ``legend`` says what each column means, in the order of ``header``."""

    title: str
    header: tuple[str, ...]
    legend: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """What each column means; columns that mean the same, one after the other, share a note."""
        found: list[tuple[list[str], str]] = []
        for name, meaning in zip(self.header, self.legend, strict=True):
            if found and found[-1][1] == meaning:
                found[-1][0].append(name)
            else:
                found.append(([name], meaning))
        return tuple((", ".join(names), meaning) for names, meaning in found)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, from a `Table`'s header and rows or any others.

    >>> print(markdown(("pattern", "pairs"), [("full()", "100 %")]))
    | pattern | pairs |
    | --- | --- |
    | full() | 100 % |
    """
    return "\n".join(markdown_row(row) for row in (header, ("---",) * len(header), *rows))


def markdown_row(cells: Sequence[str]) -> str:
    r"""One row of such a table; a bar in a cell, as in a pattern's text, is escaped.

    >>> print(markdown_row(("sliding(3, 0) | sinks(1)", "25 %")))
    | sliding(3, 0) \| sinks(1) | 25 % |
    """
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def time(seconds: float) -> str:
    """Seconds with three significant digits.

    >>> time(0.01234), time(2.5)
    ('12.3 ms', '2.50 s')
    """
    value, unit = scaled(seconds)
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def scaled(seconds: float) -> tuple[float, str]:
    """Seconds as a number and the unit that suits it."""
    if seconds >= 1:
        return seconds, "s"
    return (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "us")


def size(count: int | None) -> str:
    """Bytes in MiB; below one, the operating system's count is too coarse for a number.

    >>> size(3 << 20), size(1000), size(None)
    ('3.0 MiB', '< 1 MiB', '-')
    """
    return _NONE if count is None else f"{count / 2**20:,.1f} MiB" if count >= 1 << 20 else "< 1 MiB"


def percent(share: float) -> str:
    """A share in percent, one decimal; what is not all is not called 100 %."""
    text = f"{share * 100:.1f} %"
    return "> 99.9 %" if text == "100.0 %" and share < 1 - 1e-9 else text


def times(full: float, mine: float) -> str:
    """How many times as fast.

    >>> times(3.0, 1.0), times(1.0, 2.0)
    ('3.00x', '0.50x')
    """
    ratio = full / mine
    return f"{ratio:.{2 if ratio < 10 else 1}f}x"


def fidelity_table(result: Comparison) -> Table:
    """What each pattern keeps."""
    header = ("pattern", "pairs", "mass kept", "cosine", "worst", "NN@1", "NN@5")
    legend = (
        "which keys each query sees",
        f"share of all (query, key) pairs at {result.longest} tokens",
        "share of full attention's probability that falls on those pairs, mean over queries, heads and layers",
        "of a passage's embedding to the one of full attention, mean",
        "the lowest cosine of any passage",
        "passages whose nearest neighbor stays the same",
        "share of the five nearest neighbors that stay",
    )
    rows = [
        (
            row.pattern,
            percent(row.share),
            percent(row.kept),
            f"{row.cosine:.4f}",
            f"{row.worst:.4f}",
            percent(row.nearest1),
            percent(row.nearest5),
        )
        for row in result.rows
    ]
    return Table("What the embeddings keep", header, legend, tuple(rows))


def cost_table(result: Comparison) -> Table:
    """What attention takes, length by length."""
    header = ("length", "pattern", "pairs", "time", "speed", "peak memory", "computed by")
    legend = (
        "tokens of one sequence",
        "which keys each query sees",
        "share of all pairs at this length",
        f"one forward pass of attention, {result.heads} heads of {result.head_dim}, float32, median",
        "full attention's time over this pattern's: above 1 is faster",
        "resident memory beyond the inputs, output included, to about half a MiB",
        "the backend of glocal.attend; the reference is torch's own operator",
    )
    rows = []
    for n in range(max((len(row.cost) for row in result.rows), default=0)):
        full = result.rows[0].cost[n]
        for row in result.rows:
            c = row.cost[n]
            speed = times(full.seconds, c.seconds)
            cells = (percent(c.share), time(c.seconds), speed, size(c.bytes), c.backend)
            rows.append((f"{c.length:,}", row.pattern, *cells))
    return Table("What attention takes", header, legend, tuple(rows))


def tables(result: Comparison) -> tuple[Table, ...]:
    """Both."""
    return fidelity_table(result), cost_table(result)


def best(result: Comparison) -> Fidelity | None:
    """The pattern of the headline: the cheapest that keeps nine of ten nearest neighbors, else the most faithful.

    Cheapest by time at the greatest length, by pairs where no time was measured.
    """
    others = result.rows[1:]
    good = [row for row in others if row.nearest1 >= 0.9]
    if good:
        return min(good, key=lambda row: (row.cost[-1].seconds if row.cost else 0.0, row.share))
    return max(others, key=lambda row: (row.nearest1, row.cosine), default=None)


def headline(result: Comparison) -> str:
    """What was found, in a sentence or two of plain words, about the pattern that `best` picks."""
    row = best(result)
    if row is None:
        return "Only full attention was measured."
    said = (
        f"{row.pattern} looks at {percent(row.share)} of the pairs in passages of up to {result.longest} tokens, and "
        f"{percent(row.nearest1)} of the {result.passages} passages keep their nearest neighbor "
        f"(mean cosine {row.cosine:.4f})."
    )
    return said if not row.cost else f"{said} {_speed(result.rows[0].cost[-1], row.cost[-1])}"


def _speed(full: Cost, mine: Cost) -> str:
    faster = full.seconds >= mine.seconds
    ratio = times(full.seconds, mine.seconds) if faster else times(mine.seconds, full.seconds)
    return (
        f"At {mine.length:,} tokens its attention takes {time(mine.seconds)} where full attention takes "
        f"{time(full.seconds)}: {ratio.removesuffix('x')} times as {'fast' if faster else 'slow'}."
    )
