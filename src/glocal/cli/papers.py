"""``glocal papers``: the catalogue as a table, filtered, or one record in full."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glocal import papers as catalogue
from glocal.cli.show import fail
from glocal.papers import taxonomy

_WIDE = 10_000  # columns where nothing is to be cut: a pipe or a file
_NARROW = 140  # columns under which a paper does not fit on a line


def papers(
    text: Annotated[
        list[str] | None, typer.Argument(help="Words to find, or the code, number or key of one paper: S064.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help=f"One of {', '.join(catalogue.KINDS)}.")] = None,
    domain: Annotated[str | None, typer.Option(help=f"One of {', '.join(catalogue.DOMAINS)}.")] = None,
    done: Annotated[bool, typer.Option("--done", help="Only those with an implementation and a proof.")] = False,
    axis: Annotated[
        list[str] | None, typer.Option(help="A value of the taxonomy, such as positions=local; more than one narrow.")
    ] = None,
    axes: Annotated[bool, typer.Option("--axes", help="Print the taxonomy: values and how many have them.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Try how the layers of one paper can be used, now.")] = False,
) -> None:
    """List the papers whose attention systems this library carries, or show one in full."""
    for option, value, allowed in (("--kind", kind, catalogue.KINDS), ("--domain", domain, catalogue.DOMAINS)):
        if value is not None and value not in allowed:
            fail(option, f"{value!r} is unknown; it is one of {', '.join(allowed)}")
    if axes:
        print_axes(Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE))
        return
    try:
        placed = None if axis is None else set(taxonomy.find(**read_axes(axis)))
    except ValueError as error:
        fail("--axis", error)
    words = " ".join(text or ()).strip()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    one = _named(words) if kind is None and domain is None and placed is None and not done else None
    found = catalogue.find(words, kind=kind, domain=domain, done=True if done else None)
    found = tuple(paper for paper in found if placed is None or paper.key in placed)
    if verify and one is None:
        fail("--verify", "names one paper: glocal papers S114 --verify")
    if one is not None:
        print_record(console, one)
        if verify:
            print_uses(console, one)
        others = [paper for paper in found if paper is not one]
        # A key may be a common word, so that a search for it is not lost.
        if others and not re.fullmatch(r"[sS]?[0-9]+", words):
            codes = ", ".join(paper.code for paper in others)
            console.print(Text(f"\n{words!r} also occurs in {codes}", style="dim"), soft_wrap=True)
        return
    if words and not found and not catalogue.find(words):
        try:
            catalogue.get(words)
        except ValueError as error:
            fail("TEXT", _hint(error).replace(f"{words!r} is no paper", f"{words!r} occurs in no paper", 1))
    if found:
        print_table(console, found)
        console.print()
    console.print(Text(summary(found)), soft_wrap=True)


def _named(words: str) -> catalogue.Paper | None:
    """The paper that the words name, or None where they are a search."""
    if re.fullmatch(r"[sS]?[0-9]+", words):
        try:
            return catalogue.get(words)
        except ValueError as error:
            fail("TEXT", _hint(error))
    return next((paper for paper in catalogue.all() if paper.key == words.lower()), None)


def _hint(error: ValueError) -> str:
    # The library's message speaks of Python: the argument's name, and the function that searches.
    return str(error).removeprefix("name=").replace("; find() searches", "; other text is searched for")


def read_axes(given: list[str]) -> dict[str, str]:
    """``positions=local`` as axis and value.

    >>> read_axes(["positions=local", "levels=multi"])
    {'positions': 'local', 'levels': 'multi'}
    """
    if bad := [text for text in given if "=" not in text]:
        raise ValueError(f"must be AXIS=VALUE, such as positions=local; it was {bad[0]!r}")
    return dict(text.split("=", 1) for text in given)


def print_axes(console: Console) -> None:
    """The taxonomy: each value, what it means, how many mechanisms have it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("axis", "value", "mechanisms", "meaning"):
        table.add_column(name, justify="right" if name == "mechanisms" else "left", overflow="fold")
    for axis, counts in taxonomy.coverage().items():
        for value, count in counts.items():
            meaning = taxonomy.AXES[axis][value]
            table.add_row(axis, value, str(count), "" if meaning == value else Text(meaning))
    _print(console, table)


def summary(found: tuple[catalogue.Paper, ...]) -> str:
    """The last line: how many are listed, of how many, and how many of the listed are done.

    >>> summary(catalogue.find("neighborhood strides")).split(", ")[0]
    '1 of 119 systems'
    """
    total, done = len(catalogue.all()), sum(paper.done for paper in found)
    count = f"{total}" if len(found) == total else f"{len(found)} of {total}"
    return f"{count} systems, {done} done"


def print_table(console: Console, found: tuple[catalogue.Paper, ...]) -> None:
    """The papers, a line each; on a narrow terminal titles are folded, with the kinds under them."""
    narrow = console.is_terminal and console.width < _NARROW
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("code", "key", "title", "kinds", "domain", "done"):
        if not (narrow and name == "kinds"):
            table.add_column(name, no_wrap=not console.is_terminal or name not in ("title", "kinds"), overflow="fold")
    for paper in found:
        kinds = Text(", ".join(paper.kinds))
        title = [Text.assemble(paper.title, "\n", (kinds.plain, "dim"))] if narrow else [Text(paper.title), kinds]
        done = Text("yes", style="green") if paper.done else Text("-", style="dim")
        table.add_row(Text(paper.code), Text(paper.key), *title, Text(paper.domain), done)
    _print(console, table)


def _print(console: Console, table: Table) -> None:
    """Print without the blanks that fill a table's last column."""
    with console.capture() as caught:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in caught.get().splitlines()))


def print_uses(console: Console, paper: catalogue.Paper) -> None:
    """What each layer of a paper does in each use, tried on a dozen tokens."""
    from glocal.inspect import layers, verify

    console.print()
    found = layers(paper.objects)
    if not found:
        console.print("It has no attention layer to try.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layer", "use", "found"):
        table.add_column(name, overflow="fold")
    for layer in found:
        for use in catalogue.USES:
            verdict = verify(layer, use)
            checks = [f"{name} {'holds' if good else 'FAILS'}" for name, good in verdict.checks.items()]
            shown = Text(", ".join(checks)) if verdict.refused is None else Text(verdict.refused, style="dim")
            table.add_row(layer.__name__, use, shown)
    _print(console, table)


def placed(paper: catalogue.Paper) -> str:
    """The place of a paper's mechanism, an axis a line."""
    try:
        place = taxonomy.classify(paper.key)
    except ValueError:
        return "no mechanism of its own"
    return "\n".join(f"{axis}: {', '.join(getattr(place, axis))}" for axis in taxonomy.AXES)


def print_record(console: Console, paper: catalogue.Paper) -> None:
    """One paper, every field of it."""
    console.print(Text.assemble((f"{paper.code} {paper.key}", "bold"), "  ", paper.title), soft_wrap=True)
    console.print()
    fields = {
        "arXiv": paper.url or "no identifier verified",
        "kinds": ", ".join(paper.kinds),
        "domain": paper.domain,
        "summary": paper.summary,
        "objects": "\n".join(paper.objects) or "none yet",
        "taxonomy": placed(paper),
        "uses": ", ".join(paper.uses) + " (verified)" if paper.uses else "none verified",
        "deviations": paper.deviations or "none recorded",
        "proof": paper.proof or "none yet",
        "done": "yes" if paper.done else "no",
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(name), Text(value))
    _print(console, table)
