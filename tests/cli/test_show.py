"""``glocal show``: what it draws is read back from its text and compared with the pattern itself."""

import io
import re
import time

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from glocal import parse
from glocal.cli import show
from glocal.patterns.cost import simulate
from glocal.patterns.facts import facts
from glocal.patterns.view import pool, view

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(show.show)

HALVES = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
SHADES = " ░▒▓█"


def run(*arguments, width=60, code=0, **env):
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width), **env})
    assert done.exit_code == code, done.output
    return done


def frames(text):
    """Every frame drawn, side by side ones too: lines with a wedge, columns with a wedge, the lines themselves."""
    lines, found = text.splitlines(), []
    for n, line in enumerate(lines):
        for top in re.finditer("┌[─▼]*┐", line):
            body, wedges, at = [], set(), n + 1
            while lines[at][top.start()] != "└":
                piece = lines[at][top.start() : top.end()]
                assert piece[0] in "│▶" and piece[-1] == "│"
                if piece[0] == "▶":
                    wedges.add(len(body))
                body.append(piece[1:-1])
                at += 1
            columns = [c for c, sign in enumerate(top[0][1:-1]) if sign == "▼"]
            found.append((wedges, columns, body))
    return found


def halves(body, rows):
    """Cells of a frame whose characters are two cells high."""
    cells = [[HALVES[sign][half] for sign in line] for line in body for half in (0, 1)]
    assert not any(map(any, cells[rows:]))
    return torch.tensor(cells[:rows], dtype=torch.bool)


def live(pattern, grid_q, grid_k, query):
    index = 0
    for p, n in zip(query, grid_q, strict=True):
        index = index * n + p
    rows = pattern.rows(torch.tensor([index]), grid_q, grid_k)
    return rows.reshape(-1, *grid_k)


@pytest.mark.parametrize(
    "text", ["window((7, 7), dilation=2)", "block(5, shift=3)", "strided(3) | ~window(3)", "causal()", "prefix(0)"]
)
@pytest.mark.parametrize("width", [40, 200])
def test_cells_of_an_image_grid_read_back(text, width):
    queries = [(0, 0), (3, 16), (14, 8)]
    asked = [part for q in queries for part in ("--query", f"{q[0]},{q[1]}")]
    output = run(text, "--grid", "15x17", *asked, width=width).stdout
    drawn = frames(output)
    assert len(drawn) == 3
    for query, (wedges, columns, body) in zip(queries, drawn, strict=True):
        (expected,) = live(parse(text), (15, 17), (15, 17), query)
        assert torch.equal(halves(body, 15), expected)
        assert (wedges, columns) == ({query[0] // 2}, [query[1]])
        assert f"query {query}: {int(expected.sum())} key" in output


def test_default_queries_are_a_corner_an_edge_and_the_centre():
    output = run("window(3)", "--grid", "9x10").stdout
    assert re.findall(r"query (\(.*?\)):", output) == ["(0, 0)", "(0, 5)", "(4, 5)"]


def test_queries_and_keys_on_different_grids():
    output = run("causal()", "--grid", "2x3", "--keys", "4x6", "--query", "1,0").stdout
    ((wedges, columns, body),) = frames(output)
    assert torch.equal(halves(body, 4), live(parse("causal()"), (2, 3), (4, 6), (1, 0))[0])
    assert (wedges, columns) == ({1}, [3])  # key (3, 3), the query's own
    assert "2 x 3 queries on a grid of 4 x 6 keys" in output


@pytest.mark.parametrize("text", ["sliding(8, 0) | prefix(3)", "causal()", "~sliding(1, 1)", "segments([10, 13])"])
def test_a_sequence_shows_its_mask_and_rows(text):
    output = run(text, "--grid", "23", "--query", "0", "--query", "11").stdout
    mask = parse(text).mask(23)
    ((wedges, columns, body),) = frames(output)
    assert torch.equal(halves(body, 23), mask)
    assert (wedges, columns) == ({0, 5}, [])
    for query in (0, 11):
        title = f"query {query}: {int(mask[query].sum())} keys?"
        strip = re.search(title + r".*\n│(.{23})│", output)[1]
        assert [sign in "█◆" for sign in strip] == mask[query].tolist()
        assert [c for c, sign in enumerate(strip) if sign in "◆◇"] == [query]
        assert (strip[query] == "◆") == bool(mask[query, query])


def test_a_volume_shows_slices():
    pattern, grid = parse("window((3, 3, 5))"), (5, 6, 7)
    output = run("window((3, 3, 5))", "--grid", "5x6x7", "--query", "2,3,3").stdout
    expected = live(pattern, grid, grid, (2, 3, 3))[0]
    drawn = frames(output)
    assert re.findall(r"slice (\d+)", output) == list("01234")
    for number, (wedges, columns, body) in enumerate(drawn):
        assert torch.equal(halves(body, 6), expected[number])
        assert (wedges, columns) == (({1}, [3]) if number == 2 else (set(), []))


def test_one_picture_a_head():
    text = "per_head([window(3), ~window(3)])"
    output = run(text, "--grid", "6x6", "--query", "4,5").stdout
    expected = live(parse(text), (6, 6), (6, 6), (4, 5))
    assert [line for line in output.splitlines() if line.startswith("head")] == ["head 0", "head 1"]
    for (_, _, body), head in zip(frames(output), expected, strict=True):
        assert torch.equal(halves(body, 6), head)
    assert "2 heads of 64, batch 1" in output


@pytest.mark.parametrize("text, grid", [("block(16) | strided(7)", (90, 70)), ("sliding(40, 3) | prefix(9)", (300,))])
def test_large_grids_are_shaded_by_share(text, grid):
    query = tuple(n // 2 for n in grid)
    size, asked = "x".join(map(str, grid)), ",".join(map(str, query))
    output = run(text, "--grid", size, "--query", asked, width=64).stdout
    step = int(re.search(r"one cell is (\d+) x \1 ", output)[1])
    pattern = parse(text)
    whole = pattern.mask(grid) if len(grid) == 1 else live(pattern, grid, grid, query)[0]
    share = pool(whole, (step, step))
    ((_, _, body),) = frames(output)
    assert len(body) == share.shape[0]
    for r, line in enumerate(body):
        signs = line[::2]  # the second character of the query's cell is its mark
        for c, sign in enumerate(signs):
            level = SHADES.index(sign)
            low, high = [(0, 0), (1e-9, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1 - 1e-9), (1, 1)][level]
            assert low - 1e-6 <= float(share[r, c]) <= high + 1e-6
    if len(grid) == 2:
        assert body[query[0] // step][2 * (query[1] // step) + 1] == "◆"


@pytest.mark.parametrize(
    "text, grid", [("window(5)", "9x11"), ("~sliding(1, 1)", "3"), ("sinks(2) | sliding(3, 0)", "40")]
)
def test_numbers_shown_are_the_patterns(text, grid):
    pattern, lengths = parse(text), tuple(map(int, grid.split("x")))
    arguments = (text, "--grid", grid, "--heads", "4", "--head-dim", "32", "--batch", "2")
    output = run(*arguments, width=200).stdout
    mask = pattern.mask(lengths)
    per_query = mask.sum(-1)
    shown = {name: re.search(rf"{name} +(.*)", output)[1] for name in ("live pairs", "FLOPs", "keys a query", "boxes")}
    assert int(shown["live pairs"].replace(",", "")) == int(mask.sum()) == pattern.count(lengths)
    assert shown["boxes"] == str(len(pattern.boxes(lengths)))
    number, *prefix = shown["FLOPs"].split()
    factor = {"": 1, "k": 1e3, "M": 1e6}["".join(prefix)]
    assert float(number) * factor == pytest.approx(2 * int(mask.sum()) * 64 * 8, rel=5e-3)
    low, high = int(per_query.min()), int(per_query.max())
    mean = float(per_query.double().mean())
    assert shown["keys a query"] == (f"{low}" if low == high else f"{low} to {high}, mean {mean:.1f}")
    assert float(re.search(r"of full +([\d.]+) %", output)[1]) == pytest.approx(
        100 * float(mask.double().mean()), abs=0.01
    )
    assert "4 heads of 32, batch 2" in output and "forward: 2 x pairs x (D + Dv)" in output


def test_empty_rows_are_warned_of():
    done = run("~sliding(1, 1)", "--grid", "3")
    assert "warning: queries that see no key: 1; attention gives zeros there" in done.stderr
    assert re.search(r"empty rows +1\n", done.stdout)
    assert not run("sliding(1, 1)", "--grid", "3").stderr


@pytest.mark.parametrize("width", [50, 80, 133])
def test_no_line_is_wider_than_the_terminal(width):
    for text, grid in [("window(3)", "28x28"), ("window(3)", "100x40"), ("causal()", "400"), ("full()", "9x20x20")]:
        lines = run(text, "--grid", grid, width=width).stdout.splitlines()
        assert max(map(len, lines)) <= width


def coloured(text, grid, **options):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor", **options)
    pattern = parse(text)
    show.draw(console, view(pattern, grid, queries=[tuple(n // 2 for n in grid)]), facts(pattern, grid))
    return console.file.getvalue()


def test_colour_marks_the_query():
    def code(colour):
        return ";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))

    seen, blind = coloured("window(3)", (5, 5)), coloured("~window(3)", (5, 5))
    # The query at (2, 2) is an upper half; the cell below it is seen by the window, and not by the rest.
    assert f"\x1b[38;2;{code(show.QUERY)};48;2;{code(show.SEEN)}m▀" in seen
    assert f"\x1b[38;2;{code(show.BLIND)}m▀" in blind
    plain = re.sub(r"\x1b\[[\d;]*m", "", seen)
    assert "window(3)" in plain and len(frames(plain)) == 1


def test_no_color_is_honoured():
    text = coloured("window(3)", (5, 5), no_color=True)
    assert ";2;" not in text
    ((_, _, body),) = frames(re.sub(r"\x1b\[[\d;]*m", "", text))
    assert torch.equal(halves(body, 5), live(parse("window(3)"), (5, 5), (5, 5), (2, 2))[0])
    assert "\x1b" not in run("window(3)", "--grid", "5x5").stdout


def test_no_color_reaches_the_console(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert ";2;" not in coloured("window(3)", (5, 5))


def test_large_grids_are_quick(monkeypatch):
    monkeypatch.setattr("glocal.patterns.base.Pattern.mask", lambda *_: pytest.fail("the mask was built"))
    start = time.perf_counter()
    output = run("sliding(255, 0) | prefix(4)", "--grid", "65536").stdout
    count = parse("sliding(255, 0) | prefix(4)").count(65536)
    assert f"live pairs    {count:,}\n" in output
    assert re.search("the mask is drawn from [0-9]+ of every [0-9]+ queries", output)
    run("window(13)", "--grid", "1024x1024")
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_out_writes_a_picture(tmp_path, ending):
    path = tmp_path / f"a picture{ending}"
    output = run("window(3) & ~block(2)", "--grid", "6x6", "--query", "3,3", "--out", str(path)).stdout
    assert f"wrote {path}" in output
    if ending == ".png":
        with Image.open(path) as image:
            image.verify()
    else:
        text = path.read_text()
        assert "window(3) &amp; ~block(2)" in text and "query (3, 3): 5 keys" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["windw(3)", "--grid", "9"],
            "PATTERN: text is not a pattern: no pattern is called 'windw'; did you mean 'window'",
        ),
        (["window(3", "--grid", "9"], "PATTERN: text is not a pattern: expected ','"),
        (["__import__('os')", "--grid", "9"], "PATTERN: text is not a pattern"),
        (["(" * 10_000, "--grid", "9"], "PATTERN: text is not a pattern: nested more than"),
        (["", "--grid", "9"], "PATTERN: text is not a pattern"),
        (["keys($0)", "--grid", "9"], "PATTERN: text is not a pattern: there is no tensor $0"),
        (
            ["window(30)", "--grid", "9x9"],
            "PATTERN: size of Window is 30 on axis 0, larger than the grid's 9; use at most 9",
        ),
        (["window((3, 3))", "--grid", "9"], "PATTERN: size of Window has 2 values, the grid has 1 axes"),
        (
            ["full()", "--grid", "28y28"],
            "--grid: must be one to three lengths, such as 1024, 28x28 or 8x28x28; it was '28y28'",
        ),
        (["full()", "--grid", "2x2x2x2"], "--grid: must be one to three lengths"),
        (["full()", "--grid", "0x4"], "--grid: must have no empty axis; it was '0x4'"),
        (["full()", "--grid", "9000000"], "--grid: grid 9000000 has 9,000,000 positions; pictures are drawn up to"),
        (["full()", "--grid", "9x9", "--keys", "9"], "--keys: has 1 axes, --grid has 2; they must agree"),
        (["full()", "--grid", "9x9", "--query", "3"], "--query: must be one position for each grid axis, such as 4,4"),
        (["full()", "--grid", "9x9", "--query", "3,9"], "--query: must lie in the grid, from 0,0 to 8,8; it was '3,9'"),
        (["full()", "--grid", "9", "--out", "a.gif"], "--out: must end in .png or .svg; it was 'a.gif'"),
        (["full()", "--grid", "9", "--out", "no/such/a.png"], "--out: there is no folder 'no/such'; make it first"),
        (["full()", "--grid", "9", "--head-dim", "0"], "--head-dim: must be at least 1; it was 0"),
        (["per_head([full(), full()])", "--grid", "9", "--heads", "3"], "--heads: heads must be 2"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments, code=2)
    assert done.stderr.startswith(f"glocal: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize(
    "text, grid, tiles, sizes",
    [
        ("window(16, stride=16)", "64x64", ["--query-tile", "8x8", "--key-tile", "8x8"], ((8, 8), (8, 8))),
        ("window(5, dilation=2) | prefix(3)", "30", ["--query-tile", "4"], ((4,), (4,))),
        ("window(3)", "6x7x8", ["--key-tile", "2"], ((4, 4, 4), (2, 2, 2))),
        ("window(3, dilation=2)", "20x20", [], ((8, 8), (8, 8))),
    ],
)
def test_simulate_shows_the_tiles_visited(text, grid, tiles, sizes):
    output = run(text, "--grid", grid, "--simulate", *tiles).stdout
    found = simulate(parse(text), tuple(map(int, grid.split("x"))), *sizes)
    assert f"visited       mean {found.mean:,.2f}, most {found.most} of {found.full}\n" in output
    assert f"from 1st key  mean {found.dynamic_mean:,.2f}, most {found.dynamic_most}\n" in output
    assert f"speedup       at most {found.bound:,.2f}, {found.worst:,.2f} by the longest\n" in output
    assert f"FLOP bound    {found.flop_bound:,.2f}, " in output
    assert ("none needed" in output) == found.perfect and ("residue class" in output) == (max(found.layout) > 1)
    names = [" x ".join(map(str, size)) for size in sizes]
    assert f"tiles         {names[0]} queries, {names[1]} keys\n" in output
    assert max(map(len, output.splitlines())) <= 60
    assert "visited" not in run(text, "--grid", grid).stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["full()", "--grid", "9", "--query-tile", "3"], "--query-tile: is for --simulate; add --simulate"),
        (["full()", "--grid", "9", "--simulate", "--key-tile", "0"], "--key-tile: must have no empty axis; it was '0'"),
        (
            ["full()", "--grid", "9x9x9", "--simulate", "--query-tile", "4x4"],
            "--query-tile: has 2 sizes, --grid has 3 axes; give one, or one an axis, such as 4x4x4",
        ),
        (["~tokens(list(range(0, 99, 5)))", "--grid", "99", "--simulate"], "PATTERN: text is not a pattern"),
    ],
)
def test_bad_tiles_are_one_line(arguments, message):
    test_bad_input_is_one_line(arguments, message)
