"""The definition of truth: attention in float64 from ``pattern.mask()``, in a few lines."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q, k, v, mask, *, bias=None, scale=None, softcap=None) -> tuple[Tensor, Tensor]:
    """``q (B, H, Nq, D)``, ``k``, ``v`` with flattened grids, ``mask (*lead, Nq, Nk)``; returns ``out`` and ``lse``."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    rows = mask.any(-1, keepdim=True)
    # A row that sees nothing is given everything and then erased, so that no gradient is NaN.
    scores = scores.masked_fill(~(mask | ~rows), -torch.inf)
    out = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
    lse = scores.logsumexp(-1)
    return torch.where(rows, out, 0), torch.where(rows.squeeze(-1), lse, -torch.inf)
