"""PyTorch operations only: torch's own ``scaled_dot_product_attention`` for full and causal attention, and tiles of
dense products for every other pattern with a box form. Memory grows with N, not with N x N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import common, op, tiles
from glocal.kernels.problem import Problem
from glocal.patterns import BoxForm, Causal, Full
from glocal.patterns.boxes import pick

_BUDGET = 1 << 21  # scores computed at a time: 8 MB of float32 stay in a large cache

_plans: WeakKeyDictionary[BoxForm, list[list[tiles.Group]]] = WeakKeyDictionary()


def why_not(problem: Problem) -> str | None:
    """The reason why this kernel cannot run a problem, or None."""
    return op.no_boxes(problem)


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention by tiles, or by torch's own kernel where that computes the same thing."""
    if (out := _fused(problem)) is not None:
        return out, out.new_empty(0)
    return _tiled(problem)


def _fused(problem: Problem) -> Tensor | None:
    """Full and causal attention as torch has them; None where torch has no such thing."""
    where, bias, n = problem.where, problem.bias, math.prod(problem.grid_k)
    full = isinstance(where, Full)
    causal = isinstance(where, Causal) and problem.grid_q == problem.grid_k and bias is None
    if not (full or causal) or problem.return_lse or problem.softcap or problem.table is not None or not n:
        return None
    if problem.dropout_p or (bias is not None and (bias.requires_grad or problem.q.dtype != bias.dtype)):
        return None
    q, k, v = problem.q, problem.k, problem.v
    grouped = q.shape[1] != k.shape[1]
    if full:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=problem.scale, enable_gqa=grouped)
        return _told(out, q)
    # torch multiplies values that a causal mask hides by zero, which lets a NaN through to earlier rows.
    bad = ~torch.isfinite(v)
    out = F.scaled_dot_product_attention(
        q, k, v.masked_fill(bad, 0), is_causal=True, scale=problem.scale, enable_gqa=grouped
    )
    seen = (bad.cumsum(2) > 0).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return _told(out.masked_fill(seen, torch.nan), q)


def _told(out: Tensor, q: Tensor) -> Tensor:
    """NaN for the rows whose query has one: torch's kernel for CPUs gives zeros with some instruction sets."""
    return out.masked_fill(q.isnan().any(-1, keepdim=True), torch.nan) if q.device.type == "cpu" else out


class _Tile(NamedTuple):
    """Some tiles of queries with their keys; ``live (b, h, t, Tq, Tk)`` has 1 where heads or batches agree."""

    queries: Tensor
    keys: Tensor | None  # None: all of them, in order
    live: Tensor


def _walk(form: BoxForm, device: torch.device, pairs_per_token: int) -> Iterator[tuple[int, _Tile]]:
    """All tiles of all boxes, cut so that ``_BUDGET`` scores are alive at a time."""
    if (plan := _plans.get(form)) is None:
        plan = _plans[form] = tiles.plan(form)
    if device.type != "cpu":
        form = BoxForm(form.grid_q, form.grid_k, tuple(box.to(device) for box in form), form.lead)
    every = torch.arange(math.prod(form.grid_k), device=device)[None]
    for number, groups in enumerate(plan):
        for group in groups:
            width = len(every[0]) if group.whole else math.prod(group.extent)
            if group.blocks is not None:
                width = group.blocks.index.shape[-1] * math.prod(group.blocks.key_size)
            axis = 1 if group.whole else 0
            row = pairs_per_token * width * (1 if group.whole else group.queries.shape[1])
            count = max(1, _BUDGET // max(1, row))
            for start in range(0, group.queries.shape[axis], count):
                part = slice(start, start + count)
                if group.whole:
                    queries, keys = group.queries[:, part].to(device), every
                else:
                    queries, keys = group.queries[part].to(device), group.keys(part, form.grid_k).to(device)
                live = tiles.live(form, number, queries, keys)
                live = live.reshape(*[1] * (5 - live.dim()), *live.shape)
                yield number, _Tile(queries, None if group.whole else keys, live)


class _View:
    """One `_Tile` of one attention: gathers what it reads, and adds up what it gives back."""

    def __init__(self, tile: _Tile, q: Tensor, k: Tensor, form: BoxForm, settings: op.Settings) -> None:
        self.tile, self.form, self.settings = tile, form, settings
        self.batch, self.heads, self.kv_heads = q.shape[0], q.shape[1], k.shape[1]
        self.rows = tile.queries.clamp(min=0).flatten()
        self.dtype = common.accumulator(q.dtype)
        # Keys that differ between heads are gathered for each query head; otherwise once for its group.
        self.own = tile.keys is not None and tile.keys.dim() > 2
        self.shared = self.heads if self.own else self.kv_heads
        if self.own:
            assert tile.keys is not None
            lead = (self.batch, self.heads, *tile.keys.shape[-2:])
            keys = tile.keys.clamp(min=0).reshape(*[1] * (4 - tile.keys.dim()), *tile.keys.shape).expand(lead)
            group = torch.arange(self.heads, device=keys.device) // (self.heads // self.kv_heads)
            self.columns = (keys + (group * k.shape[2])[:, None, None]).flatten(1)

    def split(self, x: Tensor) -> Tensor:
        """``(b, h, t, Tq, ...)`` to ``(b, shared, t, group, Tq, ...)``; 1 stays 1."""
        heads = (1, 1) if x.shape[1] == 1 else (self.shared, self.heads // self.shared)
        parts: Tensor = x.unflatten(1, heads).transpose(2, 3)
        return parts

    def join(self, x: Tensor) -> Tensor:
        """``(B, shared, t, group, Tq, ...)`` back to ``(B, H, t, Tq, ...)``."""
        return x.transpose(2, 3).flatten(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """Rows of ``x (B, H, Nq, ...)`` as ``(B, shared, t, group, Tq, ...)``."""
        taken = x.index_select(2, self.rows).unflatten(2, self.tile.queries.shape)
        return self.split(taken).to(self.dtype)

    def keys(self, x: Tensor) -> Tensor:
        """Rows of ``x (B, Hkv, Nk, ...)`` as ``(B, shared, t, Tk, ...)``."""
        if self.tile.keys is None:
            taken = x.unsqueeze(2)
        elif self.own:
            index = self.columns[..., None].expand(-1, -1, x.shape[-1])
            taken = x.flatten(1, 2).gather(1, index).unflatten(1, (self.heads, *self.tile.keys.shape[-2:]))
        else:
            taken = x.index_select(2, self.tile.keys.clamp(min=0).flatten()).unflatten(2, self.tile.keys.shape)
        return taken.to(self.dtype)

    def add_queries(self, total: Tensor, part: Tensor) -> None:
        """Add ``(B, shared, t, group, Tq, D)`` to its rows of ``total (B, H, Nq, D)``; rows do not repeat in a box."""
        part = self.join(part).flatten(2, 3)
        real = self.tile.queries.flatten() >= 0
        if not real.all():
            part, rows = part[:, :, real], self.rows[real]
        else:
            rows = self.rows
        total.index_add_(2, rows, part)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """Add ``(B, shared, t, Tk, D)`` to its rows of ``total (B, Hkv, Nk, D)``."""
        if self.tile.keys is None:
            total += part.squeeze(2)
        elif self.own:
            index = self.columns[..., None].expand(-1, -1, part.shape[-1])
            total.view(self.batch, -1, part.shape[-1]).scatter_add_(1, index, part.flatten(1, 3))
        else:
            total.index_add_(2, self.tile.keys.clamp(min=0).flatten(), part.flatten(2, 3))

    def key_index(self) -> Tensor:
        """Key positions ``(t, Tk)``, or ``(*lead, t, Tk)`` where heads differ."""
        if self.tile.keys is None:
            return torch.arange(math.prod(self.form.grid_k), device=self.rows.device)[None]
        return self.tile.keys.clamp(min=0)

    def bias_index(self, bias: Tensor) -> Tensor:
        """Where the tile's pairs lie in ``bias (b, h, q, k)`` with its last two axes flattened."""
        q, k = self.tile.queries.clamp(min=0), self.key_index()
        row = q.unsqueeze(-1) * bias.shape[3] if bias.shape[2] > 1 else torch.zeros_like(q).unsqueeze(-1)
        return row + (k if bias.shape[3] > 1 else torch.zeros_like(k)).unsqueeze(-2)

    def table_index(self) -> Tensor:
        """Where the tile's pairs lie in a table over offsets."""
        queries = self.tile.queries.clamp(min=0)
        return common.offset_index(queries, self.key_index(), self.form.grid_q, self.form.grid_k)

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Masked logits ``(B, shared, t, group, Tq, Tk)``, and the capped products before any bias."""
        settings = self.settings
        raw = scores = common.cap(self.products(q * settings.scale, k), settings.softcap)
        if settings.bias is not None:
            bias = settings.bias
            scores = scores + self.split(_five(pick(bias.flatten(2), self.bias_index(bias), 3))).to(self.dtype)
        if settings.table is not None:
            scores = scores + self.split(_five(pick(settings.table, self.table_index(), 3))).to(self.dtype)
        return scores.masked_fill(~self.split(self.tile.live), -torch.inf), raw

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """``q (B, shared, t, group, Tq, D)`` with ``k (B, shared, t, Tk, D)``: every pair of a tile."""
        pairs: Tensor = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, q.shape[3:5])
        return pairs

    def kept(self, keys: int) -> Tensor:
        """What dropout keeps of the tile's pairs."""
        assert self.settings.seed is not None
        q, k = self.tile.queries.clamp(min=0).unsqueeze(-1), self.key_index().unsqueeze(-2)
        lead = torch.arange(self.batch * self.heads, device=q.device).view(self.batch, self.heads, 1, 1, 1)
        pair = (lead * math.prod(self.form.grid_q) + q) * keys + k
        return self.split(common.keep(self.settings.seed.to(q.device), pair, self.settings.dropout_p))


def _five(x: Tensor) -> Tensor:
    return x.reshape(*[1] * (5 - x.dim()), *x.shape)


def forward(q: Tensor, k: Tensor, v: Tensor, form: BoxForm, settings: op.Settings) -> tuple[Tensor, Tensor]:
    """Softmax over each tile's keys; tiles of different boxes meet by their log-sum-exp."""
    dtype = common.accumulator(q.dtype)
    out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for number, tile in _walk(form, q.device, q.shape[0] * q.shape[1]):
        view = _View(tile, q, k, form, settings)
        scores, _ = view.scores(view.queries(q), view.keys(k))
        weights, part_lse = common.softmax(scores)
        live = view.split(tile.live)
        if settings.dropout_p:
            weights = torch.where(view.kept(k.shape[2]), weights / (1 - settings.dropout_p), 0)
        values = view.keys(v)
        part = common.weighted(weights.flatten(3, 4), live.expand(weights.shape).flatten(3, 4), values)
        part = view.join(part.unflatten(3, weights.shape[3:5])).flatten(2, 3)
        part_lse = view.join(part_lse).flatten(2, 3)
        rows = view.rows
        if number:
            part, part_lse = common.merge([(out.index_select(2, rows), lse.index_select(2, rows)), (part, part_lse)])
        real = tile.queries.flatten() >= 0
        if not real.all():
            part, part_lse, rows = part[:, :, real], part_lse[:, :, real], rows[real]
        out.index_copy_(2, rows, part)
        lse.index_copy_(2, rows, part_lse)
    return out.to(q.dtype), lse


def backward(
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
    """Gradients by the same tiles; probabilities come again from ``lse``, so nothing of their size was stored."""
    dtype, bias, table = common.accumulator(q.dtype), settings.bias, settings.table
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    dbias, dtable = (
        torch.zeros(t.shape, dtype=dtype, device=q.device) if t is not None and need else None
        for t, need in zip((bias, table), needs, strict=True)
    )
    # d(lse)/d(score) is the probability, as is the usual rowsum term: the two go together.
    inner = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - torch.where(lse == -torch.inf, 0, grad_lse.to(dtype))
    for _, tile in _walk(form, q.device, q.shape[0] * q.shape[1]):
        view = _View(tile, q, k, form, settings)
        queries, keys, values = view.queries(q), view.keys(k), view.keys(v)
        scores, raw = view.scores(queries, keys)
        own = view.queries(lse.unsqueeze(-1))
        weights = torch.exp(scores - torch.where(own == -torch.inf, 0, own))
        grads = view.queries(grad_out)
        real = (tile.queries >= 0)[:, None, :, None]
        dweights, used = view.products(grads, values), weights
        if settings.dropout_p:
            kept = view.kept(k.shape[2])
            dweights = torch.where(kept, dweights / (1 - settings.dropout_p), 0)
            used = torch.where(kept, weights / (1 - settings.dropout_p), 0)
        view.add_keys(dv, (used * real).flatten(3, 4).transpose(-1, -2) @ grads.flatten(3, 4))
        dscores = weights * (dweights - view.queries(inner.unsqueeze(-1))) * real
        if dbias is not None or dtable is not None:
            each = view.join(dscores)
            if dbias is not None:
                _scatter(dbias.view(*dbias.shape[:2], -1), view.bias_index(dbias), each)
            if dtable is not None:
                _scatter(dtable[None], view.table_index(), each)
        if settings.softcap:
            dscores = dscores * (1 - (raw / settings.softcap) ** 2)
        dscores = (dscores * settings.scale).flatten(3, 4)
        view.add_queries(dq, (dscores @ keys).unflatten(3, queries.shape[3:5]))
        view.add_keys(dk, dscores.transpose(-1, -2) @ queries.flatten(3, 4))
    dbias = dbias.to(bias.dtype) if dbias is not None and bias is not None else None
    dtable = dtable.to(table.dtype) if dtable is not None and table is not None else None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dtable


def _scatter(total: Tensor, index: Tensor, part: Tensor) -> None:
    """Add ``part (B, H, t, Tq, Tk)`` to ``total (b, h, L)`` at ``index``, summed where ``total`` has one of many."""
    for axis in (0, 1):
        if total.shape[axis] == 1 and index.dim() == 3:
            part = part.sum(axis, keepdim=True)
    index = _five(index).expand(part.shape)
    if part.shape[:2] != total.shape[:2]:
        # Each head has keys of its own, but they share the bias: add the heads up one after the other.
        for b in range(part.shape[0]):
            for h in range(part.shape[1]):
                row = total[b if total.shape[0] > 1 else 0, h if total.shape[1] > 1 else 0]
                row.scatter_add_(0, index[b, h].flatten(), part[b, h].flatten())
        return
    total.scatter_add_(2, index.flatten(2), part.flatten(2))


_tiled = op.register("tiles", forward, backward)
