"""``glocal inspect``: what a pretrained model attends to on one input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from glocal.bench.inspection import Inspection, Settings, inspect_model
from glocal.bench.run import Step
from glocal.cli.output import deliver, measured, print_tables

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

    def work(step: Step) -> Inspection:
        return inspect_model(Settings(model, input, tokens, pruning), step)

    def page() -> str:
        from glocal.bench.inspection_report import render

        return render(result)

    files = {"--report": report, "--json": json_file}
    result = measured(errors, files, work, _print)
    deliver(errors, json_file, result.to_dict, report, page)


def _print(result: Inspection) -> None:
    from glocal.bench.inspection_report import headline, tables

    print_tables(tables(result), headline(result))
