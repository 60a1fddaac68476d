"""Scores and weights of some queries against plain loops in float64."""

import math

import pytest
import torch

from glocal import Causal, Keys
from glocal.hf.masks import Own, own
from glocal.hf.rows import Rows, probabilities, product
from tests.hf.test_attention import Plain

HEADS, GROUPS, QUERIES, KEYS, WIDTH = 4, 2, 5, 9, 6
AT = torch.tensor([0, 3, 4])


def tensors(dtype=torch.float32):
    make = torch.Generator().manual_seed(2)
    shapes = (HEADS, QUERIES), (GROUPS, KEYS), (GROUPS, KEYS)
    return [(torch.randn(2, *shape, WIDTH, generator=make) * 2).to(dtype) for shape in shapes]


def plain(q, k, v, seen, *, added=None, scale=WIDTH**-0.5, softcap=None):
    """Weights ``(B, H, Nq, Nk)`` and output, number by number."""
    weights = torch.zeros(2, HEADS, QUERIES, KEYS, dtype=torch.float64)
    out = torch.zeros(2, HEADS, QUERIES, WIDTH, dtype=torch.float64)
    q, k, v = (t.double().tolist() for t in (q, k, v))
    for b in range(2):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            for i in range(QUERIES):
                e = {}
                for j in range(KEYS):
                    s = sum(x * y for x, y in zip(q[b][h][i], k[b][g][j], strict=True)) * scale
                    s = s if softcap is None else softcap * math.tanh(s / softcap)
                    s = s if added is None else s + float(added[b, h % added.shape[1], i % added.shape[2], j])
                    if seen(b, i, j) and s > -math.inf:
                        e[j] = math.exp(s)
                for j, each in e.items():
                    weights[b, h, i, j] = each / sum(e.values())
                    out[b, h, i] += weights[b, h, i, j] * torch.tensor(v[b][g][j], dtype=torch.float64)
    return weights, out


def causal(b, i, j):
    return j <= i + KEYS - QUERIES


@pytest.mark.parametrize("options", [{}, {"scaling": 0.0}, {"scaling": 0.7, "softcap": 1.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_causality_softcap_and_groups(options, dtype):
    q, k, v = tensors(dtype)
    real = torch.ones(2, KEYS, dtype=torch.bool)
    real[1, :5] = False  # the second prompt's first query sees nothing
    part = Rows.of(own(Plain(), q, KEYS, real, is_causal=True), q, k, AT, options)
    named = dict(scale=options.get("scaling", WIDTH**-0.5), softcap=options.get("softcap"))
    wanted, out = plain(q, k, v, lambda b, i, j: causal(b, i, j) and real[b, j], **named)
    found = part.weights()
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted[:, :, AT].to(dtype), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(product(found, v), out[:, :, AT].to(dtype), atol=1e-6, rtol=1e-5)
    assert not found[1, :, 0].any() and torch.isneginf(part.scores()[1, :, 0]).all()
    assert found[1, :, 1].any()


@pytest.mark.parametrize("shape", [(2, 1, QUERIES, KEYS), (2, HEADS, QUERIES, KEYS)])
def test_a_mask_of_pairs_and_a_bias_of_positions(shape):
    q, k, v = tensors()
    make = torch.Generator().manual_seed(5)
    mask = torch.rand(shape, generator=make) < 0.6
    mask[0, :, 3] = False  # a query that sees nothing
    bias = torch.randn(2, HEADS, 1, KEYS, generator=make)
    added = torch.zeros(shape).masked_fill(~mask, -torch.inf) + bias
    part = Rows.of(own(Plain(), q, KEYS, mask), q, k, AT, {"position_bias": bias, "softcap": 3.0})
    wanted, _ = plain(q, k, v, lambda b, i, j: True, added=added, softcap=3.0)
    torch.testing.assert_close(part.weights(), wanted[:, :, AT].float(), atol=1e-6, rtol=1e-5)
    assert not part.weights()[0, :, 1].any()


def test_slots_behind_the_end_are_left_out():
    q, k, v = tensors()
    more = torch.cat([k, torch.full((2, GROUPS, 4, WIDTH), torch.nan)], 2)
    bias = torch.randn(2, 1, QUERIES, KEYS + 4)
    mine = Own(Causal(), Causal(), None, None, end=KEYS, offset=0)
    found = Rows.of(mine, q, more, AT, {"position_bias": bias}).weights()
    wanted, _ = plain(q, k, v, causal, added=bias)
    torch.testing.assert_close(found, wanted[:, :, AT].float(), atol=1e-6, rtol=1e-5)


def test_a_shift_moves_the_queries():
    q, k, v = tensors()
    shift = torch.randn(2, HEADS, 1, WIDTH, requires_grad=True)
    part = Rows.of(own(Plain(), q, KEYS, None, is_causal=True), q, k, AT, {})
    found = part.weights(shift)
    torch.testing.assert_close(
        found.detach(), plain(q + shift, k, v, causal)[0][:, :, AT].float(), atol=1e-6, rtol=1e-5
    )
    found[..., 0].sum().backward()
    assert shift.grad.abs().sum() > 0


def test_no_gradient_is_nan_where_a_row_sees_nothing():
    q, k, _ = (t.requires_grad_() for t in tensors())
    hidden = Keys(torch.zeros(2, KEYS, dtype=torch.bool))
    Rows.of(Own(hidden, hidden, None, None, KEYS, 0), q, k, AT, {}).weights().sum().backward()
    assert not q.grad.any() and not k.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_softmax(dtype):
    q, k, v = tensors(dtype)
    found = Rows.of(own(Plain(), q, KEYS, None, is_causal=True), q, k, AT, {}).weights()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(2, HEADS, 3))
    wanted, _ = plain(q, k, v, causal)
    assert (found - wanted[:, :, AT]).abs().max() < 8 * torch.finfo(dtype).eps


def test_products_of_no_rows():
    assert product(torch.zeros(2, 4, 0, 3), torch.zeros(2, 2, 3, 5)).shape == (2, 4, 0, 5)
    assert probabilities(torch.zeros(2, 0, 3)).shape == (2, 0, 3)
