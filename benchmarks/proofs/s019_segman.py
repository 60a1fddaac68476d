"""Do the scans of LASS carry what the windows before them cannot reach?

    python benchmarks/proofs/s019_segman.py [--seeds 2] [--steps 200]

Pictures of 32 x 32 pixels: grey discs on noise, and in the upper left corner a mark of 4 x 4 pixels in one of two
colours. Each pixel is to be given its class: background, or on all discs the mark's colour. Two blocks with windows of
7 x 7, as LASS and as neighborhood attention alone, else equal. Accuracy on pixels of discs, up to 6 away from the mark,
where both may see it, and 17 or more, where two blocks of windows and convolutions cannot; chance is a half. Fu et al.,
2024, arXiv 2412.11890.

Every picture is shown in both colours in one batch: with colours at random, a batch's most frequent one moves the
logits by far more than what the scans carry at the start, and with four of them nothing was learned in 300 steps. Four
colours in one batch each stopped at telling one from the rest.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from glocal.models.vision.pyramid import Level, PyramidBlock
from glocal.nn import NeighborhoodAttention, Rope
from glocal.nn.lass import LASS
from glocal.papers.verdict import verdict

SIDE, MARK, NEAR, FAR, COLOURS, DIM, HEADS, WINDOW = 32, 4, 10, 20, 2, 24, 2, 7


def pictures(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each of ``count`` pictures in every colour, and the pixels' classes, 0 outside the discs.

    Images ``(count COLOURS, SIDE, SIDE, 1 + COLOURS)``, of grey and the mark's colours, and ``(count COLOURS, SIDE,
    SIDE)``.
    """
    grid = torch.arange(SIDE)
    centre = torch.randint(0, SIDE, (count, 8, 2), generator=draw)
    centre[:, :3] //= 3  # near the mark, so that windows have enough to learn from
    radius = 1 + 2 * torch.rand(count, 8, 1, 1, generator=draw)
    rows, columns = (grid - centre[..., axis, None] for axis in (0, 1))
    inside = (rows[..., :, None].square() + columns[..., None, :].square() < radius.square()).any(1)
    inside[:, : MARK + 1, : MARK + 1] = False
    image = 0.1 * torch.randn(count, SIDE, SIDE, 1 + COLOURS, generator=draw)
    image[..., 0] += 2 * inside
    images, classes = image.repeat(COLOURS, 1, 1, 1), torch.arange(1, 1 + COLOURS).repeat_interleave(count)
    images[torch.arange(len(images)), :MARK, :MARK, classes] += 4
    return images, torch.where(inside.repeat(COLOURS, 1, 1), classes[:, None, None], 0)


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
    """Shares of the discs' pixels that are right, before NEAR and from FAR on, of 64 new pictures in both colours."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = network(scan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    rare = torch.tensor([0.2] + [1.0] * COLOURS)  # nine pixels of ten are background
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y = pictures(8 // COLOURS, draw)
        nn.functional.cross_entropy(model(x).flatten(0, 2), y.flatten(), rare).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        x, y = pictures(64, torch.Generator().manual_seed(1000))
        right = torch.cat([model(part) for part in x.split(16)]).argmax(-1) == y
    away = torch.maximum(*torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    return right[(y > 0) & (away < NEAR)].float().mean().item(), right[(y > 0) & (away >= FAR)].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'mixer':<14}{'seed':>6}{'near':>10}{'far':>10}   accuracy on the discs, chance {1 / COLOURS:.0%}")
    near: dict[bool, list[float]] = {True: [], False: []}
    far: dict[bool, list[float]] = {True: [], False: []}
    for scan, name in ((True, "LASS"), (False, "windows alone")):
        for seed in range(arguments.seeds):
            close, away = accuracies(scan, seed, arguments.steps)
            near[scan].append(close)
            far[scan].append(away)
            print(f"{name:<14}{seed:>6}{close:>10.1%}{away:>10.1%}", flush=True)
    verdict(
        "segman",
        f"far from the mark {min(far[True]):.1%} of the discs' pixels are right with scans, at worst of "
        f"{arguments.seeds} seeds, and at best {max(far[False]):.1%} with windows alone, chance {1 / COLOURS:.0%}; "
        f"near it at worst {min(near[True]):.1%} and {min(near[False]):.1%}",
        min(far[True]) > 0.95 and max(far[False]) < 1 / COLOURS + 0.1,
    )


if __name__ == "__main__":
    main()
