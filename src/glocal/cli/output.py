"""What the commands share: tables, a progress bar, files that are written as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from glocal.bench.run import Interrupted, Step
from glocal.bench.table import Table

__all__ = ["deliver", "measured", "print_table", "print_tables", "progress", "writable", "write"]

R = TypeVar("R")

_TEXT = ("pattern", "mechanism", "uses", "attention", "computed by", "method", "negatives", "why")


def print_table(console: Console, table: Table) -> None:
    """A table on a terminal."""
    shown = RichTable(title=escape(table.title), title_justify="left")
    for name in table.header:
        long = name in ("pattern", "mechanism", "attention")
        side: Literal["left", "right"] = "left" if name in _TEXT else "right"
        shown.add_column(escape(name), justify=side, no_wrap=not long, overflow="fold")
    for n, row in enumerate(table.rows):
        last = n + 1 == len(table.rows) or (table.header[0] == "length" and table.rows[n + 1][0] != row[0])
        shown.add_row(*map(escape, row), end_section=last)
    console.print(shown)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that is gone when the work is done; the function is told ``(what, done, total)``."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def print_tables(tables: Sequence[Table], headline: str) -> None:
    """Tables and a sentence; into a file or a pipe, a row stays on one line."""
    console = Console() if Console().is_terminal else Console(width=160)
    for table in tables:
        if table.rows:
            print_table(console, table)
    if headline:
        console.print(escape(headline), soft_wrap=True)


def measured(
    errors: Console, files: Mapping[str, Path | None], work: Callable[[Step], R], show: Callable[[R], None]
) -> R:
    """What ``work`` measures, with a bar; what goes wrong becomes a line and an exit code.

    Args:
        errors: where to complain.
        files: what will be written, by its option: tried first.
        work: is told how to say how far it is.
        show: prints the result, also that of a run that the user stops.
    """
    try:
        for option, path in files.items():
            writable(option, path)
        with progress(errors) as step:
            result = work(step)
    except Interrupted as stop:
        show(stop.partial)
        errors.print("Interrupted: this is what had been measured; no file was touched.")
        raise typer.Exit(130) from None
    except (ValueError, TypeError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    show(result)
    return result


def deliver(
    errors: Console, json_file: Path | None, data: Callable[[], Any], report: Path | None, page: Callable[[], str]
) -> None:
    """Write numbers and a page, where they are wanted."""
    if json_file is not None:
        write(json_file, json.dumps(data(), indent=1) + "\n")
    if report is not None:
        write(report, page())
        errors.print(f"Report: {escape(str(report))}")


def writable(option: str, path: Path | None) -> None:
    """Complain about a path before minutes of work, not after."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"{option} {str(path)!r} cannot be written: its folder must exist and be writable")


def write(path: Path, text: str) -> None:
    """Write beside the target, then rename: a run that stops half way leaves an older file whole."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
