"""Are three quarters of the heads enough, if every token takes its own, and do kinds of picture take different ones?

    python benchmarks/proofs/s066_moh.py [--seeds 3] [--epochs 20]

The 1,797 digits of scikit-learn as 16 patches of 2 x 2, two layers of 8 heads: all heads, against 2 shared heads and
the best 4 of the other 6. Test accuracy, the balance of heads (4 if even), and whether the digits' classes take heads
differently: chi-square of the counts of classes and heads. Patches of a picture are not independent, so its p-value is
the share of 999 shuffles of the pictures' labels with as high a value. Then the other form: the model with all heads,
4 of them made shared, tokens take the 2 of the others with the longest queries, before and after a quarter as many more
epochs. Jin et al., 2024, arXiv 2410.11842.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from glocal.nn import MLP, Attention, Block, MixtureOfHeadsAttention, head_balance
from glocal.papers.verdict import verdict

DIM, HEADS, SHARED, TOP_K, BATCH, RATE, WEIGHT, SHUFFLES = 64, 8, 2, 4, 64, 3e-3, 0.01, 999

Data = tuple[Tensor, Tensor]


class Digits(nn.Module):
    """Patches with learned positions, two blocks, mean, ten logits."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, DIM), nn.Parameter(0.02 * torch.randn(16, DIM))
        self.blocks = nn.Sequential(*[Block(DIM, layer(), MLP(DIM, 2 * DIM)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))
        return out


def digits() -> tuple[Data, Data]:
    """Patches ``(n, 16, 4)`` and labels, 60 % to train and 40 % to test."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target)
    patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: 6 * len(order) // 10], order[6 * len(order) // 10 :]
    return (patches[train], labels[train]), (patches[test], labels[test])


def train(model: Digits, data: Data, epochs: int, seed: int, *, routed: bool = False) -> None:
    """Cross-entropy, and the balance of heads where they are chosen."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps = epochs * -(-len(data[1]) // BATCH)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(data[0][batch]), data[1][batch])
            if routed:
                loss = loss + WEIGHT * head_balance(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Digits, data: Data) -> float:
    """Share of test digits that are told right."""
    return float((model.eval()(data[0]).argmax(-1) == data[1]).float().mean())


def differs(use: Tensor, labels: Tensor) -> tuple[float, float]:
    """Chi-square of classes and heads from the pictures' counts ``use (n, heads)``, and its p-value by shuffling."""
    expected = torch.outer(torch.bincount(labels) / len(labels), use.sum(0))

    def statistic(labels: Tensor) -> Tensor:
        counts = torch.zeros_like(expected).index_add(0, labels, use)
        return ((counts - expected).square() / expected.clamp(min=1e-9)).sum()

    generator = torch.Generator().manual_seed(0)
    found = statistic(labels)
    shuffled = [statistic(labels[torch.randperm(len(labels), generator=generator)]) for _ in range(SHUFFLES)]
    return float(found), (1 + sum(bool(s >= found) for s in shuffled)) / (1 + SHUFFLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)

    learn, test = digits()
    right: dict[str, list[float]] = {"all heads": [], "mixture": [], "converted": [], "tuned": []}
    balances, values = [], []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        full = Digits(lambda: Attention(DIM, HEADS))
        train(full, learn, options.epochs, seed)
        right["all heads"].append(accuracy(full, test))

        torch.manual_seed(seed)
        model = Digits(lambda: MixtureOfHeadsAttention(DIM, HEADS, shared_heads=SHARED, top_k=TOP_K))
        train(model, learn, options.epochs, seed, routed=True)
        right["mixture"].append(accuracy(model, test))
        balances.append(float(head_balance(model)))
        uses = [(block.attention.gates[:, SHARED:] > 0).sum(-1).float() for block in model.blocks]
        found = [differs(use, test[1]) for use in uses]
        values += [p for _, p in found]

        tuned = copy.deepcopy(full)
        for block in tuned.blocks:
            block.attention = MixtureOfHeadsAttention.from_attention(
                block.attention, shared_heads=HEADS // 2, top_k=HEADS // 4, router="query_norm"
            )
        right["converted"].append(accuracy(tuned, test))
        train(tuned, learn, max(1, options.epochs // 4), seed, routed=True)
        right["tuned"].append(accuracy(tuned, test))
        print(
            f"seed {seed}: "
            + ", ".join(f"{name} {each[-1]:.3f}" for name, each in right.items())
            + f"; balance {balances[-1]:.2f}; chi-square "
            + " and ".join(f"{value:.0f} (p {p:.3f})" for value, p in found),
            flush=True,
        )
    mean = {name: sum(each) / len(each) for name, each in right.items()}
    even = max(abs(balance / TOP_K - 1) for balance in balances)
    verdict(
        "moh",
        f"accuracy {mean['mixture']:.3f} with 75 % of the heads, {mean['all heads']:.3f} with all; balance within "
        f"{even:.1%} of even; classes take heads differently (p at most {max(values):.3f} in any layer); a trained "
        f"model with 75 % of its heads {mean['converted']:.3f}, {mean['tuned']:.3f} tuned",
        mean["mixture"] >= mean["all heads"] - 0.01 and even < 0.1 and max(values) < 0.01,
    )


if __name__ == "__main__":
    main()
