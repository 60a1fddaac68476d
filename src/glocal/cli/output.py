"""What the commands share: tables, a progress bar, files that are written as a whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from glocal.bench.table import Table

__all__ = ["print_table", "progress", "writable", "write"]

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
