"""``glocal bench``: any mechanism of the library on any task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from glocal.bench.mechanisms import DEFAULT, Result, Settings, compare_mechanisms, headline, tables
from glocal.bench.run import Step
from glocal.bench.tasks import TASKS
from glocal.cli.output import deliver, measured, print_tables

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

    def work(step: Step) -> Result:
        chosen = tuple(mechanism or DEFAULT), tuple(task or TASKS)
        return compare_mechanisms(Settings(*chosen, length, steps, seeds, _lengths(lengths)), step)

    def page() -> str:
        from glocal.bench.mechanisms_report import render

        return render(result)

    files = {"--report": report, "--json": json_file}
    result = measured(errors, files, work, lambda found: print_tables(tables(found), headline(found)))
    deliver(errors, json_file, result.to_dict, report, page)


def _lengths(value: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"--lengths must be numbers parted by commas, e.g. 256,512,1024; it was {value!r}") from None
    return () if found == (0,) else found
