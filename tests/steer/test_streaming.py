"""The loop is a reading of everything anew at each step; compressed, it is one pass under the segment mask."""

import gc
import weakref

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from glocal.steer import streaming
from glocal.steer.actions import Actions
from glocal.steer.compression import COMPRESSED, HIGH, LOW, QUESTION, REPLY, SYSTEM, Compressor, Segments, segment_mask
from glocal.steer.streaming import StreamingAssistant
from tests.steer import models

SILENT, RESPOND, ASK = 11, 12, 13
TWO, THREE = Actions(SILENT, RESPOND), Actions(SILENT, RESPOND, ASK)
STEPS = 20


def speaker(name, model):
    return model.language_model if "blip" in name else model


def table(model, ids):
    return model.get_input_embeddings()(torch.tensor(ids)).detach()


def frames(count, tokens=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 32, generator=draw) for _ in range(count)]


def anew(model, embeds):
    """Logits after embeddings ``(n, C)``, without a cache."""
    with torch.no_grad():
        more = {}
        if model.config.model_type == "paligemma":  # which sees its prompt both ways unless told otherwise
            more["attention_mask"] = torch.ones(1, 1, len(embeds), len(embeds), dtype=torch.bool).tril()
        positions = torch.arange(len(embeds))[None]
        return model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False, **more).logits[0, -1]


@pytest.mark.parametrize("name", [*models.VISION, *models.TEXT])
def test_a_reply_of_every_class_is_the_one_read_anew(name):
    """Also after an exception, the model is what it was."""
    model = models.build(name)
    lm = speaker(name, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = {key: len(m._forward_hooks) + len(m._forward_pre_hooks) for key, m in model.named_modules()}
    system, question, (frame,) = [1, 20, 21], [30, 31], frames(1, tokens=4)

    def broken(frame):
        raise ZeroDivisionError

    settings = dict(actions=TWO, threshold=1.1, system=torch.tensor(system), max_new_tokens=STEPS)
    with pytest.raises(ZeroDivisionError):
        list(StreamingAssistant(model, low=broken, **settings).watch([frame]))
    assistant = StreamingAssistant(model, low=lambda f: f, **settings)
    (step,) = assistant.watch([frame], {0: torch.tensor(question)})
    embeds = torch.cat([table(lm, system + question), frame, table(lm, [RESPOND])])
    expected = []
    for _ in range(STEPS):
        expected.append(int(anew(lm, embeds).argmax()))
        embeds = torch.cat([embeds, table(lm, expected[-1:])])
    assert list(step.tokens) == expected and step.actions == ("respond",)
    assert step.cached == len(embeds) and len(set(expected)) > 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks == {key: len(m._forward_hooks) + len(m._forward_pre_hooks) for key, m in model.named_modules()}


@pytest.mark.parametrize("name", [n for n in [*models.VISION, *models.TEXT] if n not in ("paligemma", "gemma3")])
def test_a_reply_is_what_generate_gives(name):
    """PaliGemma and Gemma 3 generate from no embeddings."""
    model = models.build(name)
    lm = speaker(name, model)
    (frame,) = frames(1, tokens=5)
    assistant = StreamingAssistant(model, actions=TWO, low=lambda f: f, threshold=1.1, max_new_tokens=STEPS)
    (step,) = assistant.watch([frame])
    embeds = torch.cat([frame, table(lm, [RESPOND])])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    found = lm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    assert list(step.tokens) == found[0].tolist()


@pytest.mark.parametrize("feed", [True, False])
def test_every_choice_is_the_one_read_anew(feed):
    """Low view, closer look, choice again; the whole stream written out by hand."""
    model = models.build("llama")
    seen = frames(24)
    settings = dict(low=lambda f: f, high=lambda f: torch.cat([f, -f, f * 2]), feed_actions=feed, threshold=0.36)
    assistant = StreamingAssistant(model, actions=THREE, max_new_tokens=3, prefix=torch.tensor([40]), **settings)
    past, kinds = torch.zeros(0, 32), set()
    for frame, step in zip(seen, assistant.watch(seen), strict=True):
        past = torch.cat([past, frame])
        shares = anew(model, past)[[SILENT, RESPOND, ASK]].softmax(-1)
        assert step.silence == pytest.approx(float(shares[0]), abs=1e-5)
        order = ["silent", "respond", "ask"] if shares[0] >= 0.36 else ["respond", "ask"]
        first = max(order, key=lambda n: shares[["silent", "respond", "ask"].index(n)])
        assert step.actions[0] == first
        taken = first
        if first != "silent":
            past = torch.cat([past, *([table(model, [ASK])] if feed else []), frame, -frame, frame * 2])
            shares = anew(model, past)[[SILENT, RESPOND]].softmax(-1)
            taken = "silent" if shares[0] >= 0.36 and shares[0] > shares[1] else "respond"
            assert step.actions == (first, taken)
        if taken == "respond":
            past = torch.cat([past, table(model, [RESPOND, 40])])
            for token in step.tokens:
                assert int(anew(model, past).argmax()) == token
                past = torch.cat([past, table(model, [token])])
        elif feed:
            past = torch.cat([past, table(model, [SILENT])])
        assert step.cached == len(past)
        kinds.add(step.actions)
    assert len(kinds) >= 3 and {k[-1] for k in kinds} == {"silent", "respond"}


def changed(model, **more):
    compressor = Compressor(model, 5, **more)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return compressor


@pytest.mark.parametrize("name, count", [("llama", 1), ("qwen2", 2), ("llava", 1)])
def test_a_compressed_stream_is_one_pass_under_the_segment_mask(name, count):
    """Questions in the middle of a turn, closer looks, replies, four turns and more."""
    model = models.build(name).double()
    compressor = changed(model)
    seen = [frame.double() for frame in frames(16, tokens=3)]
    plan = iter([0, 0, 2, 0, 2, 1, 0, 2, 2, 0, 1, 2, 0, 0, 2, 0])  # silent, looked and silent, looked and spoke
    assistant = StreamingAssistant(
        model,
        actions=THREE,
        low=lambda f: f,
        high=lambda f: torch.cat([f, -f]),
        system=torch.tensor([1, 20]),
        max_new_tokens=2,
        compressor=compressor,
        places=Segments(count),
    )
    wanted = {0: ("silent",), 1: ("ask", "silent"), 2: ("ask", "respond")}
    ct = compressor.embedding.detach()[None].expand(count, -1)
    done = [(table(model, [1, 20]).double(), SYSTEM, 0)]  # finished turns, with compression tokens
    turn, number, cached = [], 1, 2
    original = streaming.choose
    try:
        with assistant.session() as session:
            for n, (frame, p) in enumerate(zip(seen, plan, strict=True)):
                actions = iter([{"silent": SILENT, "respond": RESPOND, "ask": ASK}[a] for a in wanted[p]])
                streaming.choose = lambda *a, actions=actions, **k: (
                    torch.tensor([next(actions)]),
                    original(*a, **k)[1],
                )
                if n in (0, 5):
                    session.ask(torch.tensor([50 + n, 60]))
                    turn.append((table(model, [50 + n, 60]).double(), QUESTION, number))
                step = session.see(frame)
                assert step.actions == wanted[p]
                turn.append((frame, LOW, number))
                expected = passed(model, done + turn)[[SILENT, RESPOND, ASK]].softmax(-1)[0]
                assert step.silence == pytest.approx(float(expected), abs=1e-6)
                if p:
                    turn.append((torch.cat([table(model, [ASK]).double()]), LOW, number))
                    turn.append((torch.cat([frame, -frame]), HIGH, number))
                if p < 2:
                    turn.append((table(model, [SILENT]).double(), HIGH if p else LOW, number))
                else:
                    said = table(model, [RESPOND, *step.tokens]).double()
                    done += written([*turn, (said, REPLY, number)], ct, number)
                    turn, number = [], number + 1
                    cached = sum(len(e) for e, kind, _ in done if kind in (SYSTEM, QUESTION, COMPRESSED))
                    assert step.cached == cached == len(session.kinds)
                    length = sum(len(e) for e, _, _ in done)
                    kinds = torch.tensor([kind for e, kind, _ in done for _ in range(len(e))])
                    stays = torch.isin(kinds, torch.tensor([SYSTEM, QUESTION, COMPRESSED])).nonzero()[:, 0]
                    assert session.length == length and torch.equal(session.positions, stays)
    finally:
        streaming.choose = original
    assert number == 7 and cached < 0.5 * length


def written(turn, ct, number):
    """A turn with its compression tokens: after each run of low frames, each high frame, and the reply."""
    out = []
    for n, (embeds, kind, _) in enumerate(turn):
        out.append((embeds, kind, number))
        following = turn[n + 1][1] if n + 1 < len(turn) else None
        # A silent token after a high frame belongs to it.
        if (kind == LOW and following != LOW) or kind == REPLY or (kind == HIGH and following != HIGH):
            out.append((ct, COMPRESSED, number))
    return out


def passed(model, parts):
    """Logits after all parts in one pass; the session has put the compressor's maps in."""
    embeds = torch.cat([e for e, _, _ in parts])[None]
    kinds, turns = (torch.tensor([p[n] for p in parts for _ in range(len(p[0]))])[None] for n in (1, 2))
    with torch.no_grad():
        return model(
            inputs_embeds=embeds,
            attention_mask=segment_mask(kinds, turns),
            position_ids=torch.arange(embeds.shape[1])[None],
            compressed=kinds == COMPRESSED,
            use_cache=False,
        ).logits[0, -1]


def test_keeping_all_and_adding_nothing_is_no_compression(monkeypatch):
    model = models.build("qwen2").double()
    seen = [frame.double() for frame in frames(12)]
    settings = dict(actions=TWO, low=lambda f: f, threshold=0.5, max_new_tokens=3)
    plain = list(StreamingAssistant(model, **settings).watch(seen))
    monkeypatch.setattr(streaming, "kept", lambda kinds: torch.ones_like(kinds, dtype=torch.bool))
    nothing = dict(compressor=changed(model), places=lambda kinds, pieces: torch.zeros_like(kinds))
    same = list(StreamingAssistant(model, **settings, **nothing).watch(seen))
    assert 0 < sum(step.spoke for step in plain) < 12
    assert [(s.actions, s.tokens, s.cached) for s in plain] == [(s.actions, s.tokens, s.cached) for s in same]
    assert [s.silence for s in plain] == pytest.approx([s.silence for s in same], abs=1e-12)


def test_a_silent_stream_stays_bounded():
    model = models.build("llama")
    settings = dict(actions=TWO, low=lambda f: f, threshold=0.0, compressor=Compressor(model, 5), feed_actions=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(models.VOCAB))
    model.lm_head.bias.data[SILENT] = 99
    found = list(StreamingAssistant(model, **settings, turn_tokens=8).watch(frames(40)))
    assert max(s.cached for s in found) <= 40 // 4 + 8 and found[-1].cached == 10
    assert list(StreamingAssistant(model, **settings).watch(frames(40)))[-1].cached == 80


def test_the_state_is_dropped_at_the_end_and_after_an_exception():
    model = models.build("llama")
    assistant = StreamingAssistant(
        model, actions=TWO, low=lambda f: f, compressor=changed(model), threshold=0.7, max_new_tokens=2
    )
    with assistant.session() as session:
        session.see(frames(1)[0])
        cache = weakref.ref(session._cache)
    gc.collect()
    assert cache() is None and session.length == 0 and not session._turn and not len(session.kinds)
    with pytest.raises(ValueError, match="the session is over"):
        session.see(frames(1)[0])
    with pytest.raises(ZeroDivisionError), assistant.session() as session:
        session.see(frames(1)[0])
        raise ZeroDivisionError
    assert session._cache is None and not model._forward_pre_hooks
    # A stream that is left in the middle, too.
    stream = assistant.watch(frames(3))
    next(stream)
    assert model._forward_pre_hooks
    stream.close()
    assert not model._forward_pre_hooks
    first = [s.silence for s in assistant.watch(frames(3))]
    # Two streams that take turns, and end one before the other.
    longer = [s.silence for s in assistant.watch(frames(5, seed=2))]
    one, two, found = assistant.watch(frames(3)), assistant.watch(frames(5, seed=2)), ([], [])
    for _ in range(5):
        for n, stream in enumerate((one, two)):
            found[n].extend(s.silence for s in [next(stream, None)] if s)
    assert found == (first, longer) and not list(two) and not model._forward_pre_hooks
    assert first == [s.silence for s in assistant.watch(frames(3))]


def reader():
    words = {w: n for n, w in enumerate(["[UNK]", "a", "cup", ",", "]", ".", "dog"])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    from tokenizers.pre_tokenizers import Whitespace

    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def test_texts_and_actions_come_from_the_tokenizer():
    tokenizer = reader()
    actions = Actions.of(tokenizer, ask=None)
    assert actions == Actions(silent=3, respond=4) and Actions.of(tokenizer).ids == (3, 4, 5)
    with pytest.raises(ValueError, match=r"ask must be one token of the tokenizer; 'a cup' is \[1, 2\]"):
        Actions.of(tokenizer, ask="a cup")
    with pytest.raises(ValueError, match="silent must be one token"):
        Actions.of(tokenizer, silent="zebra")
    model = models.build("llama")

    def only(ids, logits):
        return torch.full_like(logits, -1e9).index_fill(1, torch.tensor([1 + min(1, ids.shape[1])]), 0.0)

    settings = dict(actions=actions, low=lambda f: f, threshold=1.1, max_new_tokens=9, end={2}, processor=only)
    assistant = StreamingAssistant(model, tokenizer=tokenizer, system="a dog", prefix="a", **settings)
    (step,) = assistant.watch(frames(1), {0: "cup ?"}, fps=4)
    assert step.tokens == (1, 2) and step.answer == "a cup" and step.cached == 2 + 2 + 2 + 1 + 1 + 2
    with pytest.raises(ValueError, match="tokenizer must be given for texts"):
        list(StreamingAssistant(model, system="a dog", **settings).watch(frames(1)))


def test_half_precision():
    model = models.build("llama").bfloat16()
    compressor = Compressor(model, 5)
    settings = dict(low=lambda f: f, high=lambda f: f.repeat(3, 1), threshold=0.5, max_new_tokens=2)
    found = list(StreamingAssistant(model, actions=THREE, compressor=compressor, **settings).watch(frames(8)))
    assert len(found) == 8 and any(s.spoke for s in found)


def test_bad_input():
    model = models.build("llama")
    with pytest.raises(ValueError, match=r"actions\.ask and high belong together"):
        StreamingAssistant(model, actions=THREE, low=lambda f: f)
    with pytest.raises(ValueError, match="turn_tokens needs a compressor"):
        StreamingAssistant(model, actions=TWO, low=lambda f: f, turn_tokens=9)
    with pytest.raises(ValueError, match="threshold must be at least 0; it was -1"):
        StreamingAssistant(model, actions=TWO, low=lambda f: f, threshold=-1)
    with pytest.raises(TypeError, match="DynamicSlidingWindowLayer"):
        gemma = models.build("gemma3")
        StreamingAssistant(gemma, actions=TWO, low=lambda f: f, compressor=Compressor(gemma, 5))
    with pytest.raises(ValueError, match=r"embeddings \(n, 32\); they were \(2, 31\)"):
        list(StreamingAssistant(model, actions=TWO, low=lambda f: f[:, :31]).watch(frames(1)))
    with pytest.raises(ValueError, match="in its with block already"):
        session = StreamingAssistant(model, actions=TWO, low=lambda f: f).session()
        with session, session:
            pass
