"""``glocal inspect``: what a pretrained model attends to on one input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from glocal.bench.inspection import Inspection, Settings, inspect_model
from glocal.bench.run import Interrupted
from glocal.cli.output import print_table, progress, writable, write

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a Hugging Face text encoder, causal language model or image model; 'bytes' and 'scenes' "
            "are the small language and picture models that glocal ships. Default: the encoder MiniLM."
        ),
    ] = None,
    input: Annotated[
        str | None,
        typer.Argument(help="A text in quotation marks, or a file of text or a picture. Default: an example."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an interactive page here; it holds all it needs and works offline.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    tokens: Annotated[int, typer.Option(help="Cut a text to this many tokens.")] = 256,
    pruning: Annotated[
        bool, typer.Option("--pruning/--no-pruning", help="Measure what pruning costs: one run a head.")
    ] = True,
) -> None:
    """Which heads matter, where they look, what draws attention, and what an answer rests on.

    Attention is computed as the model computes it; the report shows the map of any head over the tokens or patches.
    """
    errors = Console(stderr=True)
    try:
        for option, path in (("--report", report), ("--json", json_file)):
            writable(option, path)
        with progress(errors) as step:
            result = inspect_model(Settings(model, input, tokens, pruning), step)
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
        from glocal.bench.inspection_report import render

        write(report, render(result))
        errors.print(f"Report: {escape(str(report))}")


def _print(result: Inspection) -> None:
    from glocal.bench.inspection_report import headline, tables

    # Into a file or a pipe, a row stays on one line.
    console = Console() if Console().is_terminal else Console(width=160)
    for table in tables(result):
        print_table(console, table)
    console.print(escape(headline(result)), soft_wrap=True)
