"""A small vision transformer with a class token on scikit-learn's digits, for the proofs that look at its heads."""

from __future__ import annotations

import torch
from bed import kept
from digits_bed import digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

TRAIN = 1300
"""Images to learn from; the other 497 are held out."""


def images() -> tuple[Tensor, Tensor]:
    """``(1797, 1, 8, 8)`` and labels, those to learn from first."""
    return digits(8)


def make() -> ViTForImageClassification:
    """16 patches of 2 x 2 and a class token, 3 layers of 8 heads, 32 channels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=8,
            intermediate_size=64,
            num_labels=10,
        )
    )


def train(model: ViTForImageClassification, epochs: int = 20) -> ViTForImageClassification:
    """AdamW at 2e-3."""
    x, y = images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(TRAIN, generator=generator).split(64):
            nn.functional.cross_entropy(model(x[picked]).logits, y[picked]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def bed() -> ViTForImageClassification:
    """The trained network, from ``build/beds`` or trained there."""
    return kept("vit_digits", make, train)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((model(x).logits.argmax(-1) == y).double().mean())
