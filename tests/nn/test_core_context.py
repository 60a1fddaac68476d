"""S087: against loops over the definition, limiting cases, and the partition of the past."""

from __future__ import annotations

import pytest
import torch

from glocal.condense import pool_blocks
from glocal.nn import CoreContextAttention, Rope
from glocal.patterns import Between
from tests.nn.layers import by_mask, project, steps


def make(group_size=4, window=16, dim=16, heads=2, **options):
    torch.manual_seed(0)
    options = {"causal": True, "rope": Rope()} | options
    return CoreContextAttention(dim, heads, group_size=group_size, window=window, **options).double()


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cores_and_tokens(layer, i, length, cross):
    """Which groups and which tokens query ``i`` sees, by the definition."""
    g, s = layer.group_size, layer.window
    groups = range(length // g)
    if cross:
        far = list(groups)
    elif layer.causal:
        far = [u for u in groups if (u + 1) * g - 1 <= i - s]
    else:
        far = [u for u in groups if (u + 1) * g - 1 <= i - s or u * g >= i + s]
    pooled = {t for u in far for t in range(u * g, (u + 1) * g)}
    return far, [t for t in range(i + 1 if layer.causal else length) if t not in pooled]


def by_loops(layer, x, context=None, keys=None):
    """The layer one query, one head and one group at a time."""
    cross, context = context is not None, x if context is None else context
    length, g, group = context.shape[1], layer.group_size, layer.num_heads // layer.num_kv_heads
    q, k, v = project(layer, x, context)
    asked = project(layer, context)[0]
    plain = layer.heads(layer.k_proj(context), layer.num_kv_heads)
    keys = torch.ones(context.shape[:2], dtype=torch.bool) if keys is None else keys
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        kv = h // group
        far, near = cores_and_tokens(layer, i, length, cross)
        near = [t for t in near if keys[b, t]]
        entries = [[], []]
        for u in far:
            inside = [t for t in range(u * g, (u + 1) * g) if keys[b, t]]
            if not inside:
                continue
            logits = torch.stack(
                [asked[b, kv * group : (kv + 1) * group, inside[-1]] @ k[b, kv, t] for t in inside]
            ).mean(-1)
            weights = (logits * layer.scale).softmax(0)
            source = k if layer.pool_rotated else plain
            core = sum(w * source[b, kv, t] for w, t in zip(weights, inside, strict=True))
            if layer.rope is not None and not layer.pool_rotated:
                core = layer.rope(core[None], torch.tensor([u * g + g - 1]))[0]
            bias = torch.tensor(float(len(inside) if layer.group_bias else 1)).log()
            value = sum(w * v[b, kv, t] for w, t in zip(weights, inside, strict=True))
            entries[0].append((core @ q[b, h, i] * layer.scale + bias, value))
        entries[1] = [(k[b, kv, t] @ q[b, h, i] * layer.scale, v[b, kv, t]) for t in near]
        parts = [part for part in entries if part] if layer.fusion == "mean" else [entries[0] + entries[1]]
        for part in parts:
            scores, values = torch.stack([e[0] for e in part]), torch.stack([e[1] for e in part])
            out[b, h, i] += scores.softmax(0) @ values / len(parts)
    return layer.o_proj(out.movedim(1, -2).flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "lse", "group_bias": True},
        {"fusion": "mean"},
        {"pool_rotated": True, "group_bias": True},
        {"num_kv_heads": 1},
        {"rope": Rope(scaling=2.0, interleaved=True), "fusion": "lse"},
    ],
    ids=str,
)
def test_equals_loops(options):
    layer, x = make(**options), double(1, 96, 16)
    torch.testing.assert_close(layer(x), by_loops(layer, x))


@pytest.mark.parametrize("fusion", ["softmax", "lse", "mean"])
@pytest.mark.parametrize("length", [3, 29])
def test_without_causality_and_across(length, fusion):
    layer, x = make(group_size=4, window=5, causal=False, fusion=fusion, num_kv_heads=1), double(2, length, 16)
    torch.testing.assert_close(layer(x), by_loops(layer, x))
    context = double(2, 18, 16)
    torch.testing.assert_close(layer(x[:, :3], context), by_loops(layer, x[:, :3], context))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fusion", ["softmax", "lse"])
def test_padding_counts_in_no_group(causal, fusion):
    layer = make(group_size=4, window=5, causal=causal, fusion=fusion, group_bias=True)
    x, keys = double(2, 29, 16), torch.rand(2, 29) > 0.4
    keys[:, 4:8], keys[:, 0] = False, True  # a group without a real token
    torch.testing.assert_close(layer(x, keys=keys), by_loops(layer, x, keys=keys))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("group_size", "window"), [(4, 50), (4, 64), (1, 1), (1, 7), (16, 37)])
def test_a_wide_window_and_groups_of_one_are_full_attention(group_size, window, causal):
    layer, x = make(group_size, window, causal=causal), double(2, 50 if group_size < 16 else 37, 16)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask.tril() if causal else mask))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("group_size", "window"), [(4, 16), (4, 5), (7, 3), (3, 1)])
def test_cores_and_tokens_partition_the_past(group_size, window, causal):
    """Each token once, and between ``s`` and ``s + g - 1`` of them raw."""
    layer, length = make(group_size, window, causal=causal), 61
    far, near = layer.spans(length, length, False, torch.device("cpu"))
    count = torch.zeros(length, length, dtype=torch.long)
    for lo, hi in near:
        count += Between(lo, hi).mask(length, length).view(length, length)
    if causal:
        raw = count.sum(-1)[window:]
        assert bool((raw >= window).all()) and bool((raw < window + group_size).all())
    groups = length // group_size
    for lo, hi in far:
        cores = Between(lo, hi).mask(length, groups).view(length, groups)
        count[:, : groups * group_size] += cores.repeat_interleave(group_size, 1)
    every = torch.ones(length, length, dtype=torch.long)
    assert torch.equal(count, every.tril() if causal else every)


def test_a_zero_pooling_query_is_mean_pooling():
    class MeanPooling(CoreContextAttention):
        def pooling_query(self, q):
            return torch.zeros_like(super().pooling_query(q))

    layer = MeanPooling(16, 2, group_size=4, window=8, causal=True).double()
    x = double(1, 30, 16)
    q, k, v = project(layer, x)
    means = [torch.cat([pool_blocks(t, 4)[:, :, :7], t], 2) for t in (k, v)]
    i = torch.arange(30)
    before = ((i - 7).clamp(min=0) // 4)[:, None]
    far, near = torch.arange(7) < before, (i >= 4 * before) & (i <= i[:, None])
    mask = torch.cat([far, near], 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, *means, attn_mask=mask)
    torch.testing.assert_close(layer(x), layer.o_proj(out.movedim(1, -2).flatten(-2)))


def test_values_that_agree_within_a_group_are_not_changed_by_pooling():
    layer = make()
    x = double(1, 96, 16)
    q, k, _ = project(layer, x)
    v = double(1, 2, 24, 16).repeat_interleave(4, 2)
    from glocal.nn import Call

    core_v = layer.cores(q, k, v, Call(x, x, None, None, False))[1]
    torch.testing.assert_close(core_v, v[:, :, ::4])


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "mean"}, {"fusion": "lse", "group_bias": True}, {"num_kv_heads": 1}]
)
@pytest.mark.parametrize("prompt", [0, 9, 31])
def test_decoding_equals_the_parallel_form_in_bounded_memory(options, prompt):
    layer, x = make(4, 6, **options), double(2, 50, 16)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
    assert cache.cores == 11 and cache.kept()[0].k.shape[2] == 11 + 6
    # Of the rest: one core that waits, and the two turned keys of the open group.
    assert cache.nbytes == 8 * cache.kept()[0].k.shape[1] * 2 * layer.head_dim * (2 * (12 + 6) + 2)


def test_the_future_does_not_count():
    layer, x = make(4, 6), double(1, 40, 16)
    out = layer(x)
    for t in (5, 8, 17, 31):
        other = x.clone()
        other[:, t:] = torch.randn_like(other[:, t:])
        torch.testing.assert_close(layer(other)[:, :t], out[:, :t])


@pytest.mark.parametrize("fusion", ["softmax", "lse", "mean"])
def test_gradients(fusion):
    layer = make(2, 3, dim=8, fusion=fusion)
    x = double(1, 11, 8).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    layer(x).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in layer.parameters())


def test_errors_name_the_argument():
    for name in ("group_size", "window"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; it was 0"):
            CoreContextAttention(16, 2, **{name: 0})
    with pytest.raises(ValueError, match=r"fusion must be .* it was 'sum'"):
        CoreContextAttention(16, 2, fusion="sum")
    with pytest.raises(ValueError, match="group_bias must be False"):
        CoreContextAttention(16, 2, fusion="mean", group_bias=True)
    with pytest.raises(ValueError, match="kv_dim must be dim 16"):
        CoreContextAttention(16, 2, kv_dim=8)
    layer = make()
    with pytest.raises(ValueError, match="positions must count up by one"):
        layer(double(1, 4, 16), positions=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="x must be"):
        layer(double(1, 4, 4, 16))


def test_positions_may_start_anywhere():
    layer, x = make(4, 6), double(1, 30, 16)
    torch.testing.assert_close(layer(x, positions=torch.arange(30) + 100), layer(x))
