"""What heads compute with, against the layers' own outputs and transformers' eager weights."""

import pytest
import torch
from torch import nn

from glocal.inspect import layer_call, record_heads
from glocal.nn import MLP, AgentAttention, Attention, Block, NeighborhoodAttention, Rope, SlidingWindowAttention
from glocal.patterns import Sliding, Window
from tests.hf.test_attention import bert, mistral, tokens


def assert_outputs_follow(layer, call, out):
    """The layer's output is its projection of the weights times the values."""
    values = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
    mixed = (call.weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.o_proj(mixed).view_as(out), out)


def test_a_layer_of_ours():
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 4, num_kv_heads=2, window=3, causal=True).double()
    x = torch.randn(2, 7, 16).double()
    keys = torch.arange(7) < torch.tensor([[7], [5]])
    call = layer_call(layer, x, keys=keys)
    assert_outputs_follow(layer, call, layer(x, keys=keys))
    assert torch.equal(call.real, keys)
    assert torch.equal(call.live, (Sliding(2, 0).mask(7) & keys[:, None, None]).expand(2, 4, 7, 7))
    assert call.scale == layer.scale and call.k.shape == (2, 2, 7, 4)


def test_a_map_and_a_context():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, window=3).double()
    x = torch.randn(1, 4, 5, 8).double()
    call = layer_call(layer, x)
    assert_outputs_follow(layer, call, layer(x))
    assert torch.equal(call.live[0, 1], Window((3, 3)).mask((4, 5)))
    cross = Attention(8, 2, causal=True, rope=Rope()).double()
    one, other = torch.randn(1, 3, 8).double(), torch.randn(1, 6, 8).double()
    assert_outputs_follow(cross, layer_call(cross, one, other), cross(one, other))


def test_a_model_of_ours():
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(8, kind(8, 2), MLP(8, 8)) for kind in (Attention, AgentAttention, Attention)])
    x = torch.randn(2, 6, 8)
    calls = record_heads(model, x)
    assert [call.name for call in calls] == ["0.attention", "2.attention"]
    torch.testing.assert_close(calls[0].weights, layer_call(model[0].attention, model[0].norm1(x)).weights)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [bert, lambda: mistral(None), lambda: mistral(4)])
def test_a_model_of_transformers(make):
    model, batch = make(), tokens(pad=3)
    real = batch["attention_mask"].bool()
    before = model.config._attn_implementation
    calls = record_heads(model, **batch)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(**batch, output_attentions=True).attentions
    assert len(calls) == len(wanted) > 1 and calls[0].name
    for call, weights in zip(calls, wanted, strict=True):
        assert torch.equal(call.real, real)
        for row in range(len(real)):
            torch.testing.assert_close(
                call.weights[row][:, real[row]], weights[row][:, real[row]], atol=1e-5, rtol=1e-4
            )
        assert torch.equal(call.live & call.real[:, None, :, None], (call.weights > 0) & call.real[:, None, :, None])


def test_bad_input():
    with pytest.raises(ValueError, match="AgentAttention mixes in another way"):
        layer_call(AgentAttention(8, 2), torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="it called none"):
        record_heads(Skipping(), torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="Linear has none"):
        record_heads(nn.Linear(8, 8), torch.randn(1, 8))


class Skipping(nn.Module):
    """Has attention and does not call it."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(8, 2)

    def forward(self, x):
        return x
