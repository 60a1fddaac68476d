"""S005: polyline path masks by loops over paths, their factors, their limits, and attention under them."""

import pytest
import torch
from torch.nn.functional import elu, scaled_dot_product_attention, softplus
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.mamba2.modeling_mamba2 import segment_sum

from glocal.nn import Rope
from glocal.nn.polyline import (
    PathDecay,
    PolylineAttention,
    PolylineLinearAttention,
    path_mask,
    polyline_linear_attend,
    polyline_mask,
    polyline_product,
)

GRIDS = [(3, 4), (1, 7), (6, 1), (5, 5), (1, 1)]


def decays(*shape):
    torch.manual_seed(0)
    return [-torch.rand(*shape, dtype=torch.double).requires_grad_() for _ in range(2)]


def by_loops(row, column, first, causal=False):
    """Step by step along the path from query (i, j) to key (k, l)."""
    height, width = row.shape
    mask = torch.empty(height, width, height, width, dtype=row.dtype)
    for i in range(height):
        for j in range(width):
            for k in range(height):
                for n in range(width):
                    along, across = (i, n) if first == "horizontal" else (k, j)
                    total = sum(row[along, t] for t in range(min(j, n) + 1, max(j, n) + 1))
                    total = total + sum(column[t, across] for t in range(min(i, k) + 1, max(i, k) + 1))
                    mask[i, j, k, n] = -torch.inf if causal and (k > i or n > j) else total
    return mask.flatten(2).flatten(0, 1)


def lines(layer, q, k, horizontal, vertical):
    """Softmax along rows, and along columns, as ``(B, H, N, N)`` matrices with zeros elsewhere."""
    height, width = horizontal.shape[2:]
    at = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    scores = layer.scale * q.flatten(2, 3) @ k.flatten(2, 3).mT
    found = []
    for axis, decay in ((0, horizontal), (1, vertical)):
        same = at[:, None, axis] == at[None, :, axis]
        zero = torch.zeros_like(decay)
        mask = polyline_mask(*((decay, zero) if axis == 0 else (zero, decay)))
        found.append((scores + mask).masked_fill(~same, -torch.inf).softmax(-1))
    return found


# The mask.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", ["horizontal", "vertical"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_mask_by_loops(grid, first, causal):
    row, column = decays(2, *grid)
    found = polyline_mask(row, column, first=first, causal=causal)
    for mine, r, c in zip(found, row, column, strict=True):
        assert torch.allclose(mine, by_loops(r, c, first, causal), atol=1e-12)
    if not causal:
        other = {"horizontal": "vertical", "vertical": "horizontal"}[first]
        assert torch.allclose(found.mT, polyline_mask(row, column, first=other), atol=1e-12)


def test_only_a_line_is_symmetric():
    row, column = decays(3, 4)
    mask = polyline_mask(row, column)
    assert not torch.allclose(mask, mask.mT)
    assert torch.equal(path_mask(row), path_mask(row).mT)


def test_its_lower_triangle_is_the_mask_of_mamba2():
    (row, _) = decays(2, 3, 17)
    wanted = segment_sum(row.detach())
    assert torch.allclose(path_mask(row, causal=True), wanted, atol=1e-12)
    assert torch.allclose(path_mask(row).tril(), wanted.tril(), atol=1e-12)


@pytest.mark.parametrize("first", ["horizontal", "vertical"])
def test_constant_decays_count_blocks_of_the_city(first):
    at = torch.cartesian_prod(torch.arange(4), torch.arange(5)).double()
    constant = torch.full((4, 5), 0.9, dtype=torch.double).log()
    distance = torch.cdist(at, at, p=1)
    assert torch.allclose(polyline_mask(constant, constant, first=first).exp(), 0.9**distance, atol=1e-12)


def test_strong_decays_stay_finite():
    row, column = (1e5 * t.detach().float() for t in decays(9, 11))
    row.requires_grad_()
    mask = polyline_mask(row, column)
    weights = mask.softmax(-1)
    (grad,) = torch.autograd.grad(weights.square().sum(), row)
    assert mask.isfinite().all() and grad.isfinite().all()
    assert torch.allclose(weights, torch.eye(99), atol=1e-6)
    x = torch.randn(9, 11, 3)
    assert torch.allclose(polyline_product(x, row, column), x, atol=1e-6)


# Products without it.


@pytest.mark.parametrize("options", [{"scan": False}, {"chunk": 1}, {"chunk": 3}, {}])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", ["horizontal", "vertical"])
@pytest.mark.parametrize("grid", GRIDS)
def test_products_equal_those_with_the_mask(grid, first, causal, options):
    row, column = decays(2, *grid)
    x = torch.randn(2, *grid, 3, dtype=torch.double).requires_grad_()
    wanted = polyline_mask(row, column, first=first, causal=causal).exp() @ x.flatten(1, 2)
    found = polyline_product(x, row, column, first=first, causal=causal, **options).flatten(1, 2)
    assert torch.allclose(found, wanted, atol=1e-12)
    one, two = (torch.autograd.grad(t.square().sum(), (x, row, column)) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, two, strict=True))


def test_masks_of_lines_are_factors_also_where_scores_have_factors():
    """(L_H L_V) o (S_H S_V) = (L_H o S_H)(L_V o S_V): one place only lies on both the row and the column."""
    row, column = decays(3, 4)
    zero, nothing = torch.zeros_like(row), torch.full_like(row, -1e4)
    within = polyline_mask(row, nothing).exp(), polyline_mask(nothing, column).exp()
    assert torch.allclose(within[0] @ within[1], polyline_mask(row, column).exp(), atol=1e-12)
    same = polyline_mask(zero, nothing).exp(), polyline_mask(nothing, zero).exp()
    scores = [torch.rand(12, 12, dtype=torch.double) * t for t in same]
    left = (within[0] @ within[1]) * (scores[0] @ scores[1])
    assert torch.allclose(left, (within[0] * scores[0]) @ (within[1] * scores[1]), atol=1e-12)


# Linear attention under it.


def linear_by_mask(q, k, v, masks, keys=None):
    fq, fk = ((elu(t) + 1).flatten(2, -2) for t in (q, k))
    fk = fk if keys is None else fk * keys.flatten(1)[:, None, :, None]
    out = 0
    for mask in masks:
        scores = fq @ fk.mT * mask.exp()
        out = out + scores / scores.sum(-1, keepdim=True) @ v.flatten(2, -2) / len(masks)
    return out.unflatten(2, v.shape[2:-1])


def tensors(*grid, d=4, e=3):
    torch.manual_seed(1)
    return [torch.randn(2, 2, *grid, n, dtype=torch.double).requires_grad_() for n in (d, d, e)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, (1,), (13,), (70,)])
def test_linear_attention_equals_that_with_the_mask(grid, causal):
    inputs = [*tensors(*grid), *decays(2, 2, *grid)[: len(grid)]]
    if len(grid) == 1:
        masks = [path_mask(inputs[3], causal=causal)]
    else:
        masks = [polyline_mask(*inputs[3:], first=first, causal=causal) for first in ("horizontal", "vertical")]
    wanted = linear_by_mask(*inputs[:3], masks)
    found = polyline_linear_attend(*inputs, causal=causal)
    assert torch.allclose(found, wanted, atol=1e-11)
    one, two = (torch.autograd.grad(t.square().sum(), inputs) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one, two, strict=True))


def test_the_causal_form_is_the_gated_recurrence():
    q, k, v = tensors(13)
    row, _ = decays(2, 2, 13)
    state = total = 0
    for t in range(13):
        fade = row[:, :, t, None].exp()
        fk = elu(k[:, :, t]) + 1
        state = fade[..., None] * state + fk[..., None] * v[:, :, t, None]
        total = fade * total + fk
        fq = elu(q[:, :, t]) + 1
        wanted = (fq[..., None] * state).sum(-2) / (fq * total).sum(-1, keepdim=True)
        assert torch.allclose(polyline_linear_attend(q, k, v, row, causal=True)[:, :, t], wanted, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_of_a_map_does_not_count(causal):
    inputs = [*tensors(5, 6), *decays(2, 2, 5, 6)]
    keys = torch.zeros(2, 5, 6, dtype=torch.bool)
    keys[0, 1:4, 2:5] = keys[1] = True
    found = polyline_linear_attend(*inputs, keys=keys, causal=causal)
    alone = polyline_linear_attend(*(t[:1, :, 1:4, 2:5] for t in inputs), causal=causal)
    assert torch.allclose(found[:1, :, 1:4, 2:5], alone, atol=1e-12)
    assert torch.allclose(found[1], polyline_linear_attend(*inputs, causal=causal)[1], atol=1e-12)
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    inputs = [t.detach().to(dtype) for t in (*tensors(9, 14), *decays(2, 2, 9, 14))]
    found, wanted = polyline_linear_attend(*inputs), polyline_linear_attend(*(t.double() for t in inputs))
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, atol=4 * torch.finfo(dtype).eps, rtol=0.01)


# The layers.


def test_decays_of_a_token_by_hand():
    torch.manual_seed(0)
    decay = PathDecay(12, 3)
    x = torch.randn(2, 4, 5, 12)
    horizontal, vertical = decay(x)
    for head in range(3):
        step = x[..., 4 * head : 4 * head + 4] @ decay.proj.weight.T
        for n, found in enumerate((horizontal, vertical)):
            wanted = -softplus(step[..., n] + decay.bias[head]) * decay.log_rate[head].exp()
            assert torch.allclose(found[:, head], wanted, atol=1e-6)


def test_decays_start_small():
    torch.manual_seed(0)
    decay = PathDecay(4096, 1024)
    start, rate = softplus(decay.bias), decay.log_rate.exp()
    assert 0.00099 < start.min() < 0.0015 and 0.07 < start.max() < 0.1001 and 0.008 < start.median() < 0.0125
    assert 1 <= rate.min() < 1.005 and 1.095 < rate.max() <= 1.1


def make(criss_cross, **options):
    torch.manual_seed(0)
    layer = PolylineAttention(24, 3, criss_cross=criss_cross, qkv_bias=True, out_bias=True, **options).double()
    torch.nn.init.normal_(layer.decay.proj.weight)
    return layer


def by_definition(layer, x):
    at = torch.arange(x.shape[1] * x.shape[2])
    q, k, v = layer.project(x, x, at, at)
    k, v = (t.repeat_interleave(layer.num_heads // t.shape[1], 1) for t in (k, v))
    decay = layer.decay(x)
    if layer.criss_cross:
        rows, columns = lines(layer, q, k, *decay)
        weights = 0.5 * (columns @ rows + rows @ columns)
    else:
        scores = layer.scale * q.flatten(2, 3) @ k.flatten(2, 3).mT
        mask = polyline_mask(*decay)
        weights = 0.5 * ((scores + mask).softmax(-1) + (scores + mask.mT).softmax(-1))
    mixed = (weights @ v.flatten(2, 3)).unflatten(2, x.shape[1:3]).movedim(1, -2).flatten(-2)
    if layer.lepe is not None:
        mixed = mixed + layer.lepe(v.movedim(1, -2).flatten(-2))
    return layer.o_proj(mixed)


OPTIONS = [{}, {"lepe": 5, "rope": Rope(interleaved=True, endpoint=True)}, {"num_kv_heads": 1}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", [(3, 4), (1, 6), (5, 1), (7, 7)])
@pytest.mark.parametrize("criss_cross", [False, True])
def test_the_layer_by_definition(criss_cross, grid, options):
    layer = make(criss_cross, **options)
    x = torch.randn(2, *grid, 24, dtype=torch.double).requires_grad_()
    found, wanted = layer(x), by_definition(layer, x)
    assert torch.allclose(found, wanted, atol=1e-12)
    inputs = [x, *layer.parameters()]
    one, two = (torch.autograd.grad(t.square().sum(), inputs) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("criss_cross", [False, True])
def test_no_decay_is_plain_attention_and_endless_decay_is_a_token_alone(criss_cross):
    layer = make(criss_cross)
    x = torch.randn(2, 4, 5, 24, dtype=torch.double)
    q, k, v = layer.project(x, x, None, None)
    layer.decay.log_rate.data.fill_(-60)
    if criss_cross:
        along = scaled_dot_product_attention(q, k, v)  # the axis before the last is a row's
        down = [t.transpose(2, 3) for t in (q, k, along)]
        one = scaled_dot_product_attention(*down).transpose(2, 3)
        along = scaled_dot_product_attention(*(t.transpose(2, 3) for t in (q, k, v))).transpose(2, 3)
        wanted = 0.5 * (one + scaled_dot_product_attention(q, k, along))
    else:
        wanted = scaled_dot_product_attention(*(t.flatten(2, 3) for t in (q, k, v))).unflatten(2, (4, 5))
    assert torch.allclose(layer(x), layer.o_proj(wanted.movedim(1, -2).flatten(-2)), atol=1e-12)
    layer.decay.log_rate.data.fill_(20)
    assert torch.allclose(layer(x), layer.o_proj(layer.v_proj(x)), atol=1e-12)


@pytest.mark.parametrize("criss_cross", [False, True, "linear"])
def test_swapping_axes_and_decays_swaps_the_outcome(criss_cross):
    if criss_cross == "linear":
        torch.manual_seed(0)
        layer = PolylineLinearAttention(24, 3, lepe=3).double()
        torch.nn.init.normal_(layer.decay.proj.weight)
    else:
        layer = make(criss_cross, lepe=3)
    x = torch.randn(2, 3, 5, 24, dtype=torch.double)
    wanted = layer(x)
    with torch.no_grad():
        layer.decay.proj.weight.copy_(layer.decay.proj.weight.flip(0).clone())
        layer.lepe.weight.copy_(layer.lepe.weight.mT.clone())
    assert not torch.allclose(layer(x), wanted, atol=1e-3)
    assert torch.allclose(layer(x.transpose(1, 2)).transpose(1, 2), wanted, atol=1e-12)


@pytest.mark.parametrize("criss_cross", [False, True])
def test_a_query_reaches_the_whole_map(criss_cross):
    layer = make(criss_cross)
    x = torch.randn(1, 3, 4, 24, dtype=torch.double).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 1, 2].sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_causal_on_a_map_sees_the_quadrant():
    torch.manual_seed(0)
    layer = PolylineLinearAttention(24, 3, causal=True).double()
    x = torch.randn(1, 4, 5, 24, dtype=torch.double).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 2, 1].sum(), x)
    seen = grad[0].abs().sum(-1) > 0
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    wanted[:3, :2] = True
    assert torch.equal(seen, wanted)


def test_grouped_heads_and_padding_from_the_left_when_decoding():
    torch.manual_seed(0)
    layer = PolylineLinearAttention(24, 4, num_kv_heads=2, causal=True).double()
    x = torch.randn(2, 12, 24, dtype=torch.double)
    keys = torch.arange(12) >= torch.tensor([[4], [0]])
    cache = layer.new_cache()
    parts = [layer(x[:, :9], keys=keys[:, :9], cache=cache), layer(x[:, 9:], keys=keys, cache=cache)]
    found = torch.cat(parts, 1)
    assert torch.allclose(found, layer(x, keys=keys), atol=1e-12)
    assert torch.allclose(found[:1, 4:], layer(x[:1, 4:]), atol=1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("kind", ["criss-cross", "linear", "linear causal", "whole"])
def test_only_the_whole_map_needs_all_pairs(kind):
    if "linear" in kind:
        layer = PolylineLinearAttention(4, 1, causal="causal" in kind)
    else:
        layer = PolylineAttention(4, 1, criss_cross=kind == "criss-cross")
    x = torch.randn(1, 32, 40, 4, requires_grad=True)
    with Largest() as seen:
        layer(x).sum().backward()
    pairs = (32 * 40) ** 2
    assert seen.size >= pairs if kind == "whole" else seen.size <= 1280 * 64


def test_bad_inputs():
    row, column = decays(3, 4)
    with pytest.raises(ValueError, match="first must be"):
        polyline_mask(row, column, first="diagonal")
    with pytest.raises(ValueError, match="of one shape"):
        polyline_mask(row, column[:2])
    with pytest.raises(ValueError, match="x must be"):
        polyline_product(torch.randn(4, 3, 2), row, column)
    with pytest.raises(ValueError, match="chunk"):
        polyline_product(torch.randn(3, 4, 2), row, column, chunk=0)
    q, k, v = tensors(3, 4)
    with pytest.raises(ValueError, match="horizontal must be"):
        polyline_linear_attend(q, k, v, row, column)
    with pytest.raises(ValueError, match="of one grid"):
        polyline_linear_attend(q, k, v, row)
    row, column = decays(2, 2, 3, 4)
    with pytest.raises(ValueError, match="feature"):
        polyline_linear_attend(q, k, v, row, column, feature="sine")
    with pytest.raises(ValueError, match="keys must be"):
        polyline_linear_attend(q, k, v, row, column, keys=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_heads"):
        PathDecay(10, 3)
    with pytest.raises(ValueError, match="must be a map"):
        PolylineAttention(8, 2)(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="no causal-self form: a map"):
        PolylineAttention(8, 2, causal=True)
    with pytest.raises(ValueError, match="sequence or a map"):
        PolylineLinearAttention(8, 2)(torch.randn(1, 2, 3, 4, 8))
