"""Independent witnesses: other ways to compute the same attention, on random tensors, and limiting cases."""

import pytest
import torch
import torch.nn.functional as F

import glocal
from glocal import Block, Causal, Full, Keys, PerHead, Prefix, Segments, Sinks, Sliding, Strided, Window
from glocal.patterns import from_hf
from tests.conformance.cases import BACKENDS, check, inputs, run

backends = pytest.mark.parametrize("backend", BACKENDS)
quick = pytest.mark.parametrize("backend", ["dense", "sdpa", "native"])


def tensors_for(backend, *shape, **more):
    """Random q, k, v, in float64 where the backend has it."""
    return inputs(*shape, dtype=torch.float64 if backend in ("dense", "sdpa") else torch.float32, **more)


# torch's own kernel


@backends
def test_full_is_torch_sdpa(backend):
    check(backend, tensors_for(backend, (11,), batch=2), Full(), F.scaled_dot_product_attention)


@backends
def test_full_cross_with_grouped_queries(backend):
    tensors = tensors_for(backend, (5,), (13,), heads=6, kv_heads=2)
    check(backend, tensors, Full(), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@quick
def test_causal_is_torch_is_causal(backend):
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    check(backend, tensors_for(backend, (13,)), Causal(), sdpa)


@quick
@pytest.mark.parametrize("queries", [1, 4, 12])
def test_causal_decoding_is_the_end_of_the_square_case(backend, queries):
    """With fewer queries than keys, the queries are the last rows of torch's square causal attention."""

    def last(q, k, v):
        padded = torch.cat([torch.zeros_like(k[:, :, : k.shape[2] - queries]), q], 2)
        return F.scaled_dot_product_attention(padded, k, v, is_causal=True)[:, :, -queries:]

    check(backend, tensors_for(backend, (queries,), (13,)), Causal(), last)


@quick
def test_custom_scale_and_wide_values(backend):
    q, k, v = tensors_for(backend, (7,))
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)  # noqa: E731
    check(backend, (q, k, torch.cat([v, v * 2], -1)), Causal(), sdpa, scale=0.7)


# Hugging Face


def mistral(window):
    """A tiny Mistral with random weights, as it stands."""
    modeling = pytest.importorskip(
        "transformers.models.mistral.modeling_mistral", reason="transformers is not installed"
    )
    torch.manual_seed(0)
    config = modeling.MistralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        attn_implementation="eager",
    )
    return modeling, modeling.MistralModel(config).double().eval()


def ours_inside(backend, where, seen):
    """A stand-in for the function of Mistral's eager attention, on the model's own q, k, v."""

    def attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **rest):
        seen.append((query.shape[2], key.shape[2]))
        out = run(backend, query, key, value, where, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return attention


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 4, 64])
def test_mistral(backend, window, monkeypatch):
    modeling, model = mistral(window)
    tokens = torch.randint(0, 32, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(tokens).last_hidden_state
        seen = []
        monkeypatch.setattr(modeling, "eager_attention_forward", ours_inside(backend, from_hf(window), seen))
        got = model(tokens).last_hidden_state
    assert seen == [(11, 11)] * 3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # its softmax is in float32


def test_mistral_decoding_with_its_own_cache(monkeypatch):
    """Prefill and steps with the cache of transformers, which drops keys, against its parallel eager form."""
    modeling, model = mistral(4)
    tokens = torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens).last_hidden_state
        seen = []
        monkeypatch.setattr(modeling, "eager_attention_forward", ours_inside("sdpa", from_hf(4), seen))
        first = model(tokens[:, :6], use_cache=True)
        outs, cache = [first.last_hidden_state], first.past_key_values
        for t in range(6, 10):
            outs.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).last_hidden_state)
    assert seen[3:] == [(1, 4)] * 12
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-6)


# Vision


def partition(x, size):
    """``(B, H, Y, X, D)`` to ``(B, windows, H, tokens, D)``."""
    b, h, y, w, d = x.shape
    x = x.view(b, h, y // size[0], size[0], w // size[1], size[1], d).permute(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(b, -1, h, size[0] * size[1], d)


def unpartition(x, size, grid):
    b, _, h, _, d = x.shape
    x = x.view(b, grid[0] // size[0], grid[1] // size[1], h, size[0], size[1], d)
    return x.permute(0, 3, 1, 4, 2, 5, 6).reshape(b, h, *grid, d)


def swin(size, shift):
    """Shifted windows as Liu et al. (2021, 2103.14030) compute them: roll, partition, mask regions, roll back."""

    def attention(q, k, v):
        grid = q.shape[2:4]
        rolled = [partition(t.roll((-shift[0], -shift[1]), (2, 3)), size) for t in (q, k, v)]
        region = torch.zeros(1, 1, *grid, 1)
        number = 0
        rows, columns = (
            [slice(0, -s), slice(-s, -t), slice(-t, None)] if t else [slice(0, None)]
            for s, t in zip(size, shift, strict=True)
        )
        for y in rows:
            for x in columns:
                region[:, :, y, x] = number
                number += 1
        region = partition(region, size).squeeze(-1).squeeze(2)
        same = (region[..., :, None] == region[..., None, :])[:, :, None]
        out = F.scaled_dot_product_attention(*rolled, attn_mask=same)
        return unpartition(out, size, grid).roll(shift, (2, 3))

    return attention


@quick
@pytest.mark.parametrize(
    ("grid", "size", "shift"), [((6, 9), (3, 3), (1, 1)), ((4, 12), (2, 4), (1, 2)), ((6, 4), (3, 2), (2, 0))]
)
def test_swin_shifted_windows(backend, grid, size, shift):
    # A window is larger than the shift of its blocks: every border of ours is a border of Swin's regions.
    check(backend, tensors_for(backend, grid), Block(size, shift), swin(size, shift))


@quick
def test_swin_windows_without_shift(backend):
    check(backend, tensors_for(backend, (6, 4)), Block((3, 2)), swin((3, 2), (0, 0)))


@quick
@pytest.mark.parametrize(("grid", "groups"), [((6, 4), (3, 2)), ((9, 10), (3, 5))])
def test_maxvit_grid_attention(backend, grid, groups):
    """MaxViT (2204.01697): ``G x G`` tokens spread over the map, spaced ``H / G`` and ``W / G`` apart."""
    spaced = tuple(n // g for n, g in zip(grid, groups, strict=True))

    def attention(q, k, v):
        def spread(x):
            b, h, _, _, d = x.shape
            x = x.view(b, h, groups[0], spaced[0], groups[1], spaced[1], d).permute(0, 3, 5, 1, 2, 4, 6)
            return x.reshape(b, -1, h, groups[0] * groups[1], d)

        out = F.scaled_dot_product_attention(*map(spread, (q, k, v)))
        b, _, h, _, d = out.shape
        out = out.view(b, *spaced, h, *groups, d).permute(0, 3, 4, 1, 5, 2, 6)
        return out.reshape(b, h, *grid, d)

    check(backend, tensors_for(backend, grid), Strided(spaced), attention)


@backends
def test_dilation_is_windows_on_interleaved_sub_grids(backend):
    def attention(q, k, v):
        out = torch.empty_like(v)
        for y in (0, 1):
            for x in (0, 1, 2):
                sub = [t[:, :, y::2, x::3] for t in (q, k, v)]
                out[:, :, y::2, x::3] = glocal.attend(*sub, Window(3), backend="dense")
        return out

    check(backend, tensors_for(backend, (7, 10)), Window(3, dilation=(2, 3)), attention)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_stride_of_the_window_size_is_blocks(rank):
    grid, size = (6, 8, 4)[:rank], (3, 4, 2)[:rank]
    assert torch.equal(Window(size, stride=size).mask(grid), Block(size).mask(grid))


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_causal_window_is_a_sliding_one(size):
    assert torch.equal(Window(size, causal=True).mask(8), Sliding(size - 1, 0).mask(8))


def test_a_window_as_large_as_the_grid_is_full():
    assert Window((5, 3)).mask((5, 3)).all()


def reach(length, *windows):
    """The most inputs that reach one output through layers of these patterns, by products of masks."""
    seen = torch.eye(length)
    for where in windows:
        seen = ((where.mask(length).float() @ seen) > 0).float()
    return int(seen.sum(-1).max())


def test_receptive_field_of_dilated_layers():
    """DiNAT (2209.15001): it grows exponentially with dilation, linearly without: 343 against 19."""
    assert reach(343, Window(7), Window(7), Window(7)) == 19
    assert reach(343, Window(7), Window(7, dilation=7), Window(7, dilation=49)) == 343


# Merging


def random_split(keys, parts, seed):
    """A random assignment of keys to parts, as padding masks ``(1, Nk)``; some may be empty."""
    owner = torch.randint(0, parts, (keys,), generator=torch.Generator().manual_seed(seed))
    return [(owner == n)[None] for n in range(parts)]


@quick
@pytest.mark.parametrize("seed", range(4))
def test_merge_over_disjoint_keys_is_attention_over_all(backend, seed):
    where = Sliding(6, 2)

    def split(q, k, v):
        parts = [
            run(backend, q, k, v, where & Keys(real), return_lse=True)
            for real in random_split(k.shape[2], 2 + seed, seed)
        ]
        return glocal.merge(parts, return_lse=True)

    def at_once(q, k, v):
        return glocal.attend(q, k, v, where, return_lse=True, backend="dense")

    tensors = tensors_for(backend, (9,), (13,), heads=4, kv_heads=2)
    results = []
    for function in (split, at_once):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, lse = function(*leaves)
        # The gradient goes through the log-sum-exp as well.
        loss = out.square().sum() + lse.sin().sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11 if got.dtype == torch.float64 else 1e-5)


@backends
def test_lse_is_the_logsumexp_of_the_scores(backend):
    q, k, v = tensors_for(backend, (8,))
    _, lse = run(backend, q, k, v, Sliding(2, 1), return_lse=True)
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    for i in range(8):
        want = scores[:, :, i, max(0, i - 2) : i + 2].logsumexp(-1)
        torch.testing.assert_close(lse[:, :, i], want, rtol=0, atol=1e-5)


def test_merge_adds_tokens_from_outside_the_grid():
    """A window on an image and a full look at three registers, in one softmax."""
    q, k, v = inputs((5, 4), dtype=torch.float64)
    _, extra_k, extra_v = inputs((3,), dtype=torch.float64, seed=1)
    local = glocal.attend(q, k, v, Window(3), return_lse=True, backend="sdpa")
    flat_q = q.flatten(2, 3)
    outside = glocal.attend(flat_q, extra_k, extra_v, return_lse=True, backend="sdpa")
    out = glocal.merge([tuple(t.flatten(2, 3) for t in local), outside])
    mask = torch.cat([Window(3).mask((5, 4)), torch.ones(20, 3, dtype=torch.bool)], 1)
    keys, values = (torch.cat([t.flatten(2, 3), more], 2) for t, more in ((k, extra_k), (v, extra_v)))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(flat_q, keys, values, attn_mask=mask))


# Invariances


@quick
def test_full_attention_does_not_mind_the_order(backend):
    q, k, v = tensors_for(backend, (13,))
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(13, generator=generator), torch.randperm(13, generator=generator)
    out = run(backend, q, k, v, Full())
    moved = run(backend, q[:, :, rows], k[:, :, columns], v[:, :, columns], Full())
    torch.testing.assert_close(moved, out[:, :, rows], rtol=0, atol=1e-6)


@quick
def test_blocks_do_not_mind_the_order_of_blocks(backend):
    q, k, v = tensors_for(backend, (12,))
    order = torch.tensor([2, 0, 1])[:, None].mul(4).add(torch.arange(4)).flatten()
    moved = run(backend, *(t[:, :, order] for t in (q, k, v)), Block(4))
    torch.testing.assert_close(moved, run(backend, q, k, v, Block(4))[:, :, order], rtol=0, atol=1e-6)


@quick
@pytest.mark.parametrize("axis", [2, 3])
def test_an_odd_window_commutes_with_a_mirror(backend, axis):
    q, k, v = tensors_for(backend, (5, 7))
    out = run(backend, q, k, v, Window(3))
    mirrored = run(backend, q.flip(axis), k.flip(axis), v.flip(axis), Window(3))
    torch.testing.assert_close(mirrored, out.flip(axis), rtol=0, atol=1e-6)


CAUSAL = [Causal(), Sliding(3, 0), Sliding(2, 0) | Sinks(2), Window(4, causal=True), Window(3, dilation=2, causal=True)]


@quick
@pytest.mark.parametrize("where", CAUSAL, ids=repr)
def test_decoding_step_by_step_is_the_parallel_form(backend, where):
    q, k, v = tensors_for(backend, (11,), heads=4, kv_heads=2)
    out = run(backend, q, k, v, where)
    fits = where.size * where.dilation if isinstance(where, Window) else 1
    for t in range(fits - 1, 11):
        step = run(backend, q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], where)
        torch.testing.assert_close(step, out[:, :, t : t + 1], rtol=0, atol=1e-6)


@quick
def test_decoding_in_uneven_chunks(backend):
    where = Sliding(4, 0) | Sinks(3)
    q, k, v = tensors_for(backend, (13,))
    chunks = [run(backend, q[:, :, a:b], k[:, :, :b], v[:, :, :b], where) for a, b in ((0, 5), (5, 6), (6, 13))]
    torch.testing.assert_close(torch.cat(chunks, 2), run(backend, q, k, v, where), rtol=0, atol=1e-6)


@backends
def test_packed_segments_are_separate_sequences(backend):
    q, k, v = tensors_for(backend, (12,))
    out = run(backend, q, k, v, Segments([5, 0, 4, 3]) & Causal())
    apart = [
        F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True)
        for a, b in ((0, 5), (5, 9), (9, 12))
    ]
    torch.testing.assert_close(out, torch.cat(apart, 2), rtol=0, atol=1e-5)


@backends
def test_a_pattern_per_head_is_each_head_alone(backend):
    patterns = [Sliding(2, 0), Full(), Sliding(2, 0), Block(4) | Prefix(1)]
    q, k, v = tensors_for(backend, (9,), heads=4)
    out = run(backend, q, k, v, PerHead(patterns))
    for h, where in enumerate(patterns):
        alone = run("dense", *(t[:, h : h + 1] for t in (q, k, v)), where)
        torch.testing.assert_close(out[:, h : h + 1], alone, rtol=0, atol=1e-5)


@quick
def test_a_batch_is_many_batches_of_one(backend):
    real = torch.tensor([[True] * 9, [True] * 4 + [False] * 5, [False] * 9])
    where = Sliding(3, 1) & Keys(real)
    q, k, v = tensors_for(backend, (9,), batch=3)
    out = run(backend, q, k, v, where)
    for b in range(3):
        one = [t[b : b + 1] for t in (q, k, v)]
        alone = run(backend, *one, Sliding(3, 1) & Keys(real[b : b + 1]))
        torch.testing.assert_close(out[b : b + 1], alone, rtol=0, atol=1e-6)


@quick
def test_one_mask_after_another(backend):
    """Tables of a pattern that is gone must not be taken for those of the next one, at the same address."""
    q, k, v = inputs((16,))
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        where = Sliding(6, 2) & Keys(torch.rand(1, 16, generator=generator) < 0.5)
        mask = where.mask(16)
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(run(backend, q, k, v, where), want, rtol=0, atol=1e-5)
