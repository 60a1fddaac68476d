"""``glocal compare``: what attention patterns keep, and cost, on a pretrained encoder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from glocal.bench.compare import Comparison, Interrupted, Settings
from glocal.bench.compare import compare as measure
from glocal.bench.table import Table, cost_table, fidelity_table, headline


def compare(
    model: Annotated[str | None, typer.Argument(help="Folder of a Hugging Face encoder; default: MiniLM.")] = None,
    input: Annotated[
        str | None, typer.Option(help="Text file, passages parted by blank lines; default: Python's own docs.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="A pattern, e.g. 'sliding(64, 64) | tokens([0])'; repeat for more.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    passages: Annotated[int | None, typer.Option(help="How many passages at most (64).")] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths for the cost, e.g. 512,2048,8192.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small run, for a first look.")] = False,
) -> None:
    """Full attention against patterns, on a pretrained encoder and real text.

    Says how far the embeddings move, how much attention mass each pattern keeps, and what attention takes in time
    and memory, measured.
    """
    errors = Console(stderr=True)
    try:
        sizes = _lengths(lengths)
        if threads is not None and threads < 1:
            raise ValueError(f"--threads must be at least 1; it was {threads}")
        for option, path in (("--report", report), ("--json", json_file)):
            _writable(option, path)
        settings = Settings(model, input, tuple(where or ()), passages, sizes, quick)
        with _threads(threads), _progress(errors) as step:
            result = measure(settings, step)
    except Interrupted as stop:
        _print(stop.partial)
        errors.print("Interrupted: this is what had been measured; no file was touched.")
        raise typer.Exit(130) from None
    except (ValueError, TypeError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    _print(result)
    if json_file is not None:
        tables = [{"header": t.header, "rows": t.rows} for t in (fidelity_table(result), cost_table(result))]
        data = result.to_dict() | {"headline": headline(result), "tables": tables}
        _write(json_file, json.dumps(data, indent=1) + "\n")
    if report is not None:
        from glocal.bench.report import render

        _write(report, render(result))
        errors.print(f"Report: {escape(str(report))}")


def _print(result: Comparison) -> None:
    # Into a file or a pipe, a row stays on one line.
    console = Console() if Console().is_terminal else Console(width=160)
    for table in (fidelity_table(result), cost_table(result)):
        if table.rows:
            _print_table(console, table)
    if result.rows:
        console.print(escape(headline(result)), soft_wrap=True)


def _print_table(console: Console, table: Table) -> None:
    shown = RichTable(title=escape(table.title), title_justify="left")
    for name in table.header:
        text = name in ("pattern", "computed by")
        shown.add_column(escape(name), justify="left" if text else "right", no_wrap=name != "pattern", overflow="fold")
    for n, row in enumerate(table.rows):
        last = n + 1 == len(table.rows) or (table.header[0] == "length" and table.rows[n + 1][0] != row[0])
        shown.add_row(*map(escape, row), end_section=last)
    console.print(shown)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _lengths(value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",")) if value is not None else ()
    except ValueError:
        raise ValueError(f"--lengths must be numbers parted by commas, e.g. 512,2048; it was {value!r}") from None


def _writable(option: str, path: Path | None) -> None:
    """Complain about a path before minutes of work, not after."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"{option} {str(path)!r} cannot be written: its folder must exist and be writable")


def _write(path: Path, text: str) -> None:
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
