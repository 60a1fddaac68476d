"""A comparison on a causal model in words: its tables, the frontiers, and the sentences of the headline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glocal.bench.causal import Comparison, Row
from glocal.bench.table import Table, percent, size, time, times

__all__ = ["best", "bits_table", "copy_table", "cost_table", "frontier", "headline", "needle_table", "tables"]

_NONE = "-"
_NAME = "which keys each token sees; a cache policy reads the prompt in full, or its own way, and drops from then on"
NEAR = 0.01
"""How far above full attention's bits per byte a row may be to count as near it, as a share."""


def bits_table(result: Comparison) -> Table:
    """How well each row predicts text."""
    legend = (
        _NAME,
        f"share of all {result.length:,} tokens that the last of them reads, mean over heads and layers",
        "bytes of keys and values that one sequence holds at the end",
        f"bits a byte of text, {result.passages} pieces of {result.length:,} tokens read in parallel",
        "bits a byte of each piece's last quarter; a cache policy decodes it token by token",
        "what that is above full attention's; below zero is better",
        "standard error of that difference, over pieces",
        "perplexity of a token, over the last quarter",
    )
    full = result.rows[0].late if result.rows else 0.0
    rows = [
        (
            row.name,
            percent(row.read),
            size(row.bytes),
            _NONE if row.bits is None else f"{row.bits:.4f}",
            f"{row.late:.4f}",
            f"{row.late - full:+.4f}",
            _NONE if row.error is None else f"{row.error:.4f}",
            f"{row.perplexity:.3f}" if row.perplexity < 1e4 else f"{row.perplexity:.3g}",
        )
        for row in result.rows
    ]
    header = ("attention", "keys", "cache", "bits/byte", "last 1/4", "vs full", "±", "ppl")
    return Table("How well text is predicted", header, legend, tuple(rows))


def needle_table(result: Comparison) -> Table:
    """What is found of a needle, by depth."""
    header = ("attention", *(f"{depth:.0%}".replace("%", " %") for depth in result.depths), "mean")
    where = "characters found of a value that stands so far into the text and is asked for at the end"
    legend = (_NAME, *(f"{where}, over {result.texts} texts" for _ in result.depths), "over depths")
    rows = [(row.name, *map(percent, row.needle), percent(_mean(row.needle))) for row in result.rows if row.needle]
    return Table("A needle in the text, by depth", header, legend, tuple(rows))


def copy_table(result: Comparison) -> Table:
    """What is guessed of a span that comes again, by distance."""
    header = ("attention", *(f"{distance:,}" for distance in result.distances), "mean")
    where = "tokens guessed of a random span that has stood once before, so many tokens back"
    legend = (_NAME, *(f"{where}, over {result.texts} texts" for _ in result.distances), "over distances")
    rows = [(row.name, *map(percent, row.copy), percent(_mean(row.copy))) for row in result.rows if row.copy]
    return Table("A random span again, by distance", header, legend, tuple(rows))


def cost_table(result: Comparison) -> Table:
    """What the whole model takes, length by length."""
    header = ("length", "attention", "prefill", "speed", "a token", "speed", "cache", "of full")
    legend = (
        "tokens of one sequence",
        _NAME,
        f"the whole model reads the prompt, {result.layers} layers, float32, median",
        "full attention's prefill over this one's: above 1 is faster; full attention is the model's own",
        "the whole model decodes one token after that prompt, median",
        "full attention's time of a token over this one's",
        "keys and values held at the end",
        "share of full attention's bytes",
    )
    rows = []
    for n in range(max((len(row.cost) for row in result.rows), default=0)):
        full = result.rows[0].cost[n]
        for row in result.rows:
            c = row.cost[n]
            prefill, token = times(full.prefill, c.prefill), times(full.token, c.token)
            cells = (time(c.prefill), prefill, time(c.token), token, size(c.bytes), percent(c.bytes / full.bytes))
            rows.append((f"{c.length:,}", row.name, *cells))
    return Table("What the model takes", header, legend, tuple(rows))


def tables(result: Comparison) -> tuple[Table, ...]:
    """All of them."""
    return bits_table(result), needle_table(result), copy_table(result), cost_table(result)


def frontier(rows: Sequence[Row], price: Callable[[Row], float]) -> list[Row]:
    """The rows of which no other is as cheap and predicts as well, and better in one of both; cheapest first."""
    return sorted(
        (
            row
            for row in rows
            if not any(
                price(other) <= price(row)
                and other.late <= row.late
                and (price(other), other.late) != (price(row), row.late)
                for other in rows
            )
        ),
        key=price,
    )


def best(result: Comparison) -> Row | None:
    """The row of the headline: of those near full attention the one that reads fewest keys, else the nearest."""
    others, full = result.rows[1:], result.rows[0] if result.rows else None
    if full is None or not others:
        return None
    near = [row for row in others if row.late <= full.late * (1 + NEAR)]
    return min(near, key=lambda row: (row.read, row.late)) if near else min(others, key=lambda row: row.late)


def headline(result: Comparison) -> str:
    """What was found, in a few sentences of plain words, about the row that `best` picks."""
    row = best(result)
    if row is None:
        return "Only full attention was measured."
    full = result.rows[0]
    said = [
        f"{row.name} {_nearness(row, full)} with {percent(row.read)} of the keys at {result.length:,} tokens "
        f"({row.late:.4f} against {full.late:.4f} on {result.passages} pieces of {result.source})."
    ]
    small = [r for r in result.rows[1:] if r.bytes < 0.9 * full.bytes]
    near = [r for r in small if r.late <= full.late * (1 + NEAR)]
    if small:
        least = min(near, key=lambda r: r.bytes) if near else min(small, key=lambda r: r.late)
        name = "It" if least is row else f"{least.name} {_nearness(least, full)} and"
        said.append(f"{name} holds {percent(least.bytes / full.bytes)} of full attention's cache.")
    if row.needle and full.needle:
        said.append(
            f"{'It' if len(said) == 1 else row.name} finds {percent(_mean(row.needle))} of a needle's characters, "
            f"full attention {percent(_mean(full.needle))}."
        )
    return " ".join(said)


def _nearness(row: Row, full: Row) -> str:
    apart = row.late / full.late - 1
    if apart < 0:
        return f"predicts {-apart * 100:.1f} % better than full attention, in bits per byte,"
    return f"keeps bits per byte within {max(apart * 100, 0.05):.1f} % of full attention"


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)
