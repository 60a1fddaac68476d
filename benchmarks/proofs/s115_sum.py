"""Does a saliency network that is told the kind of image predict better where rules differ by kind?

    python benchmarks/proofs/s115_sum.py [--steps 800]

Pictures of 64 x 64 with five blobs on noise. In one kind people look at the brightest, in the other at the one nearest
the middle; nothing in the picture tells which. A small SUM that is told, and the same net that is always told kind 0,
from the same seed. Hosseini et al., 2024, arXiv 2406.17815.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glocal.bench.saliency import correlation, divergence, saliency_loss
from glocal.models.human.sum import SUM
from glocal.papers.verdict import verdict

SIDE, BLOBS, BATCH = 64, 5, 8


def pictures(draw: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(count, 3, SIDE, SIDE)``, kinds ``(count,)``, and where people look, ``(count, SIDE, SIDE)``."""
    at = torch.rand(count, BLOBS, 2, generator=draw) * (SIDE - 16) + 8
    bright = torch.rand(count, BLOBS, generator=draw) * 0.7 + 0.3
    kinds = torch.randint(2, (count,), generator=draw)
    rows = torch.arange(SIDE).float()
    far = (rows[:, None] - at[..., 0, None, None]) ** 2 + (rows - at[..., 1, None, None]) ** 2
    spots = (-far / (2 * 3.0**2)).exp()
    grey = (spots * bright[..., None, None]).sum(1) + 0.1 * torch.randn(count, SIDE, SIDE, generator=draw)
    middle = (at - SIDE / 2).square().sum(-1)
    chosen = torch.where(kinds == 0, bright.argmax(1), middle.argmin(1))
    looked = (-far[torch.arange(count), chosen] / (2 * 5.0**2)).exp()
    return grey[:, None].expand(-1, 3, -1, -1), kinds, looked


def trained(told: bool, steps: int) -> SUM:
    torch.manual_seed(0)
    model = SUM((16, 32, 64), (1, 1, 1), (1, 1, 1), drop_path=0.0, state=4, conditions=2).train()
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        images, kinds, looked = pictures(draw, BATCH)
        found = model(images, kinds if told else torch.zeros_like(kinds))[:, 0]
        saliency_loss(found, looked, looked > 0.5).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measured(model: SUM, told: bool) -> tuple[float, float]:
    """Mean correlation and divergence on new pictures."""
    images, kinds, looked = pictures(torch.Generator().manual_seed(2), 200)
    found = torch.cat(
        [model(images[at : at + 20], kinds[at : at + 20] if told else 0)[:, 0] for at in range(0, len(images), 20)]
    )
    return float(correlation(found, looked).mean()), float(divergence(found, looked).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    print("told the kind    CC     KL")
    figures = {}
    for told in (True, False):
        figures[told] = measured(trained(told, args.steps), told)
        print(f"{'yes' if told else 'no':12} {figures[told][0]:6.3f} {figures[told][1]:6.3f}", flush=True)
    (cc, kl), (cc0, kl0) = figures[True], figures[False]
    verdict(
        "sum",
        f"told the kind CC {cc:.3f} and KL {kl:.3f}, not told {cc0:.3f} and {kl0:.3f}",
        cc >= cc0 + 0.1 and kl <= 0.8 * kl0,
    )


if __name__ == "__main__":
    main()
