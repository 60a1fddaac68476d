"""The arithmetic that kernels share: accumulation type, a softmax that survives empty rows, dropout, merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glocal.patterns.boxes import Grid, coordinates


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cap(scores: Tensor, softcap: float) -> Tensor:
    """Squash scores into ``(-softcap, softcap)``; 0 leaves them alone (Gemma 2, arXiv 2408.00118)."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp ``(..., Q)`` of masked ``scores (..., Q, K)``; a row of -inf gives zeros, -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    some = total != 0
    total = torch.where(some, total, 1)
    lse = torch.where(some, top + torch.log(total), -torch.inf)
    return weights / total, lse.squeeze(-1)


def weighted(weights: Tensor, live: Tensor, values: Tensor) -> Tensor:
    """``weights @ values``, where a value that is not finite reaches only the rows that see it (as NaN)."""
    out = weights @ values
    # Zero times NaN is NaN: one bad value spoils every row, so a clean result means that there was none.
    if torch.isfinite(out).all():
        return out
    good = torch.isfinite(values)
    read = live.to(values.dtype).expand(weights.shape) @ (~good).to(values.dtype)
    return torch.where(read > 0, torch.nan, weights @ torch.where(good, values, 0))


def offset_index(q: Tensor, k: Tensor, grid_q: Grid, grid_k: Grid) -> Tensor:
    """Where the pairs of flattened positions ``q (..., Q)``, ``k (..., K)`` find their bias in a table over offsets."""
    index = torch.zeros((1, 1), dtype=torch.long, device=q.device)
    axes = zip(coordinates(q, grid_q), coordinates(k, grid_k), grid_q, grid_k, strict=True)
    for i, j, queries, keys in axes:
        index = index * (queries + keys - 1) + j.unsqueeze(-2) - i.unsqueeze(-1) + queries - 1
    return index


def keep(seed: Tensor, pair: Tensor, dropout_p: float) -> Tensor:
    """Which pairs dropout keeps: a hash of the seed and the pair's number, so no mask is stored for the backward.

    The finalizer of MurmurHash3, on integers that wrap around.
    """
    x = pair * -7046029254386353131 + seed
    for shift, factor in ((33, -49064778989728563), (33, -4265267296055464877)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 33) & ((1 << 31) - 1)) >= int(dropout_p * (1 << 31))


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join ``(out (..., Q, Dv), lse (..., Q))`` over disjoint keys into the softmax over all of them."""
    top = parts[0][1].detach()
    for _, lse in parts[1:]:
        top = torch.maximum(top, lse.detach())
    top = torch.where(top == -torch.inf, 0, top)
    weights = [torch.exp(lse - top) for _, lse in parts]
    total = torch.stack(weights).sum(0)
    some = total != 0
    total = torch.where(some, total, 1)
    dtype = parts[0][0].dtype
    outs = [out.to(w.dtype) * (w / total).unsqueeze(-1) for (out, _), w in zip(parts, weights, strict=True)]
    return torch.stack(outs).sum(0).to(dtype), torch.where(some, top + torch.log(total), -torch.inf)
