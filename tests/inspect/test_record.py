"""Records against transformers' eager weights, the layers' own outputs, and what is on the disk."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from glocal import attend
from glocal.hf import adapt, byte_llama
from glocal.inspect import Record, edit_heads, intercept, record
from glocal.nn import MLP, AgentAttention, Attention, Block, NeighborhoodAttention, Rope
from glocal.scores import ALiBi
from tests.hf.models import build, inputs
from tests.hf.test_attention import bert, mistral, tokens

EAGER = ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox", "bert", "vit", "whisper", "t5"]


def eager(model, batch):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**batch, output_attentions=True)


def maps(output):
    """All attention maps of an output of transformers, by what they are of."""
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions", "attentions")
    found = {name: getattr(output, name, None) for name in names}
    return {name: each for name, each in found.items() if each}


def assert_same_maps(layers, wanted, real=None):
    assert len(layers) == len(wanted) > 0
    for layer, weights in zip(layers, wanted, strict=True):
        rows = torch.cat([tile.weights for tile in layer.tiles(at_once=500)], 2)
        assert torch.equal(rows, layer.weights()) or torch.allclose(rows, layer.weights(), atol=1e-6)
        found = layer.weights()
        if real is not None:
            found, weights = (t * real[:, None, :, None] for t in (found, weights))
        torch.testing.assert_close(found, weights.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", EAGER)
def test_maps_are_those_of_eager_attention(kind):
    torch.manual_seed(0)
    model = build(kind)
    batch = inputs(kind)
    before, training = model.config._attn_implementation, model.train().training
    found = record(model, batch)
    assert model.config._attn_implementation == before and model.training == training
    model.eval()
    wanted = maps(eager(model, batch))
    mine = {
        "encoder_attentions": [layer for layer in found if "encoder" in layer.name.split(".")],
        "decoder_attentions": [layer for layer in found if "decoder" in layer.name.split(".") and not layer.cross],
        "cross_attentions": [layer for layer in found if layer.cross],
        "attentions": list(found),
    }
    assert sum(map(len, wanted.values())) == len(found)
    for name, each in wanted.items():
        assert_same_maps(mine[name], each)


@pytest.mark.parametrize("make_model", [bert, lambda: mistral(None), lambda: mistral(4)])
def test_padding(make_model):
    model, batch = make_model(), tokens(pad=3)
    found = record(model, batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(found[0].real, real) and torch.equal(found[0].tokens, batch["input_ids"])
    assert_same_maps(found, eager(model, batch).attentions, real)


@pytest.mark.parametrize("where", ["sliding(2, 0)", "sliding(2, 0) | sinks(1)", "block(4)"])
def test_an_adapted_model(where):
    """The maps are those of the pattern; and the adaptation stays."""
    model, batch = mistral(None), tokens()
    with adapt(model, where) as handle:
        with torch.no_grad():
            wanted = model(**batch).last_hidden_state
        found = record(model, batch)
        live = found[0].where.mask(found[0].queries)
        assert torch.equal(found[0].weights()[0, 0] > 0, live)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).last_hidden_state, wanted)
        assert handle.where


def ours():
    torch.manual_seed(0)
    return nn.Sequential(*[Block(8, kind(8, 2), MLP(8, 8)) for kind in (Attention, AgentAttention, Attention)])


class Sloped(Attention):
    """With a table of scores."""

    def score(self, call):
        return ALiBi.of(self.num_heads)


@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa"])
@pytest.mark.parametrize("kind", [Attention, Sloped])
def test_layers_of_ours(kind, backend):
    """Weights times values are the heads' outputs, whatever computed these."""
    torch.manual_seed(0)
    layer = kind(16, 4, num_kv_heads=2, causal=True, rope=Rope(), softcap=None, backend=backend).double()
    if kind is Attention:
        layer.softcap = 5.0 if backend != "sdpa" else None
    x, keys = torch.randn(2, 9, 16).double(), torch.arange(9) < torch.tensor([[9], [6]])
    (found,) = record(layer, x, keep=["attention", "values", "outputs"], keys=keys)
    values = found.v.repeat_interleave(2, 1)
    torch.testing.assert_close(found.weights() @ values, found.outputs)
    torch.testing.assert_close(layer.o_proj(found.outputs.transpose(1, 2).flatten(2)), layer(x, keys=keys))
    assert torch.equal(found.real, keys)
    assert not vars(layer).keys() & {"operator"} and not layer._forward_pre_hooks


def test_grids_contexts_and_blocks():
    torch.manual_seed(0)
    layer, x = NeighborhoodAttention(8, 2, window=3), torch.randn(1, 4, 5, 8)
    (found,) = record(layer, x)
    assert found.grid_q == (4, 5) and found.weights().shape == (1, 2, 20, 20) and not found.cross
    (found,) = record(Attention(8, 2, causal=True), (torch.randn(1, 3, 8), torch.randn(1, 6, 8)))
    assert found.cross and found.grid_k == (6,)
    assert torch.equal(found.weights()[0, 0] > 0, torch.ones(3, 6).tril(3).bool())
    model, x = ours(), torch.randn(2, 6, 8)
    found = record(model, x, keep=["residual"])
    assert found.names == ["0.attention", "2.attention"]
    torch.testing.assert_close(found[0].entering, x)
    torch.testing.assert_close(found[1].leaving, model(x))
    torch.testing.assert_close(found[1].entering, model[:2](x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_stream_and_norms_of_transformers():
    model, batch = bert(), tokens()
    found = record(model, batch, keep=["residual", "norms", "outputs", "values"])
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    for n, layer in enumerate(found):
        torch.testing.assert_close(layer.entering, states[n])
        torch.testing.assert_close(layer.leaving, states[n + 1])
        torch.testing.assert_close(layer.norm_leaving, states[n + 1].norm(dim=-1))
        torch.testing.assert_close(layer.norm_outputs, layer.outputs.norm(dim=-1))
    with pytest.raises(AttributeError, match=r"does not hold q: it holds .*norm_q"):
        found[0].weights()


def test_chosen_layers():
    model, batch = bert(), tokens()
    everything = record(model, batch)
    (last,) = record(model, batch, layers=[-1])
    assert last.name == everything.names[-1]
    with pytest.raises(ValueError, match=r"layers must be numbers of the \d layers; one was 7"):
        record(model, batch, layers=[7])


def assert_equal_records(one, other):
    assert one.names == other.names
    for a, b in zip(one, other, strict=True):
        assert repr(a.where) == repr(b.where) and (a.scale, a.softcap, a.cross) == (b.scale, b.softcap, b.cross)
        torch.testing.assert_close(a.weights(), b.weights(), atol=0, rtol=0)
    assert all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())


def test_on_disk(tmp_path):
    model, batch = mistral(4), tokens(pad=3)
    kept = record(model, batch)
    kept.save(tmp_path / "saved")
    assert_equal_records(kept, Record.load(tmp_path / "saved"))
    straight = record(model, batch, folder=tmp_path / "straight")
    assert_equal_records(kept, straight)
    assert_equal_records(kept, Record.load(tmp_path / "straight"))
    record(model, batch, folder=tmp_path / "straight", layers=[0])  # over the older one
    assert len(Record.load(tmp_path / "straight")) == 1


def test_past_the_limit_layers_lie_on_the_disk():
    model, batch = bert(), tokens()
    found = record(model, batch, limit=1)
    place = found[0].tensors.path
    assert place.exists()
    assert_equal_records(record(model, batch), found)
    del found
    assert not place.exists()


def test_cut_short_or_damaged(tmp_path):
    model, batch = bert(), tokens()
    with pytest.raises(ValueError, match="holds no record"):
        Record.load(tmp_path)
    record(model, batch, folder=tmp_path / "a")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    last = sorted(name for name in whole if name.startswith("layer"))[-1]
    (tmp_path / "a" / last).write_bytes(whole[last][:-100])
    with pytest.raises(ValueError, match=rf"{last}' was cut short: it has .* bytes of {len(whole[last]):,}"):
        Record.load(tmp_path / "a")
    (tmp_path / "a" / last).write_bytes(whole[last])
    (tmp_path / "a" / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"record.json' is damaged"):
        Record.load(tmp_path / "a")
    (tmp_path / "a" / "record.json").write_text(json.dumps({"version": 9, "layers": [], "inputs": 0}))
    with pytest.raises(ValueError, match="version 9"):
        Record.load(tmp_path / "a")

    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Attention(8, 2), Attention(8, 2)])

        def forward(self, x):
            self.layers[0](x)
            raise RuntimeError("interrupted")

    stops = Stops()
    with pytest.raises(RuntimeError, match="interrupted"):
        record(stops, torch.randn(1, 5, 8), folder=tmp_path / "b")
    with pytest.raises(ValueError, match=r"was cut short: record.json"):
        Record.load(tmp_path / "b")
    assert not any(m._forward_pre_hooks or "operator" in vars(m) for m in stops.modules())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds? an older record; .*mine.txt"):
        record(model, batch, folder=tmp_path / "c")
    assert (tmp_path / "c" / "mine.txt").read_text() == "precious"


def test_bad_input():
    model, batch = bert(), tokens()
    with pytest.raises(ValueError, match=r"keep must be of attention, .*; it had 'maps'"):
        record(model, batch, keep=["maps"])
    with pytest.raises(ValueError, match=r"reads token ids, integers"):
        record(model, torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="reads input_ids; it was given pixel_values"):
        record(model, {"pixel_values": torch.randn(1, 3, 16, 16)})
    with pytest.raises(ValueError, match="reads images, floats"):
        record(build("vit"), torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input_ids must hold at least one token; it was \(1, 0\)"):
        record(model, {"input_ids": torch.ones(1, 0, dtype=torch.long)})
    with pytest.raises(ValueError, match="it was empty"):
        record(model, {})
    with pytest.raises(ValueError, match="Linear has none"):
        record(nn.Linear(8, 8), torch.randn(1, 8))


def test_edits_of_heads_are_those_of_the_weights():
    """Halving a head's output halves its part of the projection; gradients flow through."""
    torch.manual_seed(0)
    layer, x = Attention(16, 4).double(), torch.randn(2, 5, 16).double()
    gate = torch.tensor([1, 0.5, 1, 1]).double().requires_grad_()
    with edit_heads(layer, lambda number, heads: heads * gate[:, None, None]) as places:
        out = layer(x)
        assert [place.name for place in places] == [""]
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.o_proj.weight[:, 4:8] *= 0.5
    torch.testing.assert_close(out, other(x))
    out.square().sum().backward()
    assert (gate.grad != 0).all()


def test_operators_see_every_call():
    model, batch, seen = bert(), tokens(), []

    def look(place):
        def compute(q, k, v, where, **options):
            seen.append(place.name)
            return attend(q, k, v, where, **options)

        return compute

    with intercept(model, look) as places, torch.no_grad():
        model(**batch)
    assert seen == [place.name for place in places] and len(seen) > 1


LONG = """
import resource, torch
from glocal.inspect import measure, record
from glocal.nn import Attention
layer, x = Attention(32, 1, causal=True), torch.randn(1, 16384, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = measure(record(layer, x), ["entropy", "sink"])
assert bool(found["entropy"].isfinite().all())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_sixteen_thousand_tokens_take_no_map():
    """A map would be 1 GiB; the record and its metrics take a fifth of it at most."""
    out = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 200 * 1024, out.stdout


def test_the_shipped_model():
    model = byte_llama()
    ids = torch.randint(3, 259, (1, 40))
    assert_same_maps(record(model, {"input_ids": ids}), eager(model, {"input_ids": ids}).attentions)


@pytest.mark.parametrize("where", ["full()", "moba(block_size=4, top_k=2)"])
def test_layers_have_the_numbers_of_their_order(where):
    """Also where one layer of a model runs a mechanism: each is given its own number, and not that of another."""
    model, batch, seen = build("llama").eval(), inputs("llama"), []
    with adapt(model, {0: where}):

        def note(number, heads):
            seen.append(number)
            return heads

        with edit_heads(model, note) as places, torch.no_grad():
            model(**batch)
        assert seen == [0, 1]
        assert record(model, batch).names == [place.name for place in places]
