"""Do heads that look at slices of the input classify as well as heads with projections of their own?

    python benchmarks/proofs/s065_better_attention.py [--seeds 3] [--epochs 20]

The 1,797 digits of scikit-learn as 16 patches of 2 x 2, two layers of 64 channels and 8 heads (`patch_bed`): all four
projections, no value projection (Optimised), neither keys' nor values' (Efficient, here `SliceAttention`), and that
with a learned alignment kernel on values (Super). Test accuracy and attention weights of both layers. Hosseini and
Hosseini, 2024, arXiv 2403.01643.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from patch_bed import DIM, HEADS, Digits, accuracy, digits, train

from glocal.nn import Attention, OptimisedAttention, SliceAttention, SuperAttention
from glocal.papers.verdict import verdict

LAYERS: dict[str, Callable[[], Attention]] = {
    "standard": lambda: Attention(DIM, HEADS, out_bias=True),
    "Optimised": lambda: OptimisedAttention(DIM, HEADS),
    "Efficient": lambda: SliceAttention(DIM, HEADS),
    "Super": lambda: SuperAttention(DIM, HEADS, max_length=16),
}
MARGIN = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)

    learn, test = digits()
    right: dict[str, list[float]] = {name: [] for name in LAYERS}
    weights = {name: 2 * sum(p.numel() for p in layer().parameters()) for name, layer in LAYERS.items()}
    for seed in range(options.seeds):
        for name, layer in LAYERS.items():
            torch.manual_seed(seed)
            model = Digits(layer)
            train(model, learn, options.epochs, seed)
            right[name].append(accuracy(model, test))
        print(f"seed {seed}: " + ", ".join(f"{name} {each[-1]:.3f}" for name, each in right.items()), flush=True)
    mean = {name: sum(each) / len(each) for name, each in right.items()}
    verdict(
        "better-attention",
        "accuracy "
        + ", ".join(f"{value:.3f} {name} ({weights[name] / 1000:.1f}k weights)" for name, value in mean.items())
        + f"; seeds differ by up to {max(max(each) - min(each) for each in right.values()):.3f}",
        min(mean["Optimised"], mean["Efficient"]) >= mean["standard"] - MARGIN and mean["Super"] >= mean["Efficient"],
    )


if __name__ == "__main__":
    main()
