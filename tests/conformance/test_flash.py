"""flash-attention's windows, by the rule that its documentation states; the library itself needs a GPU.

With ``window_size=(left, right)`` query ``i`` attends to keys from ``i + seqlen_k - seqlen_q - left`` to
``i + seqlen_k - seqlen_q + right``, both included; -1 is no limit; ``causal`` is a right reach of 0. A query that sees
no key gets zeros.
"""

import pytest
import torch

from glocal.patterns import from_flash
from tests.conformance.cases import BACKENDS, Case, check, having, inputs, run


def documented(seqlen_q: int, seqlen_k: int, left: int, right: int) -> list[list[int]]:
    """The keys of every query, written as ranges."""
    rows = []
    for i in range(seqlen_q):
        middle = i + seqlen_k - seqlen_q
        first = 0 if left == -1 else max(0, middle - left)
        last = seqlen_k - 1 if right == -1 else min(seqlen_k - 1, middle + right)
        rows.append(list(range(first, last + 1)))
    return rows


@pytest.mark.parametrize("case", having("reach"), ids=str)
def test_reaches(case: Case):
    mask = from_flash(case.reach).mask(case.grid_q, case.grid)
    rows = documented(*case.grid_q, *case.grid, *case.reach)
    assert [row.nonzero().flatten().tolist() for row in mask] == rows
    assert torch.equal(mask, case.pattern.mask(case.grid_q, case.grid))


@pytest.mark.parametrize("window", [(-1, -1), (3, 3), (3, -1), (-1, 2), (0, 0)])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (2, 7), (7, 3)])
def test_causal_is_a_right_reach_of_zero(window, queries, keys):
    mask = from_flash(window, causal=True).mask(queries, keys)
    assert [row.nonzero().flatten().tolist() for row in mask] == documented(queries, keys, window[0], 0)


def row_by_row(reach):
    """Attention of each query over its documented keys alone."""

    def attention(q, k, v):
        out = []
        for i, keys in enumerate(documented(q.shape[2], k.shape[2], *reach)):
            weights = (q[:, :, i, None] * k[:, :, keys]).sum(-1).mul(q.shape[-1] ** -0.5).softmax(-1)
            out.append((weights[..., None] * v[:, :, keys]).sum(2))
        return torch.stack(out, 2)

    return attention


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("reach", "queries", "keys"), [((2, 0), 5, 9), ((-1, 0), 7, 4), ((3, 1), 8, 5), ((2, -1), 4, 6)]
)
def test_outputs(backend, reach, queries, keys):
    check(backend, inputs((queries,), (keys,)), from_flash(reach), row_by_row(reach))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys_leave_rows_of_zeros(backend):
    q, k, v = inputs((5,), (3,))
    out, lse = run(backend, q, k, v, from_flash(causal=True), return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 2:]).all()
