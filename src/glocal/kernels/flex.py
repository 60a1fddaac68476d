"""PyTorch FlexAttention: the pattern becomes its ``mask_mod``, biases its ``score_mod``.

On a GPU the kernel is compiled here; on a CPU it runs as it is called (compile the calling function to compile it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from glocal.kernels.problem import Problem
from glocal.patterns import NoBoxForm
from glocal.patterns.boxes import Box, BoxForm, coordinates

try:
    from torch.nn.attention.flex_attention import AuxRequest

    _LSE: dict[str, Any] = {"return_aux": AuxRequest(lse=True)}
except ImportError:  # torch before 2.9
    _LSE = {"return_lse": True}

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def why_not(problem: Problem) -> str | None:
    """The reason why this kernel cannot run a problem, or None."""
    q, v = problem.q, problem.v
    if problem.dropout_p:
        return "FlexAttention has no dropout"
    if 0 in q.shape or 0 in problem.k.shape or 0 in v.shape:
        return "FlexAttention takes no empty tensors"
    if problem.needs_grad and torch.is_grad_enabled() and q.device.type == "cpu":
        return "FlexAttention has no backward on a CPU"
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention through ``flex_attention``, compiled on a GPU."""
    q, k, v, device = problem.q, problem.k, problem.v, problem.q.device
    if not torch.is_grad_enabled():
        # On a CPU it refuses tensors that need gradients even where none will be asked for.
        q, k, v = q.detach(), k.detach(), v.detach()
    mask = _block_mask(problem, device)
    call: Any = _compiled() if device.type != "cpu" else flex_attention
    out, lse = call(
        q,
        k,
        v,
        score_mod=_score_mod(problem),
        block_mask=mask,
        scale=problem.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        **_LSE,
    )
    lse = getattr(lse, "lse", lse)
    return out, lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _block_mask(problem: Problem, device: torch.device) -> BlockMask:
    batch, heads, queries, keys = *problem.q.shape[:3], problem.k.shape[2]
    try:
        form = problem.where.boxes(problem.grid_q, problem.grid_k)
        mod, lead = _boxes_mod(form, device), form.lead
    except NoBoxForm:
        live = problem.where.mask(problem.grid_q, problem.grid_k).to(device)
        lead = tuple(live.shape[:-2])
        mod = _mask_mod(live)
    lead = (1,) * (2 - len(lead)) + lead
    sizes = (batch if lead[0] > 1 else None, heads if lead[1] > 1 else None)
    return create_block_mask(mod, *sizes, queries, keys, device=str(device))


def _lead(table: Tensor, trailing: int) -> Tensor:
    """Give a table both leading dimensions."""
    return table.reshape(*[1] * (trailing + 2 - table.dim()), *table.shape)


def _at(table: Tensor, b: Tensor, h: Tensor, *index: Tensor) -> Tensor:
    """An entry of ``(B or 1, H or 1, ...)``."""
    return table[b if table.shape[0] > 1 else b * 0, h if table.shape[1] > 1 else h * 0, *index]


def _mask_mod(live: Tensor) -> Mod:
    table = _lead(live, 2)
    return lambda b, h, q, k: _at(table, b, h, q, k)


def _boxes_mod(form: BoxForm, device: torch.device) -> Mod:
    tests = [_box_mod(box.to(device), form) for box in form]

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        live = q < 0
        for test in tests:
            live = live | test(b, h, q, k)
        return live

    return mod


def _box_mod(box: Box, form: BoxForm) -> Mod:
    axes = [(_lead(a.lo, 1), _lead(a.hi, 1), a.step) for a in box.axes]
    rows = None if box.rows is None else _lead(box.rows, 1)
    keys = None if box.keys is None else _lead(box.keys, 1)
    blocks = box.blocks
    listed = None if blocks is None else _lead(blocks.index, 2)

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        live = q >= 0
        i, j = coordinates(q, form.grid_q), coordinates(k, form.grid_k)
        for axis, (lo, hi, step) in enumerate(axes):
            first = _at(lo, b, h, i[axis])
            live = live & (j[axis] >= first) & (j[axis] < _at(hi, b, h, i[axis]))
            if step > 1:
                live = live & ((j[axis] - first) % step == 0)
        if rows is not None:
            live = live & _at(rows, b, h, q)
        if keys is not None:
            live = live & _at(keys, b, h, k)
        if blocks is not None and listed is not None:
            row, column = blocks.block_of(q, keys=False), blocks.block_of(k, keys=True)
            found = q < 0
            for slot in range(listed.shape[-1]):
                found = found | (_at(listed[..., slot], b, h, row) == column)
            live = live & found
        return live

    return mod


def _score_mod(problem: Problem) -> Callable[..., Tensor] | None:
    if problem.bias is None and problem.table is None and not problem.softcap:
        return None
    bias, table, softcap = problem.bias, problem.table, problem.softcap
    if bias is not None:
        bias = bias.expand(*bias.shape[:2], math.prod(problem.grid_q), math.prod(problem.grid_k))

    def mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + _at(bias, b, h, q, k)
        if table is not None:
            index = q * 0
            axes = zip(coordinates(q, problem.grid_q), coordinates(k, problem.grid_k), strict=True)
            for (i, j), lq, lk in zip(axes, problem.grid_q, problem.grid_k, strict=True):
                index = index * (lq + lk - 1) + j - i + lq - 1
            score = score + table[h if table.shape[0] > 1 else h * 0, index]
        return score

    return mod
