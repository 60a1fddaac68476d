"""The commands, gathered."""

from __future__ import annotations

import typer

from glocal.cli.bench import bench
from glocal.cli.compare import compare
from glocal.cli.inspect import inspect
from glocal.cli.models import models
from glocal.cli.papers import papers
from glocal.cli.show import show
from glocal.cli.steer import steer

app = typer.Typer(
    help="Local-global attention: see patterns, compare them on a model, inspect and steer it, browse the catalogue.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("show")(show)
app.command("compare")(compare)
app.command("inspect")(inspect)
app.command("steer")(steer)
app.command("bench")(bench)
app.command("papers")(papers)
app.command("models")(models)
