"""Importance against gates by hooks, finite differences and planted heads; statistics against loops."""

import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from scipy.stats import spearmanr
from torch import nn

from glocal.bench import encoder, text
from glocal.inspect import (
    argmax_offset,
    attention_agreement,
    edit_heads,
    head_ablation,
    head_importance,
    head_kl,
    masked_heads,
    measure,
    output_agreement,
    prune_order,
    pruning_curve,
    record,
)
from glocal.nn import Attention
from tests.hf.models import build, inputs

RAW = dict(normalize_by_layer=False)


def bert(layers=2):
    return build("bert", num_hidden_layers=layers).double()


def lm_loss(model, batch):
    """Of real tokens."""
    out = model(**{n: t for n, t in batch.items() if n != "labels"})
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return nn.functional.cross_entropy(logits[real], batch["input_ids"][real] % logits.shape[-1])


def gated(model, batch, gates, loss=lm_loss):
    """The loss where hooks, not ours, multiply the heads' outputs before BERT's output projection."""
    hooks = []
    for layer, gate in zip(model.bert.encoder.layer, gates, strict=True):

        def multiply(module, given, gate=gate):
            heads = given[0].unflatten(-1, (4, 8))
            gate = gate if gate.dim() == 3 else gate[None, None]  # (B, N, H), or of all tokens
            return ((heads * gate[..., None]).flatten(-2), *given[1:])

        hooks.append(layer.attention.output.dense.register_forward_pre_hook(multiply))
    try:
        return loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("pad", [None, 4])
@pytest.mark.parametrize("level", ["token", "example", "batch"])
def test_against_gates_by_hooks(level, pad):
    """The loss reads padding too, so that its queries have gradients, which must not count."""
    model, batch = bert(), inputs("bert", pad=pad)

    def loss(model, batch):
        return model(**batch).logits.square().mean()

    gates = [torch.ones(3, 21, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    slopes = torch.stack(torch.autograd.grad(gated(model, batch, gates, loss), gates))  # (layers, B, N, H)
    real = batch.get("attention_mask", torch.ones(3, 21))
    slopes = slopes * real[None, :, :, None]
    wanted = {
        "token": slopes.abs().sum((1, 2)) / real.sum(),
        "example": slopes.sum(2).abs().mean(1),
        "batch": slopes.sum((1, 2)).abs(),
    }[level]
    torch.testing.assert_close(head_importance(model, [batch], loss, abs_level=level, **RAW), wanted)
    scaled = head_importance(model, [batch], loss, abs_level=level)
    torch.testing.assert_close(scaled, wanted / wanted.norm(dim=1, keepdim=True))
    last = head_importance(model, [batch], loss, abs_level=level, last_by_example=True, **RAW)
    factor = real.sum() / 3 if level == "token" else 1
    torch.testing.assert_close(last, wanted * torch.tensor([[1.0], [factor]]))


def test_finite_differences():
    model, batch, eps = bert(), inputs("bert"), 1e-3
    found = head_importance(model, [batch], lm_loss, abs_level="batch", **RAW)
    base = float(lm_loss(model, batch).detach())
    for layer in range(2):
        for head in range(4):
            gates = torch.ones(2, 4, dtype=torch.float64)
            gates[layer, head] -= eps
            change = base - float(gated(model, batch, gates).detach())
            assert abs(change) / eps == pytest.approx(float(found[layer, head]), rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "whisper", "t5"])
def test_other_models(kind):
    """Of the gradient of one factor for each head."""
    model, batch = build(kind), inputs(kind)

    def loss(model, batch):
        out = model(**batch)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()

    gates = {}

    def edit(number, out):
        gates.setdefault(number, torch.ones(4, 1, 1, requires_grad=True))
        return out * gates[number]

    with edit_heads(model, edit) as places:
        value = loss(model, batch)
    found = head_importance(model, [batch], loss, abs_level="batch", **RAW)
    assert found.shape == (len(places), 4) and len(gates) == len(places)
    for number, gate in gates.items():
        (slope,) = torch.autograd.grad(value, gate, retain_graph=True)
        torch.testing.assert_close(found[number].float(), slope.flatten().abs(), rtol=1e-3, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, batch = bert().train().requires_grad_(False), inputs("bert")
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    one, two = (head_importance(model, [batch], lm_loss) for _ in range(2))
    assert torch.equal(one, two)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    with pytest.raises(ZeroDivisionError):
        head_importance(model, [batch], lambda model, batch: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


def test_many_batches_are_one():
    model, batch = bert(), inputs("bert", batch=4)
    parts = [{"input_ids": part} for part in batch["input_ids"].split(2)]
    # The loss is a mean: of half as many tokens, twice the gradient.
    whole = head_importance(model, [batch], lm_loss, **RAW)
    torch.testing.assert_close(head_importance(model, parts, lm_loss, **RAW), 2 * whole)


def test_silent_and_doubled_heads():
    model, batch = bert(), inputs("bert")
    layer = model.bert.encoder.layer[0].attention
    layer.output.dense.weight.data[:, 8:16] = 0
    for part in (layer.self.query, layer.self.key, layer.self.value):
        part.weight.data[24:] = part.weight.data[16:24]
        part.bias.data[24:] = part.bias.data[16:24]
    layer.output.dense.weight.data[:, 16:24] /= 2
    layer.output.dense.weight.data[:, 24:] = layer.output.dense.weight.data[:, 16:24]
    for level in ("token", "example", "batch"):
        found = head_importance(model, [batch], lm_loss, abs_level=level)[0]
        assert found[1] == 0 and found[2] > 0
        torch.testing.assert_close(found[2], found[3])


def test_without_heads():
    """A masked head has the importance that it would have if it came back."""
    model, batch = bert(), inputs("bert")
    gates = torch.ones(2, 4, dtype=torch.float64)
    gates[0, 1] = gates[1, 3] = 0
    gates.requires_grad_()
    (wanted,) = torch.autograd.grad(gated(model, batch, gates), gates)
    found = head_importance(model, [batch], lm_loss, abs_level="batch", without=[(0, 1), (1, 3)], **RAW)
    free = gates.detach().bool()
    torch.testing.assert_close(found[free], wanted.abs()[free])


@pytest.mark.parametrize("rescale", [False, True])
def test_masked_heads(rescale):
    model, batch = bert(), inputs("bert")
    gates = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0]], dtype=torch.float64)
    wanted = gates * (4 / gates.sum(1, keepdim=True)) if rescale else gates
    with masked_heads(model, (gates == 0).nonzero().tolist(), rescale=rescale):
        found = lm_loss(model, batch)
    torch.testing.assert_close(found, gated(model, batch, wanted))
    with masked_heads(model, [(0, head) for head in range(4)], rescale=True):
        assert lm_loss(model, batch).isfinite()


def test_ablation():
    model, batch = bert(), inputs("bert", batch=8)
    model.bert.encoder.layer[1].attention.output.dense.weight.data[:, 16:24] = 0

    def each(model):
        logits = model(**batch).logits.transpose(1, 2)
        return nn.functional.cross_entropy(logits, batch["input_ids"], reduction="none").mean(1)

    found, alone = head_ablation(model, each), head_ablation(model, lambda m: float(each(m).mean()), alone=True)
    base = float(each(model).mean().detach())
    assert found.base == pytest.approx(base) and alone.p is None
    for layer in range(2):
        for head in range(4):
            gates = torch.ones(2, 4).double()
            gates[layer, head] = 0
            change = float(gated(model, batch, gates, lambda m, _: each(m).mean().detach())) - base
            assert float(found.change[layer, head]) == pytest.approx(change)
            gates[layer] = 1 - gates[layer]
            change = float(gated(model, batch, gates, lambda m, _: each(m).mean().detach())) - base
            assert float(alone.change[layer, head]) == pytest.approx(change)
    assert found.change[1, 2] == 0 and found.p[1, 2] == 1
    # The bootstrap against the normal law of a mean.
    for layer, head in ((0, 0), (1, 1)):
        with masked_heads(model, [(layer, head)]), torch.no_grad():
            without = each(model)
        differences = without - each(model).detach()
        z = abs(float(differences.mean() / (differences.std() / math.sqrt(8))))
        assert abs(math.erfc(z / math.sqrt(2)) - float(found.p[layer, head])) < 0.15


def test_order():
    scores = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.3, math.nan]])
    assert prune_order(scores) == [(0, 1), (1, 0), (1, 1), (0, 2), (0, 0)]
    assert prune_order(scores, keep_at_least=1) == [(0, 1), (1, 0), (0, 2)]
    assert prune_order(scores, keep_at_least=3) == []
    assert prune_order(scores, layers=[1]) == [(1, 0), (1, 1)]


@pytest.mark.parametrize("step", [1, 2])
def test_order_computed_anew(step):
    """Against a plain loop: after each step the least of what is left, given what is gone."""
    table = torch.rand(32, 2, 3, generator=torch.Generator().manual_seed(0))
    asked = []

    def scores(gone):
        asked.append(list(gone))
        return table[len(gone)]

    order = prune_order(scores, step=step)
    left, wanted = [(layer, head) for layer in range(2) for head in range(3)], []
    while left:
        now = len(wanted) // step * step
        left.sort(key=lambda pair: float(table[now][pair]))
        wanted.append(left.pop(0))
    assert order == wanted and all(gone == order[: len(gone)] for gone in asked)
    assert [len(gone) for gone in asked] == list(range(0, 7, step))


def test_curve():
    model, batch = bert(), inputs("bert")
    order = [(0, 1), (1, 2), (0, 3)]
    found = pruning_curve(model, order, lambda m: float(lm_loss(m, batch)), [0, 2, 3])
    gates = torch.ones(2, 4).double()
    assert found[0] == pytest.approx(float(gated(model, batch, gates)))
    gates[0, 1] = gates[1, 2] = 0
    assert found[1] == pytest.approx(float(gated(model, batch, gates)))
    gates[0, 3] = 0
    assert found[2] == pytest.approx(float(gated(model, batch, gates)))
    with pytest.raises(ValueError, match="from 0 to the 3 heads of order; one was 4"):
        pruning_curve(model, order, float, [4])


def test_bad_input():
    model, batch = bert(), inputs("bert")
    for words, call in [
        ("abs_level must be of token", lambda: head_importance(model, [batch], lm_loss, abs_level="layer")),
        ("batches must hold", lambda: head_importance(model, [], lm_loss)),
        (r"one number; it gave torch.Size\(\[2\]\)", lambda: head_importance(model, [0], lambda m, _: torch.ones(2))),
        ("depend on the heads", lambda: head_importance(model, [0], lambda m, _: torch.ones(1))),
        ("of layer 2", lambda: head_importance(model, [batch], lm_loss, without=[(2, 0)])),
        ("of the 4 that the layer has; one was 9", lambda: head_importance(model, [batch], lm_loss, without=[(1, 9)])),
        (r"one was \(0, -1\)", lambda: masked_heads(model, [(0, -1)]).__enter__()),
        ("must run the model", lambda: head_ablation(model, lambda m: 0.0)),
        (r"\(layers, H\); it was \(3,\)", lambda: prune_order(torch.ones(3))),
        ("keep_at_least must be at least 0", lambda: prune_order(torch.ones(1, 3), keep_at_least=-1)),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert model.config._attn_implementation == "sdpa"


def test_minilm_ranks_are_stable():
    """By how far the embedding moves, in random directions; over two sets of passages."""
    pytest.importorskip(encoder.BUNDLED, reason="the demo's MiniLM is not installed")
    model, generator = encoder.load(), torch.Generator().manual_seed(0)

    def loss(net, tokens):
        found = nn.functional.normalize(net(input_ids=tokens).last_hidden_state.mean(1), dim=-1)
        return (found * torch.randn(found.shape, generator=generator)).sum()

    passages = [" ".join(p.split()[:40]) for p in text.from_library(48)]
    parts = [[ids for _, ids in encoder.batches(model, half)] for half in (passages[::2], passages[1::2])]
    one, two = (head_importance(model.model, part, loss).flatten() for part in parts)
    assert spearmanr(one, two).statistic > 0.8


# Statistics of heads.


def layer_and_input():
    torch.manual_seed(0)
    layer = Attention(12, 3, causal=True).double()
    layer.q_proj.weight.data *= 4
    x = torch.randn(2, 10, 12).double()
    return layer, x, torch.arange(10) < torch.tensor([[10], [7]])


def test_statistics_by_loops():
    layer, x, keys = layer_and_input()
    found = record(layer, x, keys=keys, keep=["attention", "outputs"])
    weights, outputs = found[0].weights(), found[0].outputs
    real = [(b, t) for b in range(2) for t in range(10) if keys[b, t]]
    metrics = {
        "kl": head_kl,
        "agreement": attention_agreement,
        "offset": argmax_offset(),
        "square": argmax_offset(2),
        "far": argmax_offset(absolute=True),
    }
    got = measure(found, metrics)
    for h in range(3):
        for g in range(3):
            each = [scipy_entropy(weights[b, h, t, : t + 1], weights[b, g, t, : t + 1]) for b, t in real]
            assert float(got["kl"][0, h, g]) == pytest.approx(sum(each) / len(real), abs=1e-9)
        product = sum(float(weights[b, h, t] @ weights[b, g, t]) for b, t in real for g in range(3))
        assert float(got["agreement"][0, h]) == pytest.approx(product / 3 / len(real))
        steps = [t - int(weights[b, h, t].argmax()) for b, t in real]
        assert float(got["offset"][0, h]) == pytest.approx(sum(steps) / len(real))
        assert float(got["square"][0, h]) == pytest.approx(sum(s * s for s in steps) / len(real))
        assert float(got["far"][0, h]) == pytest.approx(sum(map(abs, steps)) / len(real))
        cosine = sum(
            float(torch.cosine_similarity(outputs[b, h, t], outputs[b, g, t], dim=0)) for b, t in real for g in range(3)
        )
        assert float(output_agreement(found)[0, h]) == pytest.approx(cosine / 3 / len(real))


def test_offset_counts_keys_ahead_as_negative():
    class Ahead(Attention):
        def score(self, call):
            return 50.0 * (torch.arange(6)[:, None] + 2 == torch.arange(6))

    found = measure(
        record(Ahead(4, 1), torch.zeros(1, 6, 4)), {"o": argmax_offset(), "a": argmax_offset(absolute=True)}
    )
    ahead = [-2, -2, -2, -2]  # the last two see nothing ahead: their first key is as good as any
    assert float(found["o"]) * 6 == pytest.approx(sum(ahead) + 4 + 5)
    assert float(found["a"]) * 6 == pytest.approx(8 + 4 + 5)
