"""Attention as transformers calls it, computed by `glocal.attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.hf.masks import Own, own
from glocal.patterns import Causal, Full, Keys, Pattern, PerHead, Sliding
from glocal.patterns.base import Complement, Intersection, Union

__all__ = ["attention", "refuse"]

# Patterns that depend on distances only: padding before a row, and dropped keys, leave them as they are.
_MOVABLE = (Full, Causal, Sliding, PerHead, Union, Intersection, Complement)
# Arguments of attention that change the result and that a pattern cannot express: never dropped in silence.
_REFUSED = {
    "s_aux": "learned attention sinks",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "sequences packed for flash-attention",
    "output_attentions": "returning attention weights (use the eager implementation for that)",
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    where: Pattern,
    own_window: bool = True,
    backend: str = "auto",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    operator: Callable[..., Any] = attend,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a model's layer sees, intersected with a pattern.

    Args:
        module: the layer; its ``is_causal`` counts unless ``is_causal`` is given.
        query: ``(B, H, Nq, D)``; ``key`` and ``value`` are ``(B, Hkv, Nk, D)``.
        key: see ``query``.
        value: see ``query``.
        attention_mask: None, booleans ``(B, Nk)`` that mark real keys, booleans ``(B, 1 or H, Nq, Nk)``, or floats of
            that shape that are added to the scores.
        where: which pairs exist, besides what mask, causality and the model's own window leave.
        own_window: whether the model's own sliding window counts.
        backend: as in `attend`.
        dropout: share of probabilities dropped.
        scaling: multiplies the scores.
        is_causal: overrides the module's.
        position_bias: added to the scores.
        softcap: as in `attend`.
        operator: what computes it, with the arguments of `attend`.
        **options: anything else that transformers passes on.

    Returns:
        ``(B, Nq, H, Dv)``, and None for the weights, which are never built.
    """
    refuse(options)
    mine = own(module, query, key.shape[2], attention_mask, is_causal, own_window)
    key, value = key[:, :, : mine.end], value[:, :, : mine.end]
    bias = mine.bias
    if position_bias is not None:
        position_bias = position_bias[..., : mine.end]
        bias = position_bias if bias is None else bias + position_bias
    settings: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout, "backend": backend}
    if mine.bias is None and any(mine.padding) and not mine.offset and not _movable(where):
        rows = _by_row(query, key, value, where, mine, bias, operator, settings)
        return rows.transpose(1, 2).contiguous(), None
    pattern, extra = _seen(where, mine, query, key)
    if extra is not None:
        bias = extra if bias is None else bias + extra
    out = operator(query, key, value, pattern, bias=None if bias is None else bias.to(query.dtype), **settings)
    return out.transpose(1, 2).contiguous(), None


def refuse(options: dict[str, Any]) -> None:
    """Raise a ValueError where attention is asked for what would be lost in silence."""
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"glocal.hf does not support {what} ({name})")


def _movable(where: Pattern) -> bool:
    """Whether padding before a row, or keys dropped there, leave a pattern as it is: it depends on distances only.

    What holds data, a mask of keys say, counts slots and not tokens.
    """
    return bool(where.data()) or all(isinstance(part, _MOVABLE) for part in where.walk())


def _by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Pattern,
    mine: Own,
    bias: Tensor | None,
    operator: Callable[..., Any],
    settings: dict[str, Any],
) -> Tensor:
    """Each row without the padding before it, so that the pattern counts real tokens; ``(B, H, Nq, Dv)``."""
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for row, before in enumerate(mine.padding):
        skip = max(0, before - (key.shape[2] - query.shape[2]))  # queries that are padding see nothing
        q, k, v = query[row : row + 1, :, skip:], key[row : row + 1, :, before:], value[row : row + 1, :, before:]
        if not q.shape[2]:
            continue
        pattern = where & mine.causality
        if mine.real is not None and not bool(mine.real[row, before:].all()):
            pattern = pattern & Keys(mine.real[row : row + 1, before:])
        part = None if bias is None else bias[row % bias.shape[0]][None, :, -q.shape[2] :, before:].to(q.dtype)
        out[row] = torch.nn.functional.pad(operator(q, k, v, pattern, bias=part, **settings)[0], (0, 0, skip, 0))
    return out


def _seen(where: Pattern, mine: Own, query: Tensor, key: Tensor) -> tuple[Pattern, Tensor | None]:
    """Both patterns; and a bias where keys were dropped, or padding is in a mask of pairs, and the pattern minds."""
    if isinstance(where, Full):
        return mine.pattern, None
    moved = bool(mine.offset) or (mine.bias is not None and any(mine.padding))
    if not moved or _movable(where):
        return where if isinstance(mine.pattern, Full) else where & mine.pattern, None
    queries, total = query.shape[2], mine.offset + key.shape[2]
    live = []
    for before in mine.padding or (0,):
        length = total - before  # tokens of this row
        own = min(queries, length)
        where.check((own,), (length,))
        rows = where.rows(torch.arange(own, device=query.device), (own,), (length,))
        rows = torch.nn.functional.pad(rows, (before, 0, queries - own, 0))[..., mine.offset :]
        live.append(rows if rows.dim() == 3 else rows[None])
    seen = torch.stack(live)
    return mine.pattern, torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
