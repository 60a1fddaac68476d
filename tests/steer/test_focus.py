"""Focus directions against eager attention with moved queries and keys, a model with a bias, and finite differences."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from glocal.steer.contextual import FocusSample, HeadScores, contextual_scores, read_rows
from glocal.steer.focus import Directions, FocusDirections, FocusOracle, focus_oracle, train_directions
from glocal.steer.method import Method
from glocal.steer.record import RecordRows
from tests.steer import models

GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])
LOGITS = GREEDY | dict(max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
EVERY = [*models.VISION, *models.TEXT]
HEADS = [(0, 1), (2, 0), (2, 3)]


def directions(layers=3, heads=4, size=8, scale=2.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(5)
    return Directions({n: torch.randn(heads, size, generator=draw, dtype=dtype) * scale for n in range(layers)})


@dataclass
class Weights(Method):
    """Keeps all weights of each layer."""

    seen: dict = field(default_factory=dict)

    def edits(self, site):
        return True

    def weights(self, site, weights):
        self.seen[site.layer] = weights
        return weights


@pytest.fixture
def llama():
    model = models.build("llama")
    return model, models.inputs("llama", model)


class Eager:
    """A model in transformers' own eager attention, whose queries and keys are moved before the scores."""

    def __init__(self, model, query=None, key=None):
        self.model, self.query, self.key, self.before = model, query, key, model.config._attn_implementation
        self.weights, self.outputs = [], []

    def attend(self, module, query, key, value, attention_mask, **options):
        n = module.layer_idx
        if self.query is not None and n in self.query:
            query = query + self.query[n][:, None]
        if self.key is not None:
            groups = query.shape[1] // key.shape[1]
            key = key.repeat_interleave(groups, 1) + self.key[n][:, None]  # after the heads are repeated
            key = key.view(len(key), -1, groups, *key.shape[2:])
            outs = []
            for g in range(groups):  # eager attention repeats the heads itself
                part = query.view(len(query), -1, groups, *query.shape[2:])[:, :, g]
                scores = part @ key[:, :, g].mT * options["scaling"] + attention_mask
                outs.append(scores.softmax(-1))
            weights = torch.stack(outs, 2).flatten(1, 2)
            self.weights.append(weights)
            return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights
        found = eager_attention_forward(module, query, key, value, attention_mask, **options)
        self.weights.append(found[1])
        self.outputs.append(found[0])
        return found

    def __enter__(self):
        AttentionInterface.register("moved", self.attend)
        AttentionMaskInterface.register("moved", eager_mask)
        self.model.set_attn_implementation("moved")
        return self

    def __exit__(self, *error):
        self.model.set_attn_implementation(self.before)
        AttentionInterface._global_mapping.pop("moved")
        AttentionMaskInterface._global_mapping.pop("moved")


@pytest.mark.parametrize("name", EVERY)
def test_identities_and_nothing_left_behind(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    called = model(**inputs).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with FocusDirections(model, directions=directions(), alpha=0.0):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with FocusDirections(model, directions=directions(scale=5.0), heads=HEADS, alpha=1.0):
        changed = model.generate(**inputs, **GREEDY)
        static = model.generate(**inputs, **GREEDY, **({} if "blip" in name else dict(cache_implementation="static")))
    assert changed.shape == plain.shape and not torch.equal(changed, plain)
    assert torch.equal(static, changed)
    with FocusDirections(model, directions=directions(scale=1.0), heads=HEADS, sink=0.2) as focus:
        model.generate(**inputs, **GREEDY)
    assert focus.strength.shape == (2,)

    def fails(ids, scores):
        raise OSError("stop")

    with FocusDirections(model, directions=directions()), pytest.raises(OSError, match="stop"):
        model.generate(**inputs, **GREEDY, logits_processor=[fails])
    assert torch.equal(model.generate(**inputs, **GREEDY), plain) and torch.equal(model(**inputs).logits, called)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_queries_moved_in_eager_attention(llama):
    model, inputs = llama
    found = directions()
    zero = {n: torch.zeros_like(each) for n, each in found.query.items()}
    for n, head in HEADS:
        zero[n][head] = 0.3 * found.query[n][head]
    with Eager(model, query=zero):
        wanted = model.generate(**inputs, **LOGITS)
    with FocusDirections(model, directions=found, heads=[(0, 1), (-1, 0), (2, -1)], alpha=0.3):
        steered = model.generate(**inputs, **LOGITS)
    assert torch.equal(steered.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(steered.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_vector_on_all_keys_does_nothing(llama):
    model, inputs = llama
    with Eager(model) as plain:
        before = model(**inputs).logits
    with Eager(model, key=directions(scale=0.3).query) as moved:
        after = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    for a, b in zip(plain.weights, moved.weights, strict=True):
        assert (a - b).transpose(1, 2)[real].abs().max() < 2e-6
    torch.testing.assert_close(after[real], before[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_rotation_it_is_a_bias_of_the_queries():
    model = models.build("qwen2")
    inputs = models.inputs("qwen2", model)
    model.model.rotary_emb.inv_freq.zero_()
    found = directions(scale=1.0)
    other = copy.deepcopy(model)
    for layer, each in found.query.items():
        other.model.layers[layer].self_attn.q_proj.bias += 0.7 * each.flatten()
    with FocusDirections(model, directions=found, alpha=0.7):
        logits = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], other(**inputs).logits[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[real], model(**inputs).logits[real], atol=1e-2)


def test_the_slope_at_zero_by_finite_differences():
    model = models.build("llama").double()
    inputs = models.inputs("llama", model)
    found = directions(dtype=torch.float64)

    def logit(alpha):
        with torch.no_grad(), FocusDirections(model, directions=found, heads=HEADS, alpha=alpha):
            return model(**inputs).logits[:, -1, 7]

    # Llama's norms are in float32 even here, so that the steps must be large, and the formula of fourth order.
    h = 5e-3
    differences = (8 * (logit(h) - logit(-h)) - (logit(2 * h) - logit(-2 * h))) / (12 * h)
    shift = {n: torch.zeros_like(each).requires_grad_() for n, each in found.query.items()}
    chosen = {n: torch.zeros(4, 1) for n in shift}
    for n, head in HEADS:
        chosen[n][head] = 1
    for row in range(2):
        with FocusDirections(model, directions=Directions(shift), heads=HEADS, alpha=1.0):
            value = model(**inputs).logits[row, -1, 7]
        slopes = torch.autograd.grad(value, list(shift.values()), allow_unused=True)
        slope = sum((each * found.query[n] * chosen[n]).sum() for n, each in enumerate(slopes) if each is not None)
        torch.testing.assert_close(slope, differences[row], rtol=2e-3, atol=1e-4)
    assert differences.abs().min() > 0.1


@torch.no_grad()
def test_other_heads_of_the_first_edited_layer_are_untouched(llama):
    model, inputs = llama
    seen = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with FocusDirections(model, directions=directions(), heads=[(1, 2)], alpha=0.0):
        model(**inputs)
    with FocusDirections(model, directions=directions(), heads=[(1, 2)], alpha=0.5):
        model(**inputs)
    before, after = (each.unflatten(-1, (4, 8)) for each in seen)
    others = [0, 1, 3]
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-3)


def sample(inputs, rows=(7, 9), gold=(4, 6)):
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    marked, answer = mask.clone(), mask.clone()
    marked[:, gold[0] : gold[1]] = True
    answer[:, rows[0] : rows[1]] = True
    return FocusSample(inputs, marked, answer)


@torch.no_grad()
@pytest.mark.parametrize("name", models.TEXT)
def test_head_scores_are_those_of_eager_attention(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    one = sample(inputs, rows=(5, 8), gold=(4, 5))
    found = contextual_scores(model, [one, one])
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    maps = torch.stack(model(**inputs, position_ids=positions, output_attentions=True).attentions)  # (L, B, H, N, N)
    wanted, sink = torch.zeros(3, 4), torch.zeros(3, 4)
    for b in range(2):
        first = int(inputs["attention_mask"][b].argmax())
        for n in range(5, 8):
            wanted += maps[:, b, :, n, 4] / 6
            sink += maps[:, b, :, n, first : first + 2].sum(-1) / 6
    torch.testing.assert_close(found.gold, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sink, sink, rtol=1e-4, atol=1e-6)
    best = max(((n, h) for n in range(3) for h in range(4)), key=lambda at: wanted[at])
    assert found.top(1) == [best] and len(set(found.top(12))) == 12


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_what_is_read_is_what_the_model_computes(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    last = inputs["input_ids"].shape[1] - 1
    read = read_rows(model, inputs, range(3), torch.tensor([last]))
    with RecordRows(model) as record:
        model.generate(**inputs, **(GREEDY | dict(max_new_tokens=1)))
    for layer in range(3):
        torch.testing.assert_close(read[layer].weights()[:, :, 0].mean(1), record.steps[0][layer], rtol=1e-4, atol=1e-6)


def test_training_is_gradient_descent_on_the_gold_mass(llama):
    model, inputs = llama
    one = sample(inputs, rows=(5, 7), gold=(4, 5))
    start = train_directions(model, [one], epochs=1, lr=1e-12, noise=0.3, seed=4).query
    step = train_directions(model, [one], epochs=1, lr=1e-3, noise=0.3, seed=4).query
    kept = read_rows(model, inputs, range(3), torch.tensor([5, 6]))

    def loss(layer, shift):
        rows = kept[layer]
        total = 0.0
        for b in range(2):
            for h in range(4):
                for r in range(2):
                    scores = rows.key[b, h // 2].double() @ (rows.query[b, h, r] + shift[h]).double() * 8**-0.5
                    dead = (torch.arange(len(scores)) > 5 + r) | (inputs["attention_mask"][b] == 0)
                    total -= float(scores.masked_fill(dead, -torch.inf).softmax(0)[4]) / 16
        return total

    for layer in range(3):
        for h, d in ((0, 0), (3, 5)):
            moved = []
            for sign in (1, -1):
                shift = start[layer].clone()
                shift[h, d] += sign * 1e-2
                moved.append(loss(layer, shift))
            slope = moved[0] - moved[1]
            if abs(slope) > 1e-5:  # Adam's first step goes by the slope's sign
                change = step[layer][h, d] - start[layer][h, d]
                assert change == pytest.approx(-1e-3 if slope > 0 else 1e-3, rel=0.1)


def test_trained_directions_raise_the_gold_mass(llama):
    model, inputs = llama
    one = sample(inputs, rows=(6, 7), gold=(4, 5))
    found = train_directions(model, [one], epochs=60, lr=5e-2)
    again = train_directions(model, [one], epochs=60, lr=5e-2, cached=False, progress=True)
    assert all(torch.equal(found.query[n], again.query[n]) for n in range(3))
    assert found.history == again.history and found.history[-1] < found.history[0] - 0.2
    layer = train_directions(model, [one], layers=[-1], epochs=60, lr=5e-2)
    assert list(layer.query) == [2] and not any(p.requires_grad is False for p in model.parameters())
    before = read_rows(model, inputs, [0], torch.tensor([6]))[0].weights()[:, :, 0, 4].mean()
    with FocusDirections(model, directions=found, alpha=1.0), Weights(model) as seen:
        model.generate(**inputs, **(GREEDY | dict(max_new_tokens=1)))
    assert seen.seen[0][:, :, 6, 4].mean() > before + 0.1


def test_the_oracle_by_loops():
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 4, 6, generator=draw, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    gold = torch.rand(2, 1, 1, 6, generator=draw) < 0.5
    gold[..., 0], gold[..., 1] = True, False
    torch.testing.assert_close(focus_oracle(weights, gold, 1.0), weights)
    for tau in (0.0, 0.3, 2.0):
        found = focus_oracle(weights, gold, tau)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
        for b in range(2):
            mask = gold[b, 0, 0]
            row = weights[b, 1, 2]
            pi = sum(float(w) for w, g in zip(row, mask, strict=True) if g)
            wanted = [
                float(w) * (pi**tau / pi if g else (1 - pi**tau) / (1 - pi)) for w, g in zip(row, mask, strict=True)
            ]
            torch.testing.assert_close(found[b, 1, 2], torch.tensor(wanted, dtype=torch.float64))
    none, all_of_it = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    assert torch.equal(focus_oracle(weights, none, 0.0), weights)
    torch.testing.assert_close(focus_oracle(weights, all_of_it, 0.5), weights)
    assert focus_oracle(torch.tensor([0.0, 1.0]), gold[0, 0, 0, :2], 0.5).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", EVERY)
def test_the_oracle_in_a_model(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    gold = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    gold[:, -3:-1] = True
    with FocusOracle(model, gold=gold, tau=1.0):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with FocusOracle(model, gold=gold, tau=0.0), RecordRows(model) as record:
        changed = model.generate(**inputs, **GREEDY)
    assert changed.shape == plain.shape and not torch.equal(changed, plain)
    for step in (0, 1, 5):
        for layer, rows in record.steps[step].items():
            assert rows[:, -3:-1].sum(1) == pytest.approx(1.0, abs=1e-5) or name == "gemma3", layer
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


@torch.no_grad()
def test_strength_by_attention_to_the_first_tokens(llama):
    model, inputs = llama
    heads = [(0, 1), (0, 2)]  # of one layer: what it reads does not depend on the strength
    found = directions(scale=3.0)
    both = [read_rows(model, inputs, [0], torch.tensor([7]))[0]]
    mine = both[0]

    def sink(row, alpha):
        weights = mine.weights(alpha * found.query[0][:, None])[row, [1, 2], 0]
        first = int(inputs["attention_mask"][row].argmax())
        return float(weights[:, first : first + 2].sum(-1).mean())

    ends = [(sink(row, -0.5), sink(row, 1.0)) for row in range(2)]
    target = sum(ends[0]) / 2
    with FocusDirections(model, directions=found, heads=heads, sink=target) as focus:
        answers = model.generate(**inputs, **GREEDY, num_return_sequences=1)
    for row in range(2):
        low, high = sorted(ends[row])
        if low < target < high:
            assert sink(row, float(focus.strength[row])) == pytest.approx(target, abs=1e-4)
        else:
            assert float(focus.strength[row]) in (-0.5, 1.0)
    # Each row has a strength of its own: alone it has the same.
    for row in range(2):
        start = int(inputs["attention_mask"][row].argmax())
        alone = {name: each[row : row + 1, start:] for name, each in inputs.items()}
        with FocusDirections(model, directions=found, heads=heads, sink=target) as focus_alone:
            again = model.generate(**alone, **GREEDY)
        torch.testing.assert_close(focus_alone.strength, focus.strength[row : row + 1], rtol=1e-3, atol=1e-3)
        assert torch.equal(again[0], answers[row, start:])
    with FocusDirections(model, directions=found, heads=heads, alpha=float(focus.strength[0])):
        assert torch.equal(model.generate(**inputs, **GREEDY)[0], answers[0])
    with FocusDirections(model, directions=found, heads=heads, sink=target) as focus:
        several = model.generate(**inputs, **LOGITS | dict(do_sample=True), num_return_sequences=3)
    assert len(several.sequences) == 6 and focus.strength.shape == (2,)


@torch.no_grad()
def test_half_precision_and_embeddings(llama):
    model, inputs = llama
    model = model.to(torch.bfloat16)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    found = train_directions(model, [FocusSample(given, *sample(inputs, rows=(6, 7), gold=(4, 5))[1:])], epochs=2)
    assert found.query[0].dtype == torch.float32
    for settings in (dict(alpha=0.5), dict(sink=0.3)):
        with FocusDirections(model, directions=found, **settings):
            out = model.generate(**given, **LOGITS)
        assert torch.isfinite(torch.stack(out.logits)).all()


def test_files(tmp_path, llama):
    model, _ = llama
    found, path = directions(), tmp_path / "focus.safetensors"
    found.save(path)
    again = Directions.load(path, model)
    assert all(torch.equal(again.query[n], found.query[n]) for n in range(3))
    both = {"layers.1.query": found.query[1], "layers.1.key": found.query[0]}
    save_file(both, path)
    assert list(Directions.load(path, model).query) == [1]
    with pytest.raises(ValueError, match="cannot be loaded"):
        Directions.load(tmp_path / "missing", model)
    data = path.read_bytes()
    for damaged in (data[:50], data[:-9], b"", b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"focus.safetensors' cannot be loaded"):
            Directions.load(path, model)
    for weights, message in (
        ({"layers.0.query": torch.zeros(4, 16)}, r"does not fit this model: .*layer 0 must be numbers \(4, 8\)"),
        ({"layers.7.query": torch.zeros(4, 8)}, "does not fit this model: directions are of layer 7"),
        ({"layers.0.query": torch.zeros(4, 8, dtype=torch.int64)}, "does not fit this model"),
        ({"layers.0.key": torch.zeros(4, 8)}, "does not fit this model: directions must be of one layer"),
        ({"model.embed": torch.zeros(4, 8)}, "holds no directions: model.embed"),
    ):
        save_file(weights, path)
        with pytest.raises(ValueError, match=message):
            Directions.load(path, model)


def test_what_is_refused(llama):
    model, inputs = llama
    found, one = directions(), sample(inputs, rows=(6, 7), gold=(4, 5))
    for settings, message in (
        (dict(directions=directions(size=6)), r"must be numbers \(4, 8\)"),
        (dict(directions=found, heads=[(3, 0)]), r"one was \(3, 0\)"),
        (dict(directions=found, heads=[(0, 4)]), r"one was \(0, 4\)"),
        (dict(directions=Directions({0: found.query[0]}), heads=[(1, 0)]), "layer 1, which has no direction"),
        (dict(directions=found, sink=1.5), "sink must be from 0 to 1"),
        (dict(directions=found, alpha=float("nan")), "alpha must be"),
        (dict(directions=found, bounds=(1.0, 0.0)), "bounds must be two rising"),
        (dict(directions=found, layers=[0]), "layers must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            FocusDirections(model, **settings)
    with pytest.raises(ValueError, match="tau must be at least 0"):
        FocusOracle(model, gold=one.gold, tau=-1.0)
    with FocusOracle(model, gold=one.gold[:, 1:]), pytest.raises(ValueError, match="gold must be booleans"):
        model.generate(**inputs, **GREEDY)
    for wrong, message in (
        (one._replace(gold=one.gold[:, 1:]), "gold must be booleans"),
        (one._replace(rows=torch.zeros_like(one.rows)), "rows must be booleans"),
        (one._replace(inputs={}), "inputs must hold input_ids or inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            contextual_scores(model, [wrong])
        with pytest.raises(ValueError, match=message):
            train_directions(model, [wrong])
    for call in (lambda: contextual_scores(model, []), lambda: train_directions(model, [])):
        with pytest.raises(ValueError, match="at least one; there was none"):
            call()
    for settings in (dict(lr=0.0), dict(epochs=0), dict(noise=-1.0), dict(layers=[5])):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            train_directions(model, [one], **settings)
    with pytest.raises(ValueError, match="count must be from 1 to 12"):
        HeadScores(torch.zeros(3, 4), torch.zeros(3, 4)).top(13)
