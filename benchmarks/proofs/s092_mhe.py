"""How much of attention with many heads is left to one narrow projection with a small vector for each head?

    python benchmarks/proofs/s092_mhe.py [--seeds 2] [--steps 600]

Byte models of the standard library's source (`char_bed`) with 8 heads of 8 channels: a projection for each head (MHA),
one for all heads with embeddings that multiply or are added (MHE), and a single head of 8 channels (SHA). Held-out nats
a byte and attention weights of both layers. Xue and Aletras, 2023, arXiv 2310.07911.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from char_bed import DIM, HEADS, LAYERS, held_out_nats, in_words

from glocal.nn import Attention, HeadEmbeddingAttention, Rope
from glocal.papers.verdict import verdict

WAYS: dict[str, Callable[[int], Attention]] = {
    "MHA": lambda dim: Attention(dim, HEADS, causal=True, rope=Rope()),
    "MHE-MUL": lambda dim: HeadEmbeddingAttention(dim, HEADS, form="mul", causal=True, rope=Rope()),
    "MHE-ADD": lambda dim: HeadEmbeddingAttention(dim, HEADS, form="add", causal=True, rope=Rope()),
    "SHA": lambda dim: Attention(dim, 1, head_dim=dim // HEADS, causal=True, rope=Rope()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)

    losses: dict[str, list[float]] = {name: [] for name in WAYS}
    weights = {name: LAYERS * sum(p.numel() for p in way(DIM).parameters()) for name, way in WAYS.items()}
    for seed in range(options.seeds):
        for name, way in WAYS.items():
            losses[name].append(held_out_nats(way, seed, options.steps))
            print(f"seed {seed}, {name} ({weights[name]:,} weights): {losses[name][-1]:.4f} nats a byte", flush=True)
    mean = {name: sum(each) / len(each) for name, each in losses.items()}
    embedded = [mean["MHE-MUL"], mean["MHE-ADD"]]
    verdict(
        "mhe",
        "held-out nats a byte "
        + ", ".join(f"{mean[name]:.3f} {name} ({in_words(each)})" for name, each in losses.items())
        + f"; MHE has {weights['MHE-MUL'] / weights['MHA']:.0%} of MHA's attention weights, SHA "
        f"{weights['SHA'] / weights['MHA']:.0%}",
        mean["MHA"] < min(embedded) and max(embedded) < mean["SHA"] and weights["MHE-MUL"] < 0.4 * weights["MHA"],
    )


if __name__ == "__main__":
    main()
