"""`glocal inspect` on the command line."""

import json

from typer.testing import CliRunner

from glocal.cli.app import app

TEXT = ["inspect", "bytes", "def add(a, b):", "--tokens", "20"]


def run(*arguments):
    return CliRunner().invoke(app, [*arguments])


def test_it_prints_and_writes(tmp_path):
    report, out = tmp_path / "report.html", tmp_path / "out.json"
    done = run(*TEXT, "--report", str(report), "--json", str(out))
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["model"] == "bytes" and data["tokens"] == list("def add(a, b):")
    assert len(data["metrics"]["cost"]) == 4 and "Without the cheapest heads" in done.output
    assert "<!doctype html>" in report.read_text()[:20]


def test_without_pruning():
    done = run(*TEXT, "--no-pruning")
    assert done.exit_code == 0 and "Heads by mean distance" in done.output
    assert "Without the cheapest heads" not in done.output


def test_complaints(tmp_path):
    for arguments, message in [
        (["inspect", "nowhere", "text"], "is not a folder"),
        ([*TEXT, "--report", str(tmp_path / "no" / "report.html")], "--report"),
        (["inspect", "bytes", "text", "--tokens", "1"], "tokens must be from 2"),
        (["inspect", "scenes", "a text"], "which reads images"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
