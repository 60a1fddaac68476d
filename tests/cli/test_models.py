"""``glocal models``: every network with its parameters, which take no memory to count."""

import re

import typer
from typer.testing import CliRunner

import glocal
from glocal.cli import models

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(models.models)


def run(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done


def test_the_networks_whose_name_holds_a_text():
    lines = run("favit").stdout.splitlines()
    rows = [re.split(r"\s{2,}", line) for line in lines[:-2]]
    assert [row[0] for row in rows] == list(glocal.models.names("favit")) and {row[2] for row in rows} == {
        "glocal.models.vision.favit"
    }
    network = glocal.create("favit_b0")
    assert ["favit_b0", f"{sum(p.numel() for p in network.parameters()):,}", "glocal.models.vision.favit"] in rows
    assert lines[-1] == f"{len(rows)} networks; glocal.create('{rows[0][0]}') makes one, with random weights"


def test_counting_leaves_nothing_behind():
    assert glocal.models.parameters("vggt_aggregator_flash") > 6e8  # 2.4 GB, were it made
    assert next(glocal.create("zebra_tiny", vocab=10).parameters()).device.type == "cpu"


def test_options_count():
    assert glocal.models.parameters("favit_b0", num_classes=10) < glocal.models.parameters("favit_b0")


def test_a_name_that_no_network_has():
    assert "near it are favit_b" in run("favitt_b0", code=2).stderr
    assert "no network's name contains 'zzzz'" in run("zzzz", code=2).stderr
