"""Do mean keys find the block that matters, and do chosen blocks carry what a window of as many keys cannot?

    python benchmarks/proofs/s114_moba.py [--seeds 3]

A planted needle, without training: 1,024 random keys, one of them moved towards the query, the two past blocks with the
best mean keys chosen. Then the needle task (`glocal.bench.needle`), trained: two layers that read 3 blocks of 8,
against a sliding window of 24 keys. Lu et al., 2025, arXiv 2502.13189.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from glocal.bench.needle import train_needle
from glocal.condense import best, pool_blocks
from glocal.nn import Attention, MixtureOfBlocksAttention, Rope, SlidingWindowAttention
from glocal.papers.verdict import verdict

KEYS, TRIALS, BLOCKS = 1024, 2000, (8, 16, 32, 64)


def recall(dim: int, size: int, generator: torch.Generator) -> float:
    """Share of trials in which one of the two best blocks holds the key that was moved by the query's direction."""
    found = 0
    for _ in range(TRIALS // 200):
        q = torch.randn(200, dim, generator=generator)
        k = torch.randn(200, KEYS, dim, generator=generator)
        at = torch.randint(KEYS, (200,), generator=generator)
        k[torch.arange(200), at] += q
        scores = (pool_blocks(k, size) @ q.unsqueeze(-1)).squeeze(-1)
        found += int((best(scores, 2) == (at // size)[:, None]).any(-1).sum())
    return found / TRIALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    print(f"{'head dim':<10}" + "".join(f"{f'block {b}':>10}" for b in BLOCKS))
    table = {dim: [recall(dim, b, generator) for b in BLOCKS] for dim in (16, 64)}
    for dim, row in table.items():
        print(f"{dim:<10}" + "".join(f"{r:>10.3f}" for r in row))
    chance = [2 * b / KEYS for b in BLOCKS]
    print(f"{'chance':<10}" + "".join(f"{c:>10.3f}" for c in chance))
    gain = [r / c for r, c in zip(table[64], chance, strict=True)]
    rises = all(a < b for a, b in zip(table[16], table[64], strict=True)) and gain == sorted(gain, reverse=True)

    rope = Rope()
    layers: dict[str, Callable[[int], nn.Module]] = {
        "full": lambda dim: Attention(dim, 4, causal=True, rope=rope),
        "blocks": lambda dim: MixtureOfBlocksAttention(dim, 4, block_size=8, top_k=3, causal=True, rope=rope),
        "window": lambda dim: SlidingWindowAttention(dim, 4, window=24, causal=True, rope=rope),
    }
    mean = {}
    for name, layer in layers.items():
        found = [train_needle([layer] * 2, seed=seed) for seed in range(seeds)]
        mean[name] = sum(f.accuracy for f in found) / seeds
        print(f"{name:<10}" + "".join(f"  {f.accuracy:.3f} after {f.steps} steps" for f in found))
    verdict(
        "moba",
        f"needle accuracy {mean['blocks']:.2f} with 24 chosen keys, {mean['window']:.2f} with a window of 24, "
        f"{mean['full']:.2f} full; untrained recall {table[64][0]:.2f} at blocks of 8 (chance {chance[0]:.2f}), "
        f"{table[64][-1]:.2f} at 64 ({chance[-1]:.2f})",
        rises and mean["blocks"] > mean["window"] + 0.3,
    )


if __name__ == "__main__":
    main()
