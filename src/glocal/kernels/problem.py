"""What every kernel is asked: one attention, already checked, grids flattened."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from glocal.patterns import Pattern
from glocal.patterns.boxes import Grid


class Problem(NamedTuple):
    """Tensors with flattened grids: ``q (B, H, Nq, D)``, ``k (B, Hkv, Nk, D)``, ``v (B, Hkv, Nk, Dv)``.

    ``bias`` broadcasts to ``(B, H, Nq, Nk)``; ``table (H or 1, prod(Lq + Lk - 1))`` is a bias over offsets. A
    ``softcap`` of 0 means none. ``seed`` is there when ``dropout_p`` is not 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    where: Pattern
    grid_q: Grid
    grid_k: Grid
    bias: Tensor | None = None
    table: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    return_lse: bool = False

    @property
    def needs_grad(self) -> bool:
        """Whether any input will be asked for a gradient."""
        inputs = (self.q, self.k, self.v, self.bias, self.table)
        return any(t is not None and t.requires_grad for t in inputs)
