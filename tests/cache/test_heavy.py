"""H2O: the replay of the policy, and the layer that decodes with it, against loops over a stored attention matrix."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import HeavyHitters, WindowCache, replay
from glocal.nn import Attention, HeavyHitterAttention, Rope
from tests import oracle
from tests.nn.layers import by_mask, project, steps
from tests.peers import load_kvpress


def brute_force(q, k, heavy, recent, scale):
    """The mask from the stored ``(N, N)`` matrix of full attention, by loops: ``(B, Hkv, N, N)``."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    stored = (q @ k.repeat_interleave(group, 1).mT * scale).masked_fill(
        ~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf
    )
    stored = stored.softmax(-1)
    mask = torch.zeros(batch, k.shape[1], length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(k.shape[1]):
            kept, sums = [], {}
            for i in range(length):
                kept.append(i)
                sums[i] = 0.0
                mask[b, h, i, kept] = True
                for g in range(h * group, (h + 1) * group):
                    row = stored[b, g, i, kept]
                    for j, weight in zip(kept, (row / row.sum()).tolist(), strict=True):
                        sums[j] += weight
                if len(kept) > heavy + recent:
                    old = kept[: len(kept) - recent]
                    best = sorted(old, key=lambda j: (-sums[j], j))[:heavy]
                    kept = sorted(best) + kept[len(kept) - recent :]
    return mask


def qkv(length=48, heads=4, kv_heads=2, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, length, 8, dtype=torch.float64)
    return 2 * q, k, v


@pytest.mark.parametrize(("heavy", "recent"), [(4, 8), (6, 1), (5, 0), (0, 6), (0, 0)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_replay_equals_loops_over_the_stored_matrix(heavy, recent, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    mask = replay(lambda: HeavyHitters(heavy, recent), k, v, queries=q)
    assert torch.equal(mask, brute_force(q, k, heavy, recent, 8**-0.5))
    assert int(mask.sum(-1).max()) == heavy + recent + 1


def test_the_choice_differs_between_items_and_heads_and_from_a_window():
    q, k, v = qkv()
    mask = replay(lambda: HeavyHitters(4, 8), k, v, queries=q)
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[:, 0], mask[:, 1])
    only_recent = replay(lambda: HeavyHitters(0, 12), k, v, queries=q)
    assert torch.equal(only_recent, replay(lambda: WindowCache(13), k, v))
    assert not torch.equal(mask, only_recent)
    alone = replay(lambda: HeavyHitters(4, 8), k[1:], v[1:], queries=q[1:])
    assert torch.equal(alone[0], mask[1])


def test_a_hot_token_stays_and_a_cold_one_goes():
    k, q = torch.zeros(1, 1, 20, 1, dtype=torch.float64), torch.ones(1, 1, 20, 1, dtype=torch.float64)
    k[:, :, 3] = 5
    last = replay(lambda: HeavyHitters(1, 2), k, k, queries=q)[0, 0, -1]
    assert last.nonzero().flatten().tolist() == [3, 17, 18, 19]


def test_many_tokens_at_once_are_as_good_as_one_by_one():
    q, k, v = qkv()
    at_once, one_by_one = HeavyHitters(3, 4), HeavyHitters(3, 4)
    at_once.update(k, v, queries=q)
    for t in range(48):
        at = slice(t, t + 1)
        one_by_one.update(k[:, :, at], v[:, :, at], queries=q[:, :, at])
    for a, b in zip(at_once.tensors(), one_by_one.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    assert at_once.seen == 48 and at_once.kept()[0].k.shape[2] == 8
    torch.testing.assert_close(at_once.kept()[0].k, k.gather(2, at_once.position[..., None].expand(-1, -1, -1, 8)))


class Averaged(HeavyHitters):
    """The taste of kvpress: the mean over the queries that saw a token, in place of the sum."""

    def worth(self):
        return self.sums / (self.seen - self.position)


def stored_attention(q, k):
    length = q.shape[2]
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scores_and_kept_set_agree_with_kvpress(kv_heads):
    """Its press drops once, after the prompt; so does a cache that had room until then."""
    press = load_kvpress("presses.observed_attention_press").ObservedAttentionPress(0.75)
    q, k, v = qkv(kv_heads=kv_heads)
    attention = stored_attention(q, k)
    number = torch.arange(48.0, dtype=torch.float64).view(1, 1, 48, 1).expand_as(k)  # what was kept says where it was
    scores = press.score(None, None, k, v, attention, {})
    theirs = press.compress(type("Module", (), {"head_dim": 8}), None, k, number, attention, {})[1][..., 0]
    cache = Averaged(48, 0)
    cache.update(k, v, queries=q)
    torch.testing.assert_close(cache.worth() * kv_heads / 4, scores)
    cache.heavy = 12
    cache.update(k[:, :, :1], v[:, :, :1], queries=q[:, :, :1])
    assert torch.equal(cache.position[..., :-1].double(), theirs.sort(-1).values)


def test_hot_tokens_are_kept_token_by_token_as_kvpress_keeps_them():
    """Sums favour early tokens and means late ones; what is hot enough both keep."""
    press = load_kvpress("presses.observed_attention_press").ObservedAttentionPress(0.0)
    q, k, v = qkv()
    q[..., 0], k[..., 0] = 6, 0
    for item, hot in enumerate(([0, 11, 20, 29], [0, 1, 12, 31])):
        k[item, :, hot, 0] = 5
    ours = replay(lambda: HeavyHitters(4, 6), k, v, queries=q)[:, :, -1, :41]  # before the recent ones and itself
    scores = press.score(None, None, k, v, stored_attention(q, k), {})[..., :41]
    theirs = torch.zeros_like(ours).scatter(-1, scores.topk(4).indices, True)
    assert torch.equal(ours, theirs) and ours.sum() == 2 * 2 * 4


def layer(heavy, recent, **options):
    torch.manual_seed(1)
    made = HeavyHitterAttention(32, 4, heavy=heavy, recent=recent, rope=Rope(), num_kv_heads=2, **options).double()
    torch.nn.init.normal_(made.q_proj.weight, std=0.5)  # attention that is not flat
    return made.eval()


@pytest.mark.parametrize("prompt", [0, 20])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "qk_norm": "rms"}])
def test_layer_decodes_by_the_replayed_mask(prompt, options):
    made, x = layer(4, 6, **options), torch.randn(2, 40, 32, dtype=torch.float64)
    q, k, _ = project(made, x)
    mask = brute_force(q, k, 4, 6, made.scale).repeat_interleave(2, 1)
    with torch.no_grad():
        out, cache = steps(made, x, prompt)
    torch.testing.assert_close(out, by_mask(made, x, mask))
    torch.testing.assert_close(made(x), by_mask(made, x, mask))
    assert cache.kept()[0].k.shape[2] == 11


def test_gradients_pass_through_what_was_kept():
    made, x = layer(4, 6), torch.randn(1, 24, 32, dtype=torch.float64, requires_grad=True)
    q, k, _ = project(made, x)
    mask = brute_force(q, k, 4, 6, made.scale).repeat_interleave(2, 1)
    weights = torch.randn_like(x)
    found = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (made(x), by_mask(made, x, mask))]
    torch.testing.assert_close(*found)


def test_a_budget_that_covers_the_sequence_is_full_attention():
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    for heavy, recent in ((20, 19), (0, 39), (39, 0)):
        made = layer(heavy, recent)
        full = Attention(32, 4, num_kv_heads=2, causal=True, rope=Rope()).double()
        full.load_state_dict(made.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(made(x), full(x))
            torch.testing.assert_close(steps(made, x)[0], full(x))


def test_memory_does_not_grow():
    made = layer(4, 6).float()
    cache = made.new_cache()
    with torch.no_grad():
        made(torch.randn(1, 30, 32), cache=cache)
        before = cache.nbytes
        made(torch.randn(1, 30, 32), cache=cache)
    assert cache.nbytes == before and cache.seen == 60


def test_errors_name_the_argument():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="queries must be"):
        HeavyHitters(1, 1).update(k, v)
    with pytest.raises(ValueError, match="queries must be"):
        HeavyHitters(1, 1).update(k, v, queries=q[:, :3])
    with pytest.raises(ValueError, match="recent must not be negative; it was -1"):
        HeavyHitterAttention(32, 4, recent=-1)
    with pytest.raises(ValueError, match=r"keys \(padding\)"):
        layer(4, 6)(torch.randn(1, 8, 32, dtype=torch.float64), keys=torch.ones(1, 8, dtype=torch.bool))


def written_out_whole(q, k, prompt, heavy, recent, scale, softcap=None):
    """A prompt in full, as the authors' code reads it: all weights of its queries are added up, then one cut."""
    mask = torch.zeros(q.shape[0], k.shape[1], q.shape[2], q.shape[2], dtype=torch.bool)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            kept, sums = [], {}
            for i in range(q.shape[2]):
                kept.append(i)
                sums[i] = 0.0
                mask[b, h, i, kept] = True
                for g in range(h * group, (h + 1) * group):
                    scores = k[b, h, kept] @ q[b, g, i] * scale
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    for j, weight in zip(kept, scores.softmax(0).tolist(), strict=True):
                        sums[j] += weight
                if i >= prompt - 1 and len(kept) > heavy + recent:
                    old = kept[: len(kept) - recent]
                    best = sorted(old, key=lambda j: (-sums[j], j))[:heavy]
                    kept = sorted(best) + kept[len(kept) - recent :]
    return mask


def seen_after(cache, q, k, v, prompt):
    """The prompt at once, then token by token: what each of these sees, ``(B, Hkv, N - prompt, N)``."""
    cache.update(k[:, :, :prompt], v[:, :, :prompt], queries=q[:, :, :prompt])
    rows = []
    for t in range(prompt, k.shape[2]):
        at = slice(t, t + 1)
        cache.update(k[:, :, at], v[:, :, at], queries=q[:, :, at])
        (part,) = cache.kept()
        rows.append(torch.zeros(*k.shape[:3], dtype=torch.bool).scatter(-1, part.position, True))
        assert torch.equal(part.k, k.gather(2, part.position[..., None].expand(-1, -1, -1, 8)))
    return torch.stack(rows, 2)


@pytest.mark.parametrize(("heavy", "recent"), [(4, 8), (6, 1), (5, 0), (0, 6), (30, 30)])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.9}, {"softcap": 1.5}])
def test_a_prompt_in_full_equals_loops(heavy, recent, settings):
    q, k, v = qkv(length=40)
    prompt = 24
    expected = written_out_whole(q, k, prompt, heavy, recent, **{"scale": 8**-0.5} | settings)
    cache = HeavyHitters(heavy, recent, prompt="whole", **settings)
    assert torch.equal(seen_after(cache, q, k, v, prompt), expected[:, :, prompt:])
    if heavy and heavy + recent < 40 and "softcap" not in settings:  # which makes attention flat
        steps = seen_after(HeavyHitters(heavy, recent, **settings), q, k, v, prompt)
        assert not torch.equal(steps, expected[:, :, prompt:])  # read token by token, the prompt leaves others


def test_long_prompts_are_read_in_parts(monkeypatch):
    q, k, v = qkv(length=40)
    whole, parts = (HeavyHitters(4, 4, prompt="whole") for _ in range(2))
    whole.update(k, v, queries=q)
    monkeypatch.setattr("glocal.cache.heavy._PAIRS", 7 * 40 * 8)
    parts.update(k, v, queries=q)
    for a, b in zip(whole.tensors(), parts.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    assert whole.kept()[0].k.shape[2] == 8


def test_a_prompt_of_one_token_or_a_second_one_goes_by_steps():
    q, k, v = qkv(length=20)
    one, steps = HeavyHitters(3, 2, prompt="whole"), HeavyHitters(3, 2)
    for n in (slice(0, 1), slice(1, 20)):
        for cache in (one, steps):
            cache.update(k[:, :, n], v[:, :, n], queries=q[:, :, n])
    for a, b in zip(one.tensors(), steps.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_another_way_with_prompts_is_refused():
    with pytest.raises(ValueError, match="prompt must be 'steps' or 'whole'; it was 'half'"):
        HeavyHitters(1, 1, prompt="half")


def test_layer_with_a_softcap_decodes_as_its_parallel_form():
    made, x = layer(4, 6, softcap=0.8), torch.randn(1, 30, 32, dtype=torch.float64)
    q, k, _ = project(made, x)
    mask = written_out_whole(q, k, 1, 4, 6, made.scale, 0.8).repeat_interleave(2, 1)
    full = torch.ones(30, 30, dtype=torch.bool).tril()
    out, _ = oracle.attend(q, k, made.project(x, x, *[torch.arange(30)] * 2)[2], mask, scale=made.scale, softcap=0.8)
    assert not torch.equal(mask, full.expand_as(mask))
    with torch.no_grad():
        torch.testing.assert_close(steps(made, x)[0], made.o_proj(out.transpose(1, 2).flatten(2)))
