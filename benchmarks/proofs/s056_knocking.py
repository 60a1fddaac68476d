"""Does a shared layer over all heads do no harm when it starts as the identity, and some when it starts at random?

    python benchmarks/proofs/s056_knocking.py [--seeds 2] [--steps 600]

Byte models of the standard library's source (`char_bed`): plain attention, knocking heads with the gated layer on
values from its own start, the identity, and from the start of linear layers. Held-out nats a byte. Zhou et al., 2025,
arXiv 2510.23052.
"""

from __future__ import annotations

import argparse

import torch
from char_bed import HEADS, held_out_nats, in_words
from torch import nn

from glocal.nn import Attention, KnockingHeadsAttention, Rope
from glocal.nn.knocking import KnockingMLP
from glocal.papers.verdict import verdict

MARGIN = 0.005


def at_random(model: nn.Module) -> None:
    """The shared matrices as torch starts a linear layer."""
    for module in model.modules():
        if isinstance(module, KnockingMLP):
            for matrix in module.parameters():
                bound = len(matrix) ** -0.5
                nn.init.uniform_(matrix, -bound, bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def plain(dim: int) -> Attention:
        return Attention(dim, HEADS, causal=True, rope=Rope())

    def knocking(dim: int) -> Attention:
        return KnockingHeadsAttention(dim, HEADS, causal=True, rope=Rope())

    ways = {"plain": (plain, None), "identity": (knocking, None), "random": (knocking, at_random)}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, (layer, start) in ways.items():
            losses[name].append(held_out_nats(layer, seed, options.steps, start))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f} nats a byte", flush=True)
    mean = {name: sum(each) / len(each) for name, each in losses.items()}
    beaten = [own < other for own, other in zip(losses["identity"], losses["random"], strict=True)]
    verdict(
        "knocking-heads",
        f"held-out nats a byte {mean['plain']:.3f} plain, {mean['identity']:.3f} knocking from the identity, "
        f"{mean['random']:.3f} from a random start; by seed {in_words(losses['plain'])}, "
        f"{in_words(losses['identity'])} and {in_words(losses['random'])}",
        all(beaten) and mean["identity"] <= mean["plain"] + MARGIN,
    )


if __name__ == "__main__":
    main()
