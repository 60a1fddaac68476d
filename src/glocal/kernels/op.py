"""One custom operator for every kernel that brings its own backward.

A pattern crosses the operator as text and tensors, so ``torch.compile`` and ``torch.export`` see a single opaque
node, and the tables are made inside it, once for each pattern and pair of grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from glocal.kernels.common import accumulator
from glocal.kernels.problem import Problem
from glocal.patterns import BoxForm, NoBoxForm, Where, parse


class Settings(NamedTuple):
    """What a kernel needs besides q, k, v and the boxes."""

    bias: Tensor | None
    table: Tensor | None
    scale: float
    softcap: float
    dropout_p: float
    seed: Tensor | None


class Forward(Protocol):
    """``out (B, H, Nq, Dv)`` and ``lse (B, H, Nq)``."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, form: BoxForm, settings: Settings) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    """Gradients of q, k, v, bias, table; None for a bias or table that is not there or not in ``needs``."""

    def __call__(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        form: BoxForm,
        settings: Settings,
        out: Tensor,
        lse: Tensor,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...


@lru_cache(maxsize=256)
def _static_form(where: str, grid_q: tuple[int, ...], grid_k: tuple[int, ...]) -> BoxForm:
    return parse(where).boxes(grid_q, grid_k)


def box_form(where: str, data: Sequence[Tensor], grid_q: Sequence[int], grid_k: Sequence[int]) -> BoxForm:
    """The boxes of a pattern that arrived as text and tensors."""
    if data:
        return parse(where, data).boxes(grid_q, grid_k)
    return _static_form(where, tuple(grid_q), tuple(grid_k))


def no_boxes(problem: Problem) -> str | None:
    """Why a pattern cannot be run by boxes, or None. While tracing only its parts are looked at, not its data."""
    for part in problem.where.walk():
        if isinstance(part, Where):
            return "Where is a predicate, with no box form"
    if not torch.compiler.is_compiling():
        try:
            problem.where.boxes(problem.grid_q, problem.grid_k)
        except NoBoxForm as error:
            return str(error)
    return None


def register(name: str, forward: Forward, backward: Backward) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """Make ``torch.ops.glocal.<name>`` of two functions, and return what runs a `Problem` through it."""

    @torch.library.custom_op(f"glocal::{name}", mutates_args=())
    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        table: Tensor | None,
        seed: Tensor | None,
        data: Sequence[Tensor],
        where: str,
        grid_q: Sequence[int],
        grid_k: Sequence[int],
        scale: float,
        softcap: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        settings = Settings(bias, table, scale, softcap, dropout_p, seed)
        return forward(q, k, v, box_form(where, data, grid_q, grid_k), settings)

    @op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        return out, q.new_empty(q.shape[:-1], dtype=accumulator(q.dtype))

    @torch.library.custom_op(f"glocal::{name}_backward", mutates_args=())
    def op_backward(
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        table: Tensor | None,
        seed: Tensor | None,
        data: Sequence[Tensor],
        out: Tensor,
        lse: Tensor,
        where: str,
        grid_q: Sequence[int],
        grid_k: Sequence[int],
        scale: float,
        softcap: float,
        dropout_p: float,
        needs_bias: bool,
        needs_table: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        settings = Settings(bias, table, scale, softcap, dropout_p, seed)
        form, needs = box_form(where, data, grid_q, grid_k), (needs_bias, needs_table)
        grads = backward(grad_out, grad_lse, q, k, v, form, settings, out, lse, needs)
        return tuple(q.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]

    @op_backward.register_fake
    def _(grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        bias, table, (needs_bias, needs_table) = rest[0], rest[1], rest[-2:]
        likes = (q, k, v, bias if needs_bias else None, table if needs_table else None)
        return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in likes)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, bias, table, seed, data, *ctx.settings = inputs
        ctx.needs = (bias is not None and bias.requires_grad, table is not None and table.requires_grad)
        ctx.save_for_backward(q, k, v, bias, table, seed, *output, *data)

    def grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, table, seed, out, lse, *data = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        dq, dk, dv, dbias, dtable = op_backward(
            grad_out, grad_lse, q, k, v, bias, table, seed, list(data), out, lse, *ctx.settings, *ctx.needs
        )
        needs_bias, needs_table = ctx.needs
        extra = (dbias if needs_bias else None, dtable if needs_table else None)
        return (dq, dk, dv, *extra, None, [None] * len(data), *[None] * 6)

    op.register_autograd(grad, setup_context=setup_context)

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        data: list[Tensor] = []
        where = problem.where.spec(data)
        out: tuple[Tensor, Tensor] = op(
            problem.q,
            problem.k,
            problem.v,
            problem.bias,
            problem.table,
            problem.seed,
            data,
            where,
            problem.grid_q,
            problem.grid_k,
            problem.scale,
            problem.softcap,
            problem.dropout_p,
        )
        return out

    return run
