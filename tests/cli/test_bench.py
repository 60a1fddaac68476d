"""`glocal bench` on the command line."""

import json

from typer.testing import CliRunner

from glocal.cli.app import app

SMALL = ["bench", "LinearAttention", "--task", "lookup", "--steps", "2", "--lengths", "16,32,64"]


def test_it_prints_and_writes(tmp_path):
    report, out = tmp_path / "report.html", tmp_path / "out.json"
    done = CliRunner().invoke(app, [*SMALL, "--report", str(report), "--json", str(out)])
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert [row["mechanism"] for row in data["rows"]] == ["Attention", "LinearAttention"]
    assert "LinearAttention" in done.output and "efficiency length" in done.output
    assert "LinearAttention" in report.read_text()


def test_complaints():
    for arguments, message in [
        (["bench", "Atention"], "near it are Attention"),
        (["bench", "--task", "sums"], "task must be of bytes"),
        ([*SMALL[:-1], "16"], "at least three"),
        ([*SMALL[:-1], "a,b"], "--lengths must be numbers"),
    ]:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
