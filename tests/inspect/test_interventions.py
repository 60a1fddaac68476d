"""Edits against the layers' own outputs, effects against frozen runs, lenses against the model's logits."""

import numpy as np
import pytest
import torch

from glocal.inspect import (
    ablate,
    add_direction,
    copying_score,
    detect,
    edit_heads,
    head_effect,
    head_logits,
    head_weights,
    patch_heads,
    probe_heads,
    project_out,
    record,
)
from glocal.nn import Attention, Rope
from tests.hf.models import build, inputs
from tests.inspect.circuits import INDUCTION, PREVIOUS, Circuit, planted, repeated


def circuit():
    torch.manual_seed(0)
    model = Circuit(8, 10, 12, 3).double().eval()
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.5)
    return model, torch.randint(8, (2, 2, 10))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_weights_of_heads_are_those_of_the_model(kind):
    torch.manual_seed(0)
    model = build(kind)
    batch = inputs(kind)
    states = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _, given, more, out, path=path: states.update({path: (given, more, out)}), with_kwargs=True
        )
    found = record(model, batch, keep=["attention", "values", "outputs"])
    for layer in found:
        weights = head_weights(dict(model.named_modules())[layer.name])
        given, more, out = states[layer.name]
        x = given[0] if given else more["hidden_states"]
        v = torch.einsum("bnc,hcd->bhnd", x, weights.v) + weights.bv[:, None]
        torch.testing.assert_close(layer.weights() @ v, layer.outputs, atol=1e-5, rtol=1e-4)
        if kind != "llama":  # which rotates
            q = torch.einsum("bnc,hcd->bhnd", x, weights.q) + weights.bq[:, None]
            torch.testing.assert_close(q, layer.q, atol=1e-5, rtol=1e-4)
        if kind != "vit":  # whose module joins heads, and whose block projects them
            written = torch.einsum("bhnd,hdc->bnc", layer.outputs, weights.o) + weights.bo
            torch.testing.assert_close(written, out[0], atol=1e-5, rtol=1e-4)


def test_patching_all_heads_replaces_the_layers_output():
    model, (clean, corrupted) = circuit()
    source = record(model, corrupted, keep=["outputs"])
    attention = model.layers[0].attention
    seen = {}
    hook = attention.register_forward_hook(lambda _, given, out: seen.update(out=out))
    model(corrupted)
    hook.remove()
    hook = attention.register_forward_hook(
        lambda _, given, out: seen["out"] - attention.o_proj.bias + attention.o_proj.bias
    )
    wanted = model(clean)
    hook.remove()
    with edit_heads(model, patch_heads([(0, h) for h in range(3)], source)):
        torch.testing.assert_close(model(clean), wanted, atol=1e-5, rtol=0)
    with edit_heads(
        model, patch_heads([(n, h) for n in range(2) for h in range(3)], record(model, clean, keep=["outputs"]))
    ):
        torch.testing.assert_close(model(clean), wanted * 0 + model(clean).detach())


def test_edits():
    model, (tokens, others) = circuit()
    u, at = torch.randn(4).double(), torch.arange(10) > 6
    kept = []

    def outputs(edit):
        kept.clear()
        with edit_heads(model, lambda n, z: kept.append(z) or edit(n, z)):
            model(tokens)
        return kept[0][:, 1], edit(0, kept[0])

    mean = record(model, others, keep=["outputs"])
    for edit, wanted in (
        (add_direction([(0, 1)], u, -0.5, at=at), lambda z: z - 0.5 * u),
        (ablate([(0, 1)], at=at), lambda z: 0 * z),
        (ablate([(0, 1)], mean, at=at), lambda z: mean[0].outputs[:, 1].mean(0).expand_as(z)),
        (ablate([(0, 1)], mean, pooled=True, at=at), lambda z: mean[0].outputs[:, 1].mean((0, 1)).expand_as(z)),
        (patch_heads([(0, 1)], mean, at=at), lambda z: mean[0].outputs[:, 1]),
    ):
        z, changed = outputs(edit)
        torch.testing.assert_close(changed[:, 1, 7:], wanted(z)[:, 7:])
        assert torch.equal(changed[:, 1, :7], z[:, :7]) and torch.equal(changed[:, [0, 2]], kept[0][:, [0, 2]])
        assert torch.equal(edit(1, kept[1]), kept[1])
    z, changed = outputs(project_out([(0, 1)], 3 * u))
    torch.testing.assert_close(changed[:, 1] @ u, torch.zeros(2, 10).double())
    torch.testing.assert_close(changed[:, 1] - z, ((changed[:, 1] - z) @ u)[..., None] * u / (u @ u))  # along u alone


@pytest.mark.parametrize("layer", [0, 1])
def test_effects_are_those_of_runs_with_the_rest_frozen(layer):
    model, (tokens, corrupted) = circuit()
    model.train()
    source, clean = (record(model, each, keep=["outputs"]) for each in (corrupted, tokens))
    edit = patch_heads([(layer, 0), (layer, 2)], source)
    found = head_effect(model, tokens, edit, lambda logits: logits[:, -1, 3])
    assert model.training and not model.layers[1]._forward_hooks
    before = model(tokens)[:, -1, 3]
    with edit_heads(model, edit):
        torch.testing.assert_close(found.total, model(tokens)[:, -1, 3] - before)
    with edit_heads(model, lambda n, z: edit(n, clean[n].outputs)):  # what follows is held still
        torch.testing.assert_close(found.direct, model(tokens)[:, -1, 3] - before)
    torch.testing.assert_close(found.indirect, found.total - found.direct)
    assert (found.indirect.abs() > 1e-3).all() if layer == 0 else (found.indirect.abs() < 1e-9).all()


def test_direct_effect_of_gpt2_passes_by_its_feed_forwards():
    """The last layer's head, with the feed-forward of its block frozen by hand."""
    torch.manual_seed(0)
    model, batch = build("gpt2"), inputs("gpt2")
    model.eval()
    edit = ablate([(0, 1)])
    metric = lambda out: out.logits[:, -1]  # noqa: E731
    kept, hooks = {}, []
    modules = [module for path, module in model.named_modules() if path.endswith((".mlp",))]
    for module in modules:
        hooks.append(module.register_forward_hook(lambda m, given, out: kept.update({m: out})))
    with torch.no_grad():
        before = metric(model(**batch))
    for hook in hooks:
        hook.remove()
    clean = record(model, batch, keep=["outputs"])
    hooks = [module.register_forward_hook(lambda m, given, out: kept[m]) for module in modules]
    with torch.no_grad(), edit_heads(model, lambda n, z: edit(n, clean[n].outputs)):
        wanted = metric(model(**batch)) - before
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(head_effect(model, batch, edit, metric).direct, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_lenses_of_all_parts_are_the_logits(norm):
    model, (tokens, _) = circuit()
    model.norm = norm(12).double()
    model.norm.weight.data.normal_()
    found = record(model, tokens, keep=["outputs", "residual"])
    stream, unembedding = found[-1].leaving, model.head.weight
    parts = [model.embed(tokens) + model.place.weight]
    for layer, each in zip(model.layers, found, strict=True):
        weights = head_weights(layer.attention)
        parts += [each.outputs[:, h] @ weights.o[h] for h in range(3)] + [weights.bo.expand_as(stream)]
    total = sum(head_logits(part, stream, model.norm, unembedding) for part in parts)
    bias = getattr(model.norm, "bias", None)
    torch.testing.assert_close(total + (0 if bias is None else bias @ unembedding.T), model(tokens))


def test_copying_score_is_that_of_the_whole_map():
    torch.manual_seed(0)
    weights = head_weights(Attention(12, 3, num_kv_heads=1, rope=Rope()).double())
    embed, unembed = torch.randn(2, 20, 12).double()
    for h in range(3):
        values = np.linalg.eigvals((embed @ weights.v[h] @ weights.o[h] @ unembed.T).detach().numpy())
        assert copying_score(weights, embed, unembed)[h].item() == pytest.approx(
            np.abs(values)[values.real > 0][np.abs(values)[values.real > 0] > 1e-9].sum() / np.abs(values).sum()
        )


def test_the_planted_circuit():
    """Ablating either of its heads ends the copying; the copying head is found; its word can be taken out."""
    model, tokens = planted(), repeated(4)
    rows = torch.arange(20, 39)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, rows].flatten(0, 1), tokens[:, rows + 1].flatten())

    effects = {
        (n, h): head_effect(model, tokens, ablate([(n, h)]), loss).total.item() for n in range(2) for h in range(4)
    }
    assert sorted(effects, key=effects.get)[-2:] in ([PREVIOUS, INDUCTION], [INDUCTION, PREVIOUS])
    effect = head_effect(model, tokens, ablate([PREVIOUS]), loss)
    assert effect.direct < 0 < effect.indirect  # it helps through the other head; what it writes is in the way later
    weights = head_weights(model.layers[1].attention)
    assert copying_score(weights, model.embed.weight, model.head.weight)[INDUCTION[1]] > 0.99
    layer, h = INDUCTION
    word = weights.o[h] @ model.head.weight[tokens[0, 31]]
    margin = lambda logits: logits[tokens[0, 31]] - logits[torch.arange(24) != tokens[0, 31]].max()  # noqa: E731
    with torch.no_grad():
        before = model(tokens)[0, 30]
        for edit in (add_direction([INDUCTION], word, -20.0), project_out([INDUCTION], word)):
            with edit_heads(model, edit):
                after = model(tokens)[0, 30]
            assert margin(after) < margin(before) / 10
    assert detect(record(model, tokens))["induction"].argmax() == 4 * layer + h


def test_probing():
    """Scores are those of scikit-learn fold by fold; a head that carries the label is found."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    torch.manual_seed(0)
    layer = Attention(12, 3, causal=True).double()
    layer.q_proj.weight.data[4:8] = 0
    x, labels = torch.randn(60, 5, 12).double(), torch.arange(60) % 3
    x[:, 0, :] += 40 * torch.nn.functional.one_hot(labels, 12)
    at = torch.full((60,), 3)
    found = record(layer, x, keep=["outputs"])
    got = probe_heads(found, labels, at=at, folds=4, strength=0.5)
    for h in range(3):
        z, scores = found[0].outputs[:, h, 3].numpy(), []
        for train, test in StratifiedKFold(4, shuffle=True, random_state=0).split(z, labels):
            model = LogisticRegression(C=0.5, max_iter=1000).fit(z[train], labels[train])
            right = model.predict(z[test]) == labels[test].numpy()
            scores.append(np.mean([right[labels[test].numpy() == c].mean() for c in range(3)]))
        assert got[0, h].item() == pytest.approx(np.mean(scores))
    layer.v_proj.weight.data[:4] = 0
    layer.v_proj.weight.data[8:] = 0
    scores = probe_heads(record(layer, x, keep=["outputs"]), labels)[0]
    assert scores[1] > 0.8 and scores[[0, 2]].max() < 0.6


def test_bad_input():
    model, (tokens, _) = circuit()
    with pytest.raises(ValueError, match="heads must name at least one head"):
        ablate([])
    with pytest.raises(ValueError, match=r"at must be booleans \(N,\) or \(B, N\).*int64"):
        ablate([(0, 0)], at=torch.tensor([1]))
    with (
        pytest.raises(ValueError, match="heads must be from 0 to 2 in layer 0; one was 3"),
        edit_heads(model, ablate([(0, 3)])),
    ):
        model(tokens)
    with pytest.raises(TypeError, match="Linear has no projections named q_proj"):
        head_weights(torch.nn.Linear(2, 2))
    found = record(model, tokens, keep=["outputs"])
    with pytest.raises(ValueError, match=r"labels must be one of each sequence, \(2,\); it was \(3,\)"):
        probe_heads(found, [0, 1, 0])
    with pytest.raises(ValueError, match="each at least 5 times; the rarest came 1 times"):
        probe_heads(found, [0, 1])
