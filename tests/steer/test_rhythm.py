"""Both signals against loops in NumPy, closed forms and eager attention; kurtosis against scipy."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from glocal.steer.rhythm import alternatives, jaccard, middle_layers, read_rhythm, receiver_heads, rhythm
from tests.steer import models


def causal(*shape, seed=0):
    """Random causal maps ``(*shape, N, N)`` with N the last of ``shape``."""
    draw = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(*shape, shape[-1], generator=draw, dtype=torch.float64)
    seen = torch.ones(shape[-1], shape[-1], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def everywhere(batch, length, first=0):
    return torch.arange(length).ge(first).expand(batch, length).clone()


def looped(maps, response, window, horizon, share):
    """The section's formulas, element by element; maps ``(L, B, H, N, N)``."""
    layers, batch, heads, length, _ = maps.shape
    waad, fai, delta, spans = (np.zeros(s) for s in ((batch, length),) * 3 + ((batch, layers, heads),))
    for b in range(batch):
        rows = [t for t in range(length) if response[b, t]]
        for n in range(layers):
            for h in range(heads):
                spans[b, n, h] = np.mean([sum(maps[n, b, h, t, s] * (t - s) for s in range(t + 1)) for t in rows])
        order = sorted(range(layers * heads), key=lambda i: spans[b].ravel()[i])
        take = max(1, round(share * layers * heads))
        near = np.mean([maps[i // heads, b, i % heads] for i in order[:take]], 0)
        far = np.mean([maps[i // heads, b, i % heads] for i in order[-take:]], 0)
        for t in rows:
            waad[b, t] = sum(near[t, s] * min(t - s, window) for s in range(t + 1))
        for s in range(length):
            within = [t for t in rows if s + horizon[0] <= t <= min(length, s + horizon[1])]
            fai[b, s] = np.mean([far[t, s] for t in within]) if within else 0.0
        for t, after in itertools.pairwise(rows):
            if after == t + 1:
                delta[b, t] = abs(waad[b, t] - waad[b, after])
    return spans, waad, fai, delta


@pytest.mark.parametrize(("window", "horizon", "share"), [(3, (2, 6), 0.3), (10, (10, 50), 0.5), (1, (1, 1), 0.01)])
def test_signals_against_loops(window, horizon, share):
    maps = torch.stack([causal(2, 3, 17, seed=n) for n in range(2)])
    response = everywhere(2, 17, 4)
    response[1, :6] = False
    response[1, 15:] = False
    found = rhythm(iter(maps), response, window=window, horizon=horizon, share=share)
    spans, waad, fai, delta = looped(maps.numpy(), response.numpy(), window, horizon, share)
    for mine, wanted in ((found.spans, spans), (found.waad, waad), (found.fai, fai), (found.delta, delta)):
        np.testing.assert_allclose(mine.numpy(), wanted, atol=1e-12)
    assert (fai > 0).any() and (delta > 0).any()
    assert not (found.local_heads & found.global_heads).any()
    torch.testing.assert_close(found.received[1, 0], maps[0][1][:, response[1]].mean(1))


def test_uniform_attention():
    length = 40
    uniform = torch.ones(1, 4, length, length, dtype=torch.float64).tril()
    uniform /= torch.arange(1, length + 1)[:, None]
    found = rhythm([uniform], everywhere(1, length), window=length)
    torch.testing.assert_close(found.waad[0], torch.arange(length).double() / 2)
    for s in (0, 7, 29):
        assert float(found.fai[0, s]) == pytest.approx(np.mean([1 / (t + 1) for t in range(s + 10, length)]))
    assert (found.fai[0, 30:] == 0).all() and found.delta[0, -1] == 0
    torch.testing.assert_close(found.delta[0, :-1], torch.full((length - 1,), 0.5, dtype=torch.float64))


def test_attention_to_itself_and_a_window_of_one():
    eye = torch.eye(30).expand(1, 4, 30, 30)
    found = rhythm([eye], everywhere(1, 30))
    assert (found.waad == 0).all() and (found.fai == 0).all()
    maps = causal(1, 3, 30)
    found = rhythm([maps], everywhere(1, 30), window=1)
    mean = maps[0][found.local_heads[0, 0]].mean(0)
    torch.testing.assert_close(found.waad[0], 1 - mean.diagonal())


def test_sinks_are_left_out():
    maps = causal(2, 4, 12)
    response, real = everywhere(2, 12, 4), everywhere(2, 12)
    real[1, :2] = False  # padding: the second row's first token is at 2
    maps[1, :, 3:, :2] = 0
    maps /= maps.sum(-1, keepdim=True)
    found = rhythm([maps], response, horizon=(1, 5), sinks=1, real=real)
    changed = maps.clone()
    changed[0, :, :, 0] = changed[1, :, :, 2] = 0
    changed /= changed.sum(-1, keepdim=True).clamp(min=1e-9)
    plain = rhythm([changed], response, horizon=(1, 5))
    assert found.fai[0, 0] == 0 and found.fai[1, 2] == 0 < found.fai[1, 3]
    torch.testing.assert_close(found.waad, plain.waad)
    torch.testing.assert_close(found.fai, plain.fai)
    # A head that looks at the start alone is global unless the start is left out.
    start = torch.zeros(1, 1, 12, 12)
    start[..., 0] = 0.9
    start[0, 0] += 0.1 * torch.eye(12)
    both = torch.cat([start, causal(1, 1, 12).float()], 1)
    assert rhythm([both], everywhere(1, 12, 2), share=0.5).global_heads[0, 0].tolist() == [True, False]
    assert rhythm([both], everywhere(1, 12, 2), share=0.5, sinks=1).global_heads[0, 0].tolist() == [False, True]


def test_a_response_does_not_depend_on_its_batch():
    maps, response = causal(3, 4, 14), everywhere(3, 14, 3)
    together = rhythm([maps], response, horizon=(1, 9))
    for row in range(3):
        alone = rhythm([maps[row : row + 1]], response[row : row + 1], horizon=(1, 9))
        torch.testing.assert_close(alone.fai[0], together.fai[row])
        torch.testing.assert_close(alone.waad[0], together.waad[row])


@pytest.mark.parametrize("name", [*models.VISION, *models.TEXT])
def test_reading_a_model_is_eager_attention(name):
    """All classes, padding on the left, grouped keys; twenty tokens of the model's own as the response."""
    model = models.build(name)
    inputs = models.inputs(name, model)
    greedy = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])
    said = model.generate(**inputs, **greedy)[:, -20:]
    prompt = inputs["input_ids"].shape[1]
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in whole:
            value = 1 if key == "attention_mask" else 0
            whole[key] = torch.nn.functional.pad(whole[key], (0, 20), value=value)
    response = everywhere(2, prompt + 20, prompt)
    with torch.no_grad():
        before = model(**whole).logits
    found = read_rhythm(model, whole, response, layers=[0, -1], horizon=(2, 12))
    with torch.no_grad():
        assert torch.equal(model(**whole).logits, before)
        assert torch.equal(model.generate(**inputs, **greedy)[:, -20:], said)
        model.set_attn_implementation("eager")
        output = model(**whole, output_attentions=True)
    attentions = getattr(output, "attentions", None)
    if attentions is None:
        attentions = output.language_model_outputs.attentions
    wanted = rhythm([attentions[0], attentions[2]], response, horizon=(2, 12), layers=[0, 2])
    assert found.layers == (0, 2) and (wanted.fai[:, prompt] > 0).all() and wanted.waad.max() > 0.1
    for field in ("spans", "distance", "influence", "received"):
        torch.testing.assert_close(getattr(found, field), getattr(wanted, field), atol=2e-5, rtol=1e-4)


def test_reading_leaves_the_model_as_it_was(monkeypatch):
    model = models.build("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    inputs = models.inputs("llama", model)
    response = inputs["attention_mask"].bool()
    before = [p.clone() for p in model.parameters()]
    whole = read_rhythm(model, inputs, response, horizon=(1, 4))
    monkeypatch.setattr("glocal.steer.steering._BUDGET", 1)  # row by row
    pieces = read_rhythm(model, inputs, response, horizon=(1, 4))
    assert whole.influence.max() > 0.05
    torch.testing.assert_close(whole.influence, pieces.influence)
    torch.testing.assert_close(whole.distance, pieces.distance)
    monkeypatch.setattr("glocal.steer.rhythm._Sums.add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_rhythm(model, inputs, response)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    assert not vars(model).get("_glocal_steering") and not model._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"


def test_half_precision_maps():
    maps = causal(1, 4, 40)
    exact = rhythm([maps], everywhere(1, 40), share=0.5)
    half = rhythm([maps.bfloat16()], everywhere(1, 40), share=0.5)
    assert half.waad.dtype == torch.float32
    torch.testing.assert_close(half.waad.double(), exact.waad, atol=0.03, rtol=0.03)


def test_receiver_heads_by_kurtosis():
    maps = torch.stack([causal(2, 3, 20, seed=n) for n in range(2)])
    maps[1, :, 2] = 0.9 * torch.nn.functional.one_hot(torch.tensor(9), 20) * (torch.arange(20) >= 9)[:, None]
    response = everywhere(2, 20, 5)
    found = rhythm(maps, response)
    columns = maps[:, :, :, 5:, 5:].sum(-2)
    wanted = scipy.stats.kurtosis(columns.numpy(), axis=-1).transpose(1, 0, 2)
    np.testing.assert_allclose(found.kurtosis.numpy(), wanted)
    order = np.argsort(-wanted.mean(0).ravel())[:3]
    assert receiver_heads(found, 3) == [(int(n) // 3, int(n) % 3) for n in order] and receiver_heads(found, 1) == [
        (1, 2)
    ]
    flat = rhythm([torch.eye(8).expand(1, 2, 8, 8)], everywhere(1, 8))
    assert flat.kurtosis.isnan().all() and len(receiver_heads(flat, 5)) == 2


def test_chosen_sets_of_heads():
    maps = causal(2, 4, 12)
    found = rhythm([maps], everywhere(2, 12), horizon=(1, 9))
    near, far = (torch.tensor([[n == m for n in range(4)]]) for m in (1, 3))
    other = found.with_heads(near, far)
    alone = rhythm([maps[:, 3:]], everywhere(2, 12), horizon=(1, 9))
    torch.testing.assert_close(other.fai, alone.fai)
    with pytest.raises(ValueError, match="local_heads must be booleans"):
        found.with_heads(near[:, :2], far)
    with pytest.raises(ValueError, match="global_heads must hold at least one"):
        found.with_heads(near, far & False)


def test_middle_layers():
    assert middle_layers(32) == [10, 13, 16, 18, 21] and middle_layers(1) == [0] and middle_layers(2) == [0, 1]
    for count in range(1, 80):
        wanted = {round(x + 1e-9) for x in np.linspace(count // 3, min(count - 1, 2 * count // 3), 5)}
        assert set(middle_layers(count)) == wanted


def test_alternatives_are_the_likeliest_others():
    model = models.build("llama")
    ids = torch.randint(10, models.VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        order = model(ids).logits[0, 3].argsort(descending=True).tolist()
    ids[0, 4] = order[1]
    found = alternatives(model, ids, 4, 3, max_new_tokens=5, do_sample=False)
    assert found.shape == (3, 10) and found[:, 4].tolist() == [order[0], order[2], order[3]]
    for row in found:
        again = model.generate(row[None, :5], attention_mask=torch.ones(1, 5).long(), max_new_tokens=5, do_sample=False)
        assert torch.equal(again[0], row)
    assert jaccard("ab", "bc") == pytest.approx(1 / 3) and jaccard("", "") == 1 and jaccard("a", "") == 0


def test_bad_input():
    maps, response = causal(1, 2, 12), everywhere(1, 12)
    for given, message in (
        (dict(window=0), "window must be at least 1"),
        (dict(horizon=(5, 2)), "horizon must be two distances"),
        (dict(share=0.6), "share must be above 0"),
        (dict(sinks=-1), "sinks must be at least 0"),
        (dict(layers=[1, 2]), "layers must name the 1 maps"),
    ):
        with pytest.raises(ValueError, match=message):
            rhythm([maps], response, **given)
    with pytest.raises(ValueError, match="at least one position"):
        rhythm([maps], response & False)
    with pytest.raises(ValueError, match="booleans"):
        rhythm([maps], response.long())
    with pytest.raises(ValueError, match="each of maps must be"):
        rhythm([maps[..., :5]], response)
    with pytest.raises(ValueError, match="at least one layer"):
        rhythm([], response)
    model = models.build("llama")
    inputs = models.inputs("llama", model)
    with pytest.raises(ValueError, match="response must not hold padding"):
        read_rhythm(model, inputs, torch.ones_like(inputs["input_ids"]).bool())
    with pytest.raises(ValueError, match="inputs must hold"):
        read_rhythm(model, inputs, response)
    with pytest.raises(ValueError, match="layers must be numbers"):
        read_rhythm(model, inputs, inputs["attention_mask"].bool(), layers=[7])
    with pytest.raises(TypeError, match=r"no causal language model|must be a transformers"):
        read_rhythm(torch.nn.Linear(2, 2), {"input_ids": inputs["input_ids"]}, inputs["attention_mask"].bool())
    with pytest.raises(ValueError, match="position must be"):
        alternatives(model, inputs["input_ids"][:1], 0, 2)
    with pytest.raises(ValueError, match=r"input_ids must be \(1, N\)"):
        alternatives(model, inputs["input_ids"], 2, 2)
