"""Do tokens ask for the whole context more rarely the wider their window is, at no loss?

    python benchmarks/proofs/s024_aha.py [--seeds 3] [--steps 200]

Byte models of two layers, 64 channels and 4 heads on the standard library's source, 192 bytes at a time: full
attention, and all-or-here attention with windows of 8 to 64 under one penalty on the gates. The share of tokens and
heads that still see all, and held-out bits per byte. Luo et al., 2025, arXiv 2512.22562.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch

from glocal.bench.bytes import bits_per_byte, train_bytes
from glocal.models.language.transformer import Transformer
from glocal.nn import AllOrHereAttention, Attention, Rope, gate_rate
from glocal.papers.verdict import verdict

LENGTH, WINDOWS, PENALTY = 192, (8, 16, 32, 64), 0.02


def train(window: int | None, seed: int, steps: int) -> tuple[float, float]:
    """Held-out bits per byte, and the share of gates that are open on held-out text."""
    torch.manual_seed(seed)
    rope = Rope()

    def layer(dim: int) -> Attention:
        if window is None:
            return Attention(dim, 4, causal=True, rope=rope)
        return AllOrHereAttention(dim, 4, window=window, causal=True, rope=rope)

    model = Transformer(256, 64, [layer] * 2)
    penalty = None if window is None else lambda m: PENALTY * gate_rate(m)
    train_bytes(model, length=LENGTH, batch=8, steps=steps, seed=seed, penalty=penalty)
    rate = 1.0
    bits = bits_per_byte(model, length=LENGTH, pieces=64)
    if window is not None:
        rate = gate_rate(model).item()
    return bits, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'window':<8}{'bits per byte':>15}{'global rate':>14}   each seed's rate")
    bits, rates = {}, {}
    for window in (None, *WINDOWS):
        found = [train(window, seed, arguments.steps) for seed in range(arguments.seeds)]
        bits[window], rates[window] = (sum(column) / arguments.seeds for column in zip(*found, strict=True))
        each = "  ".join(f"{rate:.3f}" for _, rate in found)
        print(f"{window or 'full':<8}{bits[window]:>15.3f}{rates[window]:>14.3f}   {each}", flush=True)
    falling = all(rates[a] > rates[b] for a, b in pairwise(WINDOWS))
    loss = bits[32] / bits[None] - 1
    verdict(
        "aha",
        f"global rate {', '.join(f'{rates[w]:.3f}' for w in WINDOWS)} at windows {', '.join(map(str, WINDOWS))}; "
        f"at 32 bits per byte {bits[32]:.3f} against {bits[None]:.3f} full ({loss:+.1%})",
        falling and rates[32] < 0.3 and loss < 0.02,
    )


if __name__ == "__main__":
    main()
