"""Do the scans of LASS carry what the windows before them cannot reach?

    python benchmarks/proofs/_s019_segman.py [--seeds 2] [--steps 250]

Pictures of 32 x 32 pixels: grey discs on noise, and in the upper left corner a mark of 3 x 3 pixels, one of four
colours. Each pixel is to be given its class: background, or on all discs the mark's colour. Two blocks with windows of
7 x 7, as LASS and as neighborhood attention alone, else equal. Accuracy on pixels of discs, near the mark and 20 or
more away, where two blocks of windows and convolutions cannot see it; chance is a quarter. Fu et al., 2024, arXiv
2412.11890.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from glocal.models.vision.pyramid import Level, PyramidBlock
from glocal.nn import NeighborhoodAttention, Rope
from glocal.nn.lass import LASS
from glocal.papers.verdict import verdict

SIDE, COLOURS, FAR, DIM, HEADS, WINDOW = 32, 4, 20, 24, 2, 7


def pictures(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(count, SIDE, SIDE, 5)`` (grey, and the mark's colours), classes ``(count, SIDE, SIDE)``, 0 outside."""
    grid = torch.arange(SIDE)
    centre = torch.randint(0, SIDE, (count, 8, 2), generator=draw)
    radius = 1 + 2 * torch.rand(count, 8, 1, 1, generator=draw)
    rows, columns = (grid - centre[..., axis, None] for axis in (0, 1))
    inside = (rows[..., :, None].square() + columns[..., None, :].square() < radius.square()).any(1)
    inside[:, :4, :4] = False
    colour = torch.randint(0, COLOURS, (count,), generator=draw)
    image = 0.3 * torch.randn(count, SIDE, SIDE, 1 + COLOURS, generator=draw)
    image[..., 0] += 2 * inside
    image[torch.arange(count), :3, :3, 1 + colour] += 2
    return image, torch.where(inside, 1 + colour[:, None, None], 0)


def network(scan: bool) -> nn.Module:
    """Two blocks and a classifier of pixels."""

    def mixer(_: int) -> nn.Module:
        if scan:
            return LASS(DIM, HEADS, WINDOW)
        return NeighborhoodAttention(DIM, HEADS, WINDOW, rope=Rope(axes=2, interleaved=True, endpoint=True), lepe=5)

    level = Level(DIM, 2, 2.0, mixer)
    blocks = (PyramidBlock(level, n, positions=2) for n in range(level.depth))
    return nn.Sequential(nn.Linear(1 + COLOURS, DIM), *blocks, nn.LayerNorm(DIM), nn.Linear(DIM, 1 + COLOURS))


def accuracies(scan: bool, seed: int, steps: int) -> tuple[float, float]:
    """Shares of the discs' pixels that are right, nearer than FAR to the mark and not, on 128 new pictures."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = network(scan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rare = torch.tensor([0.2] + [1.0] * COLOURS)  # nine pixels of ten are background
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y = pictures(8, draw)
        nn.functional.cross_entropy(model(x).flatten(0, 2), y.flatten(), rare).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        x, y = pictures(128, torch.Generator().manual_seed(1000))
        right = torch.cat([model(part) for part in x.split(16)]).argmax(-1) == y
    away = torch.maximum(*torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")) >= FAR
    return right[(y > 0) & ~away].float().mean().item(), right[(y > 0) & away].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'mixer':<14}{'seed':>6}{'near':>10}{'far':>10}   accuracy on the discs, chance {1 / COLOURS:.0%}")
    far: dict[bool, list[float]] = {True: [], False: []}
    for scan, name in ((True, "LASS"), (False, "windows alone")):
        for seed in range(arguments.seeds):
            near, away = accuracies(scan, seed, arguments.steps)
            far[scan].append(away)
            print(f"{name:<14}{seed:>6}{near:>10.1%}{away:>10.1%}", flush=True)
    verdict(
        "segman",
        f"far from the mark {min(far[True]):.1%} of the discs' pixels are right with scans, at worst of "
        f"{arguments.seeds} seeds, and at best {max(far[False]):.1%} with windows alone, chance {1 / COLOURS:.0%}",
        min(far[True]) > 0.95 and max(far[False]) < 1 / COLOURS + 0.1,
    )


if __name__ == "__main__":
    main()
