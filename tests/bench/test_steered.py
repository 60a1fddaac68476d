"""One question, or POPE's protocol: what is said is what the model and the methods give, however it is batched."""

import numpy as np
import pytest
import torch
from PIL import Image

from glocal.bench import steered
from glocal.bench.pope import poll, polled
from glocal.bench.run import Interrupted
from glocal.bench.scenes import scenes
from glocal.bench.steered import Settings, ask_both, evaluate, example, views_of
from glocal.bench.steered_report import pictured, render
from glocal.bench.steered_table import caption_table, headline, poll_table, refusals
from glocal.bench.table import markdown
from glocal.bench.vlm import Way, ask, load, read_picture
from glocal.bench.ways import PLAIN, WAYS, _writers
from tests.bench.tiny_vlm import write


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load(str(write(tmp_path_factory.mktemp("vlm"))))


QUESTIONS = ["Is there a red square?", "How many stars are there?", "Describe the picture."]


@pytest.fixture
def photos():
    return [scene.image() for scene in scenes(3, 0, held_out=True)]


def test_answers_are_those_of_generate_and_of_a_batch(vlm, photos):
    together = ask(vlm, photos, QUESTIONS, WAYS[PLAIN], 6)
    for photo, question, answer in zip(photos, QUESTIONS, together, strict=True):
        inputs = vlm.processor(images=photo, text=f"<image> {question} Answer:", return_tensors="pt")
        with torch.no_grad():
            logits = vlm.model(**inputs).logits[0, -1]
            ids = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert torch.allclose(answer.first, logits.softmax(-1), atol=1e-5)
        assert answer.text == vlm.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", WAYS)
def test_every_way_answers_and_leaves_the_model(vlm, photos, name):
    before = ask(vlm, photos, QUESTIONS, WAYS[PLAIN], 4)
    if name == "var":  # random weights have no sinks
        with pytest.raises(ValueError, match="no such sinks"):
            ask(vlm, photos, QUESTIONS, WAYS[name], 4)
        return
    one = ask(vlm, photos, QUESTIONS, WAYS[name], 4)
    alone = [ask(vlm, [p], [q], WAYS[name], 4)[0] for p, q in zip(photos, QUESTIONS, strict=True)]
    after = ask(vlm, photos, QUESTIONS, WAYS[PLAIN], 4)
    assert [a.text for a in before] == [a.text for a in after]
    if name != "agla-random":  # draws one map after the other
        assert [a.text for a in one] == [a.text for a in alone]
    assert "generate" not in vars(vlm.model)


def test_both_answers_side_by_side(vlm):
    image, question = example(3)
    found = ask_both(vlm, image, question, "agla", words=3, max_tokens=4)
    assert found.plain.text == ask(vlm, [image], [question], WAYS[PLAIN], 4)[0].text
    assert found.steered.text == ask(vlm, [image], [question], WAYS["agla"], 4)[0].text
    assert len(found.words) == 3 and len(found.views) == 1
    assert found.views[0].kept.mean() == pytest.approx(0.5, abs=0.05)
    best = max(found.plain.first.max(), found.steered.first.max())
    assert max(found.words[0][1:]) == pytest.approx(float(best))
    assert len(views_of(found, image).axes) == 3
    assert len(views_of(ask_both(vlm, image, question, "paint", max_tokens=2), image).axes) == 1


def test_what_carve_shows_instead_is_drawn_and_asked_about(vlm):
    image, question = example(3)
    found = ask_both(vlm, image, question, "carve", max_tokens=4)
    assert found.shown is not None and max(found.shown.size) >= 96
    assert found.steered.text == ask(vlm, [found.shown], [question], WAYS[PLAIN], 4)[0].text
    assert [axes.get_title() for axes in views_of(found, image).axes] == ["picture", "what is asked about instead"]


def test_heads_that_write_what_is_named_are_found_once(vlm):
    chosen = _writers(vlm)
    assert len(chosen) == 1  # of four, the tenth and at least one
    assert _writers(vlm) is chosen
    with WAYS["heads"].enter(vlm, [], []) as method:
        assert method.heads == chosen and method.factor == 2.0


def test_the_evaluation_is_counted_by_hand(vlm):
    settings = Settings(methods=(PLAIN, "agla"), scenes=4, captions=2, count=2)
    result = evaluate(vlm, settings, batch=5)
    some = scenes(4, settings.seed, held_out=True, noise=settings.noise, opacity=settings.opacity)
    for row in result.rows:
        assert [p.count for p in row.polled] == [len(poll(some, how, 2, settings.seed)) for how in steered.NEGATIVES]
        asked = poll(some, "popular", 2, settings.seed)
        said = [ask(vlm, [some[n].image()], [q.text], WAYS[row.name], 4)[0].text for n, q in asked]
        assert row.polled[1] == polled(said, [question for _, question in asked])
        assert row.chair is not None and row.token > 0 and row.held > 0
    assert result.rows[1].held > 1.5 * result.rows[0].held  # a second branch has a second cache
    assert result.rows[0].name == PLAIN and not any(row.refused for row in result.rows)


def test_tables_sentence_and_page(vlm):
    result = evaluate(vlm, Settings(methods=(PLAIN, "agla", "paint"), scenes=2, captions=1, count=1))
    page = render(result, pictured(vlm, result, 1))
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert page.count("data:image/png") == 1 and "glocal steer" in page
    table = poll_table(result)
    assert len(table.rows) == 9 and table.rows[0][-1] == "-" and table.rows[3][-1][0] in "+-"
    assert [caption_table(result).rows[0][n] for n in (-1, -3)] == ["1.0x", "1.0x"]
    assert len(markdown(table.header, table.rows).splitlines()) == 11
    assert "2 held-out scenes" in headline(result) and not refusals(result).rows


def test_what_does_not_fit_is_told_and_the_rest_goes_on(vlm, monkeypatch):
    def refuse(*_):
        raise ValueError("no <tower> here")

    monkeypatch.setitem(WAYS, "paint", Way("paint", "refuses", refuse))
    result = evaluate(vlm, Settings(methods=("paint", PLAIN), scenes=1, captions=0, count=1))
    assert [row.refused for row in result.rows] == ["no <tower> here", ""]
    assert refusals(result).rows == (("paint", "no <tower> here"),)
    assert "no &lt;tower&gt; here" in render(result) and caption_table(result).rows[0][1:5] == ("-",) * 4
    assert "Nothing was measured" in headline(result)


def test_interrupted_it_says_what_was_done(vlm, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(WAYS, "paint", Way("paint", "stops", stop))
    with pytest.raises(Interrupted) as caught:
        evaluate(vlm, Settings(methods=(PLAIN, "paint"), scenes=1, captions=0, count=1))
    assert [row.name for row in caught.value.partial.rows] == [PLAIN]


def test_bad_input(vlm, tmp_path):
    with pytest.raises(ValueError, match="method must be one of plain, agla"):
        ask_both(vlm, Image.new("RGB", (96, 96)), "?", "magic")
    with pytest.raises(ValueError, match="method must be one of"):
        Settings(methods=("magic",))
    with pytest.raises(ValueError, match="scenes must be at least 1"):
        Settings(scenes=0)
    with pytest.raises(ValueError, match="opacity from 0 to 1"):
        Settings(opacity=2.0)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(str(tmp_path))
    broken = tmp_path / "photo.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(broken)
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(tmp_path / "nothing.png")
    fine = tmp_path / "fine.png"
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(fine)
    assert read_picture(fine).size == (6, 4) and read_picture(fine).mode == "RGB"
