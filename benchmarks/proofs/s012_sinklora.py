"""Does rolling the heads leak the future, and are the tokens of most attention the ones to keep?

    python benchmarks/proofs/s012_sinklora.py [--seeds 3] [--steps 400]

The last token is changed: does the first output move, with half groups that wrap around and without? Then a small byte
model (2 layers of 64 channels) is trained on the standard library's source with full attention, and decodes held-out
text of 256 bytes with H2O caches of 10, 20 and 40 % of it, half heavy and half recent, against caches that keep as many
recent tokens and evict any of the others at random (the comparison that decides), that evict any token at random, and
that keep only the most recent. KL divergence, in nats, of its next-byte distribution from that of the full cache, over
the second half. Zhang, 2024, arXiv 2406.05678; Zhang et al., 2023, arXiv 2306.14048.

Smaller than planned: 3 seeds instead of 5. SinkLoRA's own claim, on tuning a Llama, is not tried here.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glocal.bench.bytes import library_source, train_bytes
from glocal.cache import Cache, HeavyHitters
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, HeavyHitterAttention, Rope, ShiftedSparseAttention
from glocal.papers.verdict import verdict

LENGTH, PIECES, BUDGETS = 256, 16, (26, 52, 102)


class RandomEviction(HeavyHitters):
    """Keeps as many recent tokens, and evicts any of the others."""

    def worth(self) -> Tensor:
        return torch.rand_like(super().worth())


class RandomLayer(HeavyHitterAttention):
    """Decodes with random eviction."""

    def new_cache(self) -> Cache:
        return RandomEviction(self.heavy, self.recent, scale=self.scale)


def leak(wrap: str) -> float:
    """How much the first output moves when the last token does."""
    torch.manual_seed(0)
    layer = ShiftedSparseAttention(32, 4, group_size=16, unshift_ratio=0.0, causal=True, wrap=wrap).double()
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    other = x.clone()
    other[:, -1] += 1
    with torch.no_grad():
        return float((layer(other) - layer(x))[:, 0].norm())


def network(kind: type[Attention], **options: int) -> Transformer:
    """The byte model with attention of one kind."""
    return Transformer(256, 64, [lambda dim: kind(dim, 4, causal=True, rope=Rope(), **options)] * 2)


@torch.no_grad()
def divergence(full: Transformer, kind: type[Attention], heavy: int, recent: int, rows: Tensor) -> float:
    """KL of the next-byte distribution with a small cache from that with the full one."""
    model = network(kind, heavy=heavy, recent=recent)
    model.load_state_dict(full.state_dict())
    mine, theirs = (m.eval()(rows)[:, LENGTH // 2 :].log_softmax(-1) for m in (model, full))
    return float((theirs.exp() * (theirs - mine)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)

    moved = {wrap: leak(wrap) for wrap in ("leak", "split")}
    print("first output moved by the last token: " + ", ".join(f"{wrap} {m:.3f}" for wrap, m in moved.items()))

    _, held = library_source()
    starts = torch.linspace(0, len(held) - LENGTH, PIECES).long().tolist()
    rows = torch.stack([held[i : i + LENGTH] for i in starts]).long()
    policies = {
        "heavy hitters": (HeavyHitterAttention, 0.5),
        "random old": (RandomLayer, 0.5),
        "random": (RandomLayer, 1.0),
        "recent only": (HeavyHitterAttention, 0.0),
    }
    table: dict[str, list[list[float]]] = {name: [] for name in policies}
    print(f"{'KL, nats':<16}" + "".join(f"{f'{100 * b // LENGTH} %':>10}" for b in BUDGETS))
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        full = network(Attention)
        train_bytes(full, length=LENGTH, steps=options.steps, lr=4e-3, seed=seed)
        for name, (kind, share) in policies.items():
            sizes = [(int(b * share), b - int(b * share)) for b in BUDGETS]
            table[name].append([divergence(full, kind, heavy, recent, rows) for heavy, recent in sizes])
            print(f"{name:<16}" + "".join(f"{kl:>10.4f}" for kl in table[name][-1]))
    pairs = list(zip(table["heavy hitters"], table["random old"], strict=True))
    wins = sum(all(a < b for a, b in zip(*pair, strict=True)) for pair in pairs)
    falls = all(row == sorted(row, reverse=True) for row in table["heavy hitters"])
    mean = {name: torch.tensor(found).mean(0).tolist() for name, found in table.items()}
    shown = "; ".join(f"{name} {' / '.join(f'{kl:.3f}' for kl in kls)}" for name, kls in mean.items())
    verdict(
        "sinklora",
        f"KL to the full cache at 10 / 20 / 40 % of 256 bytes: {shown}; heavy hitters below random old at every budget "
        f"in {wins} of {options.seeds} seeds; the first output moves by {moved['leak']:.2f} where half groups wrap "
        f"around, by {moved['split']:.0f} where not",
        moved["leak"] > 0 and moved["split"] == 0 and falls and wins >= 0.8 * options.seeds,
    )


if __name__ == "__main__":
    main()
