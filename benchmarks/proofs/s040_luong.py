"""Does a decoder translate better with attention, and does a window whose place is predicted suffice?

    python benchmarks/proofs/s040_luong.py [--seeds 1] [--steps 1500]

Numbers from 0 to 9999, digit by digit, into English words: 4072 is "four thousand and seventy two". LSTMs of one layer
and 64 channels. Perplexity on a tenth of the numbers, which were not in training: without attention, with dot scores
over the whole source, the same with input feeding, and with a predicted window of two digits on each side. Luong et
al., 2015, arXiv 1508.04025.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bed import fit
from torch import Tensor
from torch.nn.functional import cross_entropy

from glocal.models.language.luong import Translator
from glocal.papers.verdict import verdict

SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
ONES, TENS = SMALL.split(), ROUND.split()
WORDS = ["<pad>", "<start>", "<stop>", *ONES, *TENS, "hundred", "thousand", "and"]
DIM, BATCH = 64, 64

WAYS: dict[str, dict[str, Any]] = {
    "none": {"attention": None, "feeding": False},
    "global dot": {"attention": {"score": "dot"}, "feeding": False},
    "global dot, fed": {"attention": {"score": "dot"}, "feeding": True},
    "local-p, fed": {"attention": {"score": "dot", "place": "local_p", "window": 2}, "feeding": True},
}


def spoken(n: int) -> list[str]:
    """Up to 9999, in words."""
    words: list[str] = []
    if n >= 1000:
        words += [ONES[n // 1000], "thousand"]
    if n % 1000 >= 100:
        words += [ONES[n % 1000 // 100], "hundred"]
    rest = n % 100
    if words and rest:
        words.append("and")
    if rest >= 20:
        words.append(TENS[rest // 10 - 2])
        rest %= 10
        return words + ([ONES[rest]] if rest else [])
    return words + ([ONES[rest]] if rest or not words else [])


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Digits ``(10000, 4)``, which are real, words ``(10000, n)`` with start and stop."""
    digits, words = [], []
    for n in range(10_000):
        text = str(n)
        digits.append([int(d) for d in text] + [10] * (4 - len(text)))
        words.append([1, *(WORDS.index(word) for word in spoken(n)), 2])
    longest = max(map(len, words))
    source = torch.tensor(digits)
    return source, source < 10, torch.tensor([row + [0] * (longest - len(row)) for row in words])


def loss_of(model: Translator, source: Tensor, real: Tensor, words: Tensor) -> Tensor:
    """Nats a word."""
    return cross_entropy(model(source, words[:, :-1], real).flatten(0, 1), words[:, 1:].flatten(), ignore_index=0)


def train(way: str, seed: int, steps: int) -> float:
    """Perplexity on numbers that were not in training."""
    source, real, words = pairs()
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    held, kept = order[:1000], order[1000:]
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Translator(11, len(WORDS), dim=DIM, layers=1, **WAYS[way])

    def loss() -> Tensor:
        some = kept[torch.randint(len(kept), (BATCH,), generator=draw)]
        return loss_of(model, source[some], real[some], words[some])

    fit(model, loss, steps)
    with torch.no_grad():
        return float(loss_of(model, source[held], real[held], words[held]).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print(f"{'attention':<18}{'perplexity':>11}   each seed's")
    for way in WAYS:
        each = [train(way, seed, args.steps) for seed in range(args.seeds)]
        found[way] = sum(each) / len(each)
        print(f"{way:<18}{found[way]:>11.4f}   {'  '.join(f'{p:.4f}' for p in each)}", flush=True)
    none, dot, fed, local = found.values()
    verdict(
        "luong",
        f"numbers into words, perplexity {none:.3f} without attention, {dot:.3f} with dot scores, {fed:.3f} with input "
        f"feeding too, {local:.3f} through a predicted window",
        none > dot and none > fed and local < 1.05 * fed and none > 1.5 * fed,
    )


if __name__ == "__main__":
    main()
