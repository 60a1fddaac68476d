"""Can decays along paths tell tokens without any position where they are?

    python benchmarks/proofs/s005_ppma.py [--seeds 1] [--steps 1500] [--all]

The 1,797 digits of scikit-learn, every one of the 64 pixels a token, three blocks of 32 channels and 4 heads, their
mean, ten logits, and no position code of any kind. Softmax attention without a mask then sees a bag of grey levels. The
same with polyline path masks over the whole map; with ``--all`` also along rows and columns, and linear attention
without the mask and with it. Test accuracy after 1,500 steps of 64. Zhao et al., 2025, arXiv 2506.15940.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from glocal.nn import MLP, Attention, Block, LinearAttention
from glocal.nn.polyline import PolylineAttention, PolylineLinearAttention
from glocal.papers.verdict import verdict

DIM, HEADS, BLOCKS, BATCH, RATE, WANTED = 32, 4, 3, 64, 3e-3, 0.15

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: Attention(DIM, HEADS),
    "softmax, masked": lambda: PolylineAttention(DIM, HEADS),
    "by lines, masked": lambda: PolylineAttention(DIM, HEADS, criss_cross=True),
    "linear": lambda: LinearAttention(DIM, HEADS),
    "linear, masked": lambda: PolylineLinearAttention(DIM, HEADS),
}

Data = tuple[Tensor, Tensor]


class Digits(nn.Module):
    """A token a pixel, blocks, mean, ten logits."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(1, DIM)
        self.blocks = nn.Sequential(*[Block(DIM, layer(), MLP(DIM, 2 * DIM)) for _ in range(BLOCKS)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(images[..., None]))).mean((1, 2)))
        return out


def digits() -> tuple[Data, Data]:
    """Images ``(n, 8, 8)`` and labels, 60 % to train and 40 % to test."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: 6 * len(order) // 10], order[6 * len(order) // 10 :]
    return (images[train], labels[train]), (images[test], labels[test])


def accuracy(layer: Callable[[], nn.Module], data: tuple[Data, Data], steps: int, seed: int) -> float:
    """Share of test digits that are told right after training."""
    (images, labels), (unseen, wanted) = data
    torch.manual_seed(seed)
    model = Digits(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        plan.step()
    with torch.no_grad():
        return float((model.eval()(unseen).argmax(-1) == wanted).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    print(f"{'attention':<17} test accuracy of each seed")
    mean = {}
    for name, layer in list(LAYERS.items())[: None if options.all else 2]:
        found = [accuracy(layer, data, options.steps, seed) for seed in range(options.seeds)]
        mean[name] = sum(found) / len(found)
        print(f"{name:<17} " + " ".join(f"{value:.3f}" for value in found), flush=True)
    plain, masked = mean["softmax"], mean["softmax, masked"]
    verdict(
        "ppma",
        f"pixels as tokens without positions, accuracy {plain:.3f} without the mask and {masked:.3f} with it "
        f"(wanted: {WANTED:.2f} more)",
        masked - plain >= WANTED,
    )


if __name__ == "__main__":
    main()
