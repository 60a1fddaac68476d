"""Slices of scores against the model's own scores, numpy's decomposition, the sum of all that wrote; tracing, edits."""

from dataclasses import replace

import networkx
import numpy as np
import pytest
import torch
from torch import nn

from glocal.inspect import (
    StreamEdit,
    edit_heads,
    edit_stream,
    firings,
    head_forms,
    head_weights,
    random_signal,
    record,
    signal_graph,
    signal_set,
    trace_signals,
)
from glocal.nn import Attention
from tests.hf.models import build, inputs
from tests.inspect.circuits import (
    INDUCTION,
    PREVIOUS,
    Layer,
    copy_from_lens,
    planted,
    random_circuit,
    repeated,
    transformer_lens,
)

KEEP = ["attention", "outputs", "residual"]


def forms_of(model, batch):
    return head_forms(model, record(model, batch, keep=KEEP))


def circuit():
    model, tokens = random_circuit(), torch.randint(8, (2, 10))
    return model, tokens, forms_of(model, tokens)


def all_slices(forms, layer):
    x = forms.streams[layer]
    return torch.stack(
        [forms.layers[layer].slices(h, x[:, :, None], x[:, None]) for h in range(len(forms.layers[layer].s))], 1
    )


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_slices_sum_to_scores(kind):
    torch.manual_seed(0)
    model = random_circuit() if kind == "ours" else build("gpt2").eval()
    batch = torch.randint(8, (2, 10)) if kind == "ours" else inputs("gpt2")
    if kind == "gpt2":
        for each in model.parameters():  # biases and norms that do something
            torch.nn.init.normal_(each, std=0.3)
    forms = forms_of(model, batch)
    for number, layer in enumerate(forms.record):
        wanted = layer.scores(torch.arange(layer.queries)).double()
        got = all_slices(forms, number).sum(-1) * layer.scale
        live = wanted.isfinite()
        torch.testing.assert_close(got[live], wanted[live], atol=1e-3 if kind == "gpt2" else 1e-9, rtol=1e-4)


def test_against_numpy():
    """Of the whole matrix: singular values, and what each pair of vectors makes together."""
    model, _, forms = circuit()
    for layer, form in zip(model.layers, forms.layers, strict=True):
        weights, norm = head_weights(layer.attention), layer.norm1
        for h in range(3):
            left, right = (
                torch.cat([torch.diag(norm.weight) @ w[h], (b[h] + norm.bias @ w[h])[None]])
                for w, b in ((weights.q, weights.bq), (weights.k, weights.bk))
            )
            omega = (left @ right.T).detach().numpy()
            u, s, vt = np.linalg.svd(omega)
            np.testing.assert_allclose(form.s[h], s[:4], atol=1e-10)
            assert np.abs(s[4:]).max() < 1e-10
            for n in range(4):
                mine = torch.outer(form.u[h][:, n], form.v[h][:, n])
                np.testing.assert_allclose(mine, np.outer(u[:, n], vt[n]), atol=1e-8)


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_what_was_written_is_complete(kind):
    """On every direction, the parts of the stream, divided by its scale, and the constant sum to what is read there."""
    torch.manual_seed(0)
    model = random_circuit() if kind == "ours" else build("gpt2").double().eval()
    batch = torch.randint(8, (2, 10)) if kind == "ours" else inputs("gpt2")
    kept, hooks = [], []
    for path, module in model.named_modules():
        if path.endswith(".mlp"):
            hooks.append(module.register_forward_hook(lambda m, given, out: kept.append(out)))
    forms = forms_of(model, batch)
    for hook in hooks:
        hook.remove()
    parts = [forms.record[0].entering]  # of embedding and place
    for number, form in enumerate(forms.layers):
        total = sum(part.double() - part.double().mean(-1, keepdim=True) for part in parts)
        scale = form.scale(forms.record[number].entering.double())
        for vectors in (form.u, form.v):
            got = total / scale[..., None] @ vectors[:, None, :-1] + vectors[:, None, -1:]
            torch.testing.assert_close(got, forms.streams[number] @ vectors[:, None], atol=1e-4, rtol=0)
        parts += [*forms.written[number].unbind(1), form.constant]
        if kept:
            parts.append(kept[number])


def test_contributions_are_those_of_the_signal():
    """By a loop over the signal's slices."""
    _, _, forms = circuit()
    (one, *_) = (each for each in firings(forms, weight=0.2) if each.layer == 1)
    form, at_query, at_key = forms.layers[1], *forms.contributions(one)
    assert at_query.shape == at_key.shape == (1, 3)
    scale = form.scale(forms.record[1].entering)[one.row]
    sign = (forms.streams[1][one.row, one.query] @ form.u[one.head]).sign()
    for h in range(3):
        for got, vectors, token in ((at_query, form.u, one.query), (at_key, form.v, one.key)):
            written = nn.functional.pad(forms.written[0][one.row, h, token], (0, 1), value=1.0)
            wanted = sum(
                sign[k] * form.s[one.head, k].sqrt() * (vectors[one.head, :, k] @ written) / scale[token]
                for k in one.signal.nonzero()[:, 0]
            )
            torch.testing.assert_close(got[0, h], wanted)


def test_a_rotation_of_the_stream_changes_nothing():
    """Of the forms; columns that keep the constant and, as layer norms centre, the mean."""
    _, _, forms = circuit()
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(13, 13).double())[0]
    form = forms.layers[1]
    omega = form.u * form.s[:, None] @ form.v.mT
    u, s, vh = torch.linalg.svd(turn @ omega @ turn.T)
    turned = replace(form, u=u[..., :4], s=s[:, :4], v=vh.mT[..., :4])
    x = forms.streams[1]
    for h in range(3):
        before = form.slices(h, x[:, :, None], x[:, None])
        after = turned.slices(h, x[:, :, None] @ turn.T, x[:, None] @ turn.T)
        torch.testing.assert_close(after, before)
        assert torch.equal(signal_set(after), signal_set(before))


def test_signal_sets_by_hand():
    """The smallest sets of all, found by trying; a form of rank 1 has one slice."""
    torch.manual_seed(0)
    slices = torch.randn(50, 6).double()
    for row, chosen in zip(slices, signal_set(slices), strict=True):
        total = row.sum()
        ordered = sorted(row.tolist(), reverse=bool(total > 0))
        sizes = [n for n in range(1, 7) if abs(sum(ordered[:n])) > abs(total) and sum(ordered[:n]) * total > 0]
        assert int(chosen.sum()) == (sizes[0] if sizes else 6)
        assert set(row[chosen].tolist()) == set(ordered[: int(chosen.sum())])
    layer = Layer(12, 3).double()
    layer.attention.q_proj.bias.data.zero_()
    layer.attention.q_proj.weight.data[:, :] = torch.outer(torch.ones(12), torch.randn(12))
    model = nn.Sequential(layer)
    forms = forms_of(model, torch.randn(2, 10, 12).double())
    assert (signal_set(all_slices(forms, 0)).sum(-1) == 1).all()


def test_projectors():
    _, _, forms = circuit()
    for one in firings(forms, weight=0.2):
        for p in forms.projectors(one):
            torch.testing.assert_close(p, p.mT)
            torch.testing.assert_close(p @ p, p)
            assert round(p.trace().item()) == int(one.signal.sum())


def test_firings_by_loops():
    _, _, forms = circuit()
    wanted = set()
    for number, layer in enumerate(forms.record):
        weights, scores = layer.weights(), layer.scores(torch.arange(10))
        for b, h, i, j in np.ndindex(2, 3, 10, 10):
            if j and weights[b, h, i, j] >= 0.4 and scores[b, h, i, j] >= 0:
                wanted.add((number, h, b, i, j))
    assert {one[:5] for one in firings(forms, weight=0.4)} == wanted and len(wanted) > 5


def test_the_planted_circuit_is_traced():
    """From the induction head's firings the signal at the key leads to the previous-token head, and to no other."""
    model, tokens = planted(), repeated(2)
    forms = forms_of(model, tokens)
    every = list(firings(forms))
    roots = [one for one in every if (one.layer, one.head) == INDUCTION]
    assert len(roots) >= 2 * 19
    signals = trace_signals(forms, every, roots)
    at_keys = {signal.sender for signal in signals if signal.reader == INDUCTION and signal.source}
    assert at_keys == {PREVIOUS}
    graph = signal_graph(signals, lambda row, token: "once" if token < 20 else "again")
    assert graph.has_edge(PREVIOUS, INDUCTION, ("once", "source"))
    assert graph.edges[PREVIOUS, INDUCTION, ("once", "source")]["count"] == 2
    assert networkx.is_directed_acyclic_graph(graph)
    one = next(each for each in roots if each.row == 0 and each.query == 25)
    taken = [StreamEdit(0, one.key, -forms.signal(one, *PREVIOUS, source=True), PREVIOUS[0])]
    control = random_signal(one, torch.Generator().manual_seed(0))
    other = [StreamEdit(0, one.key, -forms.signal(control, *PREVIOUS, source=True), PREVIOUS[0])]
    wanted = tokens[0, 26]
    with torch.no_grad():
        before = model(tokens)[0, 25].softmax(-1)[wanted]
        with edit_stream(model, forms, taken):
            assert model(tokens)[0, 25].softmax(-1)[wanted] < 0.5 * before
        with edit_stream(model, forms, other):
            assert model(tokens)[0, 25].softmax(-1)[wanted] > 0.9 * before


def test_edits_of_the_stream():
    model, tokens, forms = circuit()
    d = torch.randn(12).double()
    d -= d.mean()
    plain = model(tokens)
    there, back = StreamEdit(1, 4, d, 0), StreamEdit(1, 4, -d, 0)
    with edit_stream(model, forms, [there, back]):
        torch.testing.assert_close(model(tokens), plain)  # ablated and boosted by the same
    with edit_stream(model, forms, [there]):
        changed = record(model, tokens, keep=KEEP)
    change = changed[1].entering - forms.record[1].entering
    assert torch.allclose(change[1, 4], d) and change.count_nonzero(-1).count_nonzero() == 1
    assert not model.layers[0].attention._forward_hooks

    # One reader alone: its queries, keys and values are those of the stream with the edit; of other heads nothing is.
    with edit_stream(model, forms, [there._replace(reader=(1, 2))]):
        got = model(tokens)
    layer = model.layers[1]
    x = layer.norm1(forms.record[1].entering)
    moved = x.clone()
    moved[1, 4] += d / forms.layers[1].scale(forms.record[1].entering[1, 4]) * layer.norm1.weight
    with edit_heads(layer.attention, lambda n, z: z):
        own, other = (record(layer.attention, each, keep=["outputs"])[0].outputs for each in (x, moved))
    mixed = torch.cat([own[:, :2], other[:, 2:]], 1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, model.head(model.norm(forms.record[1].entering + layer.attention.o_proj(mixed))))
    assert not torch.allclose(got, plain)


def test_against_transformer_lens():
    """Scores before the softmax, and what each head writes, with its weights folded and centred."""
    lens = transformer_lens()
    torch.manual_seed(0)
    settings = {"n_layers": 2, "d_model": 12, "n_ctx": 10, "d_head": 4, "n_heads": 3, "d_vocab": 8, "attn_only": True}
    peer = lens.HookedTransformer(lens.HookedTransformerConfig(**settings, normalization_type="LN", seed=0))
    for each in peer.parameters():
        nn.init.normal_(each, std=0.5)
    model = random_circuit().float()
    copy_from_lens(model, peer)
    tokens = torch.randint(8, (2, 10))
    state = peer.state_dict()
    folded = lens.HookedTransformer(lens.HookedTransformerConfig(**settings, normalization_type="LNPre", seed=0))
    folded.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=True, fold_value_biases=True)
    _, cache = folded.run_with_cache(tokens)
    forms = forms_of(model, tokens)
    live = torch.ones(10, 10, dtype=torch.bool).tril()
    for n in range(2):
        torch.testing.assert_close(
            all_slices(forms, n).sum(-1)[..., live] / 2,
            cache["attn_scores", n].double()[..., live],
            atol=1e-3,
            rtol=1e-4,
        )
        wanted = torch.einsum("bnhd,hdc->bhnc", cache["z", n], folded.W_O[n])
        torch.testing.assert_close(forms.written[n], wanted.double(), atol=1e-4, rtol=1e-4)


def test_bad_input():
    model, _, forms = circuit()
    with (
        pytest.raises(ValueError, match=r"reader must be in a layer after 1; it was \(1, 0\)"),
        edit_stream(model, forms, [StreamEdit(0, 0, torch.zeros(12), 1, (1, 0))]),
    ):
        pass
    bare = Attention(8, 2, causal=True)
    with pytest.raises(TypeError, match="must hold a LayerNorm before its attention, norm1 or ln_1; it was None"):
        head_forms(bare, record(bare, torch.randn(1, 4, 8), keep=["attention", "outputs"]))
