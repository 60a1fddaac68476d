"""Does the simulator order settings as a clock does? A loop that skips tiles, on a 64 x 64 map, for four strides.

    python benchmarks/proofs/s078_gna.py [--repeats 7]

The loop takes one query tile at a time and the key tiles that its windows meet, cut from the fixed grid of key tiles;
what is computed is checked against attention under the dense mask. Times are medians, runs interleaved, one thread.
Key tiles of 2 x 2 tell all four strides apart; with 8 x 8 the first three visit alike, and any order of them is noise.
Hassani et al., 2025, arXiv 2504.16922.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from glocal.papers.verdict import verdict
from glocal.patterns import Full, Pattern, Window
from glocal.patterns.cost import Cost, simulate

GRID, DIM, HEADS, SIZE = (64, 64), 32, 2, 16
STRIDES = (1, 4, 8, 16)
TILES = ((16, 2), (8, 8))  # query and key tile, on both axes; the first one decides


@dataclass(frozen=True)
class Step:
    """A query tile, the keys of the tiles that it visits, and the pairs that are live (None: all)."""

    rows: tuple[slice, slice]
    keys: tuple[slice, slice]
    live: Tensor | None


def plan(pattern: Pattern, query_tile: int, key_tile: int) -> tuple[list[Step], int]:
    """The steps of the loop and how many key tiles they visit, from the intervals of the pattern's one box."""
    (box,) = pattern.boxes(GRID)
    steps, visited = [], 0
    for corner in product(*[range(0, n, query_tile) for n in GRID]):
        rows, keys, live, tiles = [], [], [], 1
        for begin, length, spans in zip(corner, GRID, box.axes, strict=True):
            rows.append(slice(begin, begin + query_tile))
            lo, hi = spans.lo[rows[-1]], spans.hi[rows[-1]]
            first, last = int(lo.min()) // key_tile, -(-int(hi.max()) // key_tile)
            keys.append(slice(first * key_tile, min(last * key_tile, length)))
            at = torch.arange(keys[-1].start, keys[-1].stop)
            live.append((at >= lo[:, None]) & (at < hi[:, None]))
            tiles *= last - first
        visited += tiles
        pairs = (live[0][:, None, :, None] & live[1][None, :, None, :]).flatten(2, 3).flatten(0, 1)
        steps.append(Step((rows[0], rows[1]), (keys[0], keys[1]), None if bool(pairs.all()) else pairs))
    return steps, visited


def skip(steps: list[Step], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``(H, 64, 64, D)`` by the loop."""
    out = torch.empty_like(q)
    for step in steps:
        a, b, c = (t[:, *at].flatten(1, 2) for t, at in ((q, step.rows), (k, step.keys), (v, step.keys)))
        logits = a @ b.mT * DIM**-0.5
        if step.live is not None:
            logits.masked_fill_(~step.live, -torch.inf)
        part = logits.softmax(-1) @ c
        out[:, *step.rows] = part.unflatten(1, out[:, *step.rows].shape[1:3])
    return out


def ranks(values: list[float]) -> Tensor:
    """Ranks, the mean one for equals."""
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double()


def spearman(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def measure(query_tile: int, key_tile: int, repeats: int, qkv: tuple[Tensor, Tensor, Tensor]) -> float:
    """Print one table and give the rank correlation of simulated and measured cost over the strides."""
    patterns: dict[str, Pattern] = {f"stride {s}": Window(SIZE, stride=s) for s in STRIDES}
    patterns["full"] = Full()
    plans: dict[str, list[Step]] = {}
    costs: dict[str, Cost] = {}
    for name, pattern in patterns.items():
        plans[name], visited = plan(pattern, query_tile, key_tile)
        costs[name] = simulate(pattern, GRID, query_tile, key_tile)
        assert visited == round(costs[name].mean * len(plans[name])), "the loop visits what was simulated"
        dense = sdpa(*(t.flatten(1, 2) for t in qkv), attn_mask=pattern.mask(GRID)).unflatten(1, GRID)
        torch.testing.assert_close(skip(plans[name], *qkv), dense, atol=1e-5, rtol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in patterns}
    for _ in range(repeats):
        for name, steps in plans.items():
            start = time.perf_counter()
            skip(steps, *qkv)
            times[name].append(time.perf_counter() - start)
    taken = {name: statistics.median(runs) for name, runs in times.items()}
    print(
        f"\nquery tiles {query_tile} x {query_tile}, key tiles {key_tile} x {key_tile}: outputs equal the dense mask's"
    )
    print(f"{'setting':<10} {'tiles':>8} {'bound':>7} {'ms':>8} {'speedup':>8} {'FLOP bound':>11}  perfect")
    for name, cost in costs.items():
        ms, gain = 1e3 * taken[name], taken["full"] / taken[name]
        print(
            f"{name:<10} {cost.mean:>8.2f} {cost.bound:>7.2f} {ms:>8.2f} {gain:>8.2f} {cost.flop_bound:>11.2f}"
            f"  {'yes' if cost.perfect else 'no'}"
        )
    settings = [name for name in patterns if name != "full"]
    rho = spearman([costs[n].mean for n in settings], [taken[n] for n in settings])
    print(f"Spearman rank correlation of simulated and measured cost over the strides: {rho:.3f}")
    return rho


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, *GRID, DIM, generator=generator) for _ in range(3))
    with torch.inference_mode():
        rhos = [measure(*tiles, repeats, (q, k, v)) for tiles in TILES]
    print()
    verdict("gna", f"simulated and measured cost of the strides, rank correlation {rhos[0]:.3f}", rhos[0] > 1 - 1e-9)


if __name__ == "__main__":
    main()
