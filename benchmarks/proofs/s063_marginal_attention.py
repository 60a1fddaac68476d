"""Does a second step along the attention graph give one layer what otherwise takes two?

    python benchmarks/proofs/s063_marginal_attention.py [--seeds 3] [--steps 1500]

Chains of pointers: 12 tokens, each with a name, the name of another token and six numbers. A token's target is a sum of
linear maps of its own numbers, of those of the token it points to, and of those of the token that one points to. Mean
squared error of one layer of self-attention, of two, and of one multi-hop layer, with 2 heads and a linear read-out;
the error of answering the mean is 3. Singh and Buckley, 2023, arXiv 2304.04556.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bed import fit
from torch import Tensor, nn

from glocal.nn import Attention
from glocal.nn.marginal import MultiHopAttention
from glocal.papers.verdict import verdict

TOKENS, NUMBERS, DIM, HEADS, BATCH = 12, 6, 48, 2, 128


def draw(count: int, maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs ``(count, TOKENS, 2 TOKENS + NUMBERS)``, targets ``(count, TOKENS, NUMBERS)``."""
    numbers = torch.randn(count, TOKENS, NUMBERS, generator=generator)
    step = torch.randint(1, TOKENS, (count, TOKENS), generator=generator)
    to = (torch.arange(TOKENS) + step) % TOKENS
    name, other = torch.eye(TOKENS).expand(count, -1, -1), torch.eye(TOKENS)[to]
    second = to.gather(1, to)
    first, then = (numbers.gather(1, at[..., None].expand(-1, -1, NUMBERS)) for at in (to, second))
    return torch.cat([name, other, numbers], -1), numbers @ maps[0] + first @ maps[1] + then @ maps[2]


class Net(nn.Module):
    """Tokens, layers with residuals, numbers."""

    def __init__(self, layers: list[Callable[[], Attention]]) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * TOKENS + NUMBERS, DIM)
        self.layers = nn.ModuleList(make() for make in layers)
        self.head = nn.Linear(DIM, NUMBERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x)
        return out


def plain() -> Attention:
    return Attention(DIM, HEADS)


WAYS: dict[str, list[Callable[[], Attention]]] = {
    "one layer": [plain],
    "two layers": [plain, plain],
    "multi-hop": [lambda: MultiHopAttention(DIM, HEADS)],
}


def train(way: str, seed: int, steps: int) -> float:
    """Error on new chains."""
    torch.manual_seed(seed)
    maps = torch.stack([torch.linalg.qr(torch.randn(NUMBERS, NUMBERS))[0] for _ in range(3)])
    generator = torch.Generator().manual_seed(seed)
    model = Net(WAYS[way])

    def loss() -> Tensor:
        x, y = draw(BATCH, maps, generator)
        return (model(x) - y).square().mean()

    fit(model, loss, steps)
    with torch.no_grad():
        x, y = draw(2048, maps, generator)
        return float((model(x) - y).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print(f"{'network':<12}{'error':>8}   each seed's")
    for way in WAYS:
        each = [train(way, seed, args.steps) for seed in range(args.seeds)]
        found[way] = sum(each) / len(each)
        print(f"{way:<12}{found[way]:>8.4f}   {'  '.join(f'{e:.4f}' for e in each)}", flush=True)
    one, two, hop = found.values()
    verdict(
        "marginal-attention",
        f"chains of two pointers: squared error {hop:.3f} with two hops in one layer, {one:.3f} with one layer of "
        f"self-attention, {two:.3f} with two",
        hop < 0.5 * one and hop <= 1.2 * two,
    )


if __name__ == "__main__":
    main()
