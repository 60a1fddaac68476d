"""Do windows that vary by head and layer model text better than one size, on a smaller budget?

    python benchmarks/proofs/s109_mswa.py [--seeds 2] [--steps 300]

Byte-level models of the standard library's source (`glocal.bench.bytes`): 4 layers of 64 channels and 8 heads, 256
bytes, base window 16; held-out bits per byte after equal steps. Deep-small reverses the order of the layers.
Two seeds; the section asks for three. Xu et al., 2025, arXiv 2501.01039.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from glocal.bench.bytes import bits_per_byte, train_bytes
from glocal.models.language.transformer import Transformer
from glocal.nn import MultiScaleWindowAttention, Rope
from glocal.papers.verdict import verdict
from glocal.patterns import multiscale_windows

DEPTH, HEADS, WINDOW = 4, 8, 16


def make(windows: tuple[tuple[int, ...], ...], seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def layer(sizes: tuple[int, ...]):
        return lambda dim: MultiScaleWindowAttention(dim, HEADS, windows=sizes, causal=True, rope=Rope())

    return Transformer(256, 64, [layer(sizes) for sizes in windows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = {
        "one size": multiscale_windows(WINDOW, HEADS, DEPTH, by="none"),
        "by heads": multiscale_windows(WINDOW, HEADS, DEPTH, by="heads"),
        "by layers": multiscale_windows(WINDOW, HEADS, DEPTH, by="layers"),
        "by both": multiscale_windows(WINDOW, HEADS, DEPTH, by="both"),
        "deep small": multiscale_windows(WINDOW, HEADS, DEPTH, by="layers")[::-1],
    }
    mean, spread = {}, 0.0
    print(f"{'windows':<12}{'budget':>8}  bits per byte by seed")
    for name, windows in variants.items():
        budget = sum(map(sum, windows)) / (DEPTH * HEADS * WINDOW)
        bits = [
            bits_per_byte(train_bytes(make(windows, s), batch=8, steps=args.steps, seed=s)) for s in range(args.seeds)
        ]
        mean[name], spread = sum(bits) / len(bits), max(spread, max(bits) - min(bits))
        print(f"{name:<12}{budget:>8.1%}" + "".join(f"  {b:.3f}" for b in bits), flush=True)
    verdict(
        "mswa",
        f"{mean['by both']:.3f} bits per byte on 88 % of the budget, {mean['one size']:.3f} with one size; small to "
        f"large by depth {mean['by layers']:.3f}, reversed {mean['deep small']:.3f}; seeds differ by {spread:.3f}",
        mean["by both"] < mean["one size"] and mean["by layers"] < mean["deep small"],
    )


if __name__ == "__main__":
    main()
