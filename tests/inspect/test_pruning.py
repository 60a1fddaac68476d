"""Models with heads removed against the same models with heads masked; and what is on the disk."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from glocal.hf import adapt
from glocal.inspect import head_counts, load_pruned, masked_heads, prune_heads, pruned, record, save_pruned
from glocal.nn import Attention, NeighborhoodAttention, Rope
from tests.hf.models import DECODERS, TABLE, build, inputs, outputs

KNOWN = [name for name in TABLE if name != "t5"]
SOME = [(0, 1), (0, 2), (1, 0)]  # of 4 heads; groups of 2 become 1 and 1, and 1 and 2
EMPTY = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


@pytest.mark.parametrize("heads", [SOME, EMPTY], ids=["some", "empty"])
@pytest.mark.parametrize("kind", KNOWN)
def test_pruned_is_masked(kind, heads):
    model, batch = build(kind).double(), inputs(kind)
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    whole = outputs(model, batch)
    with masked_heads(model, heads):
        wanted = outputs(model, batch)
    size = model.num_parameters()
    prune_heads(model, heads)
    found = outputs(model, batch)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # parts of Gemma compute in float32
    assert (found - whole).abs().max() > 1e-3 and model.num_parameters() < size
    assert next(iter(pruned(model).values())) == ([0, 3] if heads is SOME else [])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bert", "vit"])
def test_twice(kind):
    """Numbers are among the heads that are left; what is kept is told by the first numbers."""
    model, batch = build(kind), inputs(kind)
    once = copy.deepcopy(model)
    prune_heads(once, [(1, 0), (1, 2), (0, 3)])
    prune_heads(model, [(1, 0)])
    prune_heads(model, [(1, 1), (0, 3)])
    torch.testing.assert_close(outputs(model, batch), outputs(once, batch), atol=1e-5, rtol=1e-5)
    assert list(pruned(model).values()) == list(pruned(once).values()) == [[0, 1, 2], [1, 3]]


def test_numbers_of_parameters_and_operations():
    model, batch = build("llama"), inputs("llama")
    with FlopCounterMode(display=False) as before, torch.no_grad():
        model(**batch)
    size = model.num_parameters()
    prune_heads(model, [(0, 0), (0, 1)])  # one group of two: 16 channels of queries and output, 8 of key and value
    assert size - model.num_parameters() == 32 * (16 + 16 + 8 + 8)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.out_features == 16 and layer.k_proj.out_features == 8 and layer.o_proj.in_features == 16
    with FlopCounterMode(display=False) as after, torch.no_grad():
        model(**batch)
    assert before.get_total_flops() - after.get_total_flops() >= 2 * 3 * 21 * 32 * 48


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "llama4"])
@pytest.mark.parametrize("heads", [SOME, EMPTY], ids=["some", "empty"])
def test_decoding_with_a_cache(kind, heads):
    model, batch = build(kind), inputs(kind, batch=2, pad=3, left=True)
    prune_heads(model, heads)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        cached, plain = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_decoding_without_self_and_cross_attention():
    model, batch = build("whisper"), inputs("whisper")
    numbers = {path: number for number, path in enumerate(head_counts(model))}
    for path in ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.encoder_attn"):
        prune_heads(model, [(numbers[path], head) for head in range(4)])
    settings = dict(max_new_tokens=5, do_sample=False)
    start = {"input_features": batch["input_features"], "decoder_input_ids": batch["decoder_input_ids"][:, :3]}
    with torch.no_grad():
        cached, plain = (model.generate(**start, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("more", [{}, {"qk_norm": "rms", "gate": True, "qkv_bias": True, "out_bias": True}])
@pytest.mark.parametrize("gone", [[0], [0, 1], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5]])
def test_layers_of_ours(more, gone):
    torch.manual_seed(0)
    layer = Attention(24, 6, num_kv_heads=2, causal=True, rope=Rope(), **more).double()
    x, heads = torch.randn(2, 9, 24).double(), [(0, head) for head in gone]
    with masked_heads(layer, heads):
        wanted = layer(x)
    prune_heads(layer, heads)
    torch.testing.assert_close(layer(x), wanted)
    assert layer.num_heads == 6 - len(gone) and layer.o_proj.in_features == 4 * (6 - len(gone))
    if gone == [0, 1, 2, 4]:  # of the second group, one head: one pair of key and value is left
        assert layer.num_kv_heads == 1
    again = copy.deepcopy(layer)
    torch.testing.assert_close(again(x), wanted)
    if layer.num_heads:
        layer(x).sum().backward()
        assert layer.q_proj.weight.grad.shape == layer.q_proj.weight.shape
        assert record(again, x)[0].heads == layer.num_heads
        cache = layer.new_cache()
        steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(9)], 1)
        torch.testing.assert_close(steps, wanted)


def test_unequal_groups_get_keys_of_their_own():
    layer = Attention(32, 8, num_kv_heads=2)
    prune_heads(layer, [(0, 4), (0, 5)])  # 4 and 2 heads: pairs, the first key twice
    assert (layer.num_heads, layer.num_kv_heads) == (6, 3)
    assert torch.equal(layer.k_proj.weight[:4], layer.k_proj.weight[4:8])


def test_frozen_stays_frozen_and_half_stays_half():
    model = build("bert").half().requires_grad_(False)
    prune_heads(model, SOME)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float16, False)}
    assert head_counts(model) == {f"bert.encoder.layer.{n}.attention.self": count for n, count in ((0, 2), (1, 3))}


class Own(Attention):
    def combine(self, mixed, call):
        return mixed.flip(1)


def test_what_is_refused_is_left_alone():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    for heads, words in [
        ([(0, 1), (2, 0)], "of the 2 layers; one was of layer 2"),
        ([(0, 1), (1, 4)], "of the 4 of model.layers.1.self_attn; one was 4"),
        ([(0, -1)], "one was -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune_heads(model, heads)
    with adapt(model, "sliding(2, 0)"), pytest.raises(ValueError, match="restore it first"):
        prune_heads(model, [(0, 0)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"has sinks \(4,\), which is of all heads together"):
        prune_heads(model, [(0, 0), (1, 0)])
    assert model.model.layers[0].self_attn.q_proj.out_features == 32
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has a table of positions"):
        prune_heads(build("t5"), [(0, 0)])
    model = build("bert")
    model.bert.encoder.layer[0].attention.self.query = nn.Identity()
    with pytest.raises(ValueError, match=r"architecture that prune_heads does not know: it has query \(Identity\)"):
        prune_heads(model, [(1, 0), (0, 0)])
    with pytest.raises(ValueError, match="combine of its own"):
        prune_heads(Own(8, 2), [(0, 0)])
    with pytest.raises(ValueError, match="where of its own"):
        prune_heads(NeighborhoodAttention(8, 2, window=3), [(0, 0)])
    with pytest.raises(ValueError, match="rms_all"):
        prune_heads(Attention(8, 2, qk_norm="rms_all"), [(0, 0)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "whisper"])
def test_folder(kind, tmp_path):
    model, batch = build(kind), inputs(kind)
    prune_heads(model, EMPTY)
    save_pruned(model, tmp_path / "it")
    save_pruned(model, tmp_path / "it")
    found = load_pruned(tmp_path / "it")
    assert type(found) is type(model) and torch.equal(outputs(found, batch), outputs(model, batch))
    assert pruned(found) == pruned(model) and not found.training
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [
        "config.json", "model.safetensors", "pruned.json",
    ]  # fmt: skip


def test_half_tied_and_whole(tmp_path):
    model = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    save_pruned(model, tmp_path)
    found = load_pruned(tmp_path)
    assert found.lm_head.weight is found.model.embed_tokens.weight and found.dtype == torch.bfloat16
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_damaged_folders(tmp_path):
    model = build("llama")
    prune_heads(model, SOME)
    save_pruned(model, tmp_path)
    index = tmp_path / "pruned.json"
    text, weights = index.read_text(), (tmp_path / "model.safetensors").read_bytes()

    def assert_refused(words, **changes):
        index.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(ValueError, match=words):
            load_pruned(tmp_path)

    path = "model.layers.0.self_attn"
    assert_refused("this transformers has not", **{"class": "os"})
    assert_refused("version 9", version=9)
    assert_refused("must ascend", heads={path: [3, 0]})
    assert_refused("must ascend from 0 to 3", heads={path: [0, 4]})
    assert_refused("no attention at 'nowhere'", heads={"nowhere": [0]})
    assert_refused(r"does not fit: model.layers.0.self_attn.\w+.weight must be", heads={path: [0, 1, 2]})
    assert_refused("damaged", heads=3)
    index.write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):
        load_pruned(tmp_path)
    index.write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * len(weights))
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged"):
        load_pruned(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors' was cut short"):
        load_pruned(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"pruned.json' cannot be read"):
        load_pruned(tmp_path)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"has 'mine.txt'"):
        save_pruned(model, tmp_path)
    with pytest.raises(TypeError, match=r"of a class of transformers; it was .*Attention"):
        save_pruned(Attention(8, 2), tmp_path / "other")
    assert not (tmp_path / "other").exists()
