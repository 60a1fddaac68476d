"""S091: the union against a literal one, the sets against their definition, decoding against loops over masks."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import FullCache, SelectedTokens
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, LessIsMore, Rope, SlidingWindowAttention, select_tokens, unified_topk
from tests import oracle


def literal(logits, m):
    """Picks listed rank by rank, heads in order inside a rank, repeats removed."""
    heads, total = logits.shape
    ranked = [sorted(range(total), key=lambda j: (-logits[h, j].item(), j))[:m] for h in range(heads)]
    return list(dict.fromkeys(row[r] for r in range(min(m, total)) for row in ranked))[:m]


@pytest.mark.parametrize("kind", ["random", "overlap", "same", "ties"])
@pytest.mark.parametrize(("heads", "m", "total"), [(8, 16, 200), (8, 16, 16), (8, 1, 30), (1, 16, 50), (3, 30, 20)])
def test_the_union_is_the_literal_one(kind, heads, m, total):
    torch.manual_seed(0)
    logits = torch.randn(3, heads, total)
    if kind == "overlap":
        logits = logits + 3 * torch.randn(3, 1, total)
    elif kind == "same":
        logits = logits[:, :1].expand(-1, heads, -1)
    elif kind == "ties":
        logits = torch.randint(3, logits.shape).float()
    found = unified_topk(logits, m)
    assert found.tolist() == [literal(item, m) for item in logits]


def test_one_head_or_equal_heads_give_that_heads_best():
    """One head: what TidalDecode chooses."""
    logits = torch.randn(2, 1, 60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unified_topk(logits, 9), logits[:, 0].topk(9).indices)
    assert torch.equal(unified_topk(logits.expand(-1, 5, -1), 9), logits[:, 0].topk(9).indices)


def test_heads_without_overlap_give_their_first_ranks():
    """Head h wants only tokens of its own: the first ceil(m / H) ranks of each, the last rank cut off."""
    heads, m = 4, 10
    logits = torch.full((1, heads, 40), -5.0)
    for h in range(heads):
        logits[0, h, 10 * h : 10 * h + 10] = torch.arange(10.0).flip(0)
    found = unified_topk(logits, m)[0].tolist()
    assert found == [0, 10, 20, 30, 1, 11, 21, 31, 2, 12]


def test_a_head_with_large_logits_does_not_decide():
    logits = torch.randn(1, 4, 50)
    scaled = logits * torch.tensor([1000.0, 1.0, 0.01, 5.0])[:, None]
    assert torch.equal(unified_topk(scaled, 12), unified_topk(logits, 12))


@pytest.mark.parametrize(
    ("budget", "ratio", "sinks", "expected"),
    [(32, 0.75, 4, (4, 24, 4)), (8, 0.75, 4, (0, 6, 2)), (10, 0.75, 2, (2, 7, 1)), (16, 1.0, 4, (0, 16, 0)),
     (16, 0.0, 4, (4, 0, 12)), (99, 0.5, 0, (0, 49, 50))],
)  # fmt: skip
def test_sinks_middle_and_recent_are_disjoint_and_fill_the_budget(budget, ratio, sinks, expected):
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 100, 16)
    found = select_tokens(q, k, budget, ratio, sinks)
    first, chosen, recent = expected
    assert found.shape == (2, budget)
    logits = (q @ k.repeat_interleave(4, 1).mT).squeeze(2)
    for item in range(2):
        row = found[item].tolist()
        assert row == sorted(set(row))
        middle = [first + j for j in literal(logits[item, :, first : 100 - recent], chosen)]
        assert row == sorted([*range(first), *middle, *range(100 - recent, 100)])


def test_a_budget_for_everything_keeps_everything():
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 20, 8)
    for budget in (20, 21, 1000):
        assert select_tokens(q, k, budget)[0].tolist() == list(range(20))


def test_padding_is_not_chosen_and_each_item_has_its_own_set():
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 60, 8)
    real = torch.ones(3, 60, dtype=torch.bool)
    real[1, :25] = False
    real[2, :50] = False
    found = select_tokens(q, k, 16, 0.5, 2, real=real)
    for item, skipped in enumerate((0, 25, 50)):
        alone = select_tokens(q[item : item + 1], k[item : item + 1, :, skipped:], 16, 0.5, 2)[0] + skipped
        assert found[item].tolist() == alone.tolist() + [-1] * (16 - len(alone))


def make(depth=5, heads=4, window=None):
    torch.manual_seed(0)

    def layer(dim):
        return Attention(dim, heads, num_kv_heads=2, causal=True, rope=Rope(), qk_norm="rms")

    def local(dim):
        return SlidingWindowAttention(dim, heads, num_kv_heads=2, window=window, causal=True, rope=Rope())

    kinds = [local if window and n % 2 else layer for n in range(depth)]
    model = Transformer(40, 32, kinds).double().eval()
    for p in model.parameters():  # sharper than at the start of training
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


def decode(model, tokens, prompt, keys=None):
    """Logits of every token after the prompt, fed one by one."""
    with torch.no_grad():
        caches = model.new_caches()
        ends = [prompt, *range(prompt + 1, tokens.shape[1] + 1)]
        more = [{} if keys is None else {"keys": keys[:, :end]} for end in ends]
        starts = [0, *ends[:-1]]
        return torch.cat(
            [model(tokens[:, a:b], caches=caches, **m)[:, -1:] for a, b, m in zip(starts, ends, more, strict=True)], 1
        )


def test_a_budget_for_everything_gives_full_attention():
    model, tokens = make(), torch.randint(40, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens)[:, 29:]
    with LessIsMore(model, budget=50, correction=3):
        torch.testing.assert_close(decode(model, tokens, 30), full)
    with LessIsMore(model, budget=12, correction=3):
        assert not torch.allclose(decode(model, tokens, 30)[:, 1:], full[:, 1:], atol=1e-3)
        torch.testing.assert_close(decode(model, tokens, 30)[:, 0], full[:, 0])  # the prompt is dense


def reference(model, tokens, prompt, budget, start, correction, ratio=0.75, sinks=4):
    """Decoding by masks, over one sequence: each step in loops, keys of the past as they were computed then."""
    blocks, outs = list(model.blocks), []
    past = [(torch.empty(1, 2, 0, 8).double(), torch.empty(1, 2, 0, 8).double()) for _ in blocks]
    for end in [prompt, *range(prompt + 1, tokens.shape[1] + 1)]:
        begin = past[0][0].shape[2]
        x, chosen = model.embed(tokens[:, begin:end]), None
        for number, block in enumerate(blocks):
            attention, states = block.attention, block.norm1(x)
            at = torch.arange(begin, end)
            q, k, v = attention.project(states, states, at, at)
            past[number] = tuple(torch.cat(pair, 2) for pair in zip(past[number], (k, v), strict=True))
            k, v = past[number]
            mask = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
            if end - begin == 1:
                if number in (start, correction):
                    size = min(budget, end)
                    m = int(size * ratio)
                    first = sinks if size - m >= sinks else 0
                    recent = size - m - first
                    logits = (q @ k.repeat_interleave(2, 1).mT)[0, :, 0] * attention.scale
                    middle = [first + j for j in literal(logits[:, first : end - recent], m)]
                    chosen = {*range(first), *middle, *range(end - recent, end)}
                elif number > start:
                    mask = torch.tensor([[j in chosen for j in range(end)]])
            mixed, _ = oracle.attend(q, k, v, mask, scale=attention.scale)
            x = x + attention.o_proj(mixed.movedim(1, -2).flatten(-2))
            x = x + block.mlp(block.norm2(x))
        outs.append(model.head(model.norm(x))[:, -1:])
    return torch.cat(outs, 1)


@pytest.mark.parametrize(("start", "correction"), [(0, None), (1, 3), (2, 4)])
def test_decoding_equals_masks_written_out(start, correction):
    """The gathered form against the masked softmax, each item of the batch with a set of its own."""
    model, tokens = make(), torch.randint(40, (2, 40), generator=torch.Generator().manual_seed(1))
    with LessIsMore(model, budget=12, sinks=2, start=start, correction=correction) as less:
        found = decode(model, tokens, 25)
        assert less.chosen.shape == (2, 12) and not torch.equal(less.chosen[0], less.chosen[1])
    with torch.no_grad():
        for item in range(2):
            expected = reference(model, tokens[item : item + 1], 25, 12, start, correction, sinks=2)
            torch.testing.assert_close(found[item : item + 1], expected)


def test_left_padding_is_as_if_it_were_not_there():
    """Without positions, so that only the sets could tell."""
    model, tokens = make(), torch.randint(40, (1, 40), generator=torch.Generator().manual_seed(1))
    for block in model.blocks:
        block.attention.rope = None
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), tokens], 1)
    both = torch.cat([padded, torch.randint(40, padded.shape)])
    keys = torch.ones(2, 47, dtype=torch.bool)
    keys[0, :7] = False
    with LessIsMore(model, budget=12, correction=3):
        alone = decode(model, tokens, 25)
        torch.testing.assert_close(decode(model, both, 32, keys)[:1], alone)


def test_a_second_prompt_is_dense():
    model, tokens = make(), torch.randint(40, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), LessIsMore(model, budget=40, correction=3) as less:
        caches = model.new_caches()
        for a, b in ((0, 10), (10, 11), (11, 30), (30, 31), (31, 40)):
            out = model(tokens[:, a:b], caches=caches)
            assert (less.chosen is None) == (b - a > 1)
        torch.testing.assert_close(out, model(tokens)[:, 31:])


def test_layers_are_themselves_again_after_an_error():
    model = make()
    tokens = torch.randint(40, (1, 20))
    before = [dict(vars(block.attention)) for block in model.blocks]
    with pytest.raises(RuntimeError, match="stop"), LessIsMore(model, budget=4):
        assert [type(c) for c in model.new_caches()] == [FullCache] * 3 + [SelectedTokens] * 2
        raise RuntimeError("stop")
    assert [dict(vars(block.attention)) for block in model.blocks] == before
    assert all(type(c) is FullCache for c in model.new_caches())
    caches = model.new_caches()
    model(tokens, caches=caches)
    with LessIsMore(model, budget=4), pytest.raises(ValueError, match="inside the with statement"):
        model(tokens[:, :1], caches=caches)


def test_other_layers_are_left_alone():
    model = make(6, window=5)
    with LessIsMore(model, budget=8, start=0, correction=None) as less:
        assert [model.blocks[n].attention for n in (0, 2, 4)] == less.layers
        out = model.generate(torch.randint(40, (2, 12)), 6)
    assert out.shape == (2, 18)


def test_refuses_bad_settings():
    model = make()
    for settings, name in (
        ({"budget": 0}, "budget"),
        ({"budget": 8, "ratio": 1.5}, "ratio"),
        ({"budget": 8, "sinks": -1}, "sinks"),
        ({"budget": 8, "start": 5}, "start"),
        ({"budget": 8, "start": 2, "correction": 2}, "correction"),
    ):
        with pytest.raises(ValueError, match=f"{name} must"):
            LessIsMore(model, **settings)
    with pytest.raises(ValueError, match="q must be"):
        select_tokens(torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8), 3)
    with pytest.raises(ValueError, match="logits must be"):
        unified_topk(torch.randn(4, 5), 2)
