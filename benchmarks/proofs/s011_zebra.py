"""Does one global layer in four keep what all-global layers have, at a fraction of the scores?

    python benchmarks/proofs/s011_zebra.py [--seeds 3] [--steps 400]

The needle task (`glocal.bench.needle`), causal: four layers that are all global, global in every fourth place, or all
local with windows of 8, whose reach of 29 tokens ends short of the needle. Score entries are counted by the patterns.
Song et al., 2023, arXiv 2312.08618.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from glocal.bench.needle import Needle, train_needle
from glocal.nn import Attention, Rope, SlidingWindowAttention
from glocal.papers.verdict import verdict
from glocal.patterns import Causal, Sliding, is_global

DEPTH, WINDOW = 4, 8


def layers(period: int) -> list[Callable[[int], nn.Module]]:
    """``period`` 0 makes every layer local."""
    rope = Rope()

    def full(dim: int) -> nn.Module:
        return Attention(dim, 4, causal=True, rope=rope)

    def local(dim: int) -> nn.Module:
        return SlidingWindowAttention(dim, 4, window=WINDOW, causal=True, rope=rope)

    return [full if period and is_global(layer, period) else local for layer in range(DEPTH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    length = Needle().length
    whole, near = Causal().count(length), Sliding(WINDOW - 1, 0).count(length)
    mean, share = {}, {}
    print(f"{'layers':<12}{'scores':>8}  accuracy by seed")
    for name, period in (("all global", 1), ("zebra", DEPTH), ("all local", 0)):
        count = sum(whole if period and is_global(n, period) else near for n in range(DEPTH))
        share[name] = count / (DEPTH * whole)
        found = [train_needle(layers(period), steps=args.steps, seed=seed) for seed in range(args.seeds)]
        mean[name] = sum(f.accuracy for f in found) / args.seeds
        runs = "".join(f"  {f.accuracy:.3f} after {f.steps} steps" for f in found)
        print(f"{name:<12}{share[name]:>8.1%}{runs}")
    same = mean["zebra"] >= mean["all global"] - 0.03
    more = mean["zebra"] >= mean["all local"] + 0.5
    verdict(
        "zebra",
        f"needle accuracy {mean['zebra']:.2f} with {share['zebra']:.0%} of the scores, {mean['all global']:.2f} all "
        f"global, {mean['all local']:.2f} all local",
        same and more and share["zebra"] <= 0.4,
    )


if __name__ == "__main__":
    main()
