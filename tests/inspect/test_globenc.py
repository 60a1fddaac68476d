"""Contributions against the states that they must sum to, loops over tokens, and encoders whose answer is known."""

import networkx
import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
)

from glocal import Sliding
from glocal.hf import adapt
from glocal.inspect import ATTRIBUTIONS, attribution_flow, attribution_rollout, layer_attributions
from glocal.nn import Attention
from tests.hf.models import SIZES, build, inputs
from tests.hf.test_attention import bert, tokens

STAGES = ("N", "N-Res", "N-ResLN", "N-Enc")
LAYERS = "encoder.layer"


def stirred(model: nn.Module) -> nn.Module:
    """Far from even attention, and biases and gains that count."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def watched(model, batch, paths):
    """What the modules at these paths read and give, and the model's output."""
    seen, hooks = {}, []
    for path in paths:
        keep = lambda module, given, out, path=path: seen.__setitem__(path, (given[0], out))  # noqa: E731
        hooks.append(model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return seen, out


def distilbert():
    sizes = dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=64)
    return DistilBertModel(DistilBertConfig(**sizes))


def roberta():
    return RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0), add_pooling_layer=False)


def electra():
    return ElectraModel(ElectraConfig(**SIZES, embedding_size=24, max_position_embeddings=64))


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("make", [bert, roberta, electra, distilbert])
def test_parts_sum_to_the_states(make, pad):
    model, batch = stirred(make()).double(), tokens(pad=pad)
    real = batch["attention_mask"].bool()
    block = "transformer.layer.{}.{}" if make is distilbert else "encoder.layer.{}.{}"
    first = "sa_layer_norm" if make is distilbert else "attention.output.LayerNorm"
    seen, out = watched(model, batch, [block.format(n, first) for n in range(2)])
    found = layer_attributions(model, batch)
    assert len(found) == 2
    for n, layer in enumerate(found):
        summed, normed = seen[block.format(n, first)]
        entering, leaving = out.hidden_states[n], out.hidden_states[n + 1]
        for kind, wanted in zip(STAGES, (summed - entering, summed, normed, leaving), strict=True):
            whole = layer.parts(kind).sum(2) + layer.constant(kind)
            torch.testing.assert_close(whole[real], wanted[real], atol=1e-9, rtol=1e-7)
            lengths = layer.parts(kind).norm(dim=-1)
            torch.testing.assert_close(layer.matrix(kind), lengths, atol=1e-8, rtol=1e-6)


def loops(model, batch):
    """Every matrix of every layer as the formulas say, one pair of tokens at a time."""
    model.set_attn_implementation("eager")
    blocks = [f"{LAYERS}.{n}.{at}" for n in range(2) for at in ("attention.self.value", "attention.output.LayerNorm")]
    seen, out = watched(model, batch, [*blocks, *(f"{LAYERS}.{n}.output.LayerNorm" for n in range(2))])
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    for n, weights in enumerate(maps):
        block = model.get_submodule(f"{LAYERS}.{n}")
        values, x = seen[blocks[2 * n]][1][0], out.hidden_states[n][0]
        summed, fed = seen[blocks[2 * n + 1]][0][0], seen[f"{LAYERS}.{n}.output.LayerNorm"][0][0]
        first, second = block.attention.output.LayerNorm, block.output.LayerNorm
        count, write = len(x), block.attention.output.dense.weight
        vectors = torch.zeros(4, count, count, x.shape[-1]).double()
        for i in range(count):
            for j in range(count):
                t = torch.zeros_like(x[0])
                for h in range(4):
                    t = t + weights[0, h, i, j] * (write[:, 8 * h : 8 * h + 8] @ values[j, 8 * h : 8 * h + 8])
                vectors[0, i, j] = t
                vectors[1, i, j] = t = t + x[i] if i == j else t
                for stage, (norm, read) in enumerate(((first, summed[i]), (second, fed[i])), 2):
                    t = (t - t.mean()) / (read.var(correction=0) + norm.eps).sqrt() * norm.weight
                    vectors[stage, i, j] = t
        one, plain = torch.eye(count).double(), weights[0].mean(0)
        ratios = torch.zeros(4, count).double()
        for stage in range(4):
            for i in range(count):
                others = sum(vectors[stage, i, j] for j in range(count) if j != i)
                ratios[stage, i] = others.norm() / (others.norm() + vectors[stage, i, i].norm())
        off = plain * (1 - one)
        ratio = ratios[3][:, None]
        made = dict(zip(STAGES, vectors.norm(dim=-1), strict=True))
        made["W"], made["W-FixedRes"] = plain, 0.5 * plain + 0.5 * one
        made["W-Res"] = ratio * off / off.sum(1, keepdim=True) + (1 - ratio) * one
        made["N-FixedRes"] = 0.5 * made["N"] / made["N"].sum(1, keepdim=True) + 0.5 * one
        heads = [
            weights[0, h] * (values[:, 8 * h : 8 * h + 8] @ write[:, 8 * h : 8 * h + 8].mT).norm(dim=-1)
            for h in range(4)
        ]
        yield made, dict(zip(STAGES, ratios, strict=True)), torch.stack(heads)


@torch.no_grad()
def test_every_matrix_is_that_of_loops(monkeypatch):
    model, batch = stirred(bert().double()), tokens(batch=1, length=6)
    found, rows = layer_attributions(model, batch), torch.tensor([4, 1])
    monkeypatch.setattr("glocal.inspect.contributions._AT_ONCE", 60)  # two rows at a time
    for layer, (matrices, ratios, heads) in zip(found, loops(model, batch), strict=True):
        assert set(matrices) == set(ATTRIBUTIONS)
        for kind, wanted in matrices.items():
            torch.testing.assert_close(layer.matrix(kind)[0], wanted)
            torch.testing.assert_close(layer.matrix(kind, rows)[0], wanted[rows])
            parts = list(layer.tiles(kind))
            assert len(parts) == 3 and torch.equal(torch.cat([at for at, _ in parts]), torch.arange(6))
            torch.testing.assert_close(torch.cat([part for _, part in parts], 1)[0], wanted)
        for kind, ratio in ratios.items():
            torch.testing.assert_close(layer.mixing_ratio(kind)[0], ratio)
            torch.testing.assert_close(layer.mixing_ratio(kind, rows)[0], ratio[rows])
        torch.testing.assert_close(layer.head_norms()[0], heads)
        torch.testing.assert_close(layer.parts("N-Enc", rows)[0].norm(dim=-1), matrices["N-Enc"][rows])


def test_rollout_is_a_row_of_the_product():
    found = layer_attributions(stirred(bert().double()), tokens(pad=3))
    pooled = torch.rand(3, 21, dtype=torch.float64)
    for kind in ATTRIBUTIONS:
        whole = found[1].matrix(kind) @ found[0].matrix(kind)
        torch.testing.assert_close(attribution_rollout(found, kind=kind), whole[:, 0])
        several = torch.tensor([2, -1, 5])
        torch.testing.assert_close(attribution_rollout(found, several, kind), whole[torch.arange(3), several])
        torch.testing.assert_close(attribution_rollout(found, pooled, kind), torch.einsum("bi,bij->bj", pooled, whole))


@pytest.mark.parametrize("kind", ATTRIBUTIONS)
def test_padding_takes_no_part(kind):
    """A padded sequence gives what it gives alone, and nothing comes from padding."""
    model, batch = stirred(bert().double()), tokens(pad=3)
    together = attribution_rollout(layer_attributions(model, batch), kind=kind)
    for row, real in enumerate(batch["attention_mask"].bool()):
        alone = layer_attributions(model, {"input_ids": batch["input_ids"][row : row + 1, real]})
        torch.testing.assert_close(together[row, real], attribution_rollout(alone, kind=kind)[0])
        assert (together[row, ~real] == 0).all()
    padded = layer_attributions(model, batch)[0].matrix(kind)[2]
    assert (padded[~batch["attention_mask"][2].bool()] == 0).all()


def test_one_token():
    """Its attention is 1, so every matrix is one number, and the rollout their product."""
    found = layer_attributions(stirred(bert().double()), tokens(batch=1, length=1))
    for kind in ATTRIBUTIONS:
        each = [float(layer.matrix(kind)) for layer in found]
        assert attribution_rollout(found, kind=kind).item() == pytest.approx(each[0] * each[1])
        if not kind.startswith("N") or kind == "N-FixedRes":
            assert each == pytest.approx([1, 1])
    assert found[0].mixing_ratio().item() == 0


def test_heads_that_say_nothing():
    model = stirred(bert().double())
    for block in model.encoder.layer:
        nn.init.zeros_(block.attention.output.dense.weight)
    for layer in layer_attributions(model, tokens(batch=1, length=5)):
        assert (layer.matrix("N") == 0).all() and (layer.mixing_ratio("N") == 0).all()
        torch.testing.assert_close(layer.matrix("N-Res")[0], layer.entering[0].norm(dim=-1).diag())
        assert torch.equal(layer.matrix("W-Res")[0], torch.eye(5).double())


def test_permuted_tokens_permute_rows_and_columns():
    model, batch = stirred(bert().double()), tokens(batch=1, length=9)
    nn.init.zeros_(model.embeddings.position_embeddings.weight)
    order = torch.randperm(9)
    plain = layer_attributions(model, batch)
    moved = layer_attributions(model, {"input_ids": batch["input_ids"][:, order]})
    for kind in ATTRIBUTIONS:
        for one, other in zip(plain, moved, strict=True):
            torch.testing.assert_close(other.matrix(kind), one.matrix(kind)[:, order][:, :, order])


def test_an_adapted_model_that_looks_at_itself_only():
    model, batch = stirred(bert().double()), tokens()
    with adapt(model, Sliding(0, 0)):
        for layer in layer_attributions(model, batch):
            for kind in ATTRIBUTIONS:
                assert torch.equal(layer.matrix(kind), torch.diag_embed(layer.matrix(kind).diagonal(dim1=1, dim2=2)))
            assert (layer.mixing_ratio() == 0).all()


def test_flow_is_that_of_networkx():
    found = layer_attributions(stirred(bert().double()), tokens(batch=2, length=5))
    for kind in ("W", "N-Enc"):
        flow = attribution_flow(found, torch.tensor([0, 3]), kind)
        for b, top in enumerate((0, 3)):
            graph = networkx.DiGraph()
            for n, layer in enumerate(found, 1):
                matrix = layer.matrix(kind)[b]
                for i in range(5):
                    for j in range(5):
                        graph.add_edge((n, i), (n - 1, j), capacity=float(matrix[i, j] / matrix[i].sum()))
            wanted = [networkx.maximum_flow_value(graph, (2, top), (0, j)) for j in range(5)]
            torch.testing.assert_close(flow[b], torch.tensor(wanted).double(), atol=2e-6, rtol=0)


def test_a_classifier_is_left_as_it_was():
    model = BertForSequenceClassification(bert().config).train()
    batch = tokens(batch=1)
    assert len(layer_attributions(model, batch)) == 2 and model.training
    norm = model.bert.encoder.layer[0].output.LayerNorm
    with pytest.raises(ValueError, match="at least one token"):
        layer_attributions(model, {"input_ids": torch.zeros(1, 0, dtype=torch.long)})
    assert not norm._forward_pre_hooks


def test_bad_input():
    sizes = dict(SIZES, max_position_embeddings=64, pad_token_id=0)
    prenorm = RobertaPreLayerNormModel(RobertaPreLayerNormConfig(**sizes), add_pooling_layer=False)
    for model, batch in ((prenorm, tokens()), (build("gpt2"), inputs("gpt2")), (build("vit"), inputs("vit"))):
        with pytest.raises(ValueError, match=f"post-norm blocks, as BERT or DistilBERT; {type(model).__name__} has"):
            layer_attributions(model, batch)
    with pytest.raises(ValueError, match="Attention has none"):
        layer_attributions(Attention(8, 2), torch.randn(1, 5, 8))
    model = stirred(bert())
    found = layer_attributions(model, tokens())
    hook = model.encoder.layer[1].attention.output.dense.register_forward_hook(lambda m, given, out: out + 1)
    with pytest.raises(ValueError, match=r"in 'encoder.layer.1.attention.self' attention and what enters do not add"):
        layer_attributions(model, tokens())
    hook.remove()
    with pytest.raises(ValueError, match=r"kind must be of W, .*; it was 'M'"):
        attribution_rollout(found, kind="M")
    with pytest.raises(ValueError, match="kind must be of N, N-Res, N-ResLN, N-Enc; it was 'W'"):
        found[0].parts("W")
    with pytest.raises(ValueError, match="query must be one of 21 tokens; it was 21"):
        attribution_flow(found, 21)
    with pytest.raises(ValueError, match=r"query of floats must be \(3, 21\); it was \(1, 21\)"):
        attribution_rollout(found, torch.ones(1, 21))
    with pytest.raises(ValueError, match="layers must hold"):
        attribution_rollout([])
