"""Adaptations in use: generation with every cache, choice of layers, mechanisms, saving, and what is refused."""

import json
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from glocal import Full, PerHead, Sinks, Sliding
from glocal.hf import MECHANISMS, Mechanism, adapt, attention, readapt
from glocal.hf.install import attention_modules
from glocal.patterns import Keys
from tests.hf import models
from tests.hf.test_architectures import far, state

NEW = 10
SINKS = "sliding(2, 0) | sinks(2)"


def generate(model, batch, **more) -> Any:
    torch.manual_seed(7)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | more
    return model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)


def scores(out) -> Tensor:
    """Logits of the new tokens, ``(B, NEW, vocabulary)``."""
    return torch.stack(out.logits, 1)


def forced(model, batch, sequences: Tensor) -> Tensor:
    """The same logits from one forward over the whole text, without a cache."""
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=sequences, attention_mask=mask, position_ids=places, use_cache=False)
    return whole.logits[:, -NEW - 1 : -1]


def prompt(name: str, pad: int = 3, length: int = 9) -> dict[str, Tensor]:
    batch = models.inputs(name, batch=2, length=length, pad=pad, left=True)
    batch.pop("decoder_input_ids", None)
    return batch


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "no cache": {"use_cache": False},
}
GENERATORS = {
    "llama": {},
    "mistral": {"sliding_window": 6},  # smaller than the prompt
    "gemma2": {"sliding_window": 12},  # is filled while decoding
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4": {},
    "gpt2": {},
    "t5": {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generate_is_the_models_own(name, way):
    model, batch = models.build(name, **GENERATORS[name]), prompt(name)
    own = generate(model, batch, **WAYS[way])
    with adapt(model, "full()"):
        mine = generate(model, batch, **WAYS[way])
    assert torch.equal(own.sequences, mine.sequences)
    assert far(scores(mine), scores(own)) < 1e-5


def test_whisper_generates():
    model, features = models.build("whisper"), models.inputs("whisper")["input_features"]
    own = model.generate(features, max_new_tokens=6)
    with adapt(model, "full()"):
        assert torch.equal(model.generate(features, max_new_tokens=6), own)
    with adapt(model, "full()", layers="decoder"), adapt(model, "sliding(2, 2)", layers="encoder"):
        model.generate(features, max_new_tokens=6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pattern", [SINKS, "sliding(3, 0)", "full()"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
def test_decoding_is_the_parallel_form(name, pattern, cache):
    """Step by step as in one forward, with windows of the models' own that end before and after the prompt."""
    model, batch = models.build(name, **GENERATORS[name]), prompt(name)
    with adapt(model, pattern):
        out = generate(model, batch, **(WAYS["static"] if cache == "static" else {}))
        assert far(scores(out), forced(model, batch, out.sequences)) < 1e-5
    if pattern != "full()":
        assert far(scores(out), forced(model, batch, out.sequences)) > 1e-4


@pytest.mark.parametrize("pattern", ["sliding(4, 0)", "sliding(2, 0) | sinks(3)", "block(4) | strided(5)", "per head"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_rows_with_padding_are_as_alone(name, cache, pattern):
    model, batch = models.build(name, **GENERATORS[name]), prompt(name, pad=4)
    where = PerHead([Sinks(2) | Sliding(n, 0) for n in range(4)]) if pattern == "per head" else pattern
    with adapt(model, where):
        both = generate(model, batch, **(WAYS["static"] if cache == "static" else {}))
        for row, hidden in enumerate((0, 4)):
            one = {key: value[row : row + 1, hidden:] for key, value in batch.items()}
            alone = generate(model, one)
            assert torch.equal(alone.sequences[0], both.sequences[row, hidden:])
            assert far(scores(alone)[0], scores(both)[row]) < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_text_in_pieces(name, kind):
    """Prompts that follow on what a cache holds, with padding and windows that are full by then."""
    model = models.build(name, **GENERATORS[name])
    batch = models.inputs(name, batch=2, length=20, pad=3, left=True)
    places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def pieces():
        cache = hf.DynamicCache(config=model.config)
        if kind == "static":
            cache = hf.StaticCache(config=model.config, max_cache_len=24)
        out, start = [], 0
        for size in (4, 5, 1, 8, 2):
            at = slice(start, start + size)
            with torch.no_grad():
                step = model(
                    input_ids=batch["input_ids"][:, at],
                    attention_mask=batch["attention_mask"][:, : start + size],
                    position_ids=places[:, at],
                    past_key_values=cache,
                )
            out.append(step.logits)
            start += size
        return torch.cat(out, 1)[batch["attention_mask"].bool()]

    own = pieces()
    with adapt(model, "full()"):
        assert far(pieces(), own) < 1e-5
    with adapt(model, SINKS):
        whole = models.outputs(model, batch | {"position_ids": places})[batch["attention_mask"].bool()]
        assert far(pieces(), whole) < 1e-5
    assert far(own, whole) > 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_generate_goes_on_with_a_static_cache(name):
    """Generate builds the mask ahead, over keys of which the sliding layers have dropped the first by then."""
    model = models.build(name, **GENERATORS[name])
    batch = models.inputs(name, batch=2, length=20, pad=9, left=True)
    first = {key: value[:, :12] for key, value in batch.items()}
    first["position_ids"] = (first["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def go_on():
        cache = hf.StaticCache(config=model.config, max_cache_len=40)
        models.outputs(model, first | {"past_key_values": cache})
        return generate(model, batch, past_key_values=cache)

    own = go_on()
    with adapt(model, "full()"):
        mine = go_on()
    assert torch.equal(mine.sequences, own.sequences) and far(scores(mine), scores(own)) < 1e-5


@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents(window):
    model = models.build("mistral", sliding_window=window)
    first, second = models.ids(1, 7, seed=5), models.ids(1, 9, seed=6)
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.cat([torch.arange(7), torch.arange(9)])[None],
        "use_cache": False,
    }
    own = models.outputs(model, packed)
    with adapt(model, "full()"):
        assert far(models.outputs(model, packed), own) < 2e-6
    with adapt(model, "sliding(2, 0)"):
        mine = models.outputs(model, packed)
        alone = [models.outputs(model, {"input_ids": one}) for one in (first, second)]
        assert far(mine, torch.cat(alone, 1)) < 2e-6
    assert far(mine, own) > 1e-4


def test_a_window_taken_away_while_decoding():
    """The model's default cache drops what its window hides; without the window a full cache is needed."""
    narrow, wide, batch = models.build("mistral", sliding_window=5), models.build("mistral"), prompt("mistral")
    own = generate(wide, batch)
    with adapt(narrow, own_window=False):
        mine = generate(narrow, batch, past_key_values=hf.DynamicCache())
        assert torch.equal(mine.sequences, own.sequences) and far(scores(mine), scores(own)) < 1e-5
        for cache in ({}, WAYS["static"]):
            with pytest.raises(ValueError, match=r"own_window=False .*DynamicCache\(\)"):
                generate(narrow, batch, **cache)
        packed = {"position_ids": torch.arange(6).repeat(2)[None], "use_cache": False}
        with pytest.raises(ValueError, match="own_window=False"):
            narrow(input_ids=models.ids(1, 12), **packed)


def test_training():
    """Gradients of the adapted model are those of its own attention, with checkpointing too."""
    model, batch = models.build("llama").train(), models.inputs("llama", pad=3)

    def gradients():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    own = gradients()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with adapt(model):
            mine = gradients()
        assert all(far(mine[name], own[name]) < 1e-5 for name in own)
    with adapt(model, "aha(window=3)") as handle:
        gradients()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.parameters())
        assert not set(map(id, handle.parameters())) & set(map(id, model.parameters()))


# Which layers.


def three() -> tuple[Any, dict[str, Tensor], list[str]]:
    model = models.build("llama", num_hidden_layers=3)
    return model, models.inputs("llama"), list(attention_modules(model))


NARROW = "sliding(1, 0)"


def test_choice_of_layers():
    model, batch, paths = three()
    with adapt(model, [NARROW, "full()", NARROW]):
        expected = models.outputs(model, batch)
    for where, layers in [
        (NARROW, [0, 2]),
        (NARROW, (n for n in (0, 2))),
        (NARROW, [-1, 0]),
        (NARROW, range(0, 3, 2)),
        (NARROW, r"layers\.[02]\."),
        ([NARROW, Sliding(1, 0)], [0, 2]),
        ({0: NARROW, 2: Sliding(1, 0)}, None),
        ({paths[0]: NARROW, paths[2]: NARROW}, None),
        (lambda module: Full() if module.layer_idx == 1 else NARROW, None),
        (lambda module: NARROW, [0, -1]),
    ]:
        with adapt(model, where, layers=layers) as handle:
            assert far(models.outputs(model, batch), expected) < 2e-6
            assert {p for p, w in handle.where.items() if w != Full()} == {paths[0], paths[2]}
            assert all(path in repr(handle) for path in handle.where)
    assert far(models.outputs(model, batch), expected) > 1e-4


def test_layers_that_there_are_not():
    model, batch, paths = three()
    before, known = state(model), models.outputs(model, batch)
    for where, layers, kind, word in [
        ("full()", [3], ValueError, "layers must be numbers from -3 to 2; one was 3"),
        ("full()", [-4], ValueError, "one was -4"),
        ("full()", [True], ValueError, "one was True"),
        ("full()", ["0"], ValueError, "one was '0'"),
        ("full()", [], ValueError, "selects no attention module"),
        ("full()", 1, TypeError, "layers must be numbers or a regular expression; it was 1"),
        ("full()", "encoder", ValueError, f"selects no attention module; there are {paths[0]}"),
        ("full()", "(", ValueError, "no regular expression"),
        ({0: "full()"}, [0], ValueError, "layers cannot be given beside a mapping"),
        ({7: "full()"}, None, ValueError, "where names 7"),
        ({"model.layers.0": "full()"}, None, ValueError, "where names 'model.layers.0'"),
        ({}, None, ValueError, "selects no attention module"),
        (["full()"] * 2, None, ValueError, "lists 2 patterns, 3 layers"),
        (["full()", 3, "full()"], None, TypeError, "it gave int"),
        (lambda module: None, None, TypeError, "it gave NoneType"),
        (None, None, TypeError, "where must be"),
    ]:
        with pytest.raises(kind, match=word):
            adapt(model, where, layers=layers)
        assert state(model) == before
    assert torch.equal(models.outputs(model, batch), known)


def test_nested_adaptations():
    """Each is in force for its own layers, the newest first; an outer one stays through a mistake of an inner one."""
    model, batch, _ = three()
    before, known = state(model), models.outputs(model, batch)
    with adapt(model, [NARROW, "sliding(3, 0)", "full()"]):
        expected = models.outputs(model, batch)
    outer = adapt(model, "sliding(3, 0)", layers=[0, 1])
    wide = models.outputs(model, batch)
    inner = adapt(model, {0: NARROW})
    assert far(models.outputs(model, batch), expected) < 2e-6
    with pytest.raises(RuntimeError, match="newer adaptation"):
        outer.restore()
    for wrong in ("nonsense(", "moba(block_size=0)", "full(1)"):
        with pytest.raises(ValueError), adapt(model, wrong):
            pass
    assert far(models.outputs(model, batch), expected) < 2e-6
    with adapt(model, "moba(block_size=64)", layers=[2]), adapt(model, "aha(window=1, offset=100.0)", layers=[1]):
        assert far(models.outputs(model, batch), expected) > 1e-4
        with adapt(model, {1: "sliding(3, 0)"}):
            assert far(models.outputs(model, batch), expected) < 2e-6
    inner.restore()
    inner.restore()  # once more is no harm
    assert torch.equal(models.outputs(model, batch), wide)
    outer.restore()
    assert state(model) == before and torch.equal(models.outputs(model, batch), known)


def test_a_failure_inside():
    model, batch, _ = three()
    before, known = state(model), models.outputs(model, batch)
    with pytest.raises(ValueError, match="Window"), adapt(model, "window((3, 3))"):
        models.outputs(model, batch)
    with pytest.raises(ValueError, match="keys"), adapt(model, "h2o(heavy=1, recent=1)"):
        models.outputs(model, models.inputs("llama", pad=3))
    assert state(model) == before and torch.equal(models.outputs(model, batch), known)


# Mechanisms.

WHOLE = {
    "moba": "moba(block_size=4, top_k=6)",
    "cca": "cca(group_size=4, window=32)",
    "h2o": "h2o(heavy=10, recent=11)",
    "aha": "aha(window=2, offset=1000.0)",
    "sf_attn": "sf_attn(group_size=4, sparse=False)",
    "mswa": "mswa(windows=[21, 32, 64, 21])",
    "nats": "nats(window=2)",  # all tokens global, where the scorer is 0
}
PARTIAL = {
    "moba": "moba(block_size=4, top_k=2)",
    "cca": "cca(group_size=4, window=4)",
    "h2o": "h2o(heavy=3, recent=3)",
    "aha": "aha(window=2, offset=-1000.0)",
    "sf_attn": "sf_attn(group_size=4, unshift_ratio=0.5, sinks=1)",
    "mswa": "mswa(windows=[2, 2, 4, 4])",
    "nats": "nats(window=2)",
}


def test_text_of_mechanisms():
    assert set(WHOLE) <= set(MECHANISMS)
    for text in (*WHOLE.values(), *PARTIAL.values()):
        read = Mechanism.parse(text)
        assert str(read) == text and Mechanism.parse(str(read)) == read
    assert Mechanism.parse("  moba ") == Mechanism("moba", {}) == Mechanism.parse("moba()")
    assert dict(Mechanism.parse("mswa(windows=(1, 2), qk_norm=None, x='a', y=-0.5)").settings) == {
        "windows": (1, 2),
        "qk_norm": None,
        "x": "a",
        "y": -0.5,
    }
    for wrong in (
        "moba(3)", "moba(**x)", "moba(block_size=f())", "moba(block_size=)", "moba(", "moba() | full()", "moba.x()",
        "moba(block_size=__import__('os'))", "moba()()", "", "nothing(x=1)",
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Mechanism.parse(wrong)


def nothing_learned(handle) -> None:
    for name, frame in handle.frames.items():
        for parameter in frame.parameters():
            torch.nn.init.zeros_(parameter) if "nats" in str(handle.where[name]) else torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("mechanism", WHOLE)
def test_a_budget_for_everything_is_full_attention(mechanism, name):
    model = models.build(name, **({"layer_types": ["full_attention"] * 2} if name == "gemma2" else {}))
    batch = models.inputs(name)
    if name in ("bert", "vit") and mechanism in ("h2o", "nats"):
        with pytest.raises(ValueError, match="causal"):
            adapt(model, WHOLE[mechanism])
        return
    own = models.outputs(model, batch)
    with adapt(model, WHOLE[mechanism]) as handle:
        nothing_learned(handle)
        assert len(handle.frames) == 2
        assert far(models.outputs(model, batch), own) < 5e-6
        padded = models.inputs(name, pad=3, left=True) if name != "vit" else batch
        if mechanism != "h2o":
            mine = models.real_only(name, models.outputs(model, padded), padded)
    if mechanism != "h2o":
        assert far(mine, models.real_only(name, models.outputs(model, padded), padded)) < 5e-6
    if mechanism != "nats":
        with adapt(model, PARTIAL[mechanism]) as handle:
            assert far(models.outputs(model, batch), own) > 1e-4


@pytest.mark.parametrize("mechanism", PARTIAL)
def test_mechanisms_decode(mechanism):
    """With the handle's cache as in one forward over the whole text; without it where every token is kept."""
    model, batch = models.build("llama"), prompt("llama", pad=0)
    with adapt(model, PARTIAL[mechanism]) as handle:
        for frame in handle.frames.values():
            for parameter in frame.parameters():
                torch.nn.init.normal_(parameter)
        out = generate(model, batch, past_key_values=handle.cache())
        assert far(scores(out), forced(model, {"attention_mask": torch.ones(2, 9)}, out.sequences)) < 1e-5
        if mechanism in ("moba", "aha", "sf_attn"):
            plain = generate(model, batch)
            assert torch.equal(plain.sequences, out.sequences) and far(scores(plain), scores(out)) < 1e-5
            static = generate(model, batch, **WAYS["static"])
            assert torch.equal(static.sequences, out.sequences) and far(scores(static), scores(out)) < 1e-5
        else:
            with pytest.raises(ValueError, match=r"past_key_values=handle.cache\(\)"):
                generate(model, batch)


def test_what_mechanisms_refuse():
    windowed = models.build("gemma3", layer_types=["full_attention", "sliding_attention"])
    before = state(windowed)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn has a sliding window of its own"):
        adapt(windowed, "moba()")
    assert state(windowed) == before
    with adapt(windowed, "moba(block_size=4, top_k=6)", layers=[0]) as handle:
        assert list(handle.frames) == ["model.layers.0.self_attn"]
        models.outputs(windowed, models.inputs("gemma3"))
    with adapt(windowed, "moba(block_size=4, top_k=6)", own_window=False):
        mine = models.outputs(windowed, models.inputs("gemma3"))
    with adapt(windowed, own_window=False):
        assert far(mine, models.outputs(windowed, models.inputs("gemma3"))) < 5e-6

    whisper = models.build("whisper")
    with pytest.raises(ValueError, match="encoder_attn is cross-attention"):
        adapt(whisper, "moba()", layers="encoder_attn")
    with adapt(whisper, "moba(block_size=4, top_k=9)"):
        mine = models.outputs(whisper, models.inputs("whisper"))
    assert far(mine, models.outputs(whisper, models.inputs("whisper"))) < 5e-6

    t5 = models.build("t5")
    with adapt(t5, "moba()"), pytest.raises(ValueError, match="adds a bias of positions"):
        models.outputs(t5, models.inputs("t5"))
    clip = models.build("clip_text")  # tells only at run time that it is causal
    with adapt(clip, "moba()"), pytest.raises(ValueError, match="causal by an argument at run time"):
        models.outputs(clip, models.inputs("clip_text"))

    llama = models.build("llama")
    with adapt(llama, "moba()"), pytest.raises(ValueError, match="packed"):
        llama(input_ids=models.ids(1, 8), position_ids=torch.arange(4).repeat(2)[None], use_cache=False)
    for text, word in [
        ("moba(block_size=0)", "block_size"),
        ("moba(blocks=3)", "blocks"),
        ("moba(causal=False)", "causal"),
        ("moba(project=True)", "project"),
        ("mswa()", "windows"),
        ("mswa(windows=[1, 2])", "windows"),
        ("cca(pool_rotated=False, group_size=0)", "group_size"),
        ("h2o(heavy=-1)", "heavy"),
        ("sf_attn(group_size=3)", "group_size"),
        ("aha(window='x')", "window"),
        ("moba(block_size=4", "expected name"),
    ]:
        with pytest.raises(ValueError, match=word):
            adapt(llama, text)
    for name in ("bert", "t5", "vit"):
        model = models.build(name)
        with adapt(model, "full()") as handle, pytest.raises(ValueError, match="decoder"):
            handle.cache()


# Files.


def saved(folder, name: str, where: Any, **more):
    model = models.build(name)
    handle = adapt(model, where, **more)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    handle.save(folder)
    return model, handle


@pytest.mark.parametrize(
    "name,where,more",
    [
        ("llama", SINKS, {}),
        ("llama", {1: PerHead([Sliding(1, 0), Full(), Full(), Sliding(3, 0)])}, {"backend": "dense"}),
        ("llama", ["aha(window=3)", "nats(window=4)"], {}),
        ("gemma3", ["moba(block_size=4, top_k=2)", "full()"], {"own_window": False}),
        ("t5", "sliding(2, 2)", {"layers": "EncDecAttention|SelfAttention"}),
    ],
)
def test_saved_and_read_again(tmp_path, name, where, more):
    model, handle = saved(tmp_path, name, where, **more)
    batch = models.inputs(name)
    expected = models.outputs(model, batch)
    assert "glocal" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "glocal.safetensors").exists() == ("aha" in str(where))
    again = type(model).from_pretrained(tmp_path).eval()
    before, known = state(again), models.outputs(again, batch)
    assert far(known, expected) > 1e-4
    with readapt(again, tmp_path) as read:
        assert {p: str(w) for p, w in read.where.items()} == {p: str(w) for p, w in handle.where.items()}
        assert (read.own_window, read.backend) == (handle.own_window, handle.backend)
        assert torch.equal(models.outputs(again, batch), expected)
        for mine, theirs in zip(read.parameters(), handle.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert state(again) == before and torch.equal(models.outputs(again, batch), known)


def test_damaged_files(tmp_path):
    _, handle = saved(tmp_path, "llama", ["aha(window=3)", SINKS])
    handle.restore()
    model, batch = models.build("llama"), models.inputs("llama")
    before, known = state(model), models.outputs(model, batch)
    said, weights = tmp_path / "glocal.json", tmp_path / "glocal.safetensors"
    text, data = said.read_text(), weights.read_bytes()

    def refused(at, word=""):
        with pytest.raises(ValueError, match=f"{at.name}.*{word}"):
            readapt(model, tmp_path)
        assert state(model) == before

    path = next(iter(json.loads(text)["layers"]))
    changed = [json.loads(text) for _ in range(8)]
    changed[0]["version"] = 2
    changed[1]["layers"][path] = "nonsense("
    changed[2]["layers"][path] = 3
    changed[3]["layers"] = {}
    changed[4]["layers"] = [1, 2]
    changed[5]["layers"] = {"other.layers.0": "full()"}
    del changed[6]["own_window"]
    changed[7]["layers"][path] = "aha(window=0)"
    wrong = [json.dumps(one) for one in changed]
    for one in (*wrong, text[: len(text) // 2], "", "3", "[]", "null", "[" * 100_000, '"\\ud800"'):
        said.write_text(one)
        refused(said)
    said.write_bytes(b"\xff\xfe\x00")
    refused(said)
    said.unlink()
    refused(said, "cannot be read")
    said.mkdir()
    refused(said, "cannot be read")
    said.rmdir()
    said.write_text(text)

    for damaged in (data[: len(data) // 2], b"", data[:-4], b"\xff" * 64):
        weights.write_bytes(damaged)
        refused(weights)
    weights.unlink()
    refused(weights, "cannot be loaded")
    _, other = saved(tmp_path, "llama", ["aha(window=3)", "aha(window=3)"])
    other.restore()
    said.write_text(text)
    refused(weights, "does not fit")
    weights.write_bytes(data)
    readapt(model, tmp_path).restore()
    assert state(model) == before and torch.equal(models.outputs(model, batch), known)

    for name, more in (("gpt2", {}), ("llama", {"num_hidden_layers": 1})):
        strange = models.build(name, **more)
        kept = state(strange)
        with pytest.raises(ValueError, match=r"glocal\.json.* is of another model"):
            readapt(strange, tmp_path)
        assert state(strange) == kept
    wider = models.build("llama", hidden_size=48)
    with pytest.raises(ValueError, match=r"glocal\.safetensors.* does not fit"):
        readapt(wider, tmp_path)


def test_what_text_cannot_say(tmp_path):
    model = models.build("llama")
    real = torch.ones(1, 21, dtype=torch.bool)
    with adapt(model, Keys(real)) as handle, pytest.raises(ValueError, match=r"layers\.0.* cannot be saved as text"):
        handle.save(tmp_path / "there")
    assert not (tmp_path / "there").exists()


# Faults.


class Plain(torch.nn.Module):
    is_causal = True


def test_patterns_that_do_not_fit():
    model = models.build("llama")
    before = state(model)
    for where, word in [
        ("~causal()", "contradicts model.layers.0.self_attn"),
        ("sliding(-1, 5)", "sliding"),
        (PerHead([Full(), Full()]), "is made for 2 heads; model.layers.0.self_attn has 4"),
        ("per_head([full(), full(), full()])", "is made for 3 heads"),
        ("slidin(3, 0)", "did you mean 'sliding'"),
        ("sliding(3, 0) |", "expected the name of a pattern"),
        ("", "expected the name"),
        ("mobba(top_k=3)", "mobba"),
    ]:
        with pytest.raises(ValueError, match=word):
            adapt(model, where)
        assert state(model) == before
    with adapt(models.build("bert"), "~causal()"):  # no contradiction there
        pass


def test_models_that_cannot_be_adapted():
    xlnet = hf.XLNetModel(hf.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))
    fnet = hf.FNetModel(hf.FNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8))
    for model, kind, word in [
        (xlnet, TypeError, "its attention is fixed"),
        (fnet, ValueError, "there are none"),
        (torch.nn.Linear(2, 2), TypeError, "it was Linear"),
        ("llama", TypeError, "it was str"),
    ]:
        kept = state(model) if isinstance(model, hf.PreTrainedModel) else None
        with pytest.raises(kind, match=word):
            adapt(model)
        assert kept is None or state(model) == kept


def test_tensors_that_do_not_fit():
    q = torch.randn(1, 2, 5, 8)
    meta = torch.randn(1, 2, 5, 8, device="meta")
    for key, word in [(q.double(), "float64"), (meta, "meta"), (q[..., :4], "head dimension")]:
        with pytest.raises((TypeError, ValueError), match=word):
            attention(Plain(), q, key, key, None, where=Full())
    with pytest.raises((TypeError, ValueError), match="float16"):
        attention(Plain(), q.half(), q, q, None, where=Full())
    for mask in (torch.ones(1, 5, 5), torch.ones(5), torch.ones(1, 1, 1, 5, 5)):
        with pytest.raises(ValueError, match="2 or 4 axes"):
            attention(Plain(), q, q, q, mask, where=Full())
    for wide in (torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 1, 5, 4), torch.ones(3, 1, 5, 5)):
        with pytest.raises(ValueError):
            attention(Plain(), q, q, q, wide.bool() & False, where=Full())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, batch = models.build("gpt2").to(dtype), models.inputs("gpt2", pad=3, left=True)
    own = models.real_only("gpt2", models.outputs(model, batch), batch)
    with adapt(model, "full()"):
        mine = models.real_only("gpt2", models.outputs(model, batch), batch)
    assert mine.dtype == dtype and far(mine, own) < {torch.float64: 1e-12, torch.float16: 0.02}.get(dtype, 0.1)
    with adapt(model, "moba(block_size=4, top_k=6)"):
        assert far(models.real_only("gpt2", models.outputs(model, batch), batch), own) < 0.1
