"""Dropping the past turn by turn is what the segment mask says in one pass; own maps act on their tokens alone."""

import pytest
import torch
import transformers as t
from transformers import DynamicCache

from glocal.steer.compression import (
    BUDGETS,
    COMPRESSED,
    HIGH,
    LOW,
    PADDING,
    QUESTION,
    REPLY,
    SYSTEM,
    Compressor,
    Segments,
    beacons,
    interleave,
    kept,
    segment_mask,
    select_cache,
)
from tests.steer import models

S, Q, L, H, R, C = SYSTEM, QUESTION, LOW, HIGH, REPLY, COMPRESSED
TURNS = ([S, S], [Q, L, L, C, H, H, C, R, C], [L, C, Q, Q, L, H, C, R, R, C, C], [L, Q, L])
NAMES = ("llama", "qwen2")


def stream(rows=2, width=32, dtype=torch.float64):
    """Kinds ``(B, N)``, turns ``(B, N)`` and embeddings of the turns above."""
    kinds = torch.tensor([kind for turn in TURNS for kind in turn]).expand(rows, -1)
    turns = torch.tensor([n for n, turn in enumerate(TURNS) for _ in turn]).expand(rows, -1)
    embeds = torch.randn(*kinds.shape, width, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return kinds, turns, embeds


def own_maps(model, seed=0):
    """A compressor that is no copy any more."""
    compressor = Compressor(model, token=5)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return compressor


def turn_by_turn(model, kinds, turns, embeds, choose=kept, **more):
    """Logits of all tokens, the cache cut after each turn; and how many it held at last."""
    cache, out = DynamicCache(), []
    past = kinds[:, :0]
    for n in range(int(turns.max()) + 1):
        at = (turns[0] == n).nonzero()[:, 0]
        named = {name: value[:, at] for name, value in more.items()}
        found = model(inputs_embeds=embeds[:, at], position_ids=at[None], cache=cache, use_cache=True, **named)
        out.append(found.logits)
        past = torch.cat([past, kinds[:, at]], 1)
        stays = choose(past[0]).nonzero()[:, 0]
        select_cache(cache, stays)
        past = past[:, stays]
    return torch.cat(out, 1), cache.get_seq_length()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_pass_is_turn_by_turn(name, dtype, bound):
    model = models.build(name).to(dtype)
    kinds, turns, embeds = stream(dtype=dtype)
    compressor = own_maps(model)
    where = kinds == COMPRESSED
    positions = torch.arange(kinds.shape[1])[None]
    with torch.no_grad(), compressor.on(model):
        mask = segment_mask(kinds, turns)
        one = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, compressed=where).logits
        many, held = turn_by_turn(model, kinds, turns, embeds, compressed=where)
        full = model(inputs_embeds=embeds, position_ids=positions, compressed=where).logits
    assert (one - many).abs().max() < bound
    assert held == int(kept(kinds[0]).sum())
    # The first two turns see everything; what was dropped matters afterwards.
    first = int((turns[0] < 2).sum())
    assert (one - full)[:, :first].abs().max() < bound and (one - full)[:, first:].abs().amax(-1).min() > 1e-3


def test_positions_that_go_on_from_the_cache_are_something_else():
    model = models.build("llama").double()
    kinds, turns, embeds = stream()
    with torch.no_grad():
        cache = DynamicCache()
        at = (turns[0] < 2).nonzero()[:, 0]
        model(inputs_embeds=embeds[:, at], cache=cache, use_cache=True)
        select_cache(cache, kept(kinds[0, at]).nonzero()[:, 0])
        wrong = model(inputs_embeds=embeds[:, len(at) :], cache=cache, use_cache=True).logits
        right, _ = turn_by_turn(model, kinds, turns, embeds)
    assert (wrong[:, 0] - right[:, len(at)]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_changes_nothing(name):
    model = models.build(name)
    kinds, turns, embeds = stream(dtype=torch.float32)
    with torch.no_grad():
        kept_all, held = turn_by_turn(model, kinds, turns, embeds, choose=lambda past: torch.ones_like(past).bool())
        cache, parts = DynamicCache(), []
        for n in range(len(TURNS)):
            at = (turns[0] == n).nonzero()[:, 0]
            parts.append(model(inputs_embeds=embeds[:, at], cache=cache, use_cache=True).logits)
    assert torch.equal(kept_all, torch.cat(parts, 1)) and held == kinds.shape[1]


def test_rows_that_keep_different_positions():
    model = models.build("llama").double()
    embeds = torch.randn(2, 9, 32, dtype=torch.float64)
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    with torch.no_grad():
        cache = DynamicCache()
        model(inputs_embeds=embeds[:, :6], cache=cache, use_cache=True)
        select_cache(cache, index)
        positions = torch.arange(6, 9)[None]
        both = model(inputs_embeds=embeds[:, 6:], cache=cache, position_ids=positions, use_cache=True).logits
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
        for row in range(2):
            gone = [n for n in range(6) if n not in index[row].tolist()]
            mask[row, :, 6:, gone] = False
        one = model(inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(9)[None]).logits[:, 6:]
    assert (both - one).abs().max() < 1e-10


def test_the_mask_by_loops():
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 7, (3, 14), generator=draw)
    turns = torch.randint(0, 2, (3, 14), generator=draw).cumsum(1)
    mask = segment_mask(kinds, turns)
    for b in range(3):
        for i in range(14):
            for j in range(14):
                seen = j <= i and kinds[b, j] != PADDING
                seen = seen and (turns[b, i] == turns[b, j] or kinds[b, j] in (SYSTEM, QUESTION, COMPRESSED))
                assert bool(mask[b, 0, i, j]) == bool(seen or i == j)


def test_eager_attention_takes_the_mask_as_numbers():
    model = models.build("llama").double()
    kinds, turns, embeds = stream()
    with torch.no_grad():
        fused = model(inputs_embeds=embeds, attention_mask=segment_mask(kinds, turns)).logits
        model.set_attn_implementation("eager")
        eager = model(inputs_embeds=embeds, attention_mask=segment_mask(kinds, turns, torch.float64)).logits
    assert (fused - eager).abs().max() < 1e-5  # the softmax is in float32 there


# Maps of their own.


@pytest.mark.parametrize("name", [*NAMES, "mistral", "llava", "qwen2_vl", "blip_2", "paligemma"])
def test_copied_maps_are_ordinary_tokens_at_first(name):
    model = models.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    speaker = model.language_model if name == "blip_2" else model
    kinds, _, embeds = stream(dtype=torch.float32)
    compressor = Compressor(model, token=5)
    assert torch.equal(compressor.embedding.detach(), speaker.get_input_embeddings()(torch.tensor([5]))[0].detach())
    # PaliGemma sees its prompt both ways unless told otherwise.
    given = {"inputs_embeds": embeds}
    if name == "paligemma":
        given["attention_mask"] = segment_mask(kinds, torch.zeros_like(kinds))
    with torch.no_grad():
        plain = speaker(**given).logits
        with compressor.on(model):
            own = speaker(**given, compressed=kinds == COMPRESSED).logits
        changed = own_maps(model)
        with changed.on(model):
            other = speaker(**given, compressed=kinds == COMPRESSED).logits
            none = speaker(**given).logits
        after = speaker(**given).logits
    assert (plain - own).abs().max() < 1e-5
    first = int((kinds[0] == COMPRESSED).nonzero()[0])
    assert (plain - other)[:, :first].abs().max() < 1e-5
    assert (plain - other)[:, first:].abs().amax(-1).min() > 1e-4
    assert torch.equal(plain, none) and torch.equal(plain, after)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_rows_of_compression_tokens_are_projected_by_their_own_maps():
    model = models.build("llama").double()
    compressor = own_maps(model)
    where = torch.zeros(2, 6, dtype=torch.bool)
    where[0, 2], where[1, 4] = True, True
    seen = {}
    layer = model.model.layers[0].self_attn
    with compressor.on(model):
        hooks = [
            getattr(layer, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: (a[0], out)}))
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        model(inputs_embeds=torch.randn(2, 6, 32, dtype=torch.float64), compressed=where)
        for hook in hooks:
            hook.remove()
    for name, (states, out) in seen.items():
        for b in range(2):
            for n in range(6):
                weight = (compressor.maps[0][name] if where[b, n] else getattr(layer, name)).weight
                assert torch.allclose(out[b, n], weight @ states[b, n], atol=1e-12)


def test_only_the_compressor_learns_and_checkpointing_agrees():
    model = models.build("llama").double().requires_grad_(False)
    compressor = own_maps(model)
    kinds, turns, embeds = stream()
    where = kinds == COMPRESSED
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compressor.zero_grad()
        with compressor.on(model):
            mixed = torch.where(where[..., None], compressor.embedding, embeds)
            out = model(
                inputs_embeds=mixed, attention_mask=segment_mask(kinds, turns), compressed=where, use_cache=False
            )
            out.logits.square().sum().backward()
        grads.append([p.grad.clone() for p in compressor.parameters()])
    assert all(bool(g.abs().sum() > 0) for g in grads[0])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_leaves_the_model_as_it_was():
    model = models.build("llama")
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError), Compressor(model, 5).on(model):
        raise ZeroDivisionError
    compressor, other = Compressor(model, 5), models.build("llama")
    with compressor.on(model), pytest.raises(ValueError, match="in another model already"), compressor.on(other):
        pass
    assert before == {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


def test_half_precision():
    model = models.build("llama").to(torch.bfloat16)
    kinds, turns, embeds = stream(dtype=torch.bfloat16)
    with torch.no_grad(), Compressor(model, 5).on(model):
        mask = segment_mask(kinds, turns)
        out = model(inputs_embeds=embeds, attention_mask=mask, compressed=kinds == COMPRESSED).logits
        mine, _ = turn_by_turn(model, kinds, turns, embeds, compressed=kinds == COMPRESSED)
    assert out.dtype == torch.bfloat16 and (out - mine).abs().max() < 0.05 * out.abs().max()


# Places.


def test_segments_and_interleaving():
    kinds = torch.tensor([Q, L, L, L, H, H, H, H, R, R, L])
    pieces = torch.tensor([0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6])
    counts = Segments(2)(kinds, pieces)
    assert counts.tolist() == [0, 0, 0, 2, 0, 2, 0, 2, 0, 2, 2]
    embeds = torch.randn(11, 4, requires_grad=True)
    spread, mixed = interleave(embeds, kinds, counts, torch.full((4,), 7.0))
    expected, rows = [], []
    for n in range(11):
        expected += [int(kinds[n])] + [C] * int(counts[n])
        rows += [embeds[n]] + [torch.full((4,), 7.0)] * int(counts[n])
    assert mixed.tolist() == expected and torch.equal(spread, torch.stack(rows))


def test_beacons():
    draw = torch.Generator().manual_seed(0)
    kinds = torch.tensor([Q] + [L] * 20 + [H] * 7 + [R] * 4 + [L] * 3)
    pieces = torch.tensor([0, *range(1, 21)] + [21] * 7 + [22] * 4 + [23, 24, 25])
    found = torch.stack([beacons(kinds, pieces, draw=draw) for _ in range(60)])
    assert set(found.sum(1).tolist()) == set(BUDGETS) == {10, 12, 15}
    assert bool((found[:, [27, 31, 34]] == 1).all())  # high frame, reply, end
    others = [n for n in range(35) if n not in (27, 31, 34)]
    assert bool(found[:, others].any(0).all()) and not bool(found[:, others].all(0).any())
    assert beacons(kinds, pieces, budget=1, draw=draw).nonzero()[:, 0].tolist() == [27, 31, 34]
    assert beacons(kinds[:4], pieces[:4], budget=10).tolist() == [1, 1, 1, 1]


# Bad input.


def test_refusals():
    windowed = t.MistralConfig(**{**models.build("mistral").config.to_dict(), "sliding_window": 4})
    with pytest.raises(TypeError, match=r"DynamicSlidingWindowLayer"):
        select_cache(DynamicCache(config=windowed), torch.tensor([0]))
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    for wrong in ([0, 4], [1, 0], [2, 2], [-1]):
        with pytest.raises(ValueError, match="index must ascend within the cache's 4 positions"):
            select_cache(cache, torch.tensor(wrong))
    with pytest.raises(ValueError, match="int64"):
        select_cache(cache, torch.ones(4, dtype=torch.bool))
    gpt = t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(TypeError, match="has no q_proj"):
        Compressor(gpt, 5)
    assert len(Compressor(gpt, 5, maps=False).maps) == 0
    with pytest.raises(ValueError, match="token must be from 0 to 98"):
        Compressor(models.build("llama"), 99)
    with pytest.raises(ValueError, match="turns must never fall"):
        segment_mask(torch.zeros(1, 2).long(), torch.tensor([[1, 0]]))
