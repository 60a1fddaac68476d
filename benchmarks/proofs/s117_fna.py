"""Three ways to compute neighborhood attention on a 64 x 64 map: what do they take in time and in memory?

    python benchmarks/proofs/s117_fna.py [--repeats 3]

Forward passes on a CPU, one thread, 4 heads of 32, windows of 7, 13 and 21: keys gathered by index (naive), tiles with
a contiguous halo (windowed), and fused (`attend`). Times are medians, the ways in turn; memory is the peak of what
tensors hold beyond the inputs, from the profiler's record of allocations. Hassani et al., 2024, arXiv 2403.04690.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from glocal import Window, attend
from glocal.kernels.neighborhood import neighborhood_attention
from glocal.papers.verdict import verdict

GRID, HEADS, DIM, SIZES = (64, 64), 4, 32, (7, 13, 21)

Way = Callable[[], Tensor]


def peak(call: Way) -> int:
    """Bytes that tensors hold at most during a call, beyond what they held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = highest = 0
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, *GRID, DIM, generator=generator) for _ in range(3))

    seconds: dict[str, list[float]] = {"naive": [], "windowed": [], "fused": []}
    memory: dict[str, list[int]] = {name: [] for name in seconds}
    print(f"{'window':<8} {'way':<9} {'ms':>9} {'MiB':>8}  largest difference to fused")
    with torch.inference_mode():
        for size in SIZES:
            where = Window(size)
            ways: dict[str, Way] = {
                "naive": lambda where=where: neighborhood_attention(q, k, v, where, path="naive")[0],
                "windowed": lambda where=where: neighborhood_attention(q, k, v, where, path="windowed")[0],
                "fused": lambda where=where: attend(q, k, v, where),
            }
            outs = {name: way() for name, way in ways.items()}
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(repeats):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    times[name].append(time.perf_counter() - start)
            for name, way in ways.items():
                torch.testing.assert_close(outs[name], outs["fused"], atol=1e-5, rtol=1e-5)
                seconds[name].append(statistics.median(times[name]))
                memory[name].append(peak(way))
                apart = float((outs[name] - outs["fused"]).abs().max())
                print(
                    f"{size:<8} {name:<9} {1e3 * seconds[name][-1]:>9.1f} {memory[name][-1] / 2**20:>8.1f}  {apart:.1e}"
                )

    # Linear in the keys of a window: what two sizes of window say of the third, within a tenth.
    keys = [size * size for size in SIZES]
    linear = True
    for name in ("naive", "windowed"):
        low, middle, high = memory[name]
        line = low + (high - low) * (keys[1] - keys[0]) / (keys[2] - keys[0])
        linear = linear and abs(middle / line - 1) < 0.1 and high > 5 * low
    flat = max(memory["fused"]) < 1.1 * min(memory["fused"])
    gain = [a / b for a, b in zip(seconds["naive"], seconds["windowed"], strict=True)]
    more = [a / b for a, b in zip(seconds["naive"], seconds["fused"], strict=True)]

    def row(values: list[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    mib = {name: row([m / 2**20 for m in memory[name]], 1) for name in memory}
    verdict(
        "fna",
        f"windows of 7, 13, 21 on 64 x 64: tiles {row(gain, 1)} times as fast as gathering, fused {row(more, 0)}; "
        f"memory {mib['naive']} MiB gathering, {mib['windowed']} tiles, {mib['fused']} fused; outputs equal to 1e-5",
        linear and flat and min(gain) > 1,
    )


if __name__ == "__main__":
    main()
