"""Attention as transformers calls it, computed by `glocal.attend`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.hf.masks import Own, own
from glocal.patterns import Full, Pattern

__all__ = ["attention", "refuse"]

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
    pattern, extra = _seen(where, mine, query, key)
    if extra is not None:
        bias = extra if bias is None else bias + extra
    out = attend(
        query,
        key,
        value,
        pattern,
        bias=None if bias is None else bias.to(query.dtype),
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def refuse(options: dict[str, Any]) -> None:
    """Raise a ValueError where attention is asked for what would be lost in silence."""
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"glocal.hf does not support {what} ({name})")


def _seen(where: Pattern, mine: Own, query: Tensor, key: Tensor) -> tuple[Pattern, Tensor | None]:
    """The pattern of both, and a bias where the keys are a tail of the sequence."""
    if isinstance(where, Full) or not mine.offset:
        both = (
            mine.pattern
            if isinstance(where, Full)
            else where
            if isinstance(mine.pattern, Full)
            else where & mine.pattern
        )
        return both, None
    # A sliding cache has dropped the first keys: the pattern still counts from the sequence's start.
    rows = torch.arange(query.shape[2], device=query.device)
    total = mine.offset + key.shape[2]
    where.check((query.shape[2],), (total,))
    live = where.rows(rows, (query.shape[2],), (total,))[..., mine.offset :]
    return mine.pattern, torch.zeros_like(live, dtype=query.dtype).masked_fill(~live, -torch.inf)
