"""Does linear attention sharpen when its query grows, once its magnitude counts, and does it then retrieve better?

    python benchmarks/proofs/s021_mala.py [--steps 1000] [--seeds 3]

Spread: the standard deviation over keys of N times a weight, for queries whose features are scaled by 0.25 to 16.
Retrieval: 32 keys, each with one of 32 values, in one layer of two heads of 8 that reads them for one query; the share
of right values on new sets, for softmax, MALA and plain linear attention with equal weights at the start. Fan et al.,
2025, arXiv 2507.00698.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn import Attention, LinearAttention, MagnitudeAwareAttention
from glocal.papers.verdict import verdict

SYMBOLS, WIDTH, BATCH = 32, 16, 128
KINDS = {"softmax": Attention, "MALA": MagnitudeAwareAttention, "linear": LinearAttention}


def spread(kind: str, size: float) -> float:
    """Of 32 random keys in 8 channels; a value for each key shows the weights."""
    draw = torch.Generator().manual_seed(0)
    layer = KINDS[kind](SYMBOLS, 1, head_dim=SYMBOLS, project=False, scale=8**-0.5)
    fq, k = torch.rand(1, 1, SYMBOLS, 8, generator=draw) + 1, torch.randn(1, 1, SYMBOLS, 8, generator=draw)
    # Above 0 the feature of x is x + 1, below 0 exp(x): the query whose features are size * fq.
    wanted = size * fq
    q = wanted if kind == "softmax" else torch.where(wanted > 1, wanted - 1, wanted.log())
    weights = layer.mix(q, k, torch.eye(SYMBOLS)[None, None], _call())
    return float((SYMBOLS * weights).std(-1).mean())


def _call() -> object:
    from glocal.nn import Call

    nothing = torch.empty(0)
    return Call(nothing, nothing, None, None, True)


class Retriever(nn.Module):
    """Reads pairs of symbols, each a sum of two embeddings, for a query."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.key, self.value, self.asked = (nn.Embedding(SYMBOLS, WIDTH) for _ in range(3))
        self.layer = KINDS[kind](WIDTH, 2)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        pairs = self.key(keys) + self.value(values)
        return self.head(self.layer(self.asked(asked)[:, None], pairs)[:, 0])


def batch(draw: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, values = (torch.rand(count, SYMBOLS, generator=draw).argsort(-1) for _ in range(2))
    at = torch.randint(SYMBOLS, (count, 1), generator=draw)
    return keys, values, keys.gather(1, at)[:, 0], values.gather(1, at)[:, 0]


def retrieved(kind: str, steps: int, seed: int) -> float:
    torch.manual_seed(seed)
    model, draw = Retriever(kind), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        *seen, answer = batch(draw, BATCH)
        F.cross_entropy(model(*seen), answer).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        *seen, answer = batch(torch.Generator().manual_seed(10_000), 4000)
        return float((model(*seen).argmax(-1) == answer).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    sizes = (0.25, 1.0, 4.0, 16.0)
    print("spread of weights" + "".join(f"{size:>9}" for size in sizes))
    spreads = {}
    for kind in KINDS:
        spreads[kind] = [spread(kind, size) for size in sizes]
        print(f"{kind:17}" + "".join(f"{found:9.2f}" for found in spreads[kind]), flush=True)
    print("retrieved" + " " * 8 + "".join(f"{f'seed {seed}':>9}" for seed in range(args.seeds)))
    means = {}
    for kind in KINDS:
        found = [retrieved(kind, args.steps, seed) for seed in range(args.seeds)]
        means[kind] = sum(found) / len(found)
        print(f"{kind:17}" + "".join(f"{share:9.3f}" for share in found), flush=True)
    mala, linear = spreads["MALA"], spreads["linear"]
    holds = mala[-1] > 4 * mala[0] and max(linear) < 1.01 * min(linear) and means["MALA"] > means["linear"]
    verdict(
        "mala",
        f"spread of weights {mala[0]:.2f} to {mala[-1]:.2f} as queries grow 64 times, linear {linear[0]:.2f} to "
        f"{linear[-1]:.2f}; retrieved: softmax {means['softmax']:.3f}, MALA {means['MALA']:.3f}, linear "
        f"{means['linear']:.3f}",
        holds,
    )


if __name__ == "__main__":
    main()
