"""Does a mixture for each block of queries give linear attention back what one summary for all has lost?

    python benchmarks/proofs/s060_mhla.py [--seeds 3] [--steps 600]

Mosaics of 4 x 4 handwritten digits (scikit-learn's `load_digits`), 32 x 32 pixels, 8 x 8 patches, 4 x 4 blocks of
tokens. Without training: the rank and the mean entropy of the rows of the attention matrix, of features that random
projections make of the patches; the mixing matrix is the one that training starts with. Then trained: one patch of one
digit carries a mark: which digit is it? Two layers, equal but for the mixing; test digits are not in training. MHLA,
2026, arXiv 2601.07832.

The digit is named from the marked token, which has seen a quarter of it: its query must pick three tokens of its block
from 64. The mean of all tokens would not ask this of a layer: the 63 others would count as much as the marked one.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from glocal.nn import MLP, Block
from glocal.nn.mhla import MultiHeadLinearAttention, mixing_matrix, multi_head_linear
from glocal.papers.verdict import verdict

SIDE, PATCH, BATCH, DIM, HEADS, HEAD_DIM, MOSAICS = 32, 4, 64, 32, 4, 8, 20


def mosaics(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with the mark in a second channel, ``(count, 2, 32, 32)``, and the marked digits."""
    chosen = torch.randint(len(images), (count, 16), generator=generator)
    canvas = torch.zeros(count, 2, 4, 8, 4, 8)  # row of digits, row of pixels, column of digits, column of pixels
    canvas[:, 0] = images[chosen].unflatten(1, (4, 4)).transpose(2, 3)
    cell, part = (torch.randint(n, (count,), generator=generator) for n in (16, 4))
    for row in range(PATCH):
        for column in range(PATCH):
            at = (cell // 4, part // 2 * PATCH + row, cell % 4, part % 2 * PATCH + column)
            canvas[torch.arange(count), 1, at[0], at[1], at[2], at[3]] = 1
    return canvas.view(count, 2, SIDE, SIDE), labels[chosen[torch.arange(count), cell]]


def spread(images: Tensor, mixing: Tensor, blocks: tuple[int, int]) -> tuple[float, float]:
    """Mean rank of the matrix, and mean entropy of its rows in nats."""
    generator = torch.Generator().manual_seed(0)
    x, _ = mosaics(images, torch.zeros(len(images), dtype=torch.long), MOSAICS, generator)
    patches = nn.functional.unfold(x[:, :1], PATCH, stride=PATCH).mT.double()
    q, k = (patches @ torch.randn(PATCH**2, HEAD_DIM, generator=generator).double() for _ in range(2))  # (B, 64, 8)
    grid = (SIDE // PATCH,) * 2
    q, k = (nn.functional.rms_norm(t, (HEAD_DIM,)).unflatten(1, grid)[:, None] for t in (q, k))
    eye = torch.eye(grid[0] * grid[1], dtype=torch.double).view(1, 1, *grid, -1).expand(MOSAICS, -1, -1, -1, -1)
    weights = multi_head_linear(q, k, eye, mixing, blocks, least=1e-12).flatten(2, 3)[:, 0]
    ranks = torch.linalg.matrix_rank(weights, rtol=1e-6).double().mean()
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean()
    return float(ranks), float(entropy)


class Marked(nn.Module):
    """Patches with positions, two blocks, the marked token; without the layers' convolutions, which mix as well."""

    def __init__(self, blocks: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, DIM, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.5 * torch.randn(SIDE // PATCH, SIDE // PATCH, DIM))
        layers = [MultiHeadLinearAttention(DIM, HEADS, blocks=blocks, out_bias=True) for _ in range(2)]
        self.blocks = nn.Sequential(*(Block(DIM, layer, MLP(DIM, 2 * DIM)) for layer in layers))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images).movedim(1, -1) + self.positions)
        marked = images[:, 1, ::PATCH, ::PATCH] > 0  # one of the tokens of each image
        out: Tensor = self.head(self.norm(x[marked]))
        return out


def train(blocks: tuple[int, int], seed: int, steps: int) -> float:
    """Accuracy on mosaics of test digits."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 8, torch.from_numpy(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[: len(order) // 4], order[len(order) // 4 :]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Marked(blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y = mosaics(images[rest], labels[rest], BATCH, generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
    model.eval()
    with torch.no_grad():
        x, y = mosaics(images[test], labels[test], 1000, torch.Generator().manual_seed(1))
        found = torch.cat([model(part).argmax(-1) for part in x.split(100)])
    return float((found == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)

    images = torch.from_numpy(load_digits().images).float() / 8
    kinds = {"linear": (1, 1), "mhla": (4, 4)}
    rank, entropy, accuracy = {}, {}, {}
    print(f"{'':<8}{'rank':>8}{'entropy':>10}{'accuracy':>10}   each seed's")
    for name, blocks in kinds.items():
        rank[name], entropy[name] = spread(images, mixing_matrix(blocks), blocks)
        found = [train(blocks, seed, options.steps) for seed in range(options.seeds)]
        accuracy[name] = sum(found) / len(found)
        each = "  ".join(f"{f:.3f}" for f in found)
        print(f"{name:<8}{rank[name]:>8.1f}{entropy[name]:>10.3f}{accuracy[name]:>10.3f}   {each}", flush=True)
    verdict(
        "mhla",
        f"rank {rank['mhla']:.1f} of 64 against {rank['linear']:.1f} for linear attention, entropy "
        f"{entropy['mhla']:.2f} against {entropy['linear']:.2f} nats; the marked digit is named with accuracy "
        f"{accuracy['mhla']:.3f} against {accuracy['linear']:.3f}",
        rank["mhla"] > 4 * rank["linear"]
        and entropy["mhla"] < entropy["linear"]
        and accuracy["mhla"] > accuracy["linear"],
    )


if __name__ == "__main__":
    main()
