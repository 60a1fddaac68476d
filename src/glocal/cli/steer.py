"""``glocal steer``: a vision-language model's answers with and without steering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from glocal.bench import steered, steered_table
from glocal.bench.vlm import SCENES, load, read_picture
from glocal.bench.ways import PLAIN, WAYS
from glocal.cli.output import deliver, measured, print_tables, writable

_METHODS = ", ".join(name for name in WAYS if name != PLAIN)


def steer(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a vision-language model of transformers; 'scenes' is the one that glocal ships."
        ),
    ] = SCENES,
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of {_METHODS}; repeat with --evaluate. Default: agla, or all.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture. Default: a generated scene.")] = None,
    ask: Annotated[str | None, typer.Option(help="A question on it, e.g. 'Is there a red square?'")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where what was looked at is drawn.")] = Path("steer.png"),
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="POPE's questions and captions, for all methods.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="With --evaluate: write a self-contained HTML page here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="With --evaluate: write all numbers here.")] = None,
    scenes: Annotated[int, typer.Option(help="With --evaluate: how many held-out scenes.")] = 60,
    noise: Annotated[float, typer.Option(help="Noise of generated scenes, in grey levels of 255.")] = 20.0,
    opacity: Annotated[float, typer.Option(help="How opaque the things in generated scenes are.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of generated scenes.")] = 0,
) -> None:
    """Answer a question on a picture with and without steering, or measure what steering does to hallucination.

    The answer, the likeliest words side by side, and a picture of what the method looked at.
    """
    errors = Console(stderr=True)
    try:
        for option, path in (("--picture", picture), ("--report", report), ("--json", json_file)):
            writable(option, path)
        if evaluate:
            if image is not None or ask is not None:
                raise ValueError("--evaluate asks its own questions; leave out --image and --ask")
            chosen = tuple(dict.fromkeys([PLAIN, *method])) if method else ()
            settings = steered.Settings(model, chosen, scenes, noise, opacity, captions=min(40, scenes), seed=seed or 5)
            _evaluate(settings, report, json_file, errors)
            return
        if report is not None or json_file is not None:
            raise ValueError("--report and --json are for --evaluate")
        if method and len(method) > 1:
            raise ValueError("one --method at a time answers a question; --evaluate takes several")
        if image is not None and ask is None:
            raise ValueError("--image needs a question: --ask 'Is there a red square?'")
        name = method[0] if method else "agla"
        photo, question = (None, "") if image is None else (read_picture(image), ask or "")
        if photo is None:
            photo, question = steered.example(seed, noise, opacity)
            question = ask or question
        asked = steered.ask_both(load(model), photo, question, name)
    except (ValueError, TypeError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    _say(question, name, asked)
    if picture is not None:
        steered.views_of(asked, photo).savefig(picture, dpi=120)
        errors.print(f"Picture: {escape(str(picture))}")


def _say(question: str, name: str, asked: steered.Asked) -> None:
    console = Console() if Console().is_terminal else Console(width=100)
    console.print(escape(question))
    table = RichTable()
    for column in ("", "plain", name):
        table.add_column(escape(column), justify="left" if not column else "right")
    table.add_row("answer", escape(asked.plain.text), escape(asked.steered.text), end_section=True)
    for word, plain, other in asked.words:
        table.add_row(escape(word), f"{plain:.3f}", f"{other:.3f}")
    console.print(table)


def _evaluate(settings: steered.Settings, report: Path | None, json_file: Path | None, errors: Console) -> None:
    vlm = load(settings.model)

    def page() -> str:
        from glocal.bench.steered_report import pictured, render

        return render(result, pictured(vlm, result))

    files = {"--report": report, "--json": json_file}
    result = measured(errors, files, lambda step: steered.evaluate(vlm, settings, step), _print)
    deliver(errors, json_file, result.to_dict, report, page)


def _print(result: steered.Evaluation) -> None:
    print_tables(steered_table.tables(result), steered_table.headline(result))
