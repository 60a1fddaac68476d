"""``glocal compare`` from end to end, and its complaints."""

import dataclasses
import json

import pytest
from markupsafe import escape
from typer.testing import CliRunner

from glocal.bench import Interrupted, jobs
from glocal.cli import output
from glocal.cli.app import app
from tests.bench import tiny

runner = CliRunner()
SMALL = ["compare", "--quick", "--passages", "4", "--lengths", "128,256", "--where", "sliding(64, 64) | tokens([0])"]


def cells(output):
    return [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def test_end_to_end(tmp_path):
    out, report = tmp_path / "out.json", tmp_path / "report.html"
    done = runner.invoke(app, [*SMALL, "--json", str(out), "--report", str(report), "--threads", "1"])
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["passages"] == 4 and data["threads"] == 1 and data["longest"] == 512
    full, mine = data["rows"]
    assert full["pattern"] == "full()" and full["cosine"] == pytest.approx(1) and full["nearest1"] == full["kept"] == 1
    assert mine["pattern"] == "sliding(64, 64) | tokens([0])"
    assert 0.5 < mine["worst"] <= mine["cosine"] < 0.9999 and mine["share"] < mine["kept"] < 1
    assert [c["length"] for c in mine["cost"]] == [128, 256] and all(c["seconds"] > 0 for c in mine["cost"])
    # Every cell of the JSON's tables is in the terminal's, row by row, and in the report.
    assert cells(done.output) == [list(row) for table in data["tables"] for row in table["rows"]]
    assert data["headline"] in done.output and len(report.read_text()) > 5000
    assert sorted(tmp_path.iterdir()) == [out, report]  # no half-written file stays


def test_language_model(tmp_path):
    """A causal model gets its own job, from the same command; its numbers are the same in all three places."""
    model, out, report = tiny.llama(tmp_path / "llama"), tmp_path / "out.json", tmp_path / "report.html"
    options = ["--where", "sliding(15, 0) | sinks(2)", "--cache", "h2o(heavy=8, recent=8)", "--lengths", "192"]
    options += ["--quick", "--passages", "2", "--json", str(out), "--report", str(report), "--threads", "1"]
    done = runner.invoke(app, ["compare", str(model), *options])
    assert done.exit_code == 0, done.output
    data, page = json.loads(out.read_text()), report.read_text()
    assert [row["kind"] for row in data["rows"]] == ["full", "pattern", "cache"]
    assert data["rows"][2]["read"] == 17 / 192 and data["rows"][2]["bits"] is None
    assert [len(table["rows"]) for table in data["tables"]] == [3, 3, 3, 3]
    assert cells(done.output) == [list(row) for table in data["tables"] for row in table["rows"]]
    assert all(f">{cell}<" in page for table in data["tables"] for row in table["rows"] for cell in map(escape, row))
    assert data["headline"] in done.output


def test_own_text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("The first passage.\n\nThe second, which is longer.\n\nA third one.", encoding="utf-8")
    options = ["--where", "sliding(1, 1)", "--lengths", "64", "--quick"]
    done = runner.invoke(app, ["compare", "--input", str(path), *options])
    assert done.exit_code == 0, done.output
    assert "keep their nearest neighbor" in done.output


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["/nowhere"], "'/nowhere' is not a folder"),
        (["--input", "/nowhere"], "input '/nowhere'"),
        (["--where", "sliding(1"], "where 'sliding(1'"),
        (["--where", "__import__('os')"], "where"),
        (["--where", "(" * 10000], "where"),
        (["--where", "window(600)", "--passages", "2"], "does not fit"),
        (["--passages", "1"], "passages"),
        (["--lengths", "12,x"], "--lengths"),
        (["--lengths", "-5"], "lengths"),
        (["--threads", "0"], "--threads"),
        (["--report", "/nowhere/r.html"], "--report"),
        (["--json", "/"], "--json"),
        (["--cache", "window(window=8)"], "--cache is for causal language models"),
        (["bytes", "--cache", "fifo(window=8)"], "cache 'fifo(window=8)': 'fifo' is no cache policy"),
        (["bytes", "--where", "sliding("], "where 'sliding('"),
        (["bytes", "--lengths", "16"], "lengths"),
    ],
)
def test_bad_arguments(arguments, word):
    done = runner.invoke(app, ["compare", *arguments])
    assert done.exit_code == 2 and done.stdout == ""
    message = done.stderr.strip()
    assert message.startswith("Error: ") and "\n" not in message and word in message and len(message) < 500


def test_interrupted(monkeypatch, tmp_path):
    from tests.bench import test_bench, test_causal

    report = tmp_path / "report.html"
    report.write_text("older")
    for name, model, result in (("_ENCODER", (), test_bench.result()), ("_CAUSAL", ("bytes",), test_causal.result())):

        def stop(*_, result=result):
            raise Interrupted(result)

        monkeypatch.setattr(jobs, name, dataclasses.replace(getattr(jobs, name), measure=stop))
        done = runner.invoke(app, ["compare", *model, "--report", str(report)])
        assert done.exit_code == 130 and "sliding(" in done.stdout and "Interrupted" in done.stderr
        assert report.read_text() == "older"


def test_writing_is_all_or_nothing(monkeypatch, tmp_path):
    path = tmp_path / "report.html"
    output.write(path, "new")
    assert path.read_text() == "new"

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(output.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        output.write(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
