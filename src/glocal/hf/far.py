"""Full attention for the few heads that look far, a window for all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from glocal.hf.mass import recorded
from glocal.patterns import Full, Pattern, PerHead, parse

__all__ = ["far_heads"]


@torch.no_grad()
def far_heads(model: nn.Module, inputs: Mapping[str, Any], near: Pattern | str, share: float = 0.125) -> list[Pattern]:
    """Patterns, one a layer, in which the heads that lose most by a near pattern keep full attention.

    Most heads of a language model look at what is near; a few fetch what stands far back, and lose what they are for
    under a window. That heads can be parted so is DuoAttention's (Xiao et al., 2024, arXiv 2410.10819), which learns
    the parting; here it is measured, in one pass: the mean attention of each head that falls outside of ``near``.

    Args:
        model: a ``PreTrainedModel`` in which every attention layer has the same number of heads.
        inputs: its arguments: text like what it will read, as long, but not what it is judged on.
        near: for all other heads, e.g. ``"sliding(255, 0) | sinks(4)"``.
        share: of the heads of the whole model that keep full attention, rounded to whole heads.

    Returns:
        For `adapt`: a list with a pattern for each layer.

    Raises:
        ValueError: a share that is not from 0 to 1, or a pattern that does not parse.

    Example::

        with adapt(model, far_heads(model, {"input_ids": text}, "sliding(255, 0) | sinks(4)")):
            model.generate(**batch)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1; it was {share}")
    pattern = near if isinstance(near, Pattern) else parse(near)
    with recorded(model, [pattern]) as kept:
        model(**inputs)
    lost = 1 - kept.share()[0]
    far = torch.zeros(lost.numel(), dtype=torch.bool)
    far[lost.flatten().topk(round(share * lost.numel())).indices.cpu()] = True
    layers = far.view(lost.shape).tolist()
    return [PerHead([Full() if looks_far else pattern for looks_far in heads]) for heads in layers]
