"""S117: unfused neighborhood operators: two paths, the fused form, natten, loops, and their gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

from glocal import Window, attend
from glocal.kernels.neighborhood import (
    PATHS,
    inverse_neighborhood,
    neighborhood_attention,
    neighborhood_av,
    neighborhood_qk,
)
from glocal.scores import RelativePosition

CASES = [
    # Ragged against tiles of 64, 8 x 8 and 4 x 4 x 4.
    (Window(5), (131,)),
    (Window(6, dilation=3, stride=2), (70,)),
    (Window(7, causal=True), (67,)),
    (Window(4, dilation=2, stride=3, causal=True), (29,)),
    (Window((3, 4)), (4, 5)),
    (Window((7, 5)), (19, 11)),
    (Window((3, 4), dilation=(3, 1), stride=(1, 4)), (13, 9)),
    (Window((3, 4, 2), causal=(True, False, False)), (6, 7, 5)),
    (Window((2, 2, 3), dilation=(2, 1, 1), causal=(False, True, True)), (5, 4, 3)),
    (Window((1, 3)), (3, 4)),
]


def inputs(grid, seed=0, dim=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, *grid, dim, dtype=torch.float64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("where", "grid"), CASES, ids=str)
def test_the_three_paths_agree_with_gradients_and_lse(where, grid):
    sizes = where.size if isinstance(where.size, tuple) else (where.size,) * len(grid)
    rpb = torch.randn(3, *(2 * s - 1 for s in sizes), dtype=torch.float64)
    weights = torch.randn(2, 3, *grid, 7, dtype=torch.float64)
    found = []
    for path in (*PATHS, "fused"):
        q, k, v = (t.requires_grad_() for t in inputs(grid))
        rpb = rpb.detach().requires_grad_()
        if path == "fused":
            out, lse = attend(q, k, v, where, bias=RelativePosition(rpb, where.dilation), return_lse=True)
        else:
            out, lse = neighborhood_attention(q, k, v, where, rpb=rpb, path=path)
        loss = (torch.cat([out, lse.unsqueeze(-1)], -1) * weights).sum()
        found.append((out, lse, *torch.autograd.grad(loss, [q, k, v, rpb])))
    for other in found[:2]:
        for mine, theirs in zip(other, found[2], strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("where", "grid"), CASES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_scores_and_values_equal_masked_products(path, where, grid):
    """Row-major order of the window is increasing order of the key, so the mask's entries are the table's, in order."""
    q, k, v = inputs(grid)
    mask = where.mask(grid).expand(1, 1, -1, -1)[0, 0]
    a = neighborhood_qk(q, k, where, path=path)
    full = q.flatten(2, -2) @ k.flatten(2, -2).mT
    got, live = a.flatten(2, -2), a.flatten(2, -2)[0, 0].isfinite()
    assert torch.equal(live.sum(-1), mask.sum(-1))
    torch.testing.assert_close(got[:, :, live], full[:, :, mask])
    # Weights at places without a key do not count, whatever they are.
    weights = torch.rand(a.shape, dtype=a.dtype)
    spread = torch.zeros_like(full)
    spread[:, :, mask] = weights.flatten(2, -2)[:, :, live]
    want = (spread @ v.flatten(2, -2)).view_as(v)
    torch.testing.assert_close(neighborhood_av(weights, v, where, path=path), want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", [Window(3), Window((3, 2), stride=(2, 1), causal=(False, True))], ids=repr)
def test_gradcheck(path, where):
    q, k, v = (t[:1, :1, ..., :2].contiguous().requires_grad_() for t in inputs((4, 5)))
    assert torch.autograd.gradcheck(lambda *t: neighborhood_attention(*t, where, path=path), (q, k, v))
    scores = lambda q, k: neighborhood_qk(q, k, where, path=path).nan_to_num(neginf=0)  # noqa: E731
    assert torch.autograd.gradgradcheck(scores, (q, k), fast_mode=True)
    a = torch.rand(1, 1, 4, 5, scores(q, k).shape[-1], dtype=torch.float64, requires_grad=True)
    values = lambda a, v: neighborhood_av(a, v, where, path=path)  # noqa: E731
    assert torch.autograd.gradcheck(values, (a, v)) and torch.autograd.gradgradcheck(values, (a, v), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_the_inverse_is_the_papers_interval(causal):
    """The closed interval of the definition without stride and gaps, for every size and length below 40."""
    for n in range(1, 40):
        for k in range(1, n + 1):
            (found,) = inverse_neighborhood(Window(k, causal=causal), (n,))
            right = k - 1 - k // 2
            for j in range(n):
                first = j if causal else 0 if j < k else j - right
                last = min(j + k - 1, n - 1) if causal else n - 1 if j >= n - k else j + k // 2
                assert (int(found.lo[j]), int(found.hi[j]) - 1) == (first, last)


@pytest.mark.parametrize("causal", [False, True])
def test_the_inverse_by_brute_force(causal):
    for n in (1, 2, 5, 8, 13, 24):
        for size in range(1, min(n, 8) + 1):
            for dilation in range(1, n // size + 1):
                for stride in range(1, size + 1):
                    where = Window(size, dilation, stride, causal)
                    mask = where.mask(n).expand(1, 1, -1, -1)[0, 0]
                    (found,) = inverse_neighborhood(where, (n,))
                    queries = torch.arange(n)[:, None]
                    seen_by = (queries >= found.lo) & (queries < found.hi) & ((queries - found.lo) % dilation == 0)
                    assert torch.equal(seen_by, mask)
                    assert int(found.counts().sum()) == int(mask.sum())


def test_the_inverse_on_more_axes_is_their_product():
    where, grid = Window((3, 4), dilation=(2, 1), causal=(True, False)), (7, 6)
    a, b = inverse_neighborhood(where, grid)
    assert int(a.counts().sum() * b.counts().sum()) == where.count(grid)


@pytest.mark.parametrize("path", PATHS)
def test_equals_natten(path):
    natten = pytest.importorskip("natten")
    q, k, v = (t.float() for t in inputs((6, 7, 5), dim=8))
    window = dict(kernel_size=(3, 4, 2), is_causal=(True, False, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The conversion of layouts, as documented.
        out = natten.na3d(*(t.movedim(1, -2) for t in (q, k, v)), backend="flex-fna", **window).movedim(-2, 1)
    mine, _ = neighborhood_attention(q, k, v, Window((3, 4, 2), causal=(True, False, False)), path=path)
    torch.testing.assert_close(mine, out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_causal_line(path):
    q, k, v = inputs((17,))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        neighborhood_attention(q, k, v, Window(17, causal=True), path=path)[0], sdpa(q, k, v, is_causal=True)
    )
    # transformers' sliding window of 5.
    from transformers.masking_utils import sliding_window_causal_mask_function

    rows, columns = torch.arange(17)[:, None], torch.arange(17)
    mask = sliding_window_causal_mask_function(5)(0, 0, rows, columns)
    torch.testing.assert_close(
        neighborhood_attention(q, k, v, Window(5, causal=True), path=path)[0], sdpa(q, k, v, attn_mask=mask)
    )


@pytest.mark.parametrize("path", PATHS)
def test_one_key_is_a_projection_of_values(path):
    q, k, v = inputs((3, 4))
    torch.testing.assert_close(neighborhood_attention(q, k, v, Window(1), path=path)[0], v)


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_keeps_sums_in_float32(path):
    q, k, v = inputs((9, 10))
    want, _ = neighborhood_attention(q, k, v, Window(5))
    out, lse = neighborhood_attention(*(t.bfloat16() for t in (q, k, v)), Window(5), path=path)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=0.05, rtol=0.05)


def test_errors_name_the_argument():
    q, k, v = inputs((6, 7))
    with pytest.raises(ValueError, match="path must be one of naive, windowed; it was 'fused'"):
        neighborhood_qk(q, k, Window(3), path="fused")
    with pytest.raises(ValueError, match="q and k must be"):
        neighborhood_qk(q, k[:, :, :5], Window(3))
    with pytest.raises(ValueError, match="a must have 9 weights"):
        neighborhood_av(torch.rand(2, 3, 6, 7, 8, dtype=torch.float64), v, Window(3))
    with pytest.raises(ValueError, match=r"rpb must be \(3, 5, 5\)"):
        neighborhood_qk(q, k, Window(3), rpb=torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="size of Window is 7"):
        neighborhood_qk(q, k, Window(7))
    with pytest.raises(TypeError, match="where must be a Window"):
        neighborhood_qk(q, k, "window(3)")
