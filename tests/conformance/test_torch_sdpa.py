"""torch's scaled_dot_product_attention, with masks that a plain loop writes out (``cases.visible``)."""

import pytest
import torch
import torch.nn.functional as F

from glocal import Causal
from tests.conformance.cases import BACKENDS, CASES, check, flat, inputs, visible


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_is_what_the_papers_say(case):
    assert torch.equal(case.pattern.mask(case.grid_q, case.grid), visible(case))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attend_equals_masked_sdpa(case, backend):
    if backend == "flex" and CASES.index(case) % 4:
        pytest.skip("one case of four on the slow backend")
    mask = visible(case)
    dtype = torch.float32 if backend in ("native", "flex") else torch.float64
    tensors = inputs(case.grid_q, case.grid, batch=2, heads=4, kv_heads=2, dtype=dtype)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    check(backend, tensors, case.pattern, flat(sdpa))


def test_known_difference_is_causal_is_aligned_at_the_top_left():
    """torch's ``is_causal`` puts the first query at the first key; ours puts the last at the last."""
    q, k, v = inputs((3,), (5,))
    ones = torch.ones(3, 5, dtype=torch.bool)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(theirs, F.scaled_dot_product_attention(q, k, v, attn_mask=ones.tril()))
    check("sdpa", (q, k, v), Causal(), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ones.tril(2)))
