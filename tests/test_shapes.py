"""The shapes in the public signatures, checked at run time by jaxtyping and beartype."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

import glocal
from glocal import Full, Prefix, Sliding, Window

attend = jaxtyped(typechecker=beartype)(glocal.attend)
merge = jaxtyped(typechecker=beartype)(glocal.merge)


@pytest.mark.parametrize("grid_q, grid_k", [((7,), (7,)), ((3,), (8,)), ((4, 5), (4, 5)), ((2, 3, 4), (2, 3, 4))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_returns_what_its_signature_says(grid_q, grid_k, dtype):
    q = torch.randn(2, 4, *grid_q, 8, dtype=dtype)
    k, v = torch.randn(2, 2, *grid_k, 8, dtype=dtype), torch.randn(2, 2, *grid_k, 5, dtype=dtype)
    out, lse = attend(q, k, v, Sliding(1, 1), return_lse=True)
    assert out.shape == (2, 4, *grid_q, 5) and lse.shape == (2, 4, *grid_q)
    assert merge([(out, lse), (out, lse)]).shape == out.shape


def test_the_check_would_notice():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 4)
    with pytest.raises(TypeCheckError):
        attend(q, k, k, Full())
    with pytest.raises(TypeCheckError):
        merge([(q, torch.zeros(1, 2, 4))])


def test_grids_keep_their_axes():
    q = torch.randn(1, 2, 6, 7, 8)
    assert attend(q, q, q, Window((3, 3)) | Prefix(2)).shape == q.shape
