"""Caches with a policy: full attention where the budget allows, the policy's mask written out where it does not."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AttentionInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from glocal.hf import adapt
from glocal.hf.cache import (
    AllOrHereCache,
    BlocksCache,
    CoreContextCache,
    HeavyHitterCache,
    LessIsMoreCache,
    PolicyCache,
    PolicyLayer,
    TokenRolesCache,
    WindowSinksCache,
)
from glocal.nn.frame import Call
from glocal.patterns import Full

WINDOW = 5  # of the models that have one
_SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)
_GROUPED = _SIZES | dict(num_key_value_heads=2)
_GEMMA = _GROUPED | dict(
    head_dim=8,
    num_hidden_layers=4,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"] * 2,
    query_pre_attn_scalar=20,  # a scale that is not head_dim ** -0.5
)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GEMMA, attn_logit_softcapping=3.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
}
# What a model is adapted with, and the cache.
ROOMY = {
    "full": ("full()", lambda h: h.cache()),
    "window": ("full()", lambda h: WindowSinksCache(h.model, 32, 2)),
    "heavy": ("full()", lambda h: HeavyHitterCache(h.model, 16, 16)),
    "less": ("full()", lambda h: LessIsMoreCache(h.model, 32, start=0)),
    "blocks": ("full()", lambda h: BlocksCache(h.model, 4, 8)),
    "cores": ("full()", lambda h: CoreContextCache(h.model, 4, 32)),
    "roles": ("nats(window=32)", lambda h: all_global(h)),
    "aha": ("aha(window=32)", AllOrHereCache),
}
TIGHT = {
    "full": ("sliding(3, 0) | sinks(1)", lambda h: h.cache()),
    "window": ("full()", lambda h: WindowSinksCache(h.model, 3, 2)),
    "heavy": ("full()", lambda h: HeavyHitterCache(h.model, 3, 2)),
    "less": ("full()", lambda h: LessIsMoreCache(h.model, 6, start=0, ratio=0.5, sinks=1)),
    "blocks": ("full()", lambda h: BlocksCache(h.model, 3, 2)),
    "cores": ("full()", lambda h: CoreContextCache(h.model, 2, 3)),
    "roles": ("nats(window=2)", TokenRolesCache),
    "chunks": ("nats(window=4, chunk=2)", TokenRolesCache),
    "aha": ("aha(window=2)", AllOrHereCache),
    "h2o": ("h2o(heavy=3, recent=2)", lambda h: h.cache()),
    "groups": ("sf_attn(group_size=4, sinks=1)", lambda h: h.cache()),
    "mswa": ("mswa(windows=[2, 2, 4, 4])", lambda h: h.cache()),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # large enough that attention is far from even
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def text(batch: int = 3, length: int = 14, pad: int = 0):
    """Tokens, and which are real: row n begins with n times ``pad`` of padding."""
    ids = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(length) >= pad * torch.arange(batch)[:, None]).long()


def full_layers(model) -> list[int]:
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [n for n, kind in enumerate(kinds) if kind == "full_attention"]


def all_global(handle) -> TokenRolesCache:
    """A window does not hold local tokens, so that there is room for everything only where all are global."""
    for p in handle.parameters():
        torch.nn.init.zeros_(p)  # ties go to global
    return TokenRolesCache(handle)


@contextmanager
def adapted(model, where: str):
    """As `adapt`, layers with windows of their own left out where it is a mechanism, routers far from even."""
    with adapt(model, where, layers=full_layers(model) if "=" in where else None) as handle:
        torch.manual_seed(2)
        for p in handle.parameters():
            torch.nn.init.normal_(p)
        yield handle


@torch.no_grad()
def read(model, ids, real=None, cache=None, pieces=None, start: int = 0):
    """Logits of the tokens from ``start`` on; with a cache in pieces of these sizes."""
    real = torch.ones_like(ids) if real is None else real
    places, found = (real.cumsum(1) - 1).clamp(min=0), []
    for n in pieces or [ids.shape[1] - start]:
        at = slice(start, start + n)
        more = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        out = model(input_ids=ids[:, at], attention_mask=real[:, : at.stop], position_ids=places[:, at], **more)
        found.append(out.logits)
        start += n
    return torch.cat(found, 1)


def close(found, expected) -> bool:
    """Norms of transformers compute in float32, whatever the model's type."""
    return torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def alone(model, ids, real, row: int, cache=None, pieces=None):
    """Logits of a row without its padding; pieces are those of the batch."""
    own = real[row].bool()
    if pieces:
        pieces = [n for n in (int(part.sum()) for part in own.split(list(pieces))) if n]
    return read(model, ids[row : row + 1, own], None, cache, pieces)[0]


# 1. A budget that covers everything is full attention.

STEPS = (1,) * 7


@pytest.mark.parametrize("policy", ROOMY)
@pytest.mark.parametrize("name", MODELS)
def test_room_for_everything_is_full_attention(name, policy):
    """Token by token, prompts in one piece and in two, each row as alone; Gemma's layers keep their own windows."""
    model, (where, cache) = make(name), ROOMY[policy]
    ids, real = text(length=11, pad=2)
    with adapted(model, where) as handle:
        padded = read(model, ids, real, cache(handle), (7, 1, 1, 1, 1))
        plain = read(model, ids, None, cache(handle), (3, 4, 1, 1, 1, 1))
    for row in range(3):
        assert close(padded[row, real[row].bool()], alone(model, ids, real, row)), row
    assert close(plain, read(model, ids))


def generate(model, cache=None, **more):
    # Without our code, Gemma 2 gives NaN where a window holds nothing but padding.
    ids, real = text(batch=2, length=8, pad=0 if isinstance(model, Gemma2ForCausalLM) else 3)
    torch.manual_seed(3)
    settings = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True) | more
    return model.generate(input_ids=ids, attention_mask=real, past_key_values=cache, **settings)


WAYS = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 20}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize(
    ("name", "policy"),
    [("llama", policy) for policy in ROOMY] + [(name, "heavy") for name in MODELS if name != "llama"],
)
def test_generate_as_with_transformers_own_cache(name, policy):
    model, (where, cache) = make(name), ROOMY[policy]
    expected = [generate(model, **way) for way in WAYS.values()]
    assert not torch.equal(expected[0].sequences, expected[1].sequences)
    with adapted(model, where) as handle:
        for theirs, way in zip(expected, WAYS.values(), strict=True):
            ours = generate(model, cache(handle), **way)
            assert torch.equal(ours.sequences, theirs.sequences), way
            for a, b in zip(ours.logits, theirs.logits, strict=True):
                assert close(a, b)


# 2. A small budget is the policy's mask.


@contextmanager
def written_out(model, see):
    """Dense softmax attention over ``see(module, q, k, scores)``, ``(B, H, N, N)``: none of our code."""

    def forward(module, q, k, v, mask, scaling=None, softcap=None, **options):
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = see(module, q, k, scores)
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
        return out.transpose(1, 2), None

    AttentionInterface.register("written_out", forward)
    before = model.config._attn_implementation
    model.set_attn_implementation("written_out")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop("written_out")


def causal(module, scores):
    """Causality and the model's own window."""
    ahead = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
    own = getattr(module, "sliding_window", None) or scores.shape[-1]
    return ((ahead >= 0) & (ahead < own)).expand(scores.shape).clone()


def window_after(prompt, window, sinks):
    def see(module, q, k, scores):
        seen = causal(module, scores)
        length = scores.shape[-1]
        for i in range(prompt, length):
            for j in range(length):
                seen[:, :, i, j] &= i - j < window or j < sinks
        return seen

    return see


def heavy_after(prompt, heavy, recent):
    """H2O as its authors run it: sums over the whole prompt, one cut after it, one after each token from then on."""

    def see(module, q, k, scores):
        seen = causal(module, scores)
        if getattr(module, "sliding_window", None):
            return seen
        group = q.shape[1] // k.shape[1]
        for b in range(q.shape[0]):
            for h in range(k.shape[1]):
                mine = slice(h * group, (h + 1) * group)
                kept, sums = [], []
                for i in range(scores.shape[-1]):
                    kept.append(i)
                    sums.append(0.0)
                    seen[b, mine, i] = False
                    seen[b, mine, i, kept] = True
                    for g in range(h * group, (h + 1) * group):
                        for j, weight in zip(kept, scores[b, g, i, kept].softmax(0).tolist(), strict=True):
                            sums[j] += weight
                    if i >= prompt - 1 and len(kept) > heavy + recent:
                        old = kept[: len(kept) - recent]
                        best = sorted(old, key=lambda j: (-sums[j], j))[:heavy]
                        kept = sorted(best) + kept[len(kept) - recent :]
        return seen

    return see


def less_after(prompt, budget, ratio, sinks, start):
    """LessIsMore: the best token of every head, then every head's second best, until there are enough."""
    sets = {}

    def see(module, q, k, scores):
        seen = causal(module, scores)
        for b in range(q.shape[0]):
            for i in range(prompt, scores.shape[-1]):
                if module.layer_idx == start:
                    picked = int(budget * ratio)
                    first = sinks if budget - picked >= sinks else 0
                    last = i + 1 - (budget - picked - first)
                    orders = [
                        sorted(range(first, last), key=lambda j: (-head[j], j)) for head in scores[b, :, i].tolist()
                    ]
                    found = list(dict.fromkeys(j for rank in zip(*orders, strict=True) for j in rank))[:picked]
                    everything = budget >= i + 1
                    sets[b, i] = list(range(i + 1)) if everything else [*range(first), *found, *range(last, i + 1)]
                elif module.layer_idx > start:
                    seen[b, :, i] = False
                    seen[b, :, i, sets[b, i]] = True
        return seen

    return see


def blocks(size, top_k):
    """MoBA: the own block and, of the complete ones before it, those whose mean key agrees most."""

    def see(module, q, k, scores):
        seen, group = torch.zeros_like(scores, dtype=torch.bool), q.shape[1] // k.shape[1]
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for i in range(q.shape[2]):
                    own = i // size
                    means = [k[b, h // group, n * size : (n + 1) * size].mean(0) for n in range(own)]
                    worth = [float(q[b, h, i] @ mean) for mean in means]
                    for n in [own, *sorted(range(own), key=lambda n: (-worth[n], n))[: top_k - 1]]:
                        seen[b, h, i, n * size : min((n + 1) * size, i + 1)] = True
        return seen

    return see


@pytest.mark.parametrize(
    ("name", "cache", "see"),
    [
        ("llama", TIGHT["window"][1], window_after(7, 3, 2)),
        ("gpt2", TIGHT["window"][1], window_after(7, 3, 2)),
        ("llama", TIGHT["heavy"][1], heavy_after(7, 3, 2)),
        ("gemma2", TIGHT["heavy"][1], heavy_after(7, 3, 2)),
        ("gemma3", TIGHT["heavy"][1], heavy_after(7, 3, 2)),
        ("llama", TIGHT["less"][1], less_after(7, 6, 0.5, 1, 0)),
        ("neox", lambda h: LessIsMoreCache(h.model, 5, start=1, ratio=0.8, sinks=2), less_after(7, 5, 0.8, 2, 1)),
        ("llama", TIGHT["blocks"][1], blocks(3, 2)),
        ("qwen3", TIGHT["blocks"][1], blocks(3, 2)),
    ],
)
def test_a_small_budget_is_the_policy_written_out(name, cache, see):
    model, (ids, _) = make(name), text(batch=2, length=16)
    full = read(model, ids)
    with written_out(model, see):
        expected = read(model, ids)
    assert not close(full[:, -1], expected[:, -1])  # the policy does hide something
    with adapt(model) as handle:
        assert close(read(model, ids, None, cache(handle), (7, *[1] * 9)), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox"])
def test_window_and_sinks_are_the_pattern(name):
    """Prompt and steps are one parallel forward under the pattern, however the text comes."""
    model, (ids, real) = make(name), text(length=20, pad=3)
    with adapt(model, "sliding(6, 0) | sinks(2)"):
        expected = [alone(model, ids, real, row) for row in range(3)]
        for pieces in ([1] * 20, (9, *[1] * 11), (4, 9, 1, 6), (1, 19)):
            found = read(model, ids, real, WindowSinksCache(model, 7, sinks=2), pieces)
            for row in range(3):
                assert close(found[row, real[row].bool()], expected[row]), pieces


MECHANISMS = ["roles", "chunks", "aha", "h2o", "mswa"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("where", "cache"),
    [
        ("moba(block_size=3, top_k=2)", lambda h: h.cache()),
        ("cca(group_size=2, window=3)", lambda h: h.cache()),
        *(TIGHT[policy] for policy in MECHANISMS),
        TIGHT["groups"],
    ],
)
def test_a_mechanism_decodes_as_its_parallel_form(name, where, cache):
    model, (ids, _) = make(name), text(length=16)
    full = read(model, ids)
    with adapted(model, where) as handle:
        expected = read(model, ids)
        assert not close(full, expected)
        for pieces in ((7, *[1] * 9), (1, 5, 3, 1, 6)):
            assert close(read(model, ids, None, cache(handle), pieces), expected), pieces


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("where", "policy"), [("moba(block_size=3, top_k=2)", "blocks"), ("cca(group_size=2, window=3)", "cores")]
)
def test_caches_that_read_the_prompt_too_are_their_mechanism(name, where, policy):
    model, (ids, _) = make(name), text(length=16)
    with adapted(model, where):
        expected = read(model, ids)
    with adapt(model) as handle:
        assert close(read(model, ids, None, TIGHT[policy][1](handle), (7, *[1] * 9)), expected)


# 3. Padding.


@pytest.mark.parametrize("policy", TIGHT)
def test_rows_with_padding_decode_as_alone(policy):
    model, (where, cache) = make("llama"), TIGHT[policy]
    ids, real = text(pad=3)
    for pieces in ((7, *STEPS), (5, 2, *STEPS)):  # the last row's first piece is all padding
        with adapted(model, where) as handle:
            found = read(model, ids, real, cache(handle), pieces)
            single = read(model, ids[2:], real[2:], cache(handle), pieces)
            assert close(single[0, 6:], found[2, 6:])
            for row in range(3):
                expected = alone(model, ids, real, row, cache(handle), pieces)
                assert close(found[row, real[row].bool()], expected), (pieces, row)


def test_padding_on_the_right_of_the_prompt_is_left_out():
    model, (ids, real) = make("llama"), text()
    real[1, 4:7] = 0
    with adapt(model):
        found = read(model, ids, real, WindowSinksCache(model, 3, 2), (7, *STEPS))
        expected = alone(model, ids, real, 1, WindowSinksCache(model, 3, 2), (7, *STEPS))
    assert close(found[1, real[1].bool()], expected)


# 4. Memory.


def layer_of(cache: PolicyCache) -> PolicyLayer:
    return cache.layers[0]


@torch.no_grad()
def feed(layer: PolicyLayer, count: int, piece: int, dim: int = 8):
    """``count`` tokens of noise in pieces, through what the attention function calls."""
    for _ in range(count // piece):
        q, k, v = torch.randn(1, 4, piece, dim), *torch.randn(2, 1, 2, piece, dim)
        x = q.new_empty(1, piece, 0)
        layer.attend(q, k, v, Call(x, x, None, None, False), Full())


def small():
    return LlamaForCausalLM(LlamaConfig(**_GROUPED | dict(num_hidden_layers=1))).eval()


def test_a_window_holds_as_much_after_a_million_tokens():
    layer = layer_of(WindowSinksCache(small(), 64, sinks=4))
    feed(layer, 4096, 4096)
    before = layer.nbytes
    assert before == 2 * 2 * 8 * (64 + 4) * 4
    feed(layer, 1_000_000 - 4096, 4096)
    feed(layer, 100, 1)
    assert layer.nbytes == before and layer.get_seq_length() == 1_000_000 // 4096 * 4096 + 100 - 4096 % 4096


def test_heavy_hitters_hold_as_much_after_many_tokens():
    held = []
    for prompt in (1_000, 10_000):
        layer = layer_of(HeavyHitterCache(small(), 8, 8))
        feed(layer, prompt, prompt)
        for steps in (10, 1_000):
            feed(layer, steps, 1)
            held.append(layer.nbytes)
    assert len(set(held)) == 1 and held[0] == 2 * 17 * (2 * 8 * 4 + 4 + 8)  # keys, values, sums and positions


def test_windowed_roles_hold_as_much_after_many_tokens():
    model = small()
    with adapt(model, "nats(window=16)") as handle:
        (frame,) = handle.frames.values()
        torch.nn.init.zeros_(frame.scorer.weight)
        layer = layer_of(TokenRolesCache(handle))
        held = []
        with torch.no_grad():
            frame.scorer.weight[2::3] = 1  # windowed, for all tokens of a positive sum
            x = torch.ones(1, 1_000, 32)
            for _ in range(20):
                q, k, v = torch.randn(1, 4, 1_000, 8), *torch.randn(2, 1, 2, 1_000, 8)
                if not held:
                    layer.attend(q, k, v, Call(x, x, None, None, False), Full())
                else:  # the layer would take them one by one
                    call = Call(x, x, None, layer.policies[0], False)
                    layer.policies[0].update(k, v, **frame.signals(q, k, v, call))
                held.append(layer.nbytes)
        assert len(set(held)) == 1 and layer.policies[0].seen == 20_000
        assert layer.policies[0].kept()[0].k.shape[2] == 18  # the first token, the window, the newest


# 5. Rows, resetting, copies.


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("policy", TIGHT)
def test_chosen_rows_go_on_as_those_rows(policy, pad):
    model, (where, cache) = make("llama"), TIGHT[policy]
    ids, real = text(pad=pad)
    with adapted(model, where) as handle:
        ways = [
            ([2, 0, 0, 1], lambda c: c.batch_select_indices(torch.tensor([2, 0, 0, 1]))),
            ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
            ([1, 1, 0], lambda c: c.reorder_cache(torch.tensor([1, 1, 0]))),
        ]
        for rows, choose in ways[1:] if pad else ways[:1]:
            mine, own = ids[rows], real[rows]
            mine[:, 10:] = torch.randint(1, 61, (len(rows), 4), generator=torch.Generator().manual_seed(5))
            used, fresh = cache(handle), cache(handle)
            choose(used)  # of nothing
            read(model, ids[:, :10], real[:, :10], used, (7, 1, 1, 1))
            choose(used)
            found = read(model, mine, own, used, [1] * 4, start=10)
            expected = read(model, mine, own, fresh, (7, *STEPS))[:, 10:]
            assert close(found, expected), rows
            assert used.nbytes == fresh.nbytes > 0


@pytest.mark.parametrize("policy", TIGHT)
def test_reset_and_copies(policy):
    """A cache can be emptied; a copy of a prompt's cache goes on by itself."""
    model, (where, cache) = make("llama"), TIGHT[policy]
    ids, real = text(pad=2)
    with adapted(model, where) as handle:
        used = cache(handle)
        assert used.nbytes == 0 and used.get_seq_length() == 0
        first = read(model, ids, real, used, (7, *STEPS))
        held = used.nbytes
        assert held > 0 and used.get_seq_length() == 14
        used.reset()
        assert used.nbytes == 0 and used.get_seq_length() == 0
        read(model, ids[:, :7], real[:, :7], used)
        kept = copy.deepcopy(used)
        assert torch.equal(read(model, ids, real, used, STEPS, start=7), first[:, 7:])
        assert used.nbytes == held and kept.get_seq_length() == 7
        assert torch.equal(read(model, ids, real, kept, STEPS, start=7), first[:, 7:])


@pytest.mark.parametrize("policy", ["window", "heavy", "less", "blocks"])
def test_beams_are_reordered(policy):
    """The best beam's text has the score that beam search found when it is read again, alone."""
    model, (where, cache) = make("llama"), TIGHT[policy]
    _, real = text(batch=2, length=8, pad=3)
    with adapted(model, where) as handle:
        out = generate(model, cache(handle), num_beams=3, output_scores=True)
        for row, sequence in enumerate(out.sequences):
            whole = torch.cat([real[row], torch.ones(5, dtype=torch.long)])
            logits = alone(model, sequence[None], whole[None], 0, cache(handle), (8, *[1] * 5))
            new = logits[-6:-1].log_softmax(-1).gather(1, sequence[-5:, None])
            assert abs(float(new.sum()) / 5 - float(out.sequences_scores[row])) < 1e-4  # length_penalty is 1


# 6. What is refused.


def test_a_model_that_is_not_adapted_is_told_at_once():
    model, (ids, _) = make("llama"), text()
    for cache in (WindowSinksCache(model, 3), HeavyHitterCache(model, 3, 3), BlocksCache(model, 4, 2)):
        with pytest.raises(RuntimeError, match=r"use it inside `with glocal.hf.adapt\(model\):`"):
            model.generate(input_ids=ids, max_new_tokens=1, past_key_values=cache)
        with adapt(model):
            read(model, ids, None, cache, (13, 1))
        with pytest.raises(RuntimeError, match="glocal has adapted"):
            read(model, ids, None, cache, (1,))


def test_only_decoders_have_caches():
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertModel(BertConfig(**sizes))
    bart = BartModel(
        BartConfig(
            vocab_size=61,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
    )
    for model, word in (
        (bert, "BertModel is no decoder"),
        (bart, "encoder-decoder"),
        (torch.nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(ValueError, match=word):
            WindowSinksCache(model, 4)
    for model in (bert, bart):
        with adapt(model) as handle, pytest.raises(ValueError, match="decoder"):
            handle.cache()


def test_wrong_numbers():
    model = make("llama")
    WindowSinksCache(model, 2, sinks=4)  # the budget is their sum: more sinks than window is fine
    for wrong, word in [
        (lambda: WindowSinksCache(model, 0), "window must be at least 1"),
        (lambda: WindowSinksCache(model, 4, sinks=-1), "sinks must not be negative; it was -1"),
        (lambda: HeavyHitterCache(model, -1, 4), "heavy must not be negative"),
        (lambda: HeavyHitterCache(model, 4, -2), "recent must not be negative; it was -2"),
        (lambda: LessIsMoreCache(model, 0), "budget must be at least 1"),
        (lambda: LessIsMoreCache(model, 8, start=3), "start must be one of the 3 layers"),
        (lambda: LessIsMoreCache(model, 8, ratio=1.5), "ratio must be from 0 to 1"),
        (lambda: BlocksCache(model, 0), "block_size must be at least 1"),
        (lambda: BlocksCache(model, 4, 0), "top_k must be at least 1"),
        (lambda: CoreContextCache(model, 0), "group_size must be at least 1"),
        (lambda: CoreContextCache(model, 4, 0), "window must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=word):
            wrong()


def test_learned_policies_need_their_mechanism():
    model = make("llama")
    with adapt(model) as handle:
        for kind, word in ((TokenRolesCache, r"nats\(...\)"), (AllOrHereCache, r"aha\(...\)")):
            with pytest.raises(ValueError, match=f"{kind.__name__} needs a model adapted with {word}"):
                kind(handle)
    with adapt(model, "aha(window=4)") as handle, pytest.raises(ValueError, match="needs a model adapted with nats"):
        TokenRolesCache(handle)


@pytest.mark.parametrize("cache", [lambda m: WindowSinksCache(m, 3), lambda m: HeavyHitterCache(m, 3, 3)])
def test_what_was_dropped_cannot_come_back(cache):
    model, (ids, _) = make("llama"), text(batch=1)
    with adapt(model):
        with pytest.raises(ValueError, match="crop"):
            model.generate(input_ids=ids, max_new_tokens=4, prompt_lookup_num_tokens=2, past_key_values=cache(model))
        used = cache(model)
        read(model, ids, None, used)
        with pytest.raises(ValueError, match="assisted decoding is not possible"):
            used.crop(4)


def test_layers_with_windows_of_their_own_keep_those():
    """MoBA, pooling and heavy hitters are of the other layers, whatever the budget."""
    model, (ids, _) = make("gemma2"), text()
    with adapt(model):
        for cache in (
            BlocksCache(model, 3, 2),
            CoreContextCache(model, 2, 3),
            HeavyHitterCache(model, 2, 20),
            LessIsMoreCache(model, 6, start=0),
        ):
            read(model, ids, None, cache, (7, *STEPS))
            held = [layer.policies[0].kept()[0].k.shape[2] for layer in cache.layers]
            assert held[0] == held[2] == WINDOW != held[1]
        narrow = WindowSinksCache(model, 3, sinks=1)
        read(model, ids, None, narrow, (7, *STEPS))
        assert [layer.policies[0].kept()[0].k.shape[2] for layer in narrow.layers] == [3, 4, 3, 4]


@pytest.mark.parametrize("policy", ["full", "window", "heavy", "blocks"])
def test_windows_that_an_adaptation_took_are_not_kept(policy):
    model, (ids, _) = make("gemma2"), text()
    with adapt(model, own_window=False) as handle:
        expected = read(model, ids)
        assert close(read(model, ids, None, ROOMY[policy][1](handle), (7, *STEPS)), expected)
    assert not close(read(model, ids), expected)


@pytest.mark.parametrize("policy", ["less", "blocks", "cores"])
def test_policies_that_decide_alone_refuse_patterns(policy):
    model, (ids, _) = make("llama"), text()
    with adapt(model, "sliding(3, 0)") as handle, pytest.raises(ValueError, match="decides alone what is read"):
        read(model, ids, None, TIGHT[policy][1](handle))
    with adapt(model, "causal()") as handle:
        read(model, ids, None, TIGHT[policy][1](handle))


def test_batches_and_masks_that_do_not_fit():
    model, (ids, real) = make("llama"), text()
    pairs = torch.ones(3, 1, 14, 14, dtype=torch.bool).tril()
    with adapt(model) as handle:
        with pytest.raises(ValueError, match="packed sequences"), torch.no_grad():
            model(input_ids=ids, attention_mask=pairs, past_key_values=WindowSinksCache(model, 3), use_cache=True)
        for policy in ("full", "window", "heavy", "less", "blocks", "cores"):
            cache = TIGHT[policy][1](handle)
            read(model, ids[:, :7], None, cache)
            with pytest.raises(ValueError, match="holds the past of 3 rows; the batch had 1"):
                read(model, ids[:1], None, cache, (1,), start=7)
        cache = WindowSinksCache(model, 3)
        read(model, ids[:, :7], None, cache)
        real[1, 3] = 0
        with pytest.raises(ValueError, match="padding must be at the start"):
            read(model, ids, real, cache, (1,), start=7)


# 7. Beside transformers' caches.


def test_transformers_own_caches_work_between_ours():
    model = make("llama")
    expected = generate(model).sequences
    with adapt(model) as handle:
        tight = generate(model, WindowSinksCache(model, 3, 1)).sequences
        for cache in (None, DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            assert torch.equal(generate(model, cache).sequences, expected)
            assert torch.equal(generate(model, WindowSinksCache(model, 3, 1)).sequences, tight)
        assert torch.equal(generate(model, handle.cache()).sequences, expected)
    assert not torch.equal(tight, expected)
    assert torch.equal(generate(model).sequences, expected)
