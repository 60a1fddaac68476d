"""What does attention by the exponential's first terms lose as a language model, and how does its work grow?

    python benchmarks/proofs/s039_fast.py [--seeds 1] [--steps 400]

Byte models of two layers, 64 channels and 4 heads on the standard library's source, 256 bytes at a time: softmax
attention, and fastmax with the series up to the square and up to the linear term. Held-out bits per byte, and the
multiplications of one head of 16 channels for 2,048 and 8,192 tokens. Gerami et al., 2024, arXiv 2402.07901.

A step takes 0.11 s of a core by softmax, 0.51 up to the square and 0.13 up to the linear term: 400 steps of each are
five minutes, 1,500 would be nineteen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from glocal.bench.bytes import bits_per_byte, train_bytes
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, Rope
from glocal.nn.taylor import FastmaxAttention, fastmax
from glocal.papers.verdict import verdict

LENGTH, CHANNELS = 256, 16


def train(power: int | None, seed: int, steps: int) -> float:
    """Held-out bits per byte; softmax where the power is None."""
    torch.manual_seed(seed)
    rope = Rope()

    def layer(dim: int) -> Attention:
        if power is None:
            return Attention(dim, 4, causal=True, rope=rope)
        return FastmaxAttention(dim, 4, power=power, causal=True, rope=rope)

    model = Transformer(256, 64, [layer] * 2)
    train_bytes(model, length=LENGTH, batch=8, steps=steps, seed=seed)
    return bits_per_byte(model, length=LENGTH, pieces=64)


def growth(attention: Callable[[Tensor, Tensor, Tensor], object]) -> tuple[float, float]:
    """Operations in millions for 2,048 tokens, and how many times as many for four times the tokens."""
    found = []
    for length in (2048, 8192):
        q, k, v = torch.empty(3, 1, 1, length, CHANNELS, device="meta").unbind()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            attention(q, k, v)
        found.append(counted.get_total_flops() / 1e6)
    return found[0], found[1] / found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    ways: dict[int | None, Callable[[Tensor, Tensor, Tensor], object]] = {
        None: lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        2: lambda q, k, v: fastmax(q, k, v, causal=True),
        1: lambda q, k, v: fastmax(q, k, v, power=1, causal=True),
    }
    print(f"{'attention':<12}{'bits per byte':>14}{'MFLOP at 2,048':>16}{'times at 8,192':>16}   each seed's bits")
    bits, times = {}, {}
    for power, attention in ways.items():
        work, times[power] = growth(attention)
        found = [train(power, seed, arguments.steps) for seed in range(arguments.seeds)]
        bits[power] = sum(found) / len(found)
        name = "softmax" if power is None else f"power {power}"
        each = "  ".join(f"{b:.3f}" for b in found)
        print(f"{name:<12}{bits[power]:>14.3f}{work:>16.1f}{times[power]:>16.1f}   {each}", flush=True)
    more = {power: bits[power] / bits[None] - 1 for power in (1, 2)}
    verdict(
        "fast",
        f"bits per byte {bits[None]:.3f} softmax, {bits[2]:.3f} power 2 ({more[2]:+.1%}), {bits[1]:.3f} power 1 "
        f"({more[1]:+.1%}); operations for 4 times the tokens {times[None]:.1f}, {times[2]:.1f} and {times[1]:.1f} "
        "times",
        bits[None] <= bits[2] < bits[1] and bits[2] < 1.1 * bits[None] and times[1] < 5 and times[None] > 10,
    )


if __name__ == "__main__":
    main()
