"""The native CPU kernel as a backend: forward and backward in C++, driven by the box form (see ``native/``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glocal.kernels import native, op
from glocal.kernels.problem import Problem
from glocal.patterns import BoxForm


def _available() -> str | None:
    return native.available()


# The compiler cannot look into the extension, and its answer does not change.
missing: Callable[[], str | None] = torch.compiler.assume_constant_result(_available)
"""Why the extension cannot be used, or None, also where a graph is traced."""


def why_not(problem: Problem) -> str | None:
    """The reason why this kernel cannot run a problem, or None."""
    if problem.q.device.type != "cpu":
        return f"it runs on a CPU, the tensors are on {problem.q.device.type}"
    if (reason := missing()) is not None:
        return reason
    if problem.dropout_p:
        return "it has no dropout"
    if problem.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {problem.q.dtype}"
    return op.no_boxes(problem)


def _forward(q: Tensor, k: Tensor, v: Tensor, form: BoxForm, settings: op.Settings) -> tuple[Tensor, Tensor]:
    return native.forward(q, k, v, form, settings.bias, settings.table, settings.scale, settings.softcap)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: BoxForm,
    settings: op.Settings,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return native.backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        form,
        settings.bias,
        settings.table,
        settings.scale,
        settings.softcap,
        out,
        lse,
        (True, True, True, *needs),
    )


_op = op.register("native", _forward, _backward)


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention by the native kernel."""
    return _op(problem)
