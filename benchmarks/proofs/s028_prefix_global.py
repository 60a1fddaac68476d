"""Does a global prefix do what full attention does, for a fraction of the scores?

    python benchmarks/proofs/s028_prefix_global.py [--seeds 3] [--steps 700]

The needle task (`glocal.bench.needle`) for encoders: 128 symbols, the needle at least 64 away from what is read.
Two layers: full attention, a prefix of 8 with radius 7, and radius 7 alone, all with T5's biases. The first symbol is
read, which is in the prefix; then the last one, whose answer has to come through the prefix, in two steps. Training
stops early where the answers are right. Burns et al., 2023, arXiv 2305.03668.
"""

from __future__ import annotations

import argparse

import torch

from glocal.bench.needle import Needle, train_needle
from glocal.nn import PrefixGlobalAttention
from glocal.papers.verdict import verdict

LENGTH, PREFIX, RADIUS = 128, 8, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    torch.set_num_threads(1)

    inside, outside = (Needle(LENGTH, 64, causal=False, at=at) for at in (0, LENGTH - 1))
    runs = {
        "full": (LENGTH, inside),
        "prefix": (PREFIX, inside),
        "local": (0, inside),
        "prefix, read outside": (PREFIX, outside),
    }
    mean = {}
    for name, (prefix, task) in runs.items():
        layers = [lambda dim, p=prefix: PrefixGlobalAttention(dim, 4, prefix=p, radius=RADIUS, num_buckets=32)] * 2
        found = [train_needle(layers, task, steps=options.steps, seed=seed) for seed in range(options.seeds)]
        mean[name] = sum(f.accuracy for f in found) / options.seeds
        print(f"{name:<22}" + "".join(f"  {f.accuracy:.3f} after {f.steps} steps" for f in found))
    pattern = PrefixGlobalAttention(64, 4, prefix=PREFIX, radius=RADIUS).pattern(LENGTH)
    share = pattern.count(LENGTH) / LENGTH**2
    verdict(
        "prefix-global",
        f"needle accuracy {mean['prefix']:.2f} with a prefix, {mean['full']:.2f} full, {mean['local']:.2f} local; "
        f"{mean['prefix, read outside']:.2f} read outside the prefix; {share:.0%} of the scores",
        mean["prefix"] > mean["full"] - 0.03 and mean["prefix"] > mean["local"] + 0.4 and share <= 0.35,
    )


if __name__ == "__main__":
    main()
