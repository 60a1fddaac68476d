"""Can several heads of low rank do what one head of full rank does, with as many parameters for queries and keys?

    python benchmarks/proofs/s057_rank_heads.py [--seeds 2] [--steps 2000]

The nearest of 16 points on the sphere in 8 dimensions (`glocal.bench.nearest`), one layer without feed-forward: one
head of rank 8, 2 of rank 4, 4 of rank 2 and 8 of rank 1, and for comparison 32 of rank 1, which have four times the
parameters of queries and keys. The error is 1 for answers of zero. Amsel et al., 2024, arXiv 2407.16153.
"""

from __future__ import annotations

import argparse

import torch

from glocal.bench.nearest import NearestPoint, RankResult, rank_table, train_points
from glocal.bench.table import markdown
from glocal.nn import LowRankAttention
from glocal.papers.verdict import verdict

DIM, POINTS, QUERIES = 8, 16, 16
SHAPES = ((8, 1), (4, 2), (2, 4), (1, 8), (1, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, errors = NearestPoint(DIM, POINTS, QUERIES), {}
    for rank, heads in SHAPES:
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model = LowRankAttention(DIM, heads, rank=rank)
            found.append(train_points(model, task, steps=arguments.steps, seed=seed))
        errors[rank, heads] = sum(found) / len(found)
        print(f"rank {rank} x {heads:<3}" + "".join(f"{error:8.3f}" for error in found), flush=True)
    table = rank_table(RankResult(rank, heads, 1, error) for (rank, heads), error in errors.items())
    print("\n" + markdown(table.header, table.rows))
    low = [error for shape, error in errors.items() if shape != (8, 1)]
    verdict(
        "rank-heads",
        "error at the nearest of 16 points in 8 dimensions "
        + ", ".join(f"{error:.3f} by {heads} x rank {rank}" for (rank, heads), error in errors.items()),
        errors[8, 1] <= 0.1 and min(low) >= 0.35,
    )


if __name__ == "__main__":
    main()
