"""The measuring itself: neighbors by hand, passages, loading, and numbers in words."""

import json
import math

import pytest
import torch

from glocal import Sliding, parse
from glocal.bench import Comparison, Cost, Fidelity, Settings, compare, cost, encoder, pictures, text
from glocal.bench import table as tables
from glocal.bench.compare import LADDER, agreement, patterns_of


def angles(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.float64)


def test_agreement_by_hand():
    # Neighbors of 0, 10, 25, 90: 10, 0, 10, 25. Of 0, 10, 15, 90: 10, 15, 10, 15 (only the second row's changes).
    before, after = angles(0, 10, 25, 90), angles(0, 10, 15, 90)
    assert agreement(before, before, 1) == 1
    assert agreement(before, after, 1) == 3 / 4
    # Two nearest: {10,25} {0,25} {10,0} {25,10} before; with the last at -30 only its own change, to {0,10}.
    assert agreement(before, angles(0, 10, 25, -30), 2) == 7 / 8
    assert agreement(before, after, 5) == 1  # all three others


def test_agreement_against_sorting():
    make = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(40, 6, generator=make).double(), dim=1) for _ in range(2))

    def near(e, i, k):
        return set(sorted((j for j in range(40) if j != i), key=lambda j: -float(e[i] @ e[j]))[:k])

    for k in (1, 5):
        expected = sum(len(near(a, i, k) & near(b, i, k)) for i in range(40)) / (40 * k)
        assert agreement(a, b, k) == pytest.approx(expected)


def test_passages_are_the_same_every_time():
    one = text.from_library(6)
    assert len(one) == len(set(one)) == 6 and all(len(p) == 4000 for p in one)
    assert text.from_library(4) == one[:4]


def test_passages_from_a_folder(tmp_path):
    (tmp_path / "b.py").write_text('"""' + "word " * 30 + '"""\n# ' + "other " * 30)
    (tmp_path / "a.py").write_text('"""' + "word " * 30 + '"""\n"broken" "tail"\n')
    (tmp_path / "c.py").write_text("def broken(:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_text('"""' + "hidden " * 99 + '"""')
    found = text.from_library(9, characters=100, folder=tmp_path)
    assert found == [("word " * 30)[:100], ("other " * 30)[:100]]  # b's docstring was seen in a


def test_passages_from_a_file(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("one\ntwo\n\n \n three \n\none two\n", encoding="utf-8")
    assert text.from_file(path) == ["one two", "three"]
    for content, word in [(b"only one", "two or more"), (b"", "two or more"), (b"\xff\xfe", "UTF-8")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=word):
            text.from_file(path)
    with pytest.raises(ValueError, match="cannot be read"):
        text.from_file(tmp_path / "none.txt")


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        encoder.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no config\.json"):
        encoder.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        encoder.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded"):
        encoder.load(tmp_path)


def test_embeddings_are_those_of_sentence_transformers():
    """Mean pooling over real tokens, unit length: a passage alone and among others gives the same."""
    model = encoder.load()
    passages = ["A short one.", "Another short one.", "A longer one, with quite a few more words in it than these."]
    parts = encoder.embed(model, encoder.batches(model, passages))
    found = {n: vector for numbers, vectors in parts for n, vector in zip(numbers, vectors, strict=True)}
    batch = model.tokenizer(passages, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    assert sorted(found) == [0, 1, 2]
    assert torch.allclose(torch.stack([found[n] for n in range(3)]), expected, atol=1e-5)


def test_costs_are_measured():
    patterns = patterns_of(["sliding(8, 8)"])
    steps = []
    taken = cost.seconds(patterns, 2, 16, 700, rounds=3, step=lambda: steps.append(1))
    assert len(taken) == 2 and min(taken) > 0 and len(steps) == 3
    with cost.Probe(4, 32) as probe:
        found = probe.peak(patterns[0], 20_000)
        assert probe.peak(Sliding(3, 3), 64) is not None
    if found is not None:  # Linux: at least the output, within the count's slack, and nothing like N x N
        output = 4 * 32 * 20_000 * 4
        assert output - (2 << 20) < found < 20 * output


def result() -> Comparison:
    def row(pattern, share, cosine, nearest, *seconds):
        costs = tuple(Cost(n, s, 3 << 20, share, "native") for n, s in zip((512, 4096), seconds, strict=False))
        return Fidelity(pattern, 10, share, share, cosine, cosine - 0.1, nearest, nearest, costs)

    rows = (
        row("full()", 1.0, 1.0, 1.0, 0.01, 0.8),
        row("sliding(64, 64)", 0.25, 0.9, 0.8, 0.001, 0.002),
        row("sliding(64, 64) | tokens([0])", 0.26, 0.98, 0.95, 0.002, 0.1),
        row("block(64)", 0.1, 0.97, 0.94, 0.002, 0.2),
    )
    return Comparison("a", "b", 20, 80, 300, 12, 32, 2, rows)


def test_headline_is_about_the_cheapest_good_one():
    assert tables.best(result()).pattern == "sliding(64, 64) | tokens([0])"
    said = tables.headline(result())
    assert "26.0 %" in said and "95.0 %" in said and "100 ms" in said and "8.00 times as fast" in said
    nothing = Comparison("a", "b", 20, 80, 300, 12, 32, 2, result().rows[:1])
    assert tables.best(nothing) is None and tables.headline(nothing)


def test_tables_hold_every_number():
    fidelity, costs = tables.fidelity_table(result()), tables.cost_table(result())
    assert fidelity.rows[2] == (
        "sliding(64, 64) | tokens([0])",
        "26.0 %",
        "26.0 %",
        "0.9800",
        "0.8800",
        "95.0 %",
        "95.0 %",
    )
    assert costs.rows[6][:4] == ("4,096", "sliding(64, 64) | tokens([0])", "26.0 %", "100 ms")
    assert len(costs.rows) == 8
    for t in (fidelity, costs):
        assert len(t.header) == len(t.legend) and all(len(r) == len(t.header) for r in t.rows)
    assert tables.percent(0.99999) == "> 99.9 %" and tables.percent(1.0) == "100.0 %"
    json.dumps(result().to_dict())


def test_ladder_reads_back():
    for rung in LADDER:
        assert repr(parse(rung)) == rung
    assert [repr(p) for p in patterns_of(["full()", "block(4)", "block(4)"])] == ["full()", "block(4)"]


def test_mask_picture():
    image = pictures.mask_png(Sliding(2, 2), 300)
    assert image.startswith("data:image/png;base64,") and len(image) < 6000


@pytest.mark.parametrize(
    "settings,word",
    [
        (Settings(passages=1), "passages"),
        (Settings(lengths=(0,)), "lengths"),
        (Settings(where=("sliding(",)), "where 'sliding\\('"),
        (Settings(where=("window(9999)",), passages=2), "does not fit"),
        (Settings(where=("per_head([full(), full()])",), passages=2), "2 heads"),
        (Settings(model="/nowhere"), "not a folder"),
        (Settings(input="/nowhere"), "cannot be read"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        compare(settings)
