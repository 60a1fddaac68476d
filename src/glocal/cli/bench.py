"""``glocal bench``: any mechanism of the library on any task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from glocal.bench.mechanisms import DEFAULT, Result, Settings, compare_mechanisms, headline, tables
from glocal.bench.run import Interrupted
from glocal.bench.tasks import TASKS
from glocal.cli.output import print_table, progress, writable, write

__all__ = ["bench"]


def bench(
    mechanism: Annotated[
        list[str] | None,
        typer.Argument(
            help="Layers of glocal.nn, e.g. 'SlidingWindowAttention(window=16)' 'LinearAttention'; 'all' are all. "
            "Default: four of them."
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; repeat for more. Default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 300,
    length: Annotated[int, typer.Option(help="Tokens of a task's items.")] = 64,
    seeds: Annotated[int, typer.Option(help="How often each is trained.")] = 1,
    lengths: Annotated[
        str, typer.Option(help="Lengths at which layers are timed, at least three; 0 for no timing.")
    ] = "256,512,1024,2048",
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Train mechanisms on small tasks in the same network, and say from which length on each is cheaper.

    The tasks need the four uses of attention; a mechanism that has not a use leaves them out.
    """
    errors = Console(stderr=True)
    try:
        for option, path in (("--report", report), ("--json", json_file)):
            writable(option, path)
        sizes = _lengths(lengths)
        settings = Settings(tuple(mechanism or DEFAULT), tuple(task or TASKS), length, steps, seeds, sizes)
        with progress(errors) as step:
            result = compare_mechanisms(settings, step)
    except Interrupted as stop:
        _print(stop.partial)
        errors.print("Interrupted: this is what had been measured; no file was touched.")
        raise typer.Exit(130) from None
    except (ValueError, TypeError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    _print(result)
    if json_file is not None:
        write(json_file, json.dumps(result.to_dict(), indent=1) + "\n")
    if report is not None:
        from glocal.bench.mechanisms_report import render

        write(report, render(result))
        errors.print(f"Report: {escape(str(report))}")


def _print(result: Result) -> None:
    # Into a file or a pipe, a row stays on one line.
    console = Console() if Console().is_terminal else Console(width=160)
    for table in tables(result):
        print_table(console, table)
    console.print(escape(headline(result)), soft_wrap=True)


def _lengths(value: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"--lengths must be numbers parted by commas, e.g. 256,512,1024; it was {value!r}") from None
    return () if found == (0,) else found
