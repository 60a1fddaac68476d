"""How far do dilated neighborhoods see, and do they connect what local ones cannot?

    python benchmarks/proofs/s064_dina.py [--seeds 2] [--steps 500]

Without training: the keys that reach the middle of 343 tokens through three layers with windows of 7. Then trained:
two digits of scikit-learn (`load_digits`, doubled to 16 x 16) in opposite corners of an empty canvas of 48 x 48, are
they the same digit? Two layers with windows of 3 x 3 on 12 x 12 patches, both local against one local and one with the
largest dilation, at equal parameters and steps; test digits are not in training. The digits are smaller than MNIST's,
and the network is as small as the question allows: with more local layers some token would see both digits. Hassani et
al., 2022, arXiv 2209.15001.
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from glocal.nn import MLP, Block, NeighborhoodAttention
from glocal.papers.verdict import verdict
from glocal.patterns import Window

LENGTH, WINDOW, CANVAS, PATCH, DIM, HEADS, BATCH, DEPTH = 343, 7, 48, 4, 32, 4, 64, 2


def reach(window: int, dilations: tuple[int, ...], *grid: int) -> Tensor:
    """Which positions reach which through layers with these dilations, by products of their masks."""
    size = math.prod(grid)
    reached = torch.eye(size)
    for dilation in dilations:
        reached = (Window(window, dilation).mask(grid).view(size, size).float() @ reached).clamp(max=1)
    return reached.bool()


def see_both(dilations: tuple[int, ...]) -> int:
    """Patches of the canvas that see some of both digits."""
    side, digit = CANVAS // PATCH, 16 // PATCH
    seen = reach(3, dilations, side, side).unflatten(1, (side, side))
    return int((seen[:, :digit, :digit].any((1, 2)) & seen[:, -digit:, -digit:].any((1, 2))).sum())


class Pair(nn.Module):
    """Patches, blocks of 3 x 3 neighborhoods, mean, two logits."""

    def __init__(self, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, DIM, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(
            *[Block(DIM, NeighborhoodAttention(DIM, HEADS, 3, d), MLP(DIM, 2 * DIM)) for d in dilations]
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images).movedim(1, -1))
        out: Tensor = self.head(self.norm(x).mean((1, 2)))
        return out


def pairs(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Canvases with two digits in opposite corners, half of them of one class; 1 where they are."""
    first = torch.randint(len(images), (count,), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5
    # A random order of all images; the first of the wanted kind is the second digit.
    fits = (labels[first][:, None] == labels) == same[:, None]
    second = (torch.rand(count, len(images), generator=generator) * fits).argmax(1)
    canvas = torch.zeros(count, 1, CANVAS, CANVAS)
    canvas[:, 0, :16, :16], canvas[:, 0, -16:, -16:] = images[first], images[second]
    return canvas, same.long()


def train(dilations: tuple[int, ...], seed: int, steps: int) -> float:
    """Accuracy on pairs of test digits."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 8, torch.from_numpy(data.target)
    images = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[: len(order) // 4], order[len(order) // 4 :]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Pair(dilations)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y = pairs(images[rest], labels[rest], BATCH, generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    with torch.no_grad():
        x, y = pairs(images[test], labels[test], 1000, torch.Generator().manual_seed(1))
        found = torch.cat([model(part).argmax(-1) for part in x.split(100)])
    return float((found == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)

    gaps = {"local": (1, 1, 1), "alternating": (1, WINDOW, WINDOW**2)}
    fields = {name: int(reach(WINDOW, gap, LENGTH)[LENGTH // 2].sum()) for name, gap in gaps.items()}
    print(f"positions seen through three layers: dilations 1 1 1: {fields['local']}, 1 7 49: {fields['alternating']}")
    widest = CANVAS // PATCH // 3
    kinds = {"local": (1,) * DEPTH, "alternating": (1, widest) * (DEPTH // 2)}
    mean = {}
    for name, dilations in kinds.items():
        found = [train(dilations, seed, options.steps) for seed in range(options.seeds)]
        mean[name] = sum(found) / len(found)
        size = sum(p.numel() for p in Pair(dilations).parameters())
        both = see_both(dilations)
        print(f"{name:<12} {size:>7,} parameters, {both:>3} patches see both" + "".join(f"{f:>8.3f}" for f in found))
    verdict(
        "dina",
        f"three layers see {fields['local']} of {LENGTH} positions, with dilations 1, 7, 49 {fields['alternating']}; "
        f"two digits in far corners are compared with accuracy {mean['alternating']:.3f}, local layers "
        f"{mean['local']:.3f}",
        (fields["local"], fields["alternating"]) == (19, LENGTH) and mean["alternating"] > mean["local"] + 0.1,
    )


if __name__ == "__main__":
    main()
