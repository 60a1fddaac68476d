"""S027: local and transient global attention against the definition written out, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glocal.nn import LongT5Attention
from tests import oracle
from tests.nn.layers import by_mask, gradients_agree, project


def make(radius=3, size: int | None = 4, **options):
    torch.manual_seed(0)
    layer = LongT5Attention(32, 4, radius=radius, global_block_size=size, max_distance=20, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def bucket(offset, buckets=32, far=20):
    """T5's bucket of one offset."""
    exact, distance = buckets // 4, torch.tensor(abs(offset), dtype=torch.float32)
    ratio = torch.log(distance / exact) / torch.log(torch.tensor(far / exact))
    near = abs(offset) if abs(offset) < exact else min(exact + int(ratio * exact), 2 * exact - 1)
    return near + (buckets // 2 if offset > 0 else 0)


def by_definition(layer, x, real=None):
    """All keys and global tokens of each row side by side, one mask, one bias, one softmax."""
    size, (batch, length) = layer.global_block_size, x.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    q, k, v = project(layer, x)
    rows = []
    for b in range(batch):
        end = max((i + 1 for i in range(length) if real[b, i]), default=0)
        count = end // size
        block = [min(i // size, count - 1) for i in range(length)]
        members = [[i for i in range(end) if block[i] == u and real[b, i]] for u in range(count)]
        kept = [u for u in range(count) if members[u]]
        sums = torch.stack([x[b, members[u]].sum(0) for u in kept]) if kept else x[b, :0]
        tokens = sums * (sums.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.side_norm.weight
        side_k, side_v = (layer.heads(p(tokens[None]), layer.num_kv_heads) for p in (layer.k_proj, layer.v_proj))
        near = [[bool(abs(i - j) <= layer.radius and real[b, j]) for j in range(length)] for i in range(length)]
        mask = torch.tensor([row + [True] * len(kept) for row in near])
        tables = [torch.tensor([[bucket(j - i) for j in range(length)] for i in range(length)])]
        tables += [torch.tensor([[bucket(u - block[i]) for u in kept] for i in range(length)]).long()]
        weights = (layer.bias.weight, layer.side_bias.weight)
        bias = torch.cat([w[t].movedim(-1, 0) for w, t in zip(weights, tables, strict=True)], -1)
        keys, values = torch.cat([k[b : b + 1], side_k], 2), torch.cat([v[b : b + 1], side_v], 2)
        rows.append(oracle.attend(q[b : b + 1], keys, values, mask, scale=1.0, bias=bias)[0])
    return layer.o_proj(torch.cat(rows).movedim(1, -2).flatten(-2))


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize(("length", "size"), [(32, 4), (31, 4), (9, 8), (12, 1), (50, 7)])
def test_equals_the_definition(length, size, num_kv_heads):
    layer = make(size=size, num_kv_heads=num_kv_heads)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), by_definition(layer, x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(x)
    mine, theirs = (torch.autograd.grad((o * weights).sum(), [x, *layer.parameters()]) for o in (out, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["right", "left", "holes"])
def test_padding_joins_no_block(where):
    layer, x = make(), torch.randn(4, 26, 32, dtype=torch.float64)
    place, lengths = torch.arange(26), torch.tensor([26, 21, 8, 2])[:, None]
    real = place < lengths if where == "right" else place >= 26 - lengths
    if where == "holes":
        real = torch.rand(4, 26) > 0.5
    out = layer(x, keys=real)
    torch.testing.assert_close(out[real], by_definition(layer, x, real)[real])
    assert bool(out.isfinite().all())


def test_padding_on_the_right_equals_the_row_alone():
    layer, x = make(), torch.randn(3, 30, 32, dtype=torch.float64)
    for length in (30, 29, 13, 3):
        keys = (torch.arange(30) < length).expand(3, -1)
        torch.testing.assert_close(layer(x, keys=keys)[:, :length], layer(x[:, :length]))


def test_local_equals_a_dense_band_with_biases():
    layer, x = make(size=None, num_kv_heads=2), torch.randn(2, 45, 32, dtype=torch.float64)
    place = torch.arange(45)
    mask = (place[:, None] - place).abs() <= 3
    table = torch.tensor([[bucket(j - i) for j in range(45)] for i in range(45)])
    bias = layer.bias.weight[table].movedim(-1, 0)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask, bias=bias))
    gradients_agree(layer, x, mask, bias=bias)


def test_one_token_a_block_is_attention_to_normalised_tokens():
    layer, x = make(size=1), torch.randn(1, 14, 32, dtype=torch.float64)
    q, k, v = project(layer, x)
    tokens = layer.side_norm(x)
    keys = torch.cat([k, layer.heads(layer.k_proj(tokens), 4)], 2)
    values = torch.cat([v, layer.heads(layer.v_proj(tokens), 4)], 2)
    place = torch.arange(14)
    mask = torch.cat([(place[:, None] - place).abs() <= 3, torch.ones(14, 14, dtype=torch.bool)], 1)
    table = torch.tensor([[bucket(j - i) for j in range(14)] for i in range(14)])
    bias = torch.cat([w.weight[table].movedim(-1, 0) for w in (layer.bias, layer.side_bias)], -1)
    out = oracle.attend(q, keys, values, mask, scale=1.0, bias=bias)[0]
    torch.testing.assert_close(layer(x), layer.o_proj(out.movedim(1, -2).flatten(-2)))


def test_shorter_than_a_block_is_local():
    layer, local = make(size=16), make(size=None)
    local.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), local(x), rtol=0, atol=0)
    longer = torch.randn(2, 16, 32, dtype=torch.float64)
    assert not torch.allclose(layer(longer), local(longer))


def test_the_order_inside_a_far_block_does_not_count():
    layer, x = make(), torch.randn(1, 40, 32, dtype=torch.float64)
    other = x.clone()
    other[:, 20:24] = x[:, 20:24][:, [2, 0, 3, 1]]
    far = torch.tensor([i for i in range(40) if not 20 - 3 <= i < 24 + 3])
    out, moved = layer(x), layer(other)
    torch.testing.assert_close(moved[:, far], out[:, far])
    assert not torch.allclose(moved[:, 20:24], out[:, 20:24])
    other[:, 20] += 1  # but its content does
    assert float(((layer(other) - out)[:, far].abs().amax(-1) > 1e-6).float().mean()) > 0.8


def test_sums_do_not_overflow_in_half_precision():
    layer = make(size=16).float()
    x = (6e4 * torch.rand(1, 64, 32)).half()
    _, _, k = layer.summaries(x, None, 16)
    tokens, wide = layer.half().summaries(x, None, 16)[0], layer.float().summaries(x.float(), None, 16)[0]
    assert k.tolist() == [4] and bool((x.sum(1).isinf()).any())
    torch.testing.assert_close(tokens.float(), wide, atol=2e-3, rtol=2e-3)


def test_nothing_is_as_large_as_tokens_times_global_tokens():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                self.size = max(self.size, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    layer, x = make(size=4).float(), torch.randn(1, 4099, 32)
    with torch.no_grad(), Largest() as largest:
        layer(x)
        layer(x, keys=torch.arange(4099)[None] < 4001)
    assert largest.size < 4099 * 1024 // 8


def test_refuses():
    for name, options in {
        "radius": {"radius": -1},
        "global_block_size": {"global_block_size": 0},
        "num_buckets": {"num_buckets": 2},
        "max_distance": {"max_distance": 16},
        "bias": {"bias": torch.nn.Embedding(32, 3)},
        "qk_norm": {"qk_norm": "rms"},
        "num_heads": {"num_kv_heads": 3},
        "has no causal": {"causal": True},
    }.items():
        with pytest.raises(ValueError, match=name):
            LongT5Attention(32, 4, **options)
