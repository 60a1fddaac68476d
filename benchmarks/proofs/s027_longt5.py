"""Do transient global tokens carry what lies outside every local window?

    python benchmarks/proofs/s027_longt5.py [--seeds 3] [--steps 700]

The needle task (`glocal.bench.needle`) for encoders: 128 symbols, the first one is read, the needle is at least 64
away. Two layers of radius 7, so that local attention alone reaches 14 symbols; with and without one global token for
each block of 8. Training stops early where the answers are right. Guo et al., 2021, arXiv 2112.07916.
"""

from __future__ import annotations

import argparse

import torch

from glocal.bench.needle import CLASSES, Needle, train_needle
from glocal.nn import LongT5Attention
from glocal.papers.verdict import verdict

LENGTH, RADIUS, SIZE = 128, 7, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    torch.set_num_threads(1)

    task, mean = Needle(LENGTH, 64, causal=False), {}
    for name, size in {"local": None, "tglobal": SIZE}.items():
        layers = [lambda dim, size=size: LongT5Attention(dim, 4, radius=RADIUS, global_block_size=size)] * 2
        found = [train_needle(layers, task, steps=options.steps, seed=seed) for seed in range(options.seeds)]
        mean[name] = sum(f.accuracy for f in found) / options.seeds
        print(f"{name:<10}" + "".join(f"  {f.accuracy:.3f} after {f.steps} steps" for f in found))
    band = LENGTH * (2 * RADIUS + 1) - RADIUS * (RADIUS + 1)
    scores = (band + LENGTH * (LENGTH // SIZE)) / LENGTH**2
    chance = 1 / CLASSES
    verdict(
        "longt5",
        f"needle accuracy {mean['tglobal']:.2f} with global tokens, {mean['local']:.2f} without (chance {chance:.2f}), "
        f"for {scores:.0%} of the scores of full attention",
        mean["tglobal"] > 0.85 and abs(mean["local"] - chance) < 0.05,
    )


if __name__ == "__main__":
    main()
