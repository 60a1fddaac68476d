"""Time and memory of every sparse mechanism from 1,024 to 32,768 tokens, against full attention on equal sizes.

    python benchmarks/cost_curves.py [--only moba ...] [--longest 32768] [--write]

A layer's forward pass without gradients, batch 1, 256 channels, 4 heads, random weights, its projections included;
each with the sizes that its name gives, otherwise the layer's defaults. Queries and keys are random, so that what
is chosen by data is scattered, and choosing gains less than it would on text.
Time is the median of three calls after one that is not counted; memory is the peak beyond what was held before.
The exponent is that of a power law fitted to the times from 4,096 tokens on: 1 is linear, 2 is quadratic. ``--write``
puts the table into docs/costs.md and the picture into docs/pictures/costs.png.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glocal import nn as layers
from glocal.bench.probe import resident
from glocal.models.vision.fit import FIT

ROOT = Path(__file__).resolve().parents[1]
DIM, HEADS, PATIENCE = 256, 4, 25.0
LENGTHS = [1024 * 2**n for n in range(6)]


@dataclass(frozen=True)
class Case:
    """A mechanism: makes a function of tokens ``(1, N, dim)`` for a length; ``claim`` is its cost as papers put it."""

    paper: str
    make: Callable[[int], nn.Module]
    claim: str
    square: bool = False
    """Tokens are a square image; lengths are then powers of four."""


class Fit(nn.Module):
    """A far-reaching interleaved transformer as a mixer of tokens; groups of about N^(1/3) tokens, 4 latents each."""

    causal = False

    def __init__(self, length: int) -> None:
        super().__init__()
        tokens = 2 ** round(math.log2(length) / 3)
        self.tokens, sizes = tokens, {"dim": DIM, "latent_dim": DIM, "num_heads": HEADS, "latent_heads": HEADS}
        self.fit = FIT("(1)1(1)", DIM, groups=length // tokens, tokens=tokens, latents=4, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.fit.features(x.unflatten(1, (-1, self.tokens)))
        return states


def layer(kind: type[layers.Attention], *args: Any, causal: bool = True, **settings: Any) -> Callable[[int], nn.Module]:
    """Makes the layer, whatever the length."""
    return lambda length: kind(DIM, HEADS, *args, causal=causal, **settings)


both = {"causal": False}
CASES: dict[str, Case] = {
    "full causal": Case("", layer(layers.Attention), "N^2"),
    "full": Case("", layer(layers.Attention, **both), "N^2"),
    "sliding window 512": Case("S011", layer(layers.SlidingWindowAttention, window=512), "N w"),
    "multi-scale windows": Case(
        "S109", layer(layers.MultiScaleWindowAttention, windows=(128, 256, 512, 1024)), "N mean(w)"
    ),
    "shifted groups of 512": Case("S012", layer(layers.ShiftedSparseAttention, group_size=512), "N (g + sinks)"),
    "NSA": Case("S016", layer(layers.NativeSparseAttention, num_kv_heads=1), "N^2 / 16 for scores, N (n l + w)"),
    "ASA, global layer": Case(
        "S016",
        layer(layers.LatentSparseAttention, rank=64, rope_dim=32, branches=("compress", "select")),
        "N^2 / 16 for scores, N n l",
    ),
    "ASA, local layer": Case(
        "S016", layer(layers.LatentSparseAttention, rank=64, rope_dim=32, branches=("slide",), window=512), "N w"
    ),
    "all or here, a tenth all": Case(
        "S024", layer(layers.AllOrHereAttention, window=128, offset=-0.41), "N (p N + (1 - p) w)"
    ),
    "LongT5, transient global": Case("S027", layer(layers.LongT5Attention, **both), "N (3 b + N / 16)"),
    "prefix global 128": Case("S028", layer(layers.PrefixGlobalAttention, prefix=128, **both), "N (P + 2 r)"),
    "neighborhood 7 x 7": Case("S064", layer(layers.NeighborhoodAttention, **both), "N k^2", True),
    "dilated 7 x 7": Case("S064", layer(layers.NeighborhoodAttention, dilation=4, **both), "N k^2", True),
    "blocked 16 x 16": Case(
        "S078", layer(layers.NeighborhoodAttention, window=16, stride=16, **both), "N k^2, perfect tiles", True
    ),
    "block sparse, a tenth": Case(
        "S067", layer(layers.BlockSparseAttention, patches=(16, 16), ratio=0.1, mass=0.0, **both), "0.1 N^2"
    ),
    "descriptors, factor 4": Case(
        "S072", layer(layers.DescriptorAttention, patches=(16, 16), factor=4, **both), "N^2 / 16"
    ),
    "dynamic mask 512": Case("S077", layer(layers.DynamicMaskAttention, top_k=512), "N w"),
    "multi-window": Case(
        "S085", layer(layers.MultiWindowAttention, windows=(16, 64, 256, 0), **both), "N w, one head N^2"
    ),
    "core context": Case("S087", layer(layers.CoreContextAttention, window=512), "N (N / 16 + s)"),
    "unidirectional blocks 16": Case(
        "S093", layer(layers.UnidirectionalBlockAttention, block_size=16, **both), "N 4 b^2", True
    ),
    "searched roles": Case("S100", layer(layers.NeuralAttentionSearch), "N live; untrained roles"),
    "mixture of blocks": Case("S114", layer(layers.MixtureOfBlocksAttention), "N^2 / B for scores, N k B"),
    "FIT, whole network": Case("S116", Fit, "N^(4/3)"),
}


def measure(layer: nn.Module, x: Tensor) -> tuple[float, int]:
    """Seconds of a call and bytes at its peak."""
    with torch.no_grad():
        start = time.perf_counter()
        layer(x)
        first = time.perf_counter() - start
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left must not hide what this one takes
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        times = []
        for _ in range(1 if first > 5 else 3):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
        return statistics.median(times), max(0, resident("VmHWM") - before)


def exponent(points: dict[int, float]) -> float:
    """The slope of log time over log length, by least squares, from 4,096 tokens on."""
    chosen = [(math.log(n), math.log(t)) for n, t in points.items() if n >= 4096]
    if len(chosen) < 2:
        return math.nan
    mean = [sum(c) / len(chosen) for c in zip(*chosen, strict=True)]
    top = sum((a - mean[0]) * (b - mean[1]) for a, b in chosen)
    return top / sum((a - mean[0]) ** 2 for a, _ in chosen)


def curve(case: Case, longest: int) -> tuple[dict[int, float], dict[int, int]]:
    """Seconds and bytes by length, as far as patience goes."""
    seconds: dict[int, float] = {}
    peak: dict[int, int] = {}
    for n in LENGTHS:
        if n > longest:
            break
        side = math.isqrt(n)
        if case.square and side * side != n:
            continue
        torch.manual_seed(0)
        x = torch.randn(1, side, side, DIM) if case.square else torch.randn(1, n, DIM)
        seconds[n], peak[n] = measure(case.make(n).eval(), x)
        if seconds[n] * (16 if case.square else 4) > PATIENCE:
            break
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of mechanisms")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--write", action="store_true", help="write docs/costs.md and docs/pictures/costs.png")
    args = parser.parse_args()
    unknown = set(args.only) - set(CASES)
    if unknown:
        parser.error(f"no mechanism is called {' or '.join(sorted(unknown))}; they are {', '.join(CASES)}")
    print(__doc__.splitlines()[0])
    head = [
        "mechanism",
        "paper",
        *(f"{n // 1024}k ms" for n in LENGTHS),
        "peak MiB",
        "exponent",
        "against full",
        "claim",
    ]
    print(" | ".join(head))
    rows, curves, full = [], {}, {}
    for name, case in CASES.items():
        if args.only and name not in args.only and not name.startswith("full"):
            continue
        seconds, peak = curve(case, args.longest)
        curves[name] = seconds
        if name.startswith("full"):
            full[case.make(1024).causal] = seconds
        whole = full[getattr(case.make(1024), "causal", False)]
        shared = max(set(whole) & set(seconds))
        ratio = whole[shared] / seconds[shared]
        row = [name, case.paper, *(f"{1e3 * seconds[n]:.0f}" if n in seconds else "" for n in LENGTHS)]
        row += [
            " / ".join(f"{size / 2**20:.0f}" for size in peak.values()),
            f"{exponent(seconds):.2f}",
            f"{ratio:.1f}x at {shared // 1024}k",
            case.claim,
        ]
        rows.append(row)
        print(" | ".join(row), flush=True)
    if args.write:
        write(head, rows, curves)


def write(head: list[str], rows: list[list[str]], curves: dict[str, dict[int, float]]) -> None:
    """The table and the picture."""
    text = ["# What each mechanism costs", "", *__doc__.strip().splitlines()[4:], ""]
    text += ["![Time against length](pictures/costs.png)", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    text += [f"| {' | '.join(row)} |" for row in rows]
    (ROOT / "docs" / "costs.md").write_text("\n".join(text) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    ends = []
    for number, (name, seconds) in enumerate(curves.items()):
        wide, lengths = name.startswith("full"), list(seconds)
        style = "--" if name == "full" else "-"
        color = "black" if wide else plt.cm.tab10(number % 10)
        times = [1e3 * seconds[n] for n in lengths]
        axes.loglog(lengths, times, style, marker=".", linewidth=3 if wide else 1.2, color=color)
        ends.append((times[-1], lengths[-1], name, color))
    floor = 0.0
    for value, length, name, color in sorted(ends):  # names stand clear of each other
        floor = max(value, floor * 1.16)
        axes.annotate(
            name,
            (length, value),
            (LENGTHS[-1] * 1.3, floor),
            color=color,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3},
        )
    axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    axes.minorticks_off()
    axes.set_xlim(LENGTHS[0] * 0.9, LENGTHS[-1] * 3.4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds for one forward pass")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "pictures" / "costs.png", dpi=130)


if __name__ == "__main__":
    main()
