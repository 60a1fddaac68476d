"""Does one set of tokens for all heads, chosen in two layers, decode like full attention?

    python benchmarks/proofs/s091_lessismore.py [--seeds 2] [--steps 250]

A byte model of six layers and eight heads on the standard library's source. After a prompt of held-out text 64 more
bytes are fed one by one; layers 1 and 3 choose 32, 64 or 128 tokens, layers 2, 4 and 5 read only those. The mean
Kullback-Leibler divergence of the next byte's distribution from that of full attention, against the most recent tokens
alone and against each head's own best tokens, chosen by the same layers. Then how much the heads' choices overlap.
Smaller than the paper's design: 64 channels, 256 bytes in all (not 512) with 64 decoded (not 200), and fewer seeds, of
which all but one in five must agree at the smallest budget. Yang et al., 2025, arXiv 2508.07101.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glocal.bench.bytes import library_source, train_bytes
from glocal.condense import best
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, LessIsMore, Rope
from glocal.papers.verdict import verdict

LENGTH, DECODED, TEXTS, BUDGETS, DEPTH, HEADS = 256, 64, 8, (32, 64, 128), 6, 8
START, CORRECTION = 1, 3


class Recent(LessIsMore):
    """The last ``budget`` tokens."""

    def choose(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        total = k.shape[2]
        return torch.arange(max(0, total - self.budget), total).expand(k.shape[0], -1)


class ByHead(LessIsMore):
    """The best ``budget`` tokens of each head, for the same head of the later layers."""

    def choose(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        return best((q @ k.mT).squeeze(2), self.budget)


class Overlap(LessIsMore):
    """Notes how much larger the overlap of the heads' best tokens is than that of random sets."""

    ratios: tuple[float, ...] = ()

    def choose(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        chosen, total = int(self.budget * self.ratio), k.shape[2]
        picks = best((q @ k.mT).squeeze(2), chosen)
        sets = torch.zeros(*picks.shape[:2], total).scatter(-1, picks, 1.0)
        shared = sets @ sets.mT / chosen  # of one head's tokens, the share that another has
        off = ~torch.eye(HEADS, dtype=torch.bool)
        self.ratios = (*self.ratios, float(shared[:, off].mean()) / (chosen / total))
        return super().choose(q, k, real)


@torch.no_grad()
def decode(model: Transformer, texts: Tensor) -> Tensor:
    """Log-probabilities after each of the last bytes, fed one by one."""
    caches = model.new_caches()
    model(texts[:, :-DECODED], caches=caches)
    steps = texts[:, -DECODED:].split(1, 1)
    return torch.cat([model(step, caches=caches) for step in steps], 1).log_softmax(-1)


def divergence(model: Transformer, texts: Tensor, full: Tensor, how: LessIsMore) -> float:
    with how:
        found = decode(model, texts)
    return float((full.exp() * (full - found)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    _, held = library_source()
    starts = torch.linspace(0, len(held) - LENGTH, TEXTS).long().tolist()
    texts = torch.stack([held[at : at + LENGTH] for at in starts]).long()
    kinds = {"lessismore": LessIsMore, "by head": ByHead, "recent": Recent}
    table: dict[str, list[list[float]]] = {name: [] for name in kinds}
    overlaps = []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        rope = Rope()
        model = Transformer(256, 64, [lambda dim, rope=rope: Attention(dim, HEADS, causal=True, rope=rope)] * DEPTH)
        train_bytes(model, length=LENGTH, batch=8, steps=arguments.steps, seed=seed)
        full = decode(model, texts)
        places = {"start": START, "correction": CORRECTION}
        for name, kind in kinds.items():
            table[name].append([divergence(model, texts, full, kind(model, budget=b, **places)) for b in BUDGETS])
        seen = Overlap(model, budget=BUDGETS[0], **places)
        divergence(model, texts, full, seen)
        overlaps.append(sum(seen.ratios) / len(seen.ratios))
    print(f"{'mean divergence':<18}" + "".join(f"{f'{b} tokens':>12}" for b in BUDGETS))
    mean = {name: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for name, rows in table.items()}
    for name, row in mean.items():
        print(f"{name:<18}" + "".join(f"{value:>12.5f}" for value in row))
    print("heads' best tokens overlap, times chance: " + "  ".join(f"{o:.2f}" for o in overlaps))
    wins = sum(a[0] <= b[0] for a, b in zip(table["lessismore"], table["by head"], strict=True))
    below = all(a < b for a, b in zip(mean["lessismore"], mean["recent"], strict=True))
    pairs = ", ".join(f"{a:.4f} ({b:.4f})" for a, b in zip(mean["lessismore"], mean["recent"], strict=True))
    verdict(
        "lessismore",
        f"divergence {pairs} with {', '.join(map(str, BUDGETS))} tokens (with as many recent ones); at {BUDGETS[0]} "
        f"{mean['by head'][0]:.4f} by head, less is more no worse in {wins} of {arguments.seeds} seeds; "
        f"heads' choices overlap {sum(overlaps) / len(overlaps):.1f} times chance",
        below and wins >= 0.8 * arguments.seeds,
    )


if __name__ == "__main__":
    main()
