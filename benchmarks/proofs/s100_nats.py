"""Does a network that may forget keep what it will be asked for?

    python benchmarks/proofs/s100_nats.py [--seeds 2] [--steps 250]

The needle task (`glocal.bench.needle`): two layers with learned roles and a window of 8, trained with three weights on
the mean lifetime; against full attention, and against a sliding window of as many keys a query as the best of them
keeps. Two key heads, four query heads. Live: keys that a query sees of those before it, and itself. Global: shares of
class symbols and of filler with this role, in the head where they differ most. Deng et al., 2025, arXiv 2502.13251.

Smaller than planned: 2 seeds, 250 steps. The paper trains on PG-19, and the scorers of a Llama.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from glocal.bench.needle import CLASSES, FILLER, Found, Needle, train_needle
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, NeuralAttentionSearch, Rope, SlidingWindowAttention
from glocal.papers.verdict import verdict

WINDOW, WEIGHTS = 8, (0.0003, 0.003, 0.03)
ROPE = Rope()


def searched(model: Transformer) -> list[NeuralAttentionSearch]:
    """The attention layers."""
    return [cast(NeuralAttentionSearch, block.attention) for block in model.blocks]


@torch.no_grad()
def measure(found: Found) -> tuple[float, float, float]:
    """The share of live pairs; in the head with the highest ratio, how often class symbols and filler are global."""
    tokens, _, _ = Needle().batch(64, torch.Generator().manual_seed(1))
    found.model.eval().features(tokens)
    named = (tokens >= FILLER) & (tokens < FILLER + CLASSES)
    filler = tokens < FILLER
    filler[:, 0] = named[:, 0] = False  # the first token has no choice
    length, live, shares = tokens.shape[1], [], []
    for layer in searched(found.model):
        assert layer.last is not None
        roles = layer.last.argmax(-1)
        live.append(layer.visible(roles).count(length) / (roles.shape[0] * layer.num_heads * length * (length + 1) / 2))
        for head in (roles == 0).unbind(1):
            shares.append((float(head[named].float().mean()), float(head[filler].float().mean())))
    return sum(live) / len(live), *max(shares, key=lambda pair: pair[0] / max(pair[1], 1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = range(options.seeds), options.steps

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def plain(layer: Callable[[int], nn.Module]) -> float:
        return mean([train_needle([layer] * 2, seed=seed, steps=steps).accuracy for seed in seeds])

    full = plain(lambda dim: Attention(dim, 4, num_kv_heads=2, causal=True, rope=ROPE))
    print(f"{'full':<20} accuracy {full:.3f}")
    rows = []
    for weight in WEIGHTS:

        def penalty(model: Transformer, weight: float = weight) -> Tensor:
            return weight * torch.stack([layer.lifetime() for layer in searched(model)]).mean()

        def layer(dim: int) -> nn.Module:
            return NeuralAttentionSearch(dim, 4, num_kv_heads=2, window=WINDOW, rope=ROPE)

        found = [train_needle([layer] * 2, seed=seed, steps=steps, stop=2.0, penalty=penalty) for seed in seeds]
        measured = [measure(f) for f in found]
        columns = zip(*((f.accuracy, *m) for f, m in zip(found, measured, strict=True)), strict=True)
        accuracy, live, named, filler = (mean(list(column)) for column in columns)
        rows.append((accuracy, live, named, filler))
        print(
            f"{f'lifetime x {weight}':<20} accuracy {accuracy:.3f}  live {live:.3f}  global {named:.3f}, {filler:.3f}"
        )
    good = [row for row in rows if row[1] < 0.4 and row[0] > full - 0.05]
    accuracy, live, named, filler = min(good or rows, key=lambda row: row[1])
    keys = round(live * 129 / 2)  # a window of as many keys, on average over the queries
    size = next(w for w in range(1, 129) if w * 128 - w * (w - 1) / 2 >= live * 128 * 129 / 2)
    window = plain(lambda dim: SlidingWindowAttention(dim, 4, num_kv_heads=2, window=size, causal=True, rope=ROPE))
    print(f"{f'window of {size}':<20} accuracy {window:.3f}")
    falls = all(a[1] > b[1] for a, b in pairwise(rows))
    verdict(
        "nats",
        f"needle accuracy {accuracy:.2f} with {live:.0%} of the keys live ({keys} a query), {full:.2f} with all, "
        f"{window:.2f} with a window of as many; live {' / '.join(f'{row[1]:.2f}' for row in rows)} at weights "
        f"{' / '.join(str(w) for w in WEIGHTS)}; global are {named:.1%} of class symbols and {filler:.1%} of filler",
        falls and bool(good) and window < accuracy - 0.2 and named > 0 and named >= 2 * filler,
    )


if __name__ == "__main__":
    main()
