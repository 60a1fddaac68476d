"""Pictures: the cells and numbers of a view against the mask, and the same cells read back from PNG and SVG files."""

import html
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from glocal import Causal, Choose, Full, Keys, PerHead, Selected, Sliding, Where, Window, parse
from glocal.patterns import plot
from glocal.patterns.facts import facts
from glocal.patterns.view import pool, view

CASES = [
    ("full()", (7,), None),
    ("sliding(8, 0) | prefix(3)", (23,), None),
    ("causal()", (3,), (8,)),
    ("~sliding(1, 1)", (3,), None),
    ("tokens([0, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35]) | sliding(1, 1)", (37,), None),
    ("window((3, 5), dilation=(2, 1))", (7, 11), None),
    ("block(4, shift=3) | strided(5) & ~prefix(9)", (9, 13), None),
    ("sinks(5) | sliding((1, 2), 0)", (3, 4), (5, 9)),
    ("window((3, 3, 5))", (4, 5, 7), None),
    ("causal() & ~block(2)", (9, 3, 4), None),
    ("per_head([window(3), ~window(3), full()])", (5, 6), None),
    ("per_head([causal(), prefix(0)])", (6,), None),
]


def grids(case):
    text, grid_q, grid_k = case
    return parse(text), grid_q, grid_k or grid_q


def by_head(mask):
    return mask if mask.dim() == 3 else mask[None]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0][:40])
def test_numbers_are_those_of_the_mask(case):
    pattern, grid_q, grid_k = grids(case)
    mask = pattern.mask(grid_q, grid_k)
    found = facts(pattern, grid_q, grid_k, head_dim=32, batch=3)
    per_query = mask.sum(-1)
    assert found.pairs == int(mask.sum()) == pattern.count(grid_q, grid_k)
    assert found.share == pytest.approx(float(mask.double().mean()))
    assert (found.fewest, found.most) == (int(per_query.min()), int(per_query.max()))
    assert found.mean == pytest.approx(float(per_query.double().mean()))
    assert found.empty == int((per_query == 0).sum())
    assert found.boxes == len(pattern.boxes(grid_q, grid_k))
    assert found.flops == 2 * int(mask.sum()) * 3 * 64
    assert not found.estimated and found.counted is None


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0][:40])
def test_cells_are_those_of_the_mask(case):
    pattern, grid_q, grid_k = grids(case)
    mask = by_head(pattern.mask(grid_q, grid_k))
    query = tuple(n - 1 for n in grid_q)
    row = mask[:, -1]
    shown = view(pattern, grid_q, keys=grid_k, queries=[query])
    assert all(panel.exact for panel in shown.panels if panel.kind != "row")
    if len(grid_k) == 1:
        for head, (_, (whole, strip)) in enumerate(shown.bands):
            assert torch.equal(whole.seen > 0, mask[head])
            assert torch.equal(strip.seen[0] > 0, row[head])
            assert strip.marks == ((0, grid_k[0] - 1),)
    elif len(grid_k) == 2:
        assert len(shown.panels) == len(mask)
        for head, panel in enumerate(shown.panels):
            assert torch.equal(panel.seen.flatten() > 0, row[head])
            assert panel.marks == ((grid_k[0] - 1, grid_k[1] - 1),)
    else:
        cube = row[0].view(grid_k)
        own = [panel for panel in shown.panels if panel.marks]
        assert [panel.title for panel in own] == [f"slice {grid_k[0] - 1}"]
        for panel in shown.panels:
            assert torch.equal(panel.seen > 0, cube[int(panel.title.removeprefix("slice "))])
        if len(shown.panels) < grid_k[0]:
            drawn = sum(int(panel.seen.sum()) for panel in shown.panels)
            assert f"{len(shown.panels)} of {grid_k[0]} slices drawn" in shown.bands[0][0]
            assert f"{int(cube.sum()) - drawn} keys in the others" in shown.bands[0][0]


def test_many_slices_keep_the_query_and_say_what_is_left_out():
    shown = view(Full(), (20, 2, 2), queries=[(7, 1, 0)])
    (title, panels), *_ = shown.bands
    assert len(panels) == 6
    assert [panel.marks for panel in panels if panel.marks] == [((1, 0),)]
    assert title.endswith("6 of 20 slices drawn, 56 keys in the others")


@pytest.mark.parametrize("shape, step", [((5, 7), (2, 3)), ((4, 4), (4, 4)), ((1, 9), (1, 4)), ((3, 3), (5, 5))])
def test_pooling_is_the_mean_of_each_cell(shape, step):
    live = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = pool(live, step)
    for r in range(found.shape[1]):
        for c in range(found.shape[2]):
            cell = live[:, r * step[0] : (r + 1) * step[0], c * step[1] : (c + 1) * step[1]]
            assert torch.allclose(found[:, r, c], cell.float().mean((1, 2)))


def test_a_long_mask_is_pooled_exactly_where_that_is_cheap():
    pattern = parse("sliding(30, 0) | prefix(4)")
    shown = view(pattern, 301, cells=64)
    whole = shown.panels[0]
    assert whole.step == (5, 5) and not whole.exact
    assert torch.allclose(whole.seen, pool(pattern.mask(301), (5, 5)))
    assert "one cell is 5 x 5 pairs, shaded by the share that is seen" in shown.notes
    assert len(shown.notes) == 1


def test_large_grids_never_build_a_mask(monkeypatch):
    largest = 0
    rows = Window.rows

    def counted(self, index, grid_q, grid_k):
        nonlocal largest
        out = rows(self, index, grid_q, grid_k)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(Window, "rows", counted)
    monkeypatch.setattr(Window, "mask", lambda *_: pytest.fail("the mask was built"))
    found = facts(Window(13), (512, 512))
    assert (found.pairs, found.fewest, found.most) == (512 * 512 * 169, 169, 169)
    assert view(Window(13), (512, 512)).panels[0].step == (4, 4)
    shown = view(Window(255), 65536)
    assert any(note.startswith("the mask is drawn from") for note in shown.notes)
    assert 0 < largest <= 1 << 24


def test_what_boxes_cannot_tell_is_estimated_and_says_so(monkeypatch):
    monkeypatch.setattr("glocal.patterns.facts._ROW_PAIRS", 1 << 10)
    pattern = Where(lambda q, k: (k <= q) & (q - k < 10))
    found = facts(pattern, 640)
    assert found.estimated and found.counted == 64 and found.boxes is None and "predicate" in found.why
    assert found.pairs == pytest.approx(pattern.count(640), rel=0.05)


def test_patterns_with_data():
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    padded = Sliding(1, 1) & Keys(mask)
    strip = view(padded, 6, queries=[1], batch=1).panels[1]
    assert strip.seen.tolist() == [[1, 1, 0, 0, 0, 0]]
    assert facts(padded, 6).empty == 3
    gated = Choose(torch.tensor([[True, False, True, False]]), Full(), Causal())
    assert view(gated, 4).panels[0].seen.bool().equal(gated.mask(4)[0])
    chosen = Selected(torch.tensor([[0, -1], [0, 1]]), 2)
    assert facts(chosen, 4).most == 4
    with pytest.raises(ValueError, match="batch is 2; the pattern has 2 batch elements"):
        view(padded, 6, batch=2)


def test_a_query_outside_the_keys_has_no_mark():
    shown = view(Full(), 5, keys=3, queries=[0, 4])
    assert [panel.marks for panel in shown.panels[1:]] == [(), ((0, 2),)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(grid=(4, 4), queries=[(4, 0)]), "query .4, 0. is not in the grid 4 x 4; positions go up to 3, 3"),
        (dict(grid=(4, 4), queries=[1]), "query 1 is not in the grid"),
        (dict(grid=4, queries=[]), "queries is empty"),
        (dict(grid=(2, 2, 2, 2)), "grid has 4 axes; pictures are drawn of one to three"),
        (dict(grid=(0, 3)), "there is nothing to draw"),
        (dict(grid=(4096, 4096)), "positions; pictures are drawn up to"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        view(Full(), **arguments)


@pytest.mark.parametrize(
    "options, message",
    [({"heads": 3}, "heads must be 2, as the pattern has; it was 3"), ({"batch": 0}, "batch must be at least 1")],
)
def test_bad_facts(options, message):
    with pytest.raises(ValueError, match=message):
        facts(PerHead([Full(), Causal()]), 4, **options)


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0][:40])
def test_pixels_of_the_png_are_the_mask(case, tmp_path):
    pattern, grid_q, grid_k = grids(case)
    query = tuple(n // 2 for n in grid_q)
    figure = pattern.plot(grid_q, keys=grid_k, queries=[query])
    plot.save(figure, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    panels = view(pattern, grid_q, keys=grid_k, queries=[query]).panels
    assert len(figure.axes) == len(panels)
    scale = pixels.shape[0] / figure.bbox.height
    for axes, panel in zip(figure.axes, panels, strict=True):
        rows, columns = panel.seen.shape
        for r in range(rows):
            for c in range(columns):
                x, y = axes.transData.transform((c + 0.5, r + 0.5)) * scale
                here = pixels[pixels.shape[0] - 1 - int(y), int(x)]
                want = rgb(plot.SEEN if panel.seen[r, c] else plot.UNSEEN)
                if (r, c) in panel.marks:
                    want = rgb(plot.QUERY if panel.seen[r, c] else "#FFFFFF")
                assert np.abs(here - want).max() <= 3, (panel.title, r, c)


def test_nothing_hangs_over_the_edge(tmp_path):
    for text, grid in [("full()", 2), ("sliding(255, 0) | " * 12 + "prefix(3)", 64), ("window(3)", (5, 60))]:
        plot.save(parse(text).plot(grid), tmp_path / "x.png")
        pixels = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
        border = np.concatenate(
            [pixels[:12].ravel(), pixels[-12:].ravel(), pixels[:, :12].ravel(), pixels[:, -12:].ravel()]
        )
        assert border.min() == 255


def test_svg_holds_the_expression_as_text(tmp_path):
    pattern = parse("sliding(3, 0) & ~block(4) | prefix(1)")
    plot.save(pattern.plot(12), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert html.escape(repr(pattern)) in text and "&amp; ~block(4)" in text
    tree = ElementTree.fromstring(text)
    words = " ".join("".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text"))
    assert repr(pattern) in words
    assert f"{pattern.count(12)} live pairs" in words
    whole = view(pattern, 12).panels[0].seen > 0
    runs = int((whole[:, 1:] & ~whole[:, :-1]).sum() + whole[:, 0].sum())
    panel = next(node for node in tree.iter() if node.get("id") == "panel-0")
    filled = [node for node in panel.iter() if plot.SEEN.lower() in (node.get("style") or "")]
    assert len(filled) == runs


def test_titles_are_never_read_as_mathematics(tmp_path):
    figure = Full().plot(3, title=r"$\frac{<script>$ & $x_1$")
    plot.save(figure, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert r"$\frac{&lt;script&gt;$ &amp; $x_1$" in text


def test_pooled_cells_are_shaded_by_their_share():
    figure = Sliding(100, 0).plot(1000)
    colours = {tuple(np.round(c[:3], 4)) for c in figure.axes[0].collections[0].get_facecolors()}
    assert len(colours) > 2
    assert tuple(np.round(plot.shade(1.0), 4)) in colours
    assert sorted(plot.shade(s)[0] for s in (1.0, 0.5, 0.1)) == [plot.shade(s)[0] for s in (1.0, 0.5, 0.1)]


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        plot.save(Window(3).plot((5, 5)), tmp_path / name)
    for ending in ("svg", "png"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .png or .svg; it was 'x.gif'"):
        plot.save(Full().plot(3), "x.gif")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'glocal\[plot\]'"):
        Full().plot(3)
    assert view(Full(), 3).panels  # what the terminal needs is there all the same


def test_pyplot_is_not_touched():
    code = "import sys, glocal; glocal.Full().plot(3); print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "share, text", [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.00123, "0.12 %"), (3e-6, "0.0003 %")]
)
def test_percent(share, text):
    assert plot.percent(share) == text
