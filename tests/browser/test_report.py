"""The report as a browser shows it: its numbers are the terminal's, and it asks nobody for anything."""

import dataclasses
import json
import re
import shutil
import time

import pytest
from typer.testing import CliRunner

from glocal.bench import causal_table
from glocal.bench.causal_report import render as render_causal
from glocal.bench.inspection import Settings, inspect_model
from glocal.bench.inspection_report import render as render_inspection
from glocal.bench.report import render
from glocal.cli.app import app
from tests.bench.test_bench import result
from tests.bench.test_causal import result as result_causal
from tests.cli.test_compare import SMALL

EVIL = "<script>document.title='evil'</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        reason = "no chromium or chromedriver here (Debian: apt-get install chromium chromium-driver)"
        print(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    names = [
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
    ]
    names += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for name in names:
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


def visit(browser, path):
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # What the browser asks for its own start page may come late, and is no file of ours.
    return [url for url in asked if not url.startswith(("data:", "chrome:"))], browser.get_log("browser")


def cells(browser, table):
    script = "return [...document.querySelectorAll(arguments[0])].map(r => [...r.cells].map(c => c.innerText.trim()))"
    return browser.execute_script(script, f"#{table} tr")


def test_numbers_are_the_terminals(browser, tmp_path):
    report, out = tmp_path / "report.html", tmp_path / "out.json"
    done = CliRunner().invoke(app, [*SMALL, "--report", str(report), "--json", str(out)])
    assert done.exit_code == 0, done.output
    asked, complaints = visit(browser, report)
    assert asked == [report.as_uri()] and complaints == []
    data = json.loads(out.read_text())
    printed = [[c.strip() for c in line.split("│")[1:-1]] for line in done.output.splitlines() if line.startswith("│")]
    shown = []
    for name, table in zip(("fidelity", "cost"), data["tables"], strict=True):
        header, *rows = cells(browser, name)
        assert header == table["header"] and rows == table["rows"]
        shown += rows
    assert shown == printed
    # And the raw numbers are what the cells round.
    for row, cell in zip(data["rows"], cells(browser, "fidelity")[1:], strict=True):
        assert cell[0] == row["pattern"] and float(cell[3]) == round(row["cosine"], 4)
        for text, key in zip((cell[1], cell[5], cell[6]), ("share", "nearest1", "nearest5"), strict=True):
            assert float(text.strip("> %")) == pytest.approx(100 * row[key], abs=0.051)
    assert browser.execute_script("return document.getElementById('headline').innerText") == data["headline"]


def test_made_of_itself(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render(result()), encoding="utf-8")
    outside = r"https?:|//[a-z]|@import|url\(|<script|<link(?! rel=\"icon\" href=\"data:,\")"
    assert not re.search(outside, re.sub(r"data:image/png;base64,[\w+/=]+", "", path.read_text(encoding="utf-8")))
    asked, complaints = visit(browser, path)
    assert asked == [path.as_uri()] and complaints == []
    images = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert len(images) == 4 and all(alt.startswith("Mask of ") and width > 0 for alt, width in images)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => [s.getAttribute('aria-label'),"
        " s.querySelectorAll('circle').length, s.querySelectorAll('polyline').length])"
    )
    assert [c[1:] for c in charts] == [[4, 0], [8, 4]] and all("block(64)" in c[0] for c in charts)
    fits(browser)


def fits(browser):
    """Nothing sticks out, on a wide screen or a narrow one."""
    inside = "return [...document.querySelectorAll('svg text')].every(t => { const a = t.getBoundingClientRect(),"
    inside += " b = t.ownerSVGElement.getBoundingClientRect(); return a.left >= b.left - 1 && a.right <= b.right + 1 })"
    for width in (1100, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        end = time.monotonic() + 5  # Plotly draws again a moment later
        while not browser.execute_script(inside) and time.monotonic() < end:
            time.sleep(0.1)
        assert browser.execute_script(inside), f"text outside its chart at {width} pixels"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_report_of_a_language_model(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_causal(result_causal()), encoding="utf-8")
    asked, complaints = visit(browser, path)
    assert asked == [path.as_uri()] and complaints == []
    for name, table in zip(("bits", "needle", "copy", "cost"), causal_table.tables(result_causal()), strict=True):
        header, *rows = cells(browser, name)
        assert header == [h.strip() for h in table.header] and rows == [list(row) for row in table.rows]
    rings = "return [...document.querySelectorAll('svg')].map(s => s.querySelectorAll('circle.ring').length)"
    assert browser.execute_script(rings) == [3, 2, 1, 0]
    images = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert len(images) == 3 and all(alt.startswith("Mask of ") and width > 0 for alt, width in images)
    fits(browser)


@pytest.mark.parametrize("field", ["model", "source"])
@pytest.mark.parametrize("page,of", [(render, result), (render_causal, result_causal)], ids=["encoder", "causal"])
def test_text_stays_text(browser, tmp_path, page, of, field):
    path = tmp_path / "report.html"
    path.write_text(page(dataclasses.replace(of(), **{field: EVIL})), encoding="utf-8")
    asked, complaints = visit(browser, path)
    assert asked == [path.as_uri()] and complaints == []
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.title != "evil" and EVIL in browser.execute_script("return document.body.innerText")


@pytest.fixture(scope="module")
def inspected():
    return inspect_model(Settings("bytes", f"x = 1\n{EVIL}", tokens=60))


def grid_cell(browser, layer, head):
    return browser.find_element("css selector", f"#grid button[data-at='{layer - 1},{head - 1}']")


def drawn(browser):
    """Name and weights of the map that is drawn, and the colors of the tokens."""
    script = "return [document.getElementById('which').innerText, document.getElementById('map').data[0].z,"
    script += " [...document.querySelectorAll('#strip button')].map(b => b.title)]"
    return browser.execute_script(script)


def test_inspection(browser, tmp_path, inspected):
    """A head is clicked, or reached with the arrow keys, and its map is drawn: the one that the model computed."""
    path = tmp_path / "inspect.html"
    path.write_text(render_inspection(inspected), encoding="utf-8")
    asked, complaints = visit(browser, path)
    assert asked == [path.as_uri()] and complaints == []
    before = drawn(browser)
    grid_cell(browser, 3, 2).click()
    name, weights, titles = drawn(browser)
    assert name == "Layer 3, head 2" != before[0] and weights != before[1]
    assert weights == [pytest.approx(row, abs=0.004) for row in inspected.maps[2][1].tolist()]
    assert titles[0].startswith("x: ") and len(titles) == 60
    grid_cell(browser, 3, 2).send_keys(webdriver_keys().ARROW_RIGHT)
    name, other, _ = drawn(browser)
    assert name == "Layer 3, head 3" and other != weights
    focus = "return document.activeElement.getAttribute('aria-label')"
    assert browser.execute_script(focus).startswith("layer 3, head 3: cost of pruning")
    browser.switch_to.active_element.send_keys(webdriver_keys().ARROW_UP)
    assert drawn(browser)[0] == "Layer 2, head 3"
    # Another query, and the other way round.
    row = inspected.maps[1][2]
    browser.find_element("css selector", "#strip button[data-n='5']").click()
    shares = lambda: [float(t.rsplit(": ", 1)[1].split(" ")[0]) / 100 for t in drawn(browser)[2]]  # noqa: E731
    assert shares() == pytest.approx(row[5].tolist(), abs=0.004)
    browser.find_element("css selector", "input[value=in]").click()
    assert shares() == pytest.approx(row[:, 5].tolist(), abs=0.004)
    # Another metric colors the heads.
    colors = "return [...document.querySelectorAll('#grid button')].map(b => b.style.background)"
    cost = browser.execute_script(colors)
    browser.execute_script(
        "const m = document.getElementById('metric'); m.value = 'entropy'; m.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script(colors) != cost
    layer, head = divmod(int(inspected.metrics["entropy"].argmin()), 8)
    pale = "return [...document.querySelectorAll('#grid button')].find(b => b.style.background == 'var(--paper)').title"
    assert browser.execute_script(pale).startswith(f"layer {layer + 1}, head {head + 1}: ")
    fits(browser)


def webdriver_keys():
    from selenium.webdriver.common.keys import Keys

    return Keys


def test_inspected_text_stays_text(browser, tmp_path, inspected):
    path = tmp_path / "evil.html"
    subject = dataclasses.replace(
        inspected.subject, name=EVIL, source=EVIL, labels=[EVIL, "</script>", *inspected.subject.labels[2:]]
    )
    path.write_text(render_inspection(dataclasses.replace(inspected, subject=subject)), encoding="utf-8")
    asked, complaints = visit(browser, path)
    assert asked == [path.as_uri()] and complaints == []
    assert browser.title != "evil" and not browser.execute_script("return document.images.length")
    words = browser.execute_script("return [...document.querySelectorAll('#strip button')].map(b => b.textContent)")
    assert words[:2] == [EVIL, "</script>"]
    assert EVIL in browser.execute_script("return document.body.innerText")


def test_inspection_of_a_picture(browser, tmp_path):
    path = tmp_path / "picture.html"
    found = inspect_model(Settings("scenes", pruning=False))
    path.write_text(render_inspection(found), encoding="utf-8")
    asked, complaints = visit(browser, path)
    assert asked == [path.as_uri()] and complaints == []
    patches = "return [...document.querySelectorAll('#strip .patches button')].map(b => b.style.background)"
    before = browser.execute_script(patches)
    assert len(before) == 64
    browser.find_element("css selector", "#strip .patches button[data-n='20']").click()
    after = browser.execute_script(patches)
    assert after != before
    # The brightest patch, which hides least of the picture, is the one that the query looks at most.
    dark = [float(color.rsplit(",", 1)[1].strip(" )")) if "rgba" in color else 1.0 for color in after]
    assert dark.index(min(dark)) == int(found.maps[0][0][20, 1:].argmax()) or min(dark) == 0
    assert browser.execute_script("return document.getElementById('pruning').hidden")
    fits(browser)
