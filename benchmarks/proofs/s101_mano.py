"""Do coarser copies of a map give window attention what it needs for a global problem, at a linear cost?

    python benchmarks/proofs/s101_mano.py [--steps 400] [--seeds 1]

Darcy flow on 32 x 32 cells (`glocal.bench.darcy`), 400 bodies to learn from and 100 to be tested on: from what the body
lets through, 3 or 12, and two coordinates to the pressure. MANO's network with windows of 4 x 4 on three levels, the
same network with one level, and with full attention, as in a ViT of pixels. The scores that are computed for a pixel
are counted on maps of 32, 64 and 128. Colagrande et al., 2025, arXiv 2507.02748.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from glocal.bench.darcy import darcy, relative_error
from glocal.models.vision.mano import MANOOperator
from glocal.nn.multipole import multipole_levels
from glocal.papers.verdict import verdict
from glocal.patterns import Block

SIDE, TRAIN, TEST, BATCH, WINDOW, DIM, DEPTH, HEADS = 32, 400, 100, 16, 4, 24, 3, 2


def maps(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """What is given, ``(count, 3, 32, 32)``, and the pressure, a hundred times as large."""
    data = darcy(count, SIDE, seed=seed)
    line = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    at = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(count, -1, -1, -1)
    return torch.cat([(data.a - 7.5) / 4.5, 4 * at], 1), 100 * data.u


def train(levels: int, window: int, seed: int, steps: int, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> float:
    """Relative error on the test bodies."""
    torch.manual_seed(seed)
    model = MANOOperator(3, 1, dim=DIM, depth=DEPTH, num_heads=HEADS, window=window, levels=levels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        given, wanted = x[rows], y[rows]
        if torch.rand((), generator=generator) < 0.5:  # the square turned over is another body
            given, wanted = given.transpose(2, 3)[:, [0, 2, 1]], wanted.transpose(2, 3)
        loss = relative_error(model(given), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part) for part in test[0].split(20)])
    return float(relative_error(found, test[1]))


def scores(side: int) -> float:
    """Pairs of a query and a key for each pixel, over all levels."""
    levels = multipole_levels(side, WINDOW)
    return sum(Block(WINDOW).count((side >> level,) * 2) for level in range(levels)) / side**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)

    cost = {side: scores(side) for side in (32, 64, 128)}
    print("scores a pixel: " + ", ".join(f"{n:.2f} at {side} x {side}" for side, n in cost.items()))
    x, y = maps(TRAIN, 0)
    test = maps(TEST, 1)
    mean = float(relative_error(y.mean(0, keepdim=True).expand_as(test[1]), test[1]))
    print(f"{'the mean pressure':<20}{mean:>8.3f}")
    error = {}
    for name, levels, window in (("windows", 1, WINDOW), ("three levels", 3, WINDOW), ("all pixels", 1, SIDE)):
        found = [train(levels, window, seed, options.steps, x, y, test) for seed in range(options.seeds)]
        error[name] = sum(found) / len(found)
        each = "  ".join(f"{f:.3f}" for f in found)
        print(f"{name:<20}{error[name]:>8.3f}   {each}", flush=True)
    less = 1 - error["three levels"] / error["windows"]
    flat = max(cost.values()) / min(cost.values())
    verdict(
        "mano",
        f"relative error of the pressure {error['three levels']:.3f} on three levels, {error['windows']:.3f} on one "
        f"({less:.0%} lower; {error['all pixels']:.3f} where all pixels see each other, at {SIDE**2} scores a pixel; "
        f"the mean pressure {mean:.3f}); scores a pixel {cost[32]:.2f} at 32 x 32, {cost[128]:.2f} at 128 x 128",
        less >= 0.25 and flat < 1.05,
    )


if __name__ == "__main__":
    main()
