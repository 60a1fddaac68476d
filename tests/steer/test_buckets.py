"""Attention buckets against models that were made with each base, identities, caches, sampling, and refusals."""

import copy

import pytest
import torch
from transformers import DynamicCache

from glocal.steer.agla import AGLA
from glocal.steer.buckets import AttentionBuckets, merge_buckets, own_base, rotary_base
from glocal.steer.steering import Steering
from tests.steer import models

GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])
LOGITS = GREEDY | dict(max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
BASES = [300.0, 20.0, 10000.0]
UNFIT = {"blip_2": "no rotary", "instructblip": "no rotary", "gemma3": "different bases"}
FIT = [name for name in [*models.TEXT, *models.VISION] if name not in UNFIT]
SCALINGS = [
    dict(rope_type="linear", factor=3.0),
    dict(rope_type="dynamic", factor=2.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    dict(rope_type="longrope", short_factor=[1.1] * 4, long_factor=[3.0] * 4, original_max_position_embeddings=8),
    dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
]


def made(model, base, **rope):
    """The same weights in a model that was made with a base, and with scaling for prompts beyond six tokens."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    if rope:
        text.max_position_embeddings = 6
    text.rope_parameters = dict(text.rope_parameters) | {"rope_theta": base} | rope
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    assert own_base(other) == base
    return other


@pytest.fixture
def llama():
    model = models.build("llama")
    return model, models.inputs("llama", model)


@pytest.mark.parametrize("name", FIT)
def test_identities_and_nothing_left_behind(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rotary = [module for path, module in model.named_modules() if path.endswith("rotary_emb")]
    with AttentionBuckets(model, bases=[own_base(model)]):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with AttentionBuckets(model, bases=BASES) as buckets:
        changed = model.generate(**inputs, **GREEDY)
        called = model(**inputs).logits
    assert changed.shape == plain.shape and not torch.equal(changed, plain)
    assert len(buckets.shares) == 20 and all(torch.allclose(s.sum(0), torch.ones(2)) for s in buckets.shares)

    def fails(ids, scores):
        raise OSError("stop")

    with AttentionBuckets(model, bases=BASES) as buckets, pytest.raises(OSError, match="stop"):
        model.generate(**inputs, **GREEDY, logits_processor=[fails])
    assert not buckets._branches
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert torch.equal(model(**inputs).logits, called)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    now = [module for path, module in model.named_modules() if path.endswith("rotary_emb")]
    assert all(a is b for a, b in zip(rotary, now, strict=True))


@pytest.mark.parametrize("name", FIT)
def test_one_base_is_the_model_made_with_it(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    wanted = made(model, 300.0).generate(**inputs, **GREEDY)
    assert not torch.equal(model.generate(**inputs, **GREEDY), wanted)
    with AttentionBuckets(model, bases=[300.0]):
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    # A branch reads the base like the run itself: weights of the surest aside, both are one model.
    with AttentionBuckets(model, bases=[300.0, 300.0]):
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_scaled_frequencies_are_scaled_anew(scaling, llama):
    plain, inputs = llama
    model = made(plain, 10000.0, **scaling)
    for order in ([300.0, 20.0], [20.0, 300.0]):
        with AttentionBuckets(model, bases=order):
            found = model.generate(**inputs, **LOGITS).logits
        each = [made(plain, base, **scaling) for base in order]
        logits = torch.stack([one.generate(**inputs, **LOGITS).logits[0] for one in each])
        torch.testing.assert_close(found[0], merge_buckets(logits)[0], rtol=1e-5, atol=1e-5)
        unscaled = torch.stack([made(plain, base).generate(**inputs, **LOGITS).logits[0] for base in order])
        assert not torch.allclose(found[0], merge_buckets(unscaled)[0], atol=1e-3)


def by_hand(each, ids, mask):
    """Merged logits of models that read everything anew, in loops."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [one(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1] for one in each]
    best = torch.stack([row.max(-1).values for row in rows], 1)
    share = best.exp() / best.exp().sum(1, keepdim=True)
    return sum(share[:, n, None] * row for n, row in enumerate(rows))


@torch.no_grad()
@pytest.mark.parametrize("name", models.TEXT)
def test_separately_made_models_merged_by_hand(name):
    model = models.build(name)
    inputs = models.inputs(name, model, batch=3)
    each = [made(model, base) for base in BASES]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(20):
        merged = by_hand(each, ids, mask)
        merged[:, models.IMAGE] = -torch.inf
        ids = torch.cat([ids, merged.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    with AttentionBuckets(model, bases=BASES):
        assert torch.equal(model.generate(**inputs, **GREEDY), ids)


def test_equal_bases_and_their_order(llama):
    model, inputs = llama
    plain = model.generate(**inputs, **LOGITS)
    with AttentionBuckets(model, bases=[own_base(model)] * 4):
        torch.testing.assert_close(model.generate(**inputs, **LOGITS).logits, plain.logits, rtol=1e-5, atol=1e-5)
    found = []
    for order in (BASES, BASES[::-1], [BASES[1], BASES[2], BASES[0]]):
        with AttentionBuckets(model, bases=order):
            found.append(model.generate(**inputs, **LOGITS).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_weights_come_from_raw_logits():
    logits = torch.randn(3, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, before = merge_buckets(logits)
    raised = logits.clone()
    raised[1] += 2.0
    merged, after = merge_buckets(raised)
    odds = (after[1] / after[0]) / (before[1] / before[0])
    torch.testing.assert_close(odds, torch.full((2,), torch.e**2, dtype=torch.float64))
    # Log-probabilities would not have moved.
    _, flat = merge_buckets(raised.log_softmax(-1))
    torch.testing.assert_close(flat, merge_buckets(logits.log_softmax(-1))[1])
    loops = [[sum(after[w, b] * raised[w, b, v] for w in range(3)) for v in range(7)] for b in range(2)]
    torch.testing.assert_close(merged, torch.tensor(loops, dtype=torch.float64))


def test_what_a_base_rules_out_stays_out():
    logits = torch.tensor([[[0.0, -torch.inf, 1.0]], [[900.0, 2.0, 3.0]]])
    merged, shares = merge_buckets(logits)
    assert merged.tolist() == [[900.0, -torch.inf, 3.0]] and shares.tolist() == [[0.0], [1.0]]


@torch.no_grad()
def test_sampling_draws_one_token_for_all_bases(llama):
    model, inputs = llama
    torch.manual_seed(3)
    settings = LOGITS | dict(do_sample=True, num_return_sequences=3, temperature=2.0)
    with AttentionBuckets(model, bases=BASES):
        found = model.generate(**inputs, **settings)
    assert len({tuple(row) for row in found.sequences[:3].tolist()}) == 3  # three answers of one prompt
    each = [made(model, base) for base in BASES]
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(3, 0), torch.ones(6, 5, dtype=torch.long)], 1)
    length = inputs["input_ids"].shape[1]
    for step, logits in enumerate(found.logits):
        wanted = by_hand(each, found.sequences[:, : length + step], mask[:, : length + step])
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl"])
def test_a_static_cache(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    with AttentionBuckets(model, bases=BASES):
        wanted = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), wanted)


def test_half_precision(llama):
    model, inputs = llama
    model = model.to(torch.bfloat16)
    with AttentionBuckets(model, bases=BASES):
        found = model.generate(**inputs, **LOGITS)
    assert torch.isfinite(torch.stack(found.logits)).all()


def test_a_base_for_a_block(llama):
    model, inputs = llama
    other = made(model, 20.0)
    before = model(**inputs).logits
    with rotary_base(model, 20.0):
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert torch.equal(model(**inputs).logits, before) and own_base(model) == 10000.0


def test_given_positions_reach_every_base(llama):
    model, inputs = llama
    ids = inputs["input_ids"][:1]
    positions = torch.arange(ids.shape[1])[None] * 9
    one = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with AttentionBuckets(model, bases=BASES):
        found = model.generate(input_ids=ids, position_ids=positions, **one).logits[0]
    each = [made(model, base)(input_ids=ids, position_ids=positions).logits[:, -1] for base in BASES]
    torch.testing.assert_close(found, merge_buckets(torch.stack(each))[0], rtol=1e-5, atol=1e-5)
    with AttentionBuckets(model, bases=BASES), pytest.raises(ValueError, match="set max_new_tokens=1"):
        model.generate(input_ids=ids, position_ids=positions, max_new_tokens=2)


def test_what_is_refused(llama):
    model, inputs = llama
    for bases in ([], [0.0], [-1.0], [float("nan")], [float("inf")], [True]):
        with pytest.raises(ValueError, match="bases must be numbers above 0"):
            AttentionBuckets(model, bases=bases)
    with pytest.raises(ValueError, match=r"logits must be \(W, B, V\)"):
        merge_buckets(torch.zeros(2, 3))
    with AttentionBuckets(model, bases=BASES), pytest.raises(ValueError, match="num_beams must be 1, it was 2"):
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
    cache = DynamicCache(config=model.config)
    model(**{name: t[:, :3] for name, t in inputs.items()}, **{Steering.of(model).cache_name: cache})
    with AttentionBuckets(model, bases=BASES), pytest.raises(ValueError, match="cache holds tokens already"):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    other = AGLA(model, augmented={})
    with AttentionBuckets(model, bases=BASES), pytest.raises(ValueError, match="only one method at a time"), other:
        pass


@pytest.mark.parametrize("name", UNFIT)
def test_models_without_one_base_are_refused(name):
    with pytest.raises(TypeError, match=UNFIT[name]):
        AttentionBuckets(models.build(name))
