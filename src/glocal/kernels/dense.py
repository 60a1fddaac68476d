"""The definition: every score, the mask, a softmax. Any pattern, any float type, size N x N."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.kernels.common import accumulator, cap, keep, offset_index, softmax, weighted
from glocal.kernels.problem import Problem


def why_not(problem: Problem) -> str | None:
    """Nothing is beyond the definition."""
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention by definition; autograd does the gradients."""
    q, k, v, where = problem[:4]
    dtype, heads = accumulator(q.dtype), q.shape[1]
    groups = heads // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(groups, 1) for t in (k, v))
    scores = cap((q.to(dtype) * problem.scale) @ k.transpose(-1, -2), problem.softcap)
    if problem.bias is not None:
        scores = scores + problem.bias
    if problem.table is not None:
        rows, columns = (torch.arange(t.shape[2], device=q.device) for t in (q, k))
        scores = scores + problem.table[:, offset_index(rows, columns, problem.grid_q, problem.grid_k)]
    live = where.mask(problem.grid_q, problem.grid_k).to(q.device)
    weights, lse = softmax(scores.masked_fill(~live, -torch.inf))
    if problem.dropout_p:
        assert problem.seed is not None
        pair = torch.arange(weights.numel(), device=q.device).view(weights.shape)
        kept = keep(problem.seed.to(q.device), pair, problem.dropout_p)
        weights = torch.where(kept, weights / (1 - problem.dropout_p), 0)
    return weighted(weights, live, v).to(q.dtype), lse
