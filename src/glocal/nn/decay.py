"""Which parameters of a model must not be pulled towards zero."""

from __future__ import annotations

from torch import nn

__all__ = ["no_weight_decay"]


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of a model's parameters for which zero is not neutral, as a layer's ``undecayed`` lists its own.

    Such as matrices that start as the identity. An optimizer is to have them in a group with ``weight_decay=0``.

    >>> import torch
    >>> from glocal.nn import Block, KnockingHeadsAttention, SwiGLU
    >>> model = Block(32, KnockingHeadsAttention(32, 4, form="linear", on="v"), SwiGLU(32, 64))
    >>> names = no_weight_decay(model)
    >>> names
    {'attention.v_share.weight'}
    >>> spared = [p for name, p in model.named_parameters() if name in names]
    >>> others = [p for name, p in model.named_parameters() if name not in names]
    >>> optimizer = torch.optim.AdamW([{"params": others}, {"params": spared, "weight_decay": 0.0}], weight_decay=0.1)
    """
    return {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own in getattr(module, "undecayed", ())
    }
