"""``glocal models``: the networks that ``glocal.create`` makes, with their parameters."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from glocal.cli.show import fail
from glocal.models import maker, names, parameters

__all__ = ["models"]


def models(
    text: Annotated[str, typer.Argument(help="A part of the name: favit.")] = "",
) -> None:
    """List the networks that glocal.create makes, with their parameters and the module they stand in."""
    found = names(text)
    if not found:
        near = difflib.get_close_matches(text, names(), n=3, cutoff=0.4)
        fail("TEXT", f"no network's name contains {text!r}" + (f"; near it are {', '.join(near)}" if near else ""))
    width = max(map(len, found))
    for name in found:  # a line as soon as it is counted: all of them take half a minute
        typer.echo(f"{name:<{width}}  {parameters(name):>13,}  {maker(name).__module__}")
    typer.echo(f"\n{len(found)} networks; glocal.create({found[0]!r}) makes one, with random weights")
