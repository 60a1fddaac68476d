"""Entropy of attention against scipy's, row by row, and limiting cases."""

import math

import pytest
import torch
from scipy.stats import entropy

from glocal.inspect import attention_density, layer_call, record_heads
from glocal.nn import MLP, Attention, Block, SlidingWindowAttention, UniformHeadAttention
from tests.hf.test_attention import bert, tokens


@pytest.mark.parametrize("kind", [Attention, SlidingWindowAttention])
def test_rows_one_by_one(kind):
    torch.manual_seed(0)
    options = {"window": 3} if kind is SlidingWindowAttention else {}
    layer = kind(16, 4, num_kv_heads=2, causal=True, **options).double()
    keys = torch.arange(7) < torch.tensor([[7], [4]])
    call = layer_call(layer, torch.randn(2, 7, 16).double(), keys=keys)
    rows = attention_density([call])
    assert [(row.layer, row.head) for row in rows] == [("", head) for head in range(4)]
    counts = [min(i + 1, options.get("window", 7)) for length in (7, 4) for i in range(length)]
    for row in rows:
        each = [call.weights[b, row.head, i] for b, length in enumerate((7, 4)) for i in range(length)]
        assert row.entropy == pytest.approx(sum(entropy(weights) for weights in each) / 11)
        assert row.dense == pytest.approx(sum(map(math.log, counts)) / 11)


def test_the_densest_and_the_sparsest():
    torch.manual_seed(0)
    layer = UniformHeadAttention(8, 2)
    with torch.no_grad():  # tokens find themselves alone
        layer.q_proj.weight.copy_(torch.eye(8) * 1e3)
        layer.k_proj.weight.copy_(torch.eye(8))
    uniform, pointing = attention_density([layer_call(layer, torch.eye(8)[None])])
    assert uniform.entropy == pytest.approx(math.log(8)) == uniform.dense
    # Half of the tokens have nothing in the second head, and are dense there.
    assert pointing.entropy == pytest.approx(math.log(8) / 2, abs=1e-4)


def test_models():
    model = torch.nn.Sequential(*[Block(8, Attention(8, 2), MLP(8, 8)) for _ in range(2)])
    rows = attention_density(record_heads(model, torch.randn(2, 6, 8)))
    assert [(row.layer, row.head) for row in rows] == [(f"{i}.attention", head) for i in range(2) for head in range(2)]
    model, batch = bert(), tokens(pad=3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    rows = attention_density(record_heads(model, **batch))
    wanted = [torch.special.entr(layer).sum(-1).transpose(1, 2)[real].mean(0) for layer in theirs]
    assert [row.entropy for row in rows] == pytest.approx(torch.cat(wanted).tolist(), abs=1e-5)


def test_nothing_real_is_nan():
    call = layer_call(Attention(8, 2), torch.randn(1, 4, 8), keys=torch.zeros(1, 4, dtype=torch.bool))
    assert all(math.isnan(row.entropy) and math.isnan(row.dense) for row in attention_density([call]))
