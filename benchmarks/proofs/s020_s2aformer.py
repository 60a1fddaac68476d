"""Are queries and keys of one channel a head enough, and what do the convolutions beside them add?

    python benchmarks/proofs/s020_s2aformer.py [--seeds 3] [--steps 150]

scikit-learn's digits enlarged to 32 x 32, 8 x 8 tokens of 32 channels, two hybrid blocks: strip attention (one channel,
keys on a map of half the side) against the same with whole keys, against full attention, and against strip attention
without local interaction. A fifth of the digits is in training, so that accuracies differ. Xu et al., 2025, arXiv
2505.22195.
"""

from __future__ import annotations

import argparse

import torch
from digits_bed import digits, learn, mean, score
from torch import Tensor, nn

from glocal.attention import explain
from glocal.models.vision.s2aformer import HybridPerceptionBlock
from glocal.nn.strip import StripAttention
from glocal.papers.verdict import verdict

DIM, HEADS, DEPTH, SIDE = 32, 4, 2, 8
KINDS = {  # channels of keys, reduction, local interaction
    "strip": (1, 2, True),
    "reduced": (DIM // HEADS, 2, True),
    "full": (DIM // HEADS, 1, True),
    "strip, not local": (1, 2, False),
}


class Net(nn.Module):
    """Patches of 4 x 4 pixels, hybrid blocks, mean, ten logits."""

    def __init__(self, key_dim: int, reduction: int, local: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, DIM, 4, stride=4)
        self.blocks = nn.Sequential(
            *[
                HybridPerceptionBlock(
                    DIM, StripAttention(DIM, HEADS, key_dim=key_dim, reduction=reduction), local=local
                )
                for _ in range(DEPTH)
            ]
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images).movedim(1, -1))
        out: Tensor = self.head(self.norm(x).mean((1, 2)))
        return out


def products(key_dim: int, reduction: int, local: bool) -> int:
    """Multiplications of one layer's attention for one picture."""
    q, small = torch.empty(1, HEADS, SIDE, SIDE, key_dim), SIDE // reduction
    k, v = (torch.empty(1, HEADS, small, small, size) for size in (key_dim, DIM // HEADS))
    return explain(q, k, v).flops // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)

    images, labels = digits(32)
    cut = len(images) // 5
    accuracy, work = {}, {}
    print(f"{'attention':<18}{'parameters':>12}{'products':>10}{'accuracy':>10}   each seed's accuracy")
    for name, kind in KINDS.items():
        found = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = learn(Net(*kind), images[:cut], labels[:cut], options.steps, seed)
            found.append(score(model, images[cut:], labels[cut:]))
        accuracy[name], work[name] = mean(found), products(*kind)
        count = sum(p.numel() for p in Net(*kind).parameters())
        each = "  ".join(f"{a:.3f}" for a in found)
        print(f"{name:<18}{count:>12,}{work[name]:>10,}{accuracy[name]:>10.3f}   {each}", flush=True)
    fewer, local = work["full"] / work["strip"], accuracy["strip"] - accuracy["strip, not local"]
    verdict(
        "s2aformer",
        f"digits with accuracy {accuracy['strip']:.3f} at {fewer:.1f} times fewer products than full attention, which "
        f"has {accuracy['full']:.3f}; whole keys on the small map {accuracy['reduced']:.3f}; local interaction adds "
        f"{100 * local:+.1f} points",
        accuracy["strip"] > accuracy["full"] - 0.02 and fewer >= 4 and local > 0,
    )


if __name__ == "__main__":
    main()
