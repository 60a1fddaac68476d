"""Does attention by a kernel read pictures at sizes that it was not trained on, where learned positions do not?

    python benchmarks/proofs/s104_tic.py [--seeds 1] [--steps 200]

scikit-learn's digits at 16 x 16, in training, and in tests only, without any change to the networks, enlarged to 24 x
24 and 32 x 32, and at their size in the middle of an empty canvas of 24 x 24 and 32 x 32. Three layers of MSA-Conv with
kernels of 5 x 5, against a vision transformer of three blocks with a learned table of positions that is interpolated;
patches of 2 x 2, 32 channels, about as many parameters. The transformer is trained four times as long: after as many
steps it reads half of the digits. The claim is asked of the enlarged ones. Zhang et al., 2023, arXiv 2310.04134.
"""

from __future__ import annotations

import argparse

import torch
from digits_bed import digits, learn, mean, score
from torch import Tensor, nn

from glocal.nn import MLP, Attention, Block
from glocal.nn.conv_attention import MSAConv
from glocal.papers.verdict import verdict

DIM, HEADS, DEPTH, TRAINED, SIZES = 32, 4, 3, 16, (16, 24, 32)


class Kernels(nn.Module):
    """Patches, layers of MSA-Conv, mean, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, DIM, 2, stride=2)
        self.layers = nn.Sequential(*[MSAConv(DIM, kernel=5, num_heads=HEADS) for _ in range(DEPTH)])
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embed(images).movedim(1, -1)).mean((1, 2)))
        return out


class Table(nn.Module):
    """Patches, learned positions, blocks of full attention, mean, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, DIM, 2, stride=2)
        self.table = nn.Parameter(0.02 * torch.randn(1, DIM, TRAINED // 2, TRAINED // 2))
        self.blocks = nn.Sequential(*[Block(DIM, Attention(DIM, HEADS), MLP(DIM, 4 * DIM)) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = x + nn.functional.interpolate(self.table, size=x.shape[2:], mode="bicubic")
        out: Tensor = self.head(self.norm(self.blocks(x.movedim(1, -1))).mean((1, 2)))
        return out


def views() -> tuple[dict[str, Tensor], Tensor]:
    """The digits at each size and on each canvas, and their labels."""
    found, (images, labels) = {}, digits(TRAINED)
    for size in SIZES:
        found[f"{size} x {size}"] = digits(size)[0]
    for size in SIZES[1:]:
        around = [(size - TRAINED) // 2] * 4
        found[f"canvas of {size}"] = nn.functional.pad(images, around, value=-1.0)
    return found, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)

    pictures, labels = views()
    own, largest, canvas = f"{TRAINED} x {TRAINED}", f"{SIZES[-1]} x {SIZES[-1]}", f"canvas of {SIZES[-1]}"
    cut = len(labels) // 3
    accuracy: dict[str, dict[str, float]] = {}
    print(f"{'network':<20}{'parameters':>12}" + "".join(f"{name:>14}" for name in pictures))
    for name, kind, more in (("kernels", Kernels, 1), ("table of positions", Table, 4)):
        found: dict[str, list[float]] = {view: [] for view in pictures}
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = learn(kind(), pictures[own][cut:], labels[cut:], more * options.steps, seed)
            for view, shown in pictures.items():
                found[view].append(score(model, shown[:cut], labels[:cut]))
        accuracy[name] = {view: mean(scores) for view, scores in found.items()}
        count = sum(p.numel() for p in kind().parameters())
        print(f"{name:<20}{count:>12,}" + "".join(f"{a:>14.3f}" for a in accuracy[name].values()), flush=True)
    drops = {name: {view: 100 * (of[own] - of[view]) for view in (largest, canvas)} for name, of in accuracy.items()}
    mine, table = drops["kernels"], drops["table of positions"]
    verdict(
        "tic",
        f"digits enlarged from 16 x 16 to 32 x 32: accuracy falls by {mine[largest]:.1f} points from "
        f"{accuracy['kernels'][own]:.3f}, with a table of positions by {table[largest]:.1f} from "
        f"{accuracy['table of positions'][own]:.3f}; on a canvas of 32 x 32 by {mine[canvas]:.1f} and "
        f"{table[canvas]:.1f}",
        table[largest] - mine[largest] >= 10,
    )


if __name__ == "__main__":
    main()
