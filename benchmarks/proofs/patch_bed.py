"""The 1,797 digits of scikit-learn as 16 patches of 2 x 2, and a network of two layers over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from glocal.nn import MLP, Block

DIM, HEADS, BATCH, RATE = 64, 8, 64, 3e-3

Data = tuple[Tensor, Tensor]


class Digits(nn.Module):
    """Patches with learned positions, two blocks, mean, ten logits."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, DIM), nn.Parameter(0.02 * torch.randn(16, DIM))
        self.blocks = nn.Sequential(*[Block(DIM, layer(), MLP(DIM, 2 * DIM)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))
        return out


def digits() -> tuple[Data, Data]:
    """Patches ``(n, 16, 4)`` and labels, 60 % to train and 40 % to test."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target)
    patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: 6 * len(order) // 10], order[6 * len(order) // 10 :]
    return (patches[train], labels[train]), (patches[test], labels[test])


def train(
    model: Digits, data: Data, epochs: int, seed: int, *, penalty: Callable[[nn.Module], Tensor] | None = None
) -> None:
    """By cross-entropy, and a penalty of the model that is added to it."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps = epochs * -(-len(data[1]) // BATCH)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(data[0][batch]), data[1][batch])
            if penalty is not None:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Digits, data: Data) -> float:
    """Share of test digits that are told right."""
    return float((model.eval()(data[0]).argmax(-1) == data[1]).float().mean())
