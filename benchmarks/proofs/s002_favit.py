"""Does an image-wide comparison pass through one fused window, at the price of windows that cannot make it?

    python benchmarks/proofs/s002_favit.py [--seeds 1] [--steps 400]

Pictures of 56 x 56 pixels of noise with a red or a green mark in two opposite corners: are they of one colour? Two
blocks on 28 x 28 tokens of 32 channels, of factorised attention with reduction 4 or of windows of 7 x 7 that do not
move, with the same feed-forward, mean and a linear classifier. Both multiply equally often in attention, 49 keys a
token. The catalogue's plan has 56 x 56 tokens of 64 channels with reduction 8, sixteen times the work. Qin et al.,
2023, arXiv 2312.08614.
"""

from __future__ import annotations

import argparse

import torch
from bed import fit
from torch import Tensor, nn

from glocal.attention import explain
from glocal.nn import Attention, Block, Call, ConvMLP
from glocal.nn.factorised import FactorizedAttention
from glocal.papers.verdict import verdict
from glocal.patterns import Block as Blocks
from glocal.patterns import Pattern

DIM, HEADS, SIDE, REDUCTION, BATCH, MARK = 32, 2, 28, 4, 32, 8


class Windows(Attention):
    """Attention in windows of 7 x 7 that do not move."""

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return Blocks(7)


class Net(nn.Module):
    """Patches of 2 x 2, two blocks, mean, two logits."""

    def __init__(self, factorised: bool) -> None:
        super().__init__()

        def mixer() -> nn.Module:
            return FactorizedAttention(DIM, HEADS, reduction=REDUCTION) if factorised else Windows(DIM, HEADS)

        self.embed = nn.Conv2d(3, DIM, 2, stride=2)
        self.blocks = nn.Sequential(*[Block(DIM, mixer(), ConvMLP(DIM, 2 * DIM, residual=False)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images).movedim(1, -1))
        out: Tensor = self.head(self.norm(x).mean((1, 2)))
        return out


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with two marks, and 1 where they are of one colour."""
    x = 0.1 * torch.randn(count, 3, 2 * SIDE, 2 * SIDE, generator=generator)
    colours = torch.randint(2, (count, 2), generator=generator)
    marks = nn.functional.one_hot(colours, 3).float()[..., None, None]
    x[:, :, :MARK, :MARK] += marks[:, 0]
    x[:, :, -MARK:, -MARK:] += marks[:, 1]
    return x, (colours[:, 0] == colours[:, 1]).long()


def train(factorised: bool, seed: int, steps: int) -> float:
    """Accuracy on pictures that were not in training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Net(factorised)

    def loss() -> Tensor:
        x, y = pictures(BATCH, generator)
        return nn.functional.cross_entropy(model(x), y)

    fit(model, loss, steps)
    x, y = pictures(512, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        found = torch.cat([model(part).argmax(-1) for part in x.split(64)])
    return float((found == y).float().mean())


def products(factorised: bool) -> int:
    """Multiplications of one layer's attention for one picture."""

    def empty(heads: int, side: int, channels: int) -> Tensor:
        return torch.empty(1, heads, side, side, channels // heads)

    if not factorised:
        t = empty(HEADS, SIDE, DIM)
        return explain(t, t, t, Blocks(7)).flops // 2
    layer, small = FactorizedAttention(DIM, HEADS, reduction=REDUCTION), SIDE // REDUCTION
    parts = [(1, small, layer.thin), (HEADS, 7, layer.group), (HEADS, 7, layer.group)]
    total = 0
    for heads, side, channels in parts:
        k = empty(heads, side, channels)
        total += explain(empty(heads, SIDE, channels), k, k).flops // 2
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)

    accuracy, work = {}, {}
    print(f"{'attention':<12}{'parameters':>12}{'products':>12}   accuracy of each seed")
    for name in ("factorised", "windows"):
        kind = name == "factorised"
        found = [train(kind, seed, options.steps) for seed in range(options.seeds)]
        accuracy[name], work[name] = sum(found) / len(found), products(kind)
        count = sum(p.numel() for p in Net(kind).parameters())
        print(f"{name:<12}{count:>12,}{work[name]:>12,}   {'  '.join(f'{a:.3f}' for a in found)}", flush=True)
    assert work["factorised"] == work["windows"]
    verdict(
        "favit",
        f"marks in opposite corners are compared with accuracy {accuracy['factorised']:.3f}, by windows with "
        f"{accuracy['windows']:.3f}, at {work['windows']:,} products each",
        accuracy["factorised"] >= 0.9 and accuracy["windows"] <= 0.6,
    )


if __name__ == "__main__":
    main()
