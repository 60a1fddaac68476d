"""The C++ kernel for CPUs: forward and backward over the box form, without a compiler at run time.

``available()`` says in a line why it cannot be used, or None. ``GLOCAL_ISA`` (baseline, avx2, avx512, neon) forces an
instruction set; without it the best one that the machine has is taken.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glocal.patterns.boxes import Box, BoxForm

_missing: str | None = None
try:
    _native: Any = importlib.import_module("glocal.kernels.native._native")
except ImportError as error:
    _missing = f"the native extension is not part of this build ({error})"

__all__ = ["FEATURES", "available", "backward", "exp2", "forward", "isa", "isas", "linear", "select", "supports"]

FEATURES = {"identity": 0, "relu": 1, "elu": 2}
"""Feature maps that `linear` computes, as it numbers them."""

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_forms: weakref.WeakKeyDictionary[BoxForm, Any] = weakref.WeakKeyDictionary()


def available() -> str | None:
    """Why the extension cannot be used, or None where it can.

    >>> available() is None or isinstance(available(), str)
    True
    """
    if _missing is not None:
        return _missing
    try:
        _native.isa()
    except RuntimeError as error:
        return str(error)
    return None


def isas() -> list[str]:
    """Instruction sets that this build and this machine have in common, best last."""
    return list(_native.isas()) if _missing is None else []


def isa() -> str:
    """The instruction set in use. Raises RuntimeError where ``GLOCAL_ISA`` names one that the machine lacks."""
    return str(_native.isa())


def select(name: str) -> None:
    """Use another instruction set, for tests. Raises RuntimeError where the machine lacks it."""
    _native.select(name)


def supports(form: BoxForm, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot run this, or None where it can."""
    if (missing := available()) is not None:
        return missing
    if dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16; it was {dtype}"
    if len(form.grid_q) > _native.MAX_RANK:
        return f"it takes grids of up to {_native.MAX_RANK} axes; it was {len(form.grid_q)}"
    if head_dim < 1 or value_dim < 1:
        return f"it needs head dims of at least 1; it was {head_dim} and {value_dim}"
    return None


def exp2(x: Tensor) -> Tensor:
    """The kernel's own ``2 ** x`` of a contiguous float32 tensor, for tests."""
    y = torch.empty_like(x)
    _native.exp2(x.numpy(), y.numpy())
    return y


def _table(tensor: Tensor, trailing: int, dtype: type) -> np.ndarray[Any, Any]:
    """A table with its lead widened to (B or 1, H or 1)."""
    shape = tuple(tensor.shape)
    lead = (1, 1, *shape[: len(shape) - trailing])[-2:]
    return np.ascontiguousarray(tensor.reshape(*lead, *shape[len(shape) - trailing :]).cpu().numpy(), dtype=dtype)


def _add(compiled: Any, box: Box) -> None:
    lo = [_table(a.lo, 1, np.int32) for a in box.axes]
    hi = [_table(a.hi, 1, np.int32) for a in box.axes]
    rows = None if box.rows is None else _table(box.rows, 1, np.uint8)
    keys = None if box.keys is None else _table(box.keys, 1, np.uint8)
    compiled.add_box(lo, hi, [a.step for a in box.axes], rows, keys)
    if box.blocks is not None:
        index = _table(box.blocks.index, 2, np.int32)
        compiled.set_blocks(index, list(box.blocks.query_size), list(box.blocks.key_size))


def compile_form(form: BoxForm) -> Any:
    """The tables of a box form on the C++ side, made once for each form."""
    compiled = _forms.get(form)
    if compiled is None:
        compiled = _native.Form(list(form.grid_q), list(form.grid_k))
        for box in form.boxes:
            _add(compiled, box)
        _forms[form] = compiled
    return compiled


def _rows(t: Tensor) -> Tensor:
    """A tensor whose last axis has unit stride: itself nearly always."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _fresh(t: Tensor) -> Tensor:
    """A result that nothing has been written to yet, on large pages where the machine gives them."""
    _native.large_pages(t.data_ptr(), t.numel() * t.element_size())
    return t


def _array(t: Tensor) -> list[int]:
    return [t.data_ptr(), *t.stride()[:3]]


def _strides(t: Tensor) -> list[int]:
    return [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]


def _added(bias: Tensor | None, table: Tensor | None) -> tuple[list[int], list[int]]:
    b = [0] * 5 if bias is None else [bias.data_ptr(), *_strides(bias)]
    t = [0, 0] if table is None else [table.data_ptr(), _strides(table)[0]]
    return b, t


def _float(bias: Tensor | None, table: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if bias is None else bias.float(), None if table is None else table.float().contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
    return [torch.get_num_threads(), _DTYPES[q.dtype], q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3]]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: BoxForm,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs of ``form``: ``softmax(softcap * tanh(scale * q k / softcap) + bias + table) v``.

    Args:
        q: ``(B, H, Nq, D)``, grids flattened; float32, float16 or bfloat16, any strides.
        k: ``(B, Hkv, Nk, D)``; query head ``h`` reads key head ``h // (H // Hkv)``.
        v: ``(B, Hkv, Nk, Dv)``.
        form: what each query sees.
        bias: broadcasts to ``(B, H, Nq, Nk)``, with every axis present.
        table: ``(H or 1, prod(Lq + Lk - 1))``, a bias by offset, row by row over ``j - i + Lq - 1``.
        scale: factor of the products.
        softcap: 0 for none.

    Returns:
        ``out (B, H, Nq, Dv)`` in the type of ``q``, and ``lse (B, H, Nq)`` in float32. A query with no key gets 0
        and ``-inf``.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias, table = _float(bias, table)
    out = _fresh(q.new_empty((*q.shape[:3], v.shape[3])))
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    if out.shape[0] and out.shape[1] and out.shape[2]:
        added = _added(bias, table)
        arrays = [_array(t) for t in (q, k, v, out)]
        _native.forward(compile_form(form), _sizes(q, k, v), *arrays, lse.data_ptr(), *added, scale, softcap)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: BoxForm,
    bias: Tensor | None,
    table: Tensor | None,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...] = (True, True, True, True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, bias and table; the bits are the same for any number of threads.

    ``grad_out`` and ``grad_lse`` are gradients of what `forward` returned; ``needs`` says for which inputs, in this
    order, a gradient is wanted (the first three always come).
    """
    q, k, v, grad_out, out = _rows(q), _rows(k), _rows(v), _rows(grad_out.to(q.dtype)), _rows(out)
    given_bias, given_table = bias, table
    bias, table = _float(bias, table)
    lse = lse.float().contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    dq = _fresh(torch.empty_like(q, memory_format=torch.contiguous_format))
    dk, dv = (_fresh(torch.empty(t.shape, dtype=torch.float32)).zero_() for t in (k, v))
    dbias = torch.zeros(bias.shape) if bias is not None and needs[3] else None
    dtable = torch.zeros(table.shape) if table is not None and needs[4] else None
    if q.shape[0] and q.shape[1] and q.shape[2]:
        arrays = [_array(t) for t in (q, k, v, out)]
        to_bias = _added(dbias, None)[0]
        to_table = [0, 0, 0] if dtable is None else [dtable.data_ptr(), _strides(dtable)[0], dtable.shape[1]]
        _native.backward(
            compile_form(form),
            _sizes(q, k, v),
            *arrays,
            lse.data_ptr(),
            *_added(bias, table),
            scale,
            softcap,
            _array(grad_out),
            0 if grad_lse is None else grad_lse.data_ptr(),
            *(_array(t) for t in (dq, dk, dv)),
            to_bias,
            to_table,
        )
    if dbias is not None and given_bias is not None:
        dbias = dbias.to(given_bias.dtype)
    if dtable is not None and given_table is not None:
        dtable = dtable.to(given_table.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias, dtable


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    sums: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    feature: str = "identity",
    least: float = 0.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal linear attention by chunks: ``o_i = f(q_i) (kv + sum over j <= i of f(k_j) v_j^T)``.

    Args:
        q: ``(B, H, N, F)``, the last positions of the keys; float32, float16 or bfloat16, any strides.
        k: ``(B, Hkv, M, F)``, in the type of ``q`` as ``v``.
        v: ``(B, Hkv, M, E)``.
        kv: before the first position, float32 ``(B, Hkv, F, E)``.
        sums: of the keys' features before it, float32 ``(B, Hkv, F)``. Where given, the result is divided by ``f(q_i)
            (sums + sum over j <= i of f(k_j))``.
        keys: which keys are real, booleans ``(B, M)``.
        feature: a name of `FEATURES`.
        least: the divisor's least absolute value, where the largest feature of a query is 1.
        reverse: time runs from the last position to the first.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and ``kv`` and ``sums`` after the last position.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    kv, sums = kv.contiguous(), None if sums is None else sums.contiguous()
    out = _fresh(q.new_empty((*q.shape[:3], v.shape[3])))
    if not (out.numel() and k.numel()):
        return out, kv.clone(), None if sums is None else sums.clone()
    after, sums_after = torch.empty_like(kv), None if sums is None else torch.empty_like(sums)
    arrays = [_backwards(t) if reverse else _array(t) for t in (q, k, v, out)]
    real = [0, 0, 0]
    if keys is not None:
        real = [keys.data_ptr(), *_strides(keys)]
        if reverse:
            real = [real[0] + (k.shape[2] - 1) * real[2], real[1], -real[2]]
    state = [0 if t is None else t.data_ptr() for t in (kv, sums, after, sums_after)]
    sizes = [*_sizes(q, k, v), q.shape[2], k.shape[2], FEATURES[feature]]
    _native.linear(sizes, *arrays, real, state, least, sums is not None)
    return out, after, sums_after


def _backwards(t: Tensor) -> list[int]:
    """An array whose rows are read from the last one on."""
    batch, head, row = t.stride()[:3]
    return [t.data_ptr() + (t.shape[2] - 1) * row * t.element_size(), batch, head, -row]
