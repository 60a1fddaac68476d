"""``glocal compare``: what attention patterns and cache policies keep, and cost, on a pretrained model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from glocal.bench.jobs import Job, choose
from glocal.bench.run import Step
from glocal.cli.output import deliver, measured, print_tables


def compare(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a Hugging Face text encoder or causal language model; 'bytes' is the small language model "
            "that glocal ships, on held-out text. Default: the encoder MiniLM."
        ),
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(help="Text file; for encoders, passages parted by blank lines. Default: Python's own library."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern, e.g. 'sliding(64, 64) | tokens([0])', for language models also a mechanism, e.g. "
            "'moba(block_size=64, top_k=4)'; repeat for more."
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="Language models: a cache policy, e.g. 'window(window=508, sinks=4)', 'h2o(heavy=256, recent=256)', "
            "'less_is_more(budget=512)', 'moba(block_size=64, top_k=8)', 'cca(group_size=16, window=384)'; repeat."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    passages: Annotated[int | None, typer.Option(help="Passages (64) or pieces of text (16) at most.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Lengths for the cost, e.g. 512,1024,2048; a language model reads text at the longest."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small run, for a first look.")] = False,
) -> None:
    """Full attention against patterns, mechanisms and cache policies, on a pretrained model and real text.

    Of an encoder it says how far the embeddings move and how much attention mass each pattern keeps; of a causal
    language model how well it still predicts text, and finds what stands far back. And what each takes in time and
    memory, measured.
    """
    errors = Console(stderr=True)
    jobs: list[Job] = []

    def work(step: Step) -> Any:
        sizes = _lengths(lengths)
        if threads is not None and threads < 1:
            raise ValueError(f"--threads must be at least 1; it was {threads}")
        jobs.append(choose(model))
        settings = jobs[0].settings(
            input=input,
            where=tuple(where or ()),
            passages=passages,
            lengths=sizes,
            quick=quick,
            **({"model": model} if model is not None else {}),
            **_policies(jobs[0], cache),
        )
        with _threads(threads):
            return jobs[0].measure(settings, step)

    def data() -> Any:
        found = [{"header": t.header, "rows": t.rows} for t in jobs[0].tables(result)]
        return result.to_dict() | {"headline": jobs[0].headline(result), "tables": found}

    def show(found: Any) -> None:
        print_tables(jobs[0].tables(found), jobs[0].headline(found) if found.rows else "")

    result = measured(errors, {"--report": report, "--json": json_file}, work, show)
    deliver(errors, json_file, data, report, lambda: jobs[0].render(result))


def _policies(job: Job, cache: list[str] | None) -> dict[str, tuple[str, ...]]:
    """The caches, where the job has any."""
    if not cache:
        return {}
    if not job.caches:
        raise ValueError("--cache is for causal language models; an encoder has no cache")
    return {"cache": tuple(cache)}


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
