"""A small causal model of the standard library's source, byte by byte, for the proofs of how heads share weights.

Two layers of 64 channels and 8 heads, 600 steps on 24 pieces of 96 bytes at 3e-3, warmed up and lowered by a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from glocal.bench.bytes import bits_per_byte, train_bytes
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention

DIM, HEADS, LAYERS, LENGTH, BATCH, RATE = 64, 8, 2, 96, 24, 3e-3


def held_out_nats(
    layer: Callable[[int], Attention], seed: int, steps: int, start: Callable[[nn.Module], None] | None = None
) -> float:
    """Loss a byte of unseen modules after training, in nats.

    Args:
        layer: makes an attention layer from the number of channels.
        seed: of the weights and of the pieces that are trained on.
        steps: of training.
        start: what is done to the model before it.
    """
    torch.manual_seed(seed)
    model = Transformer(256, DIM, [layer] * LAYERS)
    if start is not None:
        start(model)
    train_bytes(model, length=LENGTH, batch=BATCH, steps=steps, lr=RATE, seed=seed)
    return bits_per_byte(model, length=LENGTH, pieces=512) * math.log(2)


def in_words(losses: list[float]) -> str:
    """Each seed's loss."""
    return ", ".join(f"{loss:.3f}" for loss in losses)
