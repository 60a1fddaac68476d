"""Tasks against what they say of themselves, and mechanisms on them."""

import pytest
import torch

from glocal.bench import tasks
from glocal.bench.bytes import library_source
from glocal.bench.cab import Efficiency
from glocal.bench.mechanisms import (
    Result,
    Row,
    Settings,
    cheaper_from,
    compare_mechanisms,
    headline,
    kinds,
    missing,
    tables,
)
from glocal.bench.mechanisms_report import render
from glocal.bench.run import Interrupted
from glocal.bench.tasks import TASKS, Reader, evaluate, train
from glocal.nn import USES, Attention

KEYS = VALUES = 16
PAIRS = KEYS * VALUES


def draw(name, count=50, length=64, held=False):
    return TASKS[name].draw(count, length, torch.Generator().manual_seed(0), held)


def test_every_use_has_a_task():
    assert {task.use for task in TASKS.values()} == set(USES)


def test_answers_of_pairs_are_in_the_input():
    recall, lookup, stream = draw("recall"), draw("lookup"), draw("stream")
    for row in range(50):
        shown = {int(t) // VALUES: int(t) % VALUES for t in recall.tokens[row] if t < PAIRS}
        assert len(shown) == KEYS and (recall.tokens[row, :KEYS] < PAIRS).all()
        asked = [
            (int(t) - PAIRS, int(a)) for t, a in zip(recall.tokens[row], recall.targets[row], strict=True) if a >= 0
        ]
        assert len(asked) == KEYS and all(shown[key] == answer for key, answer in asked)
        shown = {int(t) // VALUES: int(t) % VALUES for t in lookup.context[row] if t < PAIRS}
        assert all(
            shown[int(t) - PAIRS] == int(a) for t, a in zip(lookup.tokens[row], lookup.targets[row], strict=True)
        )
        for place, (t, a) in enumerate(zip(stream.tokens[row], stream.targets[row], strict=True)):
            come = {int(c) // VALUES: int(c) % VALUES for c in stream.context[row, : place + 1] if c < PAIRS}
            assert come.get(int(t) - PAIRS, -100) == int(a)


def test_bytes_are_the_librarys_and_held_out_ones_others():
    items = draw("bytes")
    assert torch.equal(items.tokens[:, 1:], items.targets[:, :-1])
    train_text, held = (bytes(part.tolist()) for part in library_source())
    assert bytes(items.tokens[0].tolist()) in train_text
    assert bytes(draw("bytes", held=True).tokens[0].tolist()) in held
    masked = draw("masked")
    gone = masked.tokens == 256
    assert torch.equal(gone, masked.targets >= 0) and 0.1 < gone.double().mean() < 0.2


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_answer_scores_so(name):
    task = TASKS[name]
    items = task.draw(128, 64, torch.Generator().manual_seed(10_007), True)
    sure = 60 * torch.nn.functional.one_hot(items.targets.clamp(min=0), task.classes).double()
    assert evaluate(lambda tokens, context: sure, task, 64) == pytest.approx(1.0 if task.better == "+" else 0.0)
    alike = evaluate(lambda tokens, context: 0 * sure, task, 64)
    assert alike < 0.12 if task.better == "+" else alike == pytest.approx(8)


def test_plain_attention_learns_a_lookup():
    """The smallest of the tasks, at a size for a test."""
    torch.manual_seed(0)
    task, length = TASKS["lookup"], 36
    model = Reader(task, length, lambda dim, heads: Attention(dim, heads))
    train(model, task, length, 250)
    assert evaluate(model, task, length) > 0.9


@pytest.fixture(scope="module")
def result():
    settings = Settings(("SlidingWindowAttention(window=8)", "StripAttention"), steps=2, lengths=(36, 64, 144))
    return compare_mechanisms(settings)


def test_rows(result):
    plain, window, strip = result.rows
    assert plain.mechanism == "Attention" and plain.parameters == 1 and plain.uses == USES
    assert set(plain.scores) == set(TASKS) and set(window.scores) == {"bytes", "recall", "masked"}
    assert set(strip.scores) == {"masked", "lookup"}, "a map's tokens are laid out on a grid"
    whys = {(name, task) for name, task, _ in missing(result)}
    assert ("SlidingWindowAttention(window=8)", "lookup") in whys and ("StripAttention", "bytes") in whys
    assert plain.efficiency is None and set(window.seconds) == {36, 64, 144} and window.efficiency is not None
    assert set(result.index()) == {row.mechanism for row in result.rows}


def test_tables_and_page(result):
    scores, cost = tables(result)
    assert scores.rows[0][1] == f"{result.rows[0].scores['bytes']:.3f}" and scores.rows[2][1] == "-"
    assert scores.rows[0][7] == "NS CS NC CC" and len(cost.rows) == 3
    text = render(result)
    assert "SlidingWindowAttention(window=8)" in text and "<script" not in text and headline(result)[:20] in text


def test_cheaper_from_which_length():
    def row(name, seconds, length=None):
        return Row(name, 1.0, (), seconds=seconds, efficiency=Efficiency(length, 1.0, 0.5))

    full = Row("Attention", 1.0, (), seconds={1: 1.0, 2: 4.0})
    assert cheaper_from(full, full) == ("-", "-")
    assert cheaper_from(row("a", {1: 2.0, 2: 3.0}, 1234.6), full) == ("1,235", "1.000, 0.500")
    assert cheaper_from(row("b", {1: 0.5, 2: 0.6}), full)[0] == "any"
    assert cheaper_from(row("c", {1: 5.0, 2: 6.0}), full)[0] == "-"


def test_only_those_that_did_the_same_are_ranked():
    """One task in which it is far ahead does not make a mechanism the best of all."""
    rows = [
        Row("Attention", 1.0, (), scores={"recall": 0.6, "lookup": 0.9}),
        Row("a", 1.0, (), scores={"recall": 0.5, "lookup": 0.5}),
        Row("b", 1.0, (), scores={"recall": 1.0}),
    ]
    found = Result(Settings(tasks=("recall", "lookup"), lengths=()), rows, 1)
    assert max(found.index(), key=found.index().get) == "b"
    assert headline(found).startswith("Of the 2 that did 2 tasks, Attention is best")


def test_same_items_and_same_seed_give_the_same():
    settings = Settings(("Attention",), ("lookup",), steps=3, lengths=())
    one, other = (compare_mechanisms(settings).rows[0].scores for _ in range(2))
    assert one == other


def test_interrupted_keeps_what_was_measured():
    def stop(what, done, total):
        if "learns recall" in what:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as raised:
        compare_mechanisms(Settings(("Attention",), ("bytes", "recall"), steps=1, lengths=()), stop)
    assert set(raised.value.partial.rows[0].scores) == {"bytes"} and tables(raised.value.partial)


def test_all_mechanisms_can_be_made():
    assert set(Settings(("all",), lengths=()).chosen()) == set(kinds())


def test_bad_input():
    for given, message in [
        (dict(mechanisms=("Atention",)), "layer of glocal.nn; it was 'Atention'; near it are Attention"),
        (dict(mechanisms=("SlidingWindowAttention(width=3)",)), "width"),
        (dict(mechanisms=("SlidingWindowAttention(",)), "expected name"),
        (dict(tasks=("sums",)), "task must be of bytes, .*; it was 'sums'"),
        (dict(length=8), "length must be at least 36; it was 8"),
        (dict(lengths=(16, 32)), "lengths must be at least three, or none"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings(**given)
    assert tasks.__all__
