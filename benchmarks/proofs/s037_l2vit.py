"""Does local concentration gather again what linear attention has spread, and does that help?

    python benchmarks/proofs/s037_l2vit.py [--seeds 3] [--steps 150]

Handwritten digits, enlarged to 28 x 28, patches of 2 x 2: four blocks of linear attention over the whole map, 32
channels and 2 heads, with the local concentration and without. Test accuracy, and which share of an output token's
gradient falls on input tokens at most 3 away. Zheng, 2025, arXiv 2501.16182.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from glocal.models.vision.l2vit import GlobalBlock
from glocal.papers.verdict import verdict

DIM, HEADS, DEPTH, SIDE, NEAR = 32, 2, 4, 14, 3


class Classifier(nn.Module):
    """Patches, blocks, the mean, classes. The divisor's least is 1: 196 small features seldom sum to 100."""

    def __init__(self, concentrate: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, DIM, 2, 2)
        self.blocks = nn.Sequential(
            *(GlobalBlock(DIM, HEADS, denom_min=1.0, concentrate=concentrate, mlp_ratio=2.0) for _ in range(DEPTH))
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).movedim(1, -1))
        return self.head(self.norm(x).mean((1, 2)))


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 28, 28)`` of variance 1, and what they show, in an order of chance."""
    images, labels = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    large = interpolate(images.float().view(-1, 1, 8, 8), (28, 28), mode="bilinear")
    return ((large - large.mean()) / large.std())[order], labels[order]


def near(model: Classifier, images: Tensor, seed: int) -> float:
    """Share of the gradient's absolute values within ``NEAR`` of the token, by 32 tokens."""
    draw, at = torch.Generator().manual_seed(seed), torch.arange(SIDE)
    shares = []
    for image in images[:32]:
        x = model.patch(image[None]).movedim(1, -1).detach().requires_grad_()
        row, column = torch.randint(SIDE, (2,), generator=draw).tolist()
        out = model.blocks(x)[0, row, column]
        (found,) = torch.autograd.grad((out * torch.randn(DIM, generator=draw)).sum(), x)
        mass = found[0].abs().sum(-1)
        close = (at[:, None] - row).square() + (at - column).square() <= NEAR**2
        shares.append(mass[close].sum() / mass.sum())
    return float(torch.stack(shares).mean())


def train(concentrate: bool, seed: int, steps: int) -> tuple[float, float]:
    """Test accuracy and the share of the gradient that is near."""
    images, labels = digits()
    test = slice(1300, None)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Classifier(concentrate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        rows = torch.randint(1300, (32,), generator=draw)
        loss = cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(-1) == labels[test]).float().mean())
    return accuracy, near(model, images[test], seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'concentration':<15}{'accuracy':>10}{'near':>8}   each seed's")
    accuracy, share = {}, {}
    for concentrate in (False, True):
        found = [train(concentrate, seed, arguments.steps) for seed in range(arguments.seeds)]
        accuracy[concentrate], share[concentrate] = (sum(c) / len(found) for c in zip(*found, strict=True))
        each = "  ".join(f"{a:.3f} {s:.3f}" for a, s in found)
        name = "with" if concentrate else "without"
        print(f"{name:<15}{accuracy[concentrate]:>10.3f}{share[concentrate]:>8.3f}   {each}", flush=True)
    verdict(
        "l2vit",
        f"within {NEAR} tokens lies {share[True]:.3f} of the gradient with local concentration, {share[False]:.3f} "
        f"without; accuracy {accuracy[True]:.3f} and {accuracy[False]:.3f}",
        share[True] > share[False] and accuracy[True] > accuracy[False],
    )


if __name__ == "__main__":
    main()
