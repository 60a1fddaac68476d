"""Pooling and choosing, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glocal import condense
from glocal.patterns import Selected


def blocks_of(length, size):
    return [slice(a, min(a + size, length)) for a in range(0, length, size)]


@settings(deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.booleans())
def test_pooling_is_a_mean_over_real_tokens(length, size, masked):
    torch.manual_seed(length * 10 + size)
    x = torch.randn(2, 3, length, 4, dtype=torch.float64)
    real = torch.rand(2, length) > 0.4 if masked else torch.ones(2, length, dtype=torch.bool)
    mean = condense.pool_blocks(x, size, real=real[:, None] if masked else None)
    most = condense.pool_blocks(x, size, real=real[:, None] if masked else None, how="max")
    scores = torch.randn(2, 3, length, dtype=torch.float64)
    weighed = condense.weigh_blocks(x, scores, size, real=real[:, None] if masked else None)
    for n, part in enumerate(blocks_of(length, size)):
        for b in range(2):
            keep = real[b, part]
            if not keep.any():
                assert not mean[b, :, n].any() and not most[b, :, n].any() and not weighed[b, :, n].any()
                continue
            tokens = x[b, :, part][:, keep]
            torch.testing.assert_close(mean[b, :, n], tokens.mean(1))
            torch.testing.assert_close(most[b, :, n], tokens.amax(1))
            share = scores[b, :, part][:, keep].softmax(-1)
            torch.testing.assert_close(weighed[b, :, n], (share[..., None] * tokens).sum(1))


def test_learned_weights_pass_gradients():
    x, weights = torch.randn(1, 7, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: condense.pool_blocks(x, 3, weights=w), weights)
    torch.testing.assert_close(condense.pool_blocks(x, 3, weights=weights)[0, -1], weights[0] * x[0, 6])


def test_gradients_of_weighed_blocks():
    x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: condense.weigh_blocks(x, s, 3), (x, scores))


@settings(deadline=None)
@given(st.integers(0, 23), st.integers(1, 9))
def test_the_tail_joins_the_last_complete_block(length, size):
    x = torch.randn(2, length, 3, dtype=torch.float64)
    sums = condense.block_sums(x, size)
    count = length // size
    assert sums.shape == (2, count, 3)
    for n in range(count):
        end = length if n == count - 1 else (n + 1) * size
        torch.testing.assert_close(sums[:, n], x[:, n * size : end].sum(1))


@settings(deadline=None)
@given(st.integers(1, 23), st.integers(1, 6), st.integers(1, 6))
def test_overlapping_blocks(length, size, stride):
    x = torch.arange(float(length))[:, None]
    found = condense.pool_overlapping(x, size, stride)
    wanted = [list(range(a, a + size)) for a in range(0, length - size + 1, stride)]
    assert found.squeeze(-1).int().tolist() == wanted
    shares = condense.overlapping_blocks(len(wanted), size, stride, 4, -(-length // 4))
    for n, tokens in enumerate(wanted):
        for m in range(-(-length // 4)):
            assert abs(float(shares[n, m]) - sum(t // 4 == m for t in tokens) / size) < 1e-6


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 5))
def test_blocks_before_are_wholly_past(queries, keys, size):
    if queries > keys:
        return
    before = condense.blocks_before(queries, keys, size)
    for i in range(queries):
        at = keys - queries + i
        assert int(condense.own_block(queries, keys, size)[i]) == at // size
        assert before[i].tolist() == [(n + 1) * size <= at // size * size for n in range(-(-keys // size))]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 9))
def test_best_is_a_stable_sort_of_what_is_allowed(seed, n, count):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (4, n), generator=generator).float()  # many ties
    allowed = torch.rand(4, n, generator=generator) > 0.4
    forced = torch.rand(4, n, generator=generator) > 0.8
    plain, some = condense.best(scores, count), condense.best(scores, count, allowed=allowed)
    chosen = condense.choose_blocks(scores, count, allowed=allowed, forced=forced)
    for row in range(4):
        order = sorted(range(n), key=lambda j: (-float(scores[row, j]), j))
        must = [j for j in range(n) if forced[row, j]]
        rest = [j for j in order if allowed[row, j] and j not in must]
        for found, wanted in ((plain[row], order), (some[row], [j for j in order if allowed[row, j]]),
                              (chosen[row], must + rest)):  # fmt: skip
            wanted = wanted[:count]
            assert found.tolist() == wanted + [-1] * (min(count, n) - len(wanted))


def test_a_nan_is_chosen_last_and_infinities_in_order():
    scores = torch.tensor([float("nan"), 0.0, -float("inf"), float("inf")])
    assert condense.best(scores, 3).tolist() == [3, 1, 0]
    assert condense.best(scores, 4, allowed=torch.tensor([True, False, True, False])).tolist() == [0, 2, -1, -1]


def test_choices_are_equal_in_half_precision_and_pass_no_gradient():
    scores = torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    blocks = condense.choose_blocks(scores, 2)
    assert blocks.tolist() == [[1, 2]] and not blocks.requires_grad
    assert Selected(blocks, 2, query_size=4).mask(4, 6).int().tolist() == [[0, 0, 1, 1, 1, 1]] * 4


def test_heads_share():
    scores = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(condense.share_heads(scores, 3)[:, 1], scores[:, 2] + scores[:, 3])
    torch.testing.assert_close(condense.share_heads(scores, 3, "mean")[:, 1], scores[:, 2:4].mean(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: condense.pool_blocks(torch.zeros(4, 2), 0), "size must be an integer of at least 1; it was 0"),
        (lambda: condense.pool_blocks(torch.zeros(4, 2), 2, how="sum"), "how must be 'mean' or 'max'"),
        (lambda: condense.pool_blocks(torch.zeros(4, 2), 2, weights=torch.ones(3)), r"weights must be \(2,\)"),
        (lambda: condense.pool_blocks(torch.zeros(4, 2), 2, real=torch.ones(3, dtype=torch.bool)), "real must be"),
        (lambda: condense.best(torch.zeros(3), -1), "count must be an integer of at least 0"),
        (lambda: condense.share_heads(torch.zeros(1, 4, 2), 3), "num_kv_heads must divide the 4 heads"),
        (lambda: condense.share_heads(torch.zeros(1, 4, 2), 2, "max"), "how must be 'sum' or 'mean'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 9))
def test_ties_may_go_to_the_last(seed, n, count):
    generator = torch.Generator().manual_seed(seed)
    scores, allowed = torch.randint(3, (n,), generator=generator).float(), torch.rand(n, generator=generator) > 0.4
    order = [j for j in sorted(range(n), key=lambda j: (-float(scores[j]), -j)) if allowed[j]][:count]
    found = condense.best(scores, count, allowed=allowed, ties="last")
    assert found.tolist() == order + [-1] * (min(count, n) - len(order))
