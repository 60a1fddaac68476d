"""``glocal show``: where queries look, in the terminal or in a file. What to draw comes from `patterns.view`."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from glocal.patterns import Pattern, parse
from glocal.patterns.cost import Cost, simulate
from glocal.patterns.facts import Facts, facts
from glocal.patterns.plot import ENDINGS, figure, percent, quantity, save
from glocal.patterns.view import Panel, View, view

SEEN, QUERY, BLIND, SOFT = "#2F8FD0", "#E69F00", "#CC79A7", "dim"
SHADES = " ░▒▓█"
TILES = {1: "64", 2: "8x8", 3: "4x4x4"}
_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}

T = TypeVar("T")


def fail(argument: str, message: object) -> NoReturn:
    """Say in one line which argument is wrong and what would be right, and leave with exit code 2."""
    first = str(message).splitlines()[0].rstrip(":; ")
    typer.echo(f"glocal: {argument}: {first}", err=True)
    raise typer.Exit(2)


def show(
    pattern: Annotated[str, typer.Argument(help='The pattern, such as "sliding(255, 0) | prefix(4)".')],
    grid: Annotated[str, typer.Option(help="Query grid: 1024, 28x28 or 8x28x28.")],
    keys: Annotated[str | None, typer.Option(help="Key grid, where it differs.")] = None,
    query: Annotated[list[str] | None, typer.Option(help="A query to draw, such as 14,14; may be repeated.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads, for the FLOPs; the pattern's own by default.")] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head, for the FLOPs.")] = 64,
    batch: Annotated[int, typer.Option(help="Batch size, for the FLOPs.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write a picture to this file (.png or .svg) as well.")] = None,
    simulated: Annotated[bool, typer.Option("--simulate", help="Count the tiles that a kernel would visit.")] = False,
    query_tile: Annotated[str | None, typer.Option(help="Queries of a tile, such as 8x8, for --simulate.")] = None,
    key_tile: Annotated[str | None, typer.Option(help="Keys of a tile; the query tile by default.")] = None,
) -> None:
    """Draw where queries look, with what it costs beside it."""
    for name, value in (("--heads", heads), ("--head-dim", head_dim), ("--batch", batch)):
        if value is not None and value < 1:
            fail(name, f"must be at least 1; it was {value}")
    if out is not None and out.suffix.lower() not in ENDINGS:
        fail("--out", f"must end in {' or '.join(ENDINGS)}; it was {str(out)!r}")
    if out is not None and not out.parent.is_dir():
        fail("--out", f"there is no folder {str(out.parent)!r}; make it first")
    where = _try("PATTERN", lambda: parse(pattern))
    grid_q = read_grid("--grid", grid)
    grid_k = grid_q if keys is None else read_grid("--keys", keys)
    if len(grid_q) != len(grid_k):
        fail("--keys", f"has {len(grid_k)} axes, --grid has {len(grid_q)}; they must agree")
    queries = [_read_query(text, grid_q) for text in query or ()] or None
    tiles = _read_tiles(simulated, query_tile, key_tile, len(grid_q))
    _try("PATTERN", lambda: where.check(grid_q, grid_k))
    console = Console(highlight=False, soft_wrap=True)
    across = max(8, console.width - 4)
    shown = _try("--grid", lambda: view(where, grid_q, keys=grid_k, queries=queries, cells=across, coarse=across // 2))
    known = _try("--heads", lambda: facts(where, grid_q, grid_k, heads=heads, head_dim=head_dim, batch=batch))
    cost = _try("--simulate", lambda: simulate(where, grid_q, *tiles, keys=grid_k)) if tiles else None
    if out is not None:
        _write(where, grid_q, grid_k, queries, head_dim, out)
    count = heads or (1, *where.lead(grid_q, grid_k))[-1]
    assumed = f"{count} head{'' if count == 1 else 's'} of {head_dim}, batch {batch}"
    draw(console, shown, known, assumed)
    if tiles and cost:
        console.print()
        for line in _cost(cost, *tiles):
            console.print(line, soft_wrap=False)
    if out is not None:
        console.print(Text(f"wrote {out}"))
    if known.empty:
        some = "" if known.counted is None else f" of {known.counted:,} looked at"
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            Text(f"warning: queries that see no key: {known.empty:,}{some}; attention gives zeros there", style="bold")
        )


def _write(
    where: Pattern,
    grid_q: tuple[int, ...],
    grid_k: tuple[int, ...],
    queries: list[tuple[int, ...]] | None,
    head_dim: int,
    out: Path,
) -> None:
    try:
        save(figure(where, grid_q, keys=grid_k, queries=queries, head_dim=head_dim), out)
    except (ImportError, OSError) as error:
        fail("--out", error)


def _try(argument: str, work: Callable[[], T]) -> T:
    """The result of ``work``; a ValueError becomes one line about ``argument``."""
    try:
        return work()
    except ValueError as error:
        fail(argument, error)


def read_grid(argument: str, text: str) -> tuple[int, ...]:
    """``28x28`` as a grid.

    >>> read_grid("--grid", "8x28x28")
    (8, 28, 28)
    """
    if not re.fullmatch(r"\s*\d{1,9}(\s*[xX\u00d7]\s*\d{1,9}){0,2}\s*", text):
        fail(argument, f"must be one to three lengths, such as 1024, 28x28 or 8x28x28; it was {text!r}")
    lengths = tuple(int(n) for n in re.findall(r"\d+", text))
    if 0 in lengths:
        fail(argument, f"must have no empty axis; it was {text!r}")
    return lengths


def _read_query(text: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    example = ",".join(str(n // 2) for n in grid)
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text) or text.count(",") != len(grid) - 1:
        fail("--query", f"must be one position for each grid axis, such as {example}; it was {text!r}")
    place = tuple(int(n) for n in re.findall(r"\d+", text))
    if any(p >= n for p, n in zip(place, grid, strict=True)):
        last = ",".join(str(n - 1) for n in grid)
        fail("--query", f"must lie in the grid, from {','.join('0' * len(grid))} to {last}; it was {text!r}")
    return place


def _read_tiles(
    wanted: bool, query_tile: str | None, key_tile: str | None, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes of a query tile and a key tile, one an axis, or None where nothing is simulated."""
    sizes = []
    for name, text in (("--query-tile", query_tile), ("--key-tile", key_tile)):
        if text is not None and not wanted:
            fail(name, "is for --simulate; add --simulate")
        size = read_grid(name, text or query_tile or TILES[rank])
        if len(size) not in (1, rank):
            fail(
                name, f"has {len(size)} sizes, --grid has {rank} axes; give one, or one an axis, such as {TILES[rank]}"
            )
        sizes.append(size * rank if len(size) == 1 else size)
    return (sizes[0], sizes[1]) if wanted else None


def draw(console: Console, shown: View, known: Facts, assumed: str = "") -> None:
    """Print a view and its facts as wide as the console is, in colour where it has colour."""
    colour = console.color_system is not None and not console.no_color
    console.print(Text.assemble((shown.expression, "bold"), ("   " + shown.where, SOFT)), soft_wrap=False)
    last: list[list[Text]] = []
    for title, panels in shown.bands:
        _flow(console, last)
        console.print()
        if title:
            console.print(Text(title, style="bold"), soft_wrap=False)
        last = [block(panel, colour) for panel in panels]
        if len(shown.grid_k) == 1:
            last = [[line for lines in last for line in lines]]
    _flow(console, [*last, _numbers(known, assumed)])
    for note in (_legend(shown, colour), *shown.notes):
        console.print(Text(note, style=SOFT) if isinstance(note, str) else note, soft_wrap=False)


def block(panel: Panel, colour: bool) -> list[Text]:
    """A panel as lines: its title, then cells in a frame whose wedges point at the queries.

    A cell that is one pair is half a character high, so that cells are square: the pair is live where the half is
    filled. Pooled cells are two characters wide, shaded by their share.
    """
    rows, columns = panel.seen.shape
    width = columns if panel.exact else 2 * columns
    down = {r for r, _ in panel.marks}
    lines = [Text(panel.title)] if panel.title else []
    if panel.kind == "row":
        return [*lines, Text.assemble("│", _coarse(panel, 0, colour), "│")]
    top = ["─"] * width
    for _, c in panel.marks:
        if c is not None:
            top[c if panel.exact else 2 * c] = "▼"
    lines.append(Text("┌" + "".join(top) + "┐"))
    for r in range(0, rows, 2 if panel.exact else 1):
        cells = _halves(panel, r, colour) if panel.exact else _coarse(panel, r, colour)
        here = down & ({r, r + 1} if panel.exact else {r})
        lines.append(Text.assemble("▶" if here else "│", cells, "│"))
    lines.append(Text("└" + "─" * width + "┘"))
    return lines


def _halves(panel: Panel, r: int, colour: bool) -> Text:
    """Rows ``r`` and ``r + 1``, one character for the two cells of a column."""
    cells: list[tuple[str, str]] = []
    seen = (panel.seen[r : r + 2] > 0).tolist()
    seen += [[False] * len(seen[0])] * (2 - len(seen))
    marks = set(panel.marks)
    for c, halves in enumerate(zip(*seen, strict=True)):
        if not colour:
            cells.append((_HALVES[halves], ""))
            continue
        # The query's half is filled in colour whether it sees itself or not.
        first, second = (
            (QUERY if live else BLIND) if (r + n, c) in marks else (SEEN if live else "")
            for n, live in enumerate(halves)
        )
        if first and second and first != second:
            cells.append(("▀", f"{first} on {second}"))
        else:
            cells.append((_HALVES[bool(first), bool(second)], first or second))
    return _line(cells)


def _coarse(panel: Panel, r: int, colour: bool) -> Text:
    """One row of cells by their share; a cell that is one pair is one character, a pooled one is two."""
    cells: list[tuple[str, str]] = []
    for c, share in enumerate(panel.seen[r].tolist()):
        text = shade(share) if panel.exact else 2 * shade(share)
        query = (r, c) in panel.marks
        if query:
            text = text[:-1] + ("◆" if share else "◇")
        paint = (QUERY if share else BLIND) if query else SEEN if share else ""
        cells.append((text, paint if colour else ""))
    return _line(cells)


def _line(cells: list[tuple[str, str]]) -> Text:
    """Cells as one text, with a style set once for a run of equals."""
    return Text.assemble(*(("".join(t for t, _ in run), style) for style, run in groupby(cells, key=itemgetter(1))))


def shade(share: float) -> str:
    """The character of a share: blank for none, full for all.

    >>> [shade(s) for s in (0, 0.1, 0.5, 0.9, 1)]
    [' ', '░', '▒', '▓', '█']
    """
    return SHADES[0] if share <= 0 else SHADES[4] if share >= 1 else SHADES[1 + min(2, int(3 * share))]


def _flow(console: Console, blocks: list[list[Text]]) -> None:
    """Print blocks side by side, as many as fit."""
    line: list[list[Text]] = []
    for lines in [*blocks, []]:
        wide = sum(max(map(len, b)) + 3 for b in [*line, lines] if b) - 3
        if line and (not lines or wide > console.width):
            widths = [max(map(len, b)) for b in line]
            for n in range(max(map(len, line))):
                row = Text("   ").join(
                    _padded(b[n] if n < len(b) else Text(), w) for b, w in zip(line, widths, strict=True)
                )
                row.rstrip()
                console.print(row)
            line = []
        line.append(lines)


def _padded(text: Text, width: int) -> Text:
    out = text.copy()
    out.pad_right(width - len(text))
    return out


def _numbers(known: Facts, assumed: str) -> list[Text]:
    """The facts as lines of name and value."""
    about = "about " if known.estimated else ""
    spread = f"{known.fewest:,} to {known.most:,}, mean {known.mean:,.1f}"
    if known.fewest == known.most:
        spread = f"{known.most:,}"
    if known.counted is not None:
        spread += f" (of {known.counted:,} queries looked at)"
    values = [
        ("live pairs", f"{about}{known.pairs:,}"),
        ("of full", f"{about}{percent(known.share)}"),
        ("FLOPs", f"{about}{quantity(known.flops).strip()}"),
        ("keys a query", spread),
        ("boxes", f"{known.boxes}" if known.boxes is not None else f"none: {known.why}"),
    ]
    if known.empty:
        values.append(("empty rows", f"{known.empty:,}"))
    lines = [Text.assemble((f"{name:<14}", SOFT), value) for name, value in values]
    # What the FLOPs assume stands under them.
    more = ["forward: 2 x pairs x (D + Dv)", assumed]
    lines[3:3] = [Text.assemble(" " * 14, (text, SOFT)) for text in more if text]
    return [Text(), *lines]


def _legend(shown: View, colour: bool) -> Text:
    """What the characters mean; only those that occur."""
    panels = shown.panels
    line = Text()
    if all(panel.exact for panel in panels):
        line.append("█", style=SEEN if colour else "").append(" seen   ")
    else:
        line.append("░▒▓", style=SEEN if colour else "").append(" up to 1/3, up to 2/3, more   ")
        line.append("█", style=SEEN if colour else "").append(" all   ")
    marked = {bool(panel.seen[r, c]) for panel in panels for r, c in panel.marks if c is not None}
    signs = "▶" if len(shown.grid_k) == 1 else "▼ ▶"
    if marked and (len(shown.grid_k) == 1 or not all(panel.exact for panel in panels)):
        signs += "".join(f" {'◆' if seen else '◇'}" for seen in sorted(marked, reverse=True))
    line.append(f"{signs} show the query")
    if colour and True in marked:
        line.append("   █", style=QUERY).append(" query")
    if colour and False in marked:
        line.append("   █", style=BLIND).append(" query, blind to itself")
    return line


def _cost(cost: Cost, query_tile: tuple[int, ...], key_tile: tuple[int, ...]) -> list[Text]:
    """What was simulated, as lines of name and value."""
    tiles = [" x ".join(map(str, size)) for size in (query_tile, key_tile)]
    values = [
        ("tiles", f"{tiles[0]} queries, {tiles[1]} keys"),
        ("visited", f"mean {cost.mean:,.2f}, most {cost.most:,} of {cost.full:,}"),
        ("from 1st key", f"mean {cost.dynamic_mean:,.2f}, most {cost.dynamic_most:,}"),
        ("speedup", f"at most {cost.bound:,.2f}, {cost.worst:,.2f} by the longest"),
        ("FLOP bound", f"{cost.flop_bound:,.2f}, {percent(cost.efficiency)} of it reached"),
        ("masks", "none needed" if cost.perfect else "some tiles are partly live"),
        ("padding", f"{percent(cost.padded)} of query slots"),
    ]
    if max(cost.layout) > 1:
        values.append(("order", f"by residue class of {' x '.join(map(str, cost.layout))}"))
    return [Text.assemble((f"{name:<14}", SOFT), value) for name, value in values]
