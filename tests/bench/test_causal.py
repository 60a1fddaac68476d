"""The causal job: bits by hand, caches against full attention, probes on rigged models, tables and frontiers."""

import dataclasses
import json
import math
import types

import pytest
import torch
from markupsafe import escape
from torch.nn.functional import cross_entropy

from glocal.bench import causal, causal_table, decoder, folder, recall
from glocal.bench.causal import Comparison, Cost, Row, Settings, compare
from glocal.bench.corpus import to_ids
from glocal.bench.decoder import Way
from glocal.bench.run import Interrupted
from tests.bench import tiny

SMALL = {"quick": True, "passages": 3, "lengths": (192, 256)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def loaded(home):
    return decoder.load(home)


@pytest.fixture(scope="module")
def found(home):
    ways = {
        "where": ("sliding(15, 0) | sinks(2)", "moba(block_size=16, top_k=2)", "full()"),
        "cache": ("window(window=20,sinks=4)", "window(window=300, sinks=0)"),
    }
    return compare(Settings(str(home), **ways, **SMALL))


def logits(loaded, ids, mask=None):
    """The model's, with the pairs of a mask written out, by transformers' own attention."""
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None].expand(len(ids), -1, -1, -1)
    with torch.no_grad():
        return loaded.model(input_ids=ids, attention_mask=mask).logits


def bits(loaded, ids, start, mask=None):
    """Bits a byte of the tokens from ``start``: each token is a byte."""
    out = logits(loaded, ids, mask)[:, start - 1 : -1]
    return float(cross_entropy(out.double().flatten(0, 1), ids[:, start:].flatten())) / math.log(2)


def test_bits_by_hand(loaded, found):
    ids = decoder.text(loaded, None, 3, 256).ids
    full, pattern = found.rows[:2]
    assert full.bits == pytest.approx(bits(loaded, ids, 1), abs=1e-6)
    assert full.late == pytest.approx(bits(loaded, ids, 192), abs=1e-6)
    assert full.perplexity == pytest.approx(2**full.late, rel=1e-6)
    i, j = torch.arange(256)[:, None], torch.arange(256)[None]
    mask = (j <= i) & ((j >= i - 15) | (j < 2))
    assert pattern.bits == pytest.approx(bits(loaded, ids, 1, mask), abs=1e-5)
    assert pattern.late == pytest.approx(bits(loaded, ids, 192, mask), abs=1e-5)
    assert abs(pattern.late - full.late) > 1e-3
    each = [bits(loaded, row[None], 192, mask) - bits(loaded, row[None], 192) for row in ids]
    assert pattern.error == pytest.approx(torch.tensor(each).std().item() / math.sqrt(3), abs=1e-5)


def test_a_cache_that_holds_all_is_full_attention(found):
    full, everything, small = found.rows[0], found.rows[4], found.rows[3]
    assert everything.text == "window(window=300, sinks=0)" and everything.bits is None
    assert everything.late == pytest.approx(full.late, abs=1e-5) and everything.read == 1
    assert everything.needle == full.needle and everything.copy == full.copy
    assert abs(small.late - full.late) > 1e-3


@pytest.mark.parametrize(
    "policy", ["h2o(heavy=200, recent=200)", "less_is_more(budget=400)", "moba(block_size=64, top_k=9)"]
)
def test_generous_policies_change_nothing(loaded, policy):
    ids = decoder.text(loaded, None, 2, 256).ids
    expected = decoder.nats(loaded, ids)[:, 191:]
    with Way.policy(policy).on(loaded.model) as new_cache:
        mine = decoder.decoded_nats(loaded, ids, 192, new_cache(), lambda: None)
    assert torch.allclose(mine, expected, atol=1e-4)


def test_decoding_under_a_pattern_is_its_parallel_form(loaded):
    ids = decoder.text(loaded, None, 2, 200).ids
    for text in ("sliding(15, 0) | sinks(2)", "strided(8) | sliding(7, 0)", "moba(block_size=16, top_k=2)"):
        with Way("mechanism" if text.startswith("moba") else "pattern", text).on(loaded.model) as new_cache:
            mine = decoder.decoded_nats(loaded, ids, 150, new_cache(), lambda: None)
            assert torch.allclose(mine, decoder.nats(loaded, ids)[:, 149:], atol=1e-4), text


def test_what_is_read_and_held(found):
    full, pattern, moba, window, everything = found.rows
    token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, channels, bytes
    assert full.read == 1 and full.bytes == pattern.bytes == 256 * token
    assert pattern.read == 18 / 256
    assert 16 / 256 < moba.read <= 32 / 256 and moba.bytes == 256 * token + 16 * token // 2  # and a mean key a block
    assert window.read == 24 / 256 and window.bytes == 24 * token
    assert everything.bytes == 300 * token  # a window is laid out whole
    for row in found.rows:
        assert [c.length for c in row.cost] == [192, 256] and all(c.prefill > 0 and c.token > 0 for c in row.cost)
        assert row.cost[-1].bytes == row.bytes
    assert full.cost[0].bytes == 192 * token


def test_needles_stand_where_they_should(loaded):
    pieces = decoder.text(loaded, None, 2, 256).ids
    probe = recall.needles(loaded, pieces, 2)
    assert probe.prompt.shape[1] + probe.query.shape[1] + 5 == 256 and len(probe.values) == 10
    assert len(set(probe.values)) == 10
    for number, (row, value) in enumerate(zip(probe.prompt.tolist(), probe.values, strict=True)):
        line = f'\nsecret_key_17 = "{value}"\n'
        text = bytes(i - 3 for i in row)
        at = text.index(line.encode())
        assert at == round(recall.DEPTHS[number // 2] * (len(text) - len(line)))
        hay = bytes(i - 3 for i in pieces[number % 2].tolist())
        assert (text[:at] + text[at + len(line) :]) == hay[: len(text) - len(line)]
    assert bytes(i - 3 for i in probe.query[0].tolist()) == b'\nsecret_key_17 = "'


class Rigged(torch.nn.Module):
    """Says what followed the last earlier occurrence of its newest ``order`` tokens within ``reach``; else zero."""

    def __init__(self, order, reach):
        super().__init__()
        self.order, self.reach, self.config = order, reach, types.SimpleNamespace(vocab_size=259)

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        past = [] if past_key_values is None else past_key_values
        out = torch.zeros(*input_ids.shape, 259)
        for t in range(input_ids.shape[1]):
            past.append(input_ids[:, t])
            rows = torch.stack(past, 1).tolist() if past_key_values is not None else input_ids[:, : t + 1].tolist()
            for n, row in enumerate(rows):
                end = len(row) - self.order
                for at in range(end - 1, max(-1, end - self.reach - 1), -1):
                    if row[at : at + self.order] == row[end:]:
                        out[n, t, row[at + self.order]] = 1
                        break
        return types.SimpleNamespace(logits=out[:, -logits_to_keep:])


@pytest.mark.parametrize("by_token", [False, True])
def test_probes_on_a_rigged_model(loaded, by_token):
    """One that copies exactly finds everything; one that looks back 120 tokens finds what is nearer, and no more."""
    pieces = decoder.text(loaded, None, 2, 256).ids
    needles, copies = recall.needles(loaded, pieces, 2), recall.copies(loaded, pieces, 2, span=20)
    assert copies.distances == (20, 64, 128, 216)
    assert torch.equal(copies.ids[2, -20:], copies.ids[2, -84:-64])
    for reach, needle, copy in ((300, (1, 1, 1, 1, 1), (1, 1, 1, 1)), (120, (0, 0, 0.5, 1, 1), (1, 1, 0, 0))):
        model = dataclasses.replace(loaded, model=Rigged(6, reach))
        right = recall.needles_right(model, needles, list, by_token, lambda: None)
        near = [r >= 0.9 for r in right], [r <= 0.1 for r in right]
        for n, expected in enumerate(needle):
            assert expected == 0.5 or (near[0][n] if expected else near[1][n]), (reach, right)
        again = recall.copy_right(model, copies, list, by_token, lambda: None)
        assert all(r == 1 if expected else r < 0.2 for r, expected in zip(again, copy, strict=True)), (reach, again)


def test_the_kind_of_a_model(home, tmp_path):
    assert folder.kind(home) == "causal"
    (tmp_path / "model.safetensors").write_bytes(b"")

    def kind(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return folder.kind(tmp_path)

    assert kind(model_type="bert", architectures=["BertModel"]) == "encoder"
    assert kind(model_type="bert", architectures=["BertLMHeadModel"], is_decoder=True) == "causal"
    assert kind(model_type="gpt2", architectures=["GPT2LMHeadModel"]) == "causal"
    assert kind(model_type="llama") == "causal" and kind(model_type="roberta") == "encoder"
    for config in (
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    ):
        with pytest.raises(ValueError, match=r"is a \w+; supported are causal language models"):
            kind(**config)
    with pytest.raises(ValueError, match="names no model_type"):
        kind()


def test_text_of_a_file(loaded, tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("äb" * 300, encoding="utf-8")  # 900 bytes
    text = decoder.text(loaded, path, 9, 300)
    assert text.ids.shape == (3, 300) and text.source == "in.txt" and text.sizes[:, -1].tolist() == [300] * 3
    assert torch.equal(text.ids[0], to_ids("äb" * 100))
    with pytest.raises(ValueError, match="not enough text for a piece of 1000"):
        decoder.text(loaded, path, 1, 1000)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        decoder.text(loaded, path, 1, 10)


def test_tokens_of_several_bytes(tmp_path):
    """Bits per byte is the nats of all tokens over the bytes of their text, whatever the tokens are."""
    home, path = tiny.llama(tmp_path / "pairs", layers=1, bytewise=False), tmp_path / "in.txt"
    written = "def naïve(self): return the self import of äöü and 世界 or self\n" * 200
    path.write_text(written, encoding="utf-8")
    one = decoder.load(home)
    assert not one.bytewise and one.start == one.tokenizer.bos_token_id
    text = decoder.text(one, path, 2, 192)
    assert text.ids.shape == (2, 192) and set(text.ids[:, 0].tolist()) == {one.start}
    said = one.text(text.ids[0].tolist())
    assert written.startswith(said.rstrip("\ufffd")) and len(said) > 192
    found = compare(Settings(str(home), str(path), where=("sliding(9, 0)",), passages=2, quick=True, lengths=(192,)))
    nats = cross_entropy(
        logits(one, text.ids)[:, :-1].double().flatten(0, 1), text.ids[:, 1:].flatten(), reduction="none"
    )
    size = sum(len(one.text(row).encode()) for row in text.ids.tolist())
    assert found.rows[0].bits == pytest.approx(float(nats.sum()) / size / math.log(2), abs=1e-6)
    late = sum(len(one.text(r).encode()) - len(one.text(r[:144]).encode()) for r in text.ids.tolist())
    assert found.rows[0].late == pytest.approx(float(nats.view(2, -1)[:, 143:].sum()) / late / math.log(2), abs=1e-6)
    assert len(found.rows[1].needle) == 5


@pytest.mark.parametrize(
    "settings,word",
    [
        ({"where": ("sliding(",)}, r"where 'sliding\('"),
        ({"where": ("moba(block_size=0)",)}, "where 'moba"),
        ({"where": ("moba(blocks=4)",)}, "blocks"),
        ({"where": ("window(9999)",)}, "where"),
        ({"where": ("per_head([full(), full()])",)}, "2 heads"),
        ({"cache": ("fifo(window=3)",)}, "'fifo' is no cache policy; there are window, h2o"),
        ({"cache": ("window(size=3)",)}, "window has no setting 'size'; it has window, sinks"),
        ({"cache": ("window()",)}, "window needs window"),
        ({"cache": ("window(3)",)}, "expected name"),
        ({"cache": ("window(window=0)",)}, "window must be at least 1"),
        ({"cache": ("less_is_more(budget=5, start=7)",)}, "start must be one of the 3 layers"),
        ({"passages": 0}, "passages"),
        ({"lengths": (100,)}, "lengths must be from 192"),
        ({"lengths": (1024,)}, "reads up to 512 tokens"),
        ({"input": "/nowhere"}, "cannot be read"),
    ],
)
def test_bad_settings(home, settings, word):
    with pytest.raises(ValueError, match=word):
        compare(Settings(str(home), **{"quick": True, **settings}))


def test_defaults_are_readable():
    ways = Settings().ways()
    assert [w.text for w in ways] == ["full()", *causal.LADDER, *causal.CACHES]
    assert [w.kind for w in ways].count("cache") == 5 and ways[6].kind == "mechanism"
    assert [w.text for w in Settings(cache=("moba()",)).ways()] == ["full()", "moba()"]
    assert len(Settings(quick=True).ways()) == 5


def test_interruption_keeps_what_was_measured(home):
    def step(what, done, total):
        if what.startswith("recall: sliding"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        compare(Settings(str(home), where=("sliding(15, 0)",), **SMALL), step)
    full, pattern = stop.value.partial.rows
    assert full.needle and not pattern.needle and not full.cost
    shown = causal_table.tables(stop.value.partial)
    assert [len(t.rows) for t in shown] == [2, 1, 1, 0] and causal_table.headline(stop.value.partial)


def result() -> Comparison:
    def row(kind, text, read, kept, late, token, found):
        costs = tuple(Cost(n, token * 3, token, int(kept * n)) for n in (1024, 2048))
        parallel = None if kind == "cache" else late + 0.1
        return Row(kind, text, read, int(kept * 2048), parallel, late, 0.01, 2**late, (found,) * 2, (found,), costs)

    rows = (
        row("full", "full()", 1.0, 4096, 2.0, 0.010, 0.9),
        row("pattern", "sliding(255, 0) | sinks(4)", 0.127, 4096, 2.012, 0.012, 0.3),
        row("pattern", "sliding(63, 0)", 0.031, 4096, 2.3, 0.011, 0.0),
        row("cache", "h2o(heavy=256, recent=256)", 0.25, 1024, 2.016, 0.02, 0.5),
        row("cache", "moba(block_size=64, top_k=8)", 0.25, 4200, 2.02, 0.03, 0.8),
    )
    return Comparison("tiny", "some text", 16, 2048, 4, 8, 32, 1, (0.0, 0.5), (128,), 4, rows)


def test_frontier_by_hand():
    rows = list(result().rows)
    assert causal_table.frontier(rows, lambda r: r.read) == [rows[2], rows[1], rows[0]]
    assert causal_table.frontier(rows, lambda r: r.bytes) == [rows[3], rows[0]]
    for price in (lambda r: r.read, lambda r: r.bytes, lambda r: r.cost[-1].token):
        kept = causal_table.frontier(rows, price)
        for row in rows:  # beaten by a row of the frontier, or on it
            beaten = any(price(f) <= price(row) and f.late <= row.late for f in kept if f is not row)
            assert beaten != (row in kept)


def test_headline():
    said = causal_table.headline(result())
    assert said == (
        "sliding(255, 0) | sinks(4) keeps bits per byte within 0.6 % of full attention with 12.7 % of the keys at "
        "2,048 tokens (2.0120 against 2.0000 on 16 pieces of some text). cache h2o(heavy=256, recent=256) keeps bits "
        "per byte within 0.8 % of full attention and holds 25.0 % of full attention's cache. sliding(255, 0) | "
        "sinks(4) finds 30.0 % of a needle's characters, full attention 90.0 %."
    )


def test_tables_hold_every_number():
    text, needle, copy, cost = causal_table.tables(result())
    assert text.rows[3] == (
        "cache h2o(heavy=256, recent=256)", "25.0 %", "2.0 MiB", "-", "2.0160", "+0.0160", "0.0100", "4.045",
    )  # fmt: skip
    assert text.rows[1][3] == "2.1120"
    assert needle.header == ("attention", "0 %", "50 %", "mean") and needle.rows[3][1:] == ("50.0 %",) * 3
    assert copy.header == ("attention", "128", "mean") and copy.rows[4][1:] == ("80.0 %",) * 2
    assert cost.rows[8][2:] == ("60.0 ms", "0.50x", "20.0 ms", "0.50x", "2.0 MiB", "25.0 %")
    assert needle.notes[1][0] == "0 %, 50 %" and len(cost.notes) == len(cost.header)
    for t in (text, needle, copy, cost):
        assert len(t.header) == len(t.legend) and all(len(r) == len(t.header) for r in t.rows)
    json.dumps(result().to_dict())


def test_report_holds_every_number():
    from glocal.bench.causal_report import render

    page = render(result())
    for table in causal_table.tables(result()):
        for row in table.rows:
            assert all(f">{cell}<" in page for cell in row), row
    assert str(escape(causal_table.headline(result()))) in page
    assert page.count("<svg") == 4 and page.count('class="ring"') == 3 + 2 + 1 and page.count("<img") == 3
    assert "https:" not in page and "<script" not in page
