"""scikit-learn's digits at any size, for the proofs of small image networks: how one is trained and what it scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from bed import fit
from sklearn.datasets import load_digits
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def digits(size: int) -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, size, size)`` from -1 to 1, made from 8 x 8, and labels, in a random order that is fixed."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 8 - 1
    return nn.functional.interpolate(images, size=size, mode="bilinear"), torch.from_numpy(data.target)[order]


def learn(model: M, images: Tensor, labels: Tensor, steps: int, seed: int, batch: int = 64) -> M:
    """Steps on batches at random."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        picked = torch.randint(len(images), (batch,), generator=generator)
        return nn.functional.cross_entropy(model(images[picked]), labels[picked])

    return fit(model, loss, steps)


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    found = torch.cat([model(part).argmax(-1) for part in images.split(100)])
    return float((found == labels).float().mean())


def mean(values: Sequence[float]) -> float:
    """Of the seeds."""
    return sum(values) / len(values)
