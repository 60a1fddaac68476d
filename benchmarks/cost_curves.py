"""Time and memory of every sparse mechanism from 1,024 to 32,768 tokens, against full attention on equal sizes.

    python benchmarks/cost_curves.py [--only NAME ...] [--longest 32768] [--write]

A layer's forward pass without gradients, batch 1, 256 channels, 4 heads, random weights, its projections included;
each with the sizes that its name gives, otherwise the layer's defaults. Queries and keys are random, so that what
is chosen by data is scattered, and choosing gains less than it would on text.
Time is the median of three calls after one that is not counted; memory is the peak beyond what was held before.
The exponent is that of a power law fitted to the times from 4,096 tokens on: 1 is linear, 2 is quadratic. ``--write``
puts the table into docs/costs.md and the picture into docs/pictures/costs.png; with ``--only``, only the rows that were
measured change.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glocal import nn as layers
from glocal.bench.probe import resident
from glocal.bench.table import markdown, markdown_row
from glocal.cache import Cache
from glocal.models.vision.fit import FIT

ROOT = Path(__file__).resolve().parents[1]
DIM, HEADS, PATIENCE = 256, 4, 25.0
LENGTHS = [1024 * 2**n for n in range(6)]
DEPTH, BUDGET = 8, 512

DECODING_TEXT = f"""
## One step of decoding

Some mechanisms act in decoding only. One new token through a stack of {DEPTH} attention layers of the same sizes,
nothing between them, with caches that hold random keys and values of so many tokens: the median of 15 steps after 3
that are not counted, and the bytes that all caches hold. Budgets are {BUDGET} tokens. H2O drops what its budget has no
room for in every layer; LessIsMore keeps every token, layers 0 to 2 and {DEPTH // 2} of {DEPTH} read all of them.
""".strip()


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


class Stack(nn.Module):
    """Attention layers, each added to what came before."""

    def __init__(self, kind: type[layers.Attention], **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(DIM, HEADS, causal=True, **settings) for _ in range(DEPTH))

    def forward(self, x: Tensor, caches: list[Cache]) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + layer(x, cache=cache)
        return x


@dataclass(frozen=True)
class Decoding:
    """A way to decode: layers, what is switched on around them, and the tokens that a cache must be given."""

    paper: str
    make: Callable[[], Stack]
    claim: str
    inside: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    room: int | None = None
    """Where a cache drops tokens, how many random ones fill it; the text before them leaves no trace."""


DECODING: dict[str, Decoding] = {
    "full cache": Decoding("", lambda: Stack(layers.Attention), "N"),
    "heavy hitters 256 + 256": Decoding(
        "S012",
        lambda: Stack(layers.HeavyHitterAttention, heavy=BUDGET // 2, recent=BUDGET // 2),
        "h + r, in memory too",
        room=BUDGET + 1,
    ),
    "LessIsMore 512": Decoding(
        "S091",
        lambda: Stack(layers.Attention),
        "N in 4 of 8 layers, 512 in the others",
        lambda stack: layers.LessIsMore(stack, budget=BUDGET, correction=DEPTH // 2),
    ),
}


def filled(layer: layers.Attention, length: int, room: int | None) -> Cache:
    """The layer's cache after ``length`` random tokens."""
    cache = layer.new_cache()
    q, k, v = torch.randn(3, 1, HEADS, length if room is None else min(room, length), layer.head_dim).unbind()
    cache.update(k, v, queries=q)
    cache.seen = length
    return cache


def decode(case: Decoding, length: int) -> tuple[float, int]:
    """Seconds of a step and bytes of all caches."""
    torch.manual_seed(0)
    stack, times = case.make().eval(), []
    with torch.no_grad(), case.inside(stack):
        # A cache that drops tokens is filled token by token, so one is filled for all layers.
        made = filled(stack.layers[0], length, case.room)
        caches = [filled(layer, length, None) if case.room is None else copy.deepcopy(made) for layer in stack.layers]
        for _ in range(18):
            x = torch.randn(1, 1, DIM)
            start = time.perf_counter()
            stack(x, caches)
            times.append(time.perf_counter() - start)
        return statistics.median(times[3:]), sum(cache.nbytes for cache in caches)


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


HEAD = ["mechanism", "paper", *(f"{n // 1024}k ms" for n in LENGTHS)]
FORWARD_HEAD = [*HEAD, "peak MiB", "exponent", "against full", "claim"]
DECODING_HEAD = [*HEAD, "caches MiB", "exponent", "against full", "claim"]


def row_of(
    name: str, case: Case | Decoding, seconds: dict[int, float], size: dict[int, int], full: dict[int, float], form: str
) -> list[str]:
    """A row of a table; milliseconds, and MiB, in ``form``."""
    shared = max(set(full) & set(seconds))
    row = [
        name,
        case.paper,
        *(format(1e3 * seconds[n], form) if n in seconds else "" for n in LENGTHS),
        " / ".join(format(held / 2**20, form) for held in size.values()),
        f"{exponent(seconds):.2f}",
        f"{full[shared] / seconds[shared]:.1f}x at {shared // 1024}k",
        case.claim,
    ]
    print(" | ".join(row), flush=True)
    return row


def forward_table(only: set[str], longest: int) -> tuple[list[list[str]], dict[str, dict[int, float]]]:
    """Rows, and seconds by length of each mechanism; nothing where no row was asked for."""
    rows, curves, full = [], {}, {}
    if not only & set(CASES):
        return rows, curves
    print(" | ".join(FORWARD_HEAD))
    for name, case in CASES.items():
        if name not in only and not name.startswith("full"):
            continue
        seconds, peak = curve(case, longest)
        curves[name] = seconds
        causal = getattr(case.make(1024), "causal", False)
        if name.startswith("full"):
            full[causal] = seconds
        rows.append(row_of(name, case, seconds, peak, full[causal], ".0f"))
    return rows, curves


def decoding_table(only: set[str], longest: int) -> list[list[str]]:
    """Rows; none where none was asked for."""
    rows: list[list[str]] = []
    if not only & set(DECODING):
        return rows
    print(" | ".join(DECODING_HEAD))
    full: dict[int, float] = {}
    for name, case in DECODING.items():
        if name not in only and name != "full cache":
            continue
        found = {n: decode(case, n) for n in LENGTHS if n <= longest}
        seconds, held = ({n: pair[at] for n, pair in found.items()} for at in range(2))
        full = full or seconds
        rows.append(row_of(name, case, seconds, held, full, ".1f"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="names of mechanisms, of either table")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--write", action="store_true", help="write docs/costs.md and docs/pictures/costs.png")
    args = parser.parse_args()
    known = [*CASES, *DECODING]
    unknown = set(args.only) - set(known)
    if unknown:
        parser.error(f"no mechanism is called {' or '.join(sorted(unknown))}; they are {', '.join(known)}")
    only = set(args.only or known)
    print(__doc__.splitlines()[0])
    rows, curves = forward_table(only, args.longest)
    rows += decoding_table(only, args.longest)
    if args.write:
        write(ROOT / "docs" / "costs.md", rows)
        if not args.only:
            picture(curves)


def write(page: Path, rows: list[list[str]]) -> None:
    """Both tables; what was not measured stays as it was."""
    old = page.read_text().splitlines() if page.exists() else []
    known = {line.split("|")[1].strip(): line for line in old if line.startswith("| ")}
    known |= {row[0]: markdown_row(row) for row in rows}
    text = ["# What each mechanism costs", "", *__doc__.strip().splitlines()[4:], ""]
    text += ["![Time against length](pictures/costs.png)", ""]
    for head, cases, after in ((FORWARD_HEAD, CASES, ["", DECODING_TEXT, ""]), (DECODING_HEAD, DECODING, [])):
        text += [markdown(head, ()), *(known[name] for name in cases if name in known), *after]
    page.write_text("\n".join(text) + "\n")


def picture(curves: dict[str, dict[int, float]]) -> None:
    """Milliseconds against length, a line a mechanism."""
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
