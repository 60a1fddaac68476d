"""``glocal papers``: every record is listed whole, filters filter, and errors say what would be right."""

import dataclasses
import io
import re

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from glocal import papers as catalogue
from glocal.cli import papers

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(papers.papers)


def run(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "40"})
    assert done.exit_code == code, done.output
    return done


def listed(output):
    return re.findall(r"^(S\d{3})\b", output, flags=re.MULTILINE)


def test_a_pipe_gets_every_paper_whole_on_a_line():
    output = run().stdout
    lines = output.splitlines()
    assert lines[0].split() == ["code", "key", "title", "kinds", "domain", "done"]
    for paper, line in zip(catalogue.all(), lines[1:], strict=False):
        cells = re.split(r"\s{2,}", line)
        done = "yes" if paper.done else "-"
        assert cells == [paper.code, paper.key, paper.title, ", ".join(paper.kinds), paper.domain, done]
    assert lines[-1] == f"119 systems, {sum(p.done for p in catalogue.all())} done"
    assert len(lines) == 1 + 119 + 1 + 1
    assert "\x1b" not in output and not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize(
    "arguments, query",
    [
        (["window", "carrier"], {"text": "window carrier"}),
        (["--kind", "survey"], {"kind": "survey"}),
        (["--domain", "graph"], {"domain": "graph"}),
        (
            ["attention", "--kind", "layer", "--domain", "video"],
            {"text": "attention", "kind": "layer", "domain": "video"},
        ),
        (["--done"], {"done": True}),
    ],
)
def test_filters_are_those_of_the_catalogue(arguments, query):
    output = run(*arguments).stdout
    found = catalogue.find(**query)
    assert listed(output) == [paper.code for paper in found]
    assert output.splitlines()[-1] == f"{len(found)} of 119 systems, {sum(p.done for p in found)} done"


@pytest.mark.parametrize("name", ["S064", "s64", "64", "dina", "DINA"])
def test_one_record_in_full(name):
    paper = catalogue.get("dina")
    output = run(name).stdout
    assert output.startswith(f"S064 dina  {paper.title}\n")
    for text in (paper.url, ", ".join(paper.kinds), paper.domain, paper.summary):
        assert text in output
    assert not any(line != line.rstrip() for line in output.splitlines())


def test_a_record_shows_what_implements_and_proves_it():
    paper = dataclasses.replace(
        catalogue.get("dina"),
        arxiv=None,
        objects=("glocal.Window", "glocal.attend"),
        deviations="None [bold]known[/bold].",
        proof="benchmarks/dina.py",
    )
    console = Console(file=io.StringIO(), width=200)
    output = CliRunner().invoke(_printing(console, paper), []).stdout
    fields = dict(re.findall(r"^(\w+) {2,}(.*)$", output, flags=re.MULTILINE))
    assert fields["objects"] == "glocal.Window" and re.search(r"^ +glocal.attend$", output, flags=re.MULTILINE)
    assert fields["deviations"] == "None [bold]known[/bold]."
    assert (fields["proof"], fields["done"], fields["arXiv"]) == ("benchmarks/dina.py", "yes", "no identifier verified")


def _printing(console, paper):
    printing = typer.Typer()
    printing.command()(lambda: papers.print_record(console, paper))
    return printing


def test_a_key_that_is_a_common_word_still_searches():
    key = next(p.key for p in catalogue.all() if len(catalogue.find(p.key)) > 1)
    others = [p.code for p in catalogue.find(key) if p.key != key]
    output = run(key).stdout
    assert output.splitlines()[-1].strip() == f"{key!r} also occurs in {', '.join(others)}"


def test_a_narrow_terminal_folds_titles_and_cuts_nothing(capsys):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    papers.print_table(console, catalogue.all())
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert listed(output) == [paper.code for paper in catalogue.all()]
    assert "…" not in output
    # Words of the first title, wherever they were folded to.
    assert all(word in output for word in catalogue.all()[0].title.split()[:5])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kind", "layr"], "--kind: 'layr' is unknown; it is one of operator, layer, model"),
        (["--domain", "sound"], "--domain: 'sound' is unknown; it is one of language, vision"),
        (["S999"], "TEXT: 'S999' is no paper; give a code from 'S001' to 'S119'"),
        (["0"], "TEXT: '0' is no paper; give a code from 'S001' to 'S119'"),
        (["dinax"], "TEXT: 'dinax' occurs in no paper; did you mean 'dina'?"),
        (["no-such-word"], "TEXT: 'no-such-word' occurs in no paper; give a code"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments, code=2)
    assert done.stderr.startswith(f"glocal: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_filters_that_leave_nothing_are_no_error():
    output = run("dina", "--kind", "survey").stdout
    assert output == "0 of 119 systems, 0 done\n"


def test_verify_tries_the_layers_of_one_paper() -> None:
    output = run("S114", "--verify").stdout
    lines = [line for line in output.splitlines() if line.startswith("MixtureOfBlocksAttention")]
    assert len(lines) == 4 and "decoding holds" in output and "has no causal-cross form" in output


def test_verify_needs_one_paper() -> None:
    assert "names one paper" in run("--verify", code=2).output


def test_the_taxonomy_narrows_the_list():
    from glocal.papers import taxonomy

    keys = {paper.code: paper.key for paper in catalogue.all()}
    found = [keys[code] for code in listed(run("--axis", "positions=local", "--axis", "levels=multi").stdout)]
    assert tuple(found) == taxonomy.find(positions="local", levels="multi")
    assert listed(run("windows", "--axis", "domain=audio").stdout) == []
    assert "positions: soft_global, local" in run("S040").stdout
    assert "no mechanism of its own" in run("S013").stdout


def test_the_taxonomy_itself():
    lines = run("--axes").stdout.splitlines()
    assert lines[0].split() == ["axis", "value", "mechanisms", "meaning"]
    assert re.search(r"^architecture +graph_attention +3 +nodes look at their neighbours$", "\n".join(lines), re.M)


@pytest.mark.parametrize(
    "given,said",
    [
        ("local", "must be AXIS=VALUE, such as positions=local; it was 'local'"),
        ("place=local", "axis 'place' is unknown"),
        ("positions=near", "positions 'near' is unknown"),
    ],
)
def test_a_bad_axis(given, said):
    assert said in run("--axis", given, code=2).stderr
