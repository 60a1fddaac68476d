"""Is there a length from which on a local window is cheaper than full attention, and do the fits that give it hold?

    python benchmarks/proofs/s061_cab.py [--repeats 9] [--all]

Explicit softmax attention against blocks that see themselves and both neighbours (blocks of 32), 4 heads of 32, at 64
to 4,096 tokens, in the process's own time on one thread, the median of nine. A parabola through the first and a line
through the second meet at the efficiency length. The claim: both fits explain at least 0.98, and the length lies
between 0 and 1,024; with the memory of the scores, counted and not measured, it is within a tenth of the closed form.
With ``--all`` also the efficiency lengths of every mechanism of the library as it is used, against plain attention by
its fastest kernel. Zhang et al., 2022, arXiv 2210.07661.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from glocal.bench.cab import efficiency_length
from glocal.bench.mechanisms import Settings, cheaper_from, compare_mechanisms
from glocal.papers.verdict import verdict

LENGTHS, HEADS, DIM, BLOCK = (64, 128, 256, 512, 1024, 2048, 4096), 4, 32, 32


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * DIM**-0.5).softmax(-1) @ v


def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each block of queries over the block before, itself and the block after; outside are zeros."""
    blocks = q.unflatten(1, (-1, BLOCK))
    wide = [torch.nn.functional.pad(t, (0, 0, BLOCK, BLOCK)).unfold(1, 3 * BLOCK, BLOCK) for t in (k, v)]
    return ((blocks @ wide[0] * DIM**-0.5).softmax(-1) @ wide[1].mT).flatten(1, 2)


def seconds(work: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, repeats: int) -> float:
    q, k, v = torch.randn(3, HEADS, length, DIM).unbind()
    work(q, k, v)
    found = []
    for _ in range(repeats):
        begin, count = time.process_time(), 0
        while time.process_time() - begin < 2e-3:  # the clock is coarse
            work(q, k, v)
            count += 1
        found.append((time.process_time() - begin) / count)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        times = {
            name: [seconds(work, n, arguments.repeats) for n in LENGTHS]
            for name, work in (("full", full), ("local", local))
        }
    print("| tokens | full, ms | local, ms |\n| ---: | ---: | ---: |")
    for n, a, b in zip(LENGTHS, times["full"], times["local"], strict=True):
        print(f"| {n:,} | {1e3 * a:.3f} | {1e3 * b:.3f} |")
    found = efficiency_length(LENGTHS, times["full"], times["local"])
    scores = [HEADS * n * n for n in LENGTHS], [HEADS * n * 3 * BLOCK for n in LENGTHS]
    counted = efficiency_length(LENGTHS, *map(list, scores)).length
    print(f"numbers of the scores alone: {counted} tokens; the closed form says {3 * BLOCK}")
    if arguments.all:
        result = compare_mechanisms(Settings(("all",), (), lengths=(256, 512, 1024, 2048)))
        print("\n| mechanism | 2,048 tokens, ms | efficiency length | fits |\n| --- | ---: | ---: | --- |")
        for row in result.rows[1:]:
            met, fits = cheaper_from(row, result.rows[0])
            print(f"| {row.mechanism} | {1e3 * row.seconds.get(2048, float('nan')):.1f} | {met} | {fits} |", flush=True)
    length = found.length
    holds = (
        min(found.vanilla, found.method) >= 0.98
        and length is not None
        and 0 < length < 1024
        and counted is not None
        and abs(counted / (3 * BLOCK) - 1) <= 0.1
    )
    said = "none" if length is None else f"{length:,.0f}"
    verdict(
        "cab",
        f"efficiency length of a local window {said} tokens, the fits explain {found.vanilla:.4f} (parabola) and "
        f"{found.method:.4f} (line); by counted scores {counted:.0f}, closed form {3 * BLOCK}",
        holds,
    )


if __name__ == "__main__":
    main()
