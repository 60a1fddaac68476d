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

import torch
from patch_bed import DIM, HEADS, Digits, accuracy, digits, train
from torch import Tensor, nn

from glocal.nn import Attention, MixtureOfHeadsAttention, head_balance
from glocal.papers.verdict import verdict

SHARED, TOP_K, WEIGHT, SHUFFLES = 2, 4, 0.01, 999


def balance(model: nn.Module) -> Tensor:
    """What the paper adds to the loss."""
    return WEIGHT * head_balance(model)


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
        train(model, learn, options.epochs, seed, penalty=balance)
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
        train(tuned, learn, max(1, options.epochs // 4), seed, penalty=balance)
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
