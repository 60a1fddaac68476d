"""Does attention tell which tokens decide what follows, and does reinforcement learning gain by paying them more?

    python benchmarks/proofs/s032_preplan_anchor.py [--texts 200] [--seeds 5] [--updates 100]

A small language model of sentences in which a topic decides the twelve letters after it. Future attention influence
(FAI, rows 2 to 12 behind): how many of the highest tenth are topics. Swapped tokens: the topic of a sentence, or the
letter of its first two words with the least influence, is replaced by the model's likeliest alternatives; how many of
the last two words, drawn anew, are still those of before (Jaccard). Windowed distance (WAAD) at the starts of words and
inside them. Then GRPO, the reward for words of a topic that is not told: factors from FAI, at random, and none
(``examples/train_credit.py``). Li et al., 2025, arXiv 2510.13554.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
from pathlib import Path

import torch
from text_bed import CHARS, SENTENCE, text_bed, texts, topic_places, words_of
from torch import Tensor

from glocal.papers.verdict import verdict
from glocal.steer.credit import top_factors
from glocal.steer.rhythm import Rhythm, alternatives, jaccard, read_rhythm

HORIZON, DRAWS, SWAPS = (2, 12), 8, 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_credit.py"


def kinds(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions are topics, first letters of words, other letters: booleans ``(N,)``."""
    at = torch.arange(length)
    topic = torch.isin(at, topic_places())
    start = ((at - 1) % SENTENCE % CHARS == 1) & (at > 0)
    return topic, start, ~topic & ~start & (at > 0)


def last_words(rows: Tensor, first: int) -> list[tuple[int, ...]]:
    """The last two words of the sentence whose topic is at ``first``, of all rows."""
    return words_of(rows[:, first + SENTENCE - 2 * CHARS : first + SENTENCE].reshape(-1))


def swapped(model: torch.nn.Module, ids: Tensor, first: int, position: int) -> float:
    """How alike the sentence's last words are, with the token at a position swapped and not."""
    draw = dict(max_new_tokens=first + SENTENCE - 1 - position, do_sample=True, top_k=0)
    before = ids[None, : position + 1]
    plain = model.generate(
        input_ids=before, attention_mask=torch.ones_like(before), num_return_sequences=SWAPS * DRAWS, **draw
    )
    other = alternatives(model, ids[None], position, SWAPS, num_return_sequences=DRAWS, **draw)
    return jaccard(last_words(plain, first), last_words(other, first))


def swaps(model: torch.nn.Module, ids: Tensor, found: Rhythm, count: int) -> tuple[float, float]:
    """Jaccard of a swapped topic, and of the swapped letter of least influence, in a sentence of each text."""
    torch.manual_seed(3)
    first = int(topic_places()[1])
    letters = torch.arange(first + 1, first + 1 + 2 * CHARS)
    topic, letter = [], []
    for row in range(count):
        topic.append(swapped(model, ids[row], first, first))
        letter.append(swapped(model, ids[row], first, int(letters[found.fai[row, letters].argmin()])))
    return statistics.mean(topic), statistics.mean(letter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = text_bed()

    ids = texts(arguments.texts, torch.Generator().manual_seed(5))
    response = (torch.arange(ids.shape[1]) > 0).expand(ids.shape)
    topic, start, inside = kinds(ids.shape[1])
    base, shares = float(topic.sum() / response[0].sum()), {}
    # So small a model looks back at topics in its first layer; the paper reads the middle third.
    for layers in ((1, 2), (0,)):
        found = read_rhythm(model, {"input_ids": ids}, response, layers=layers, window=10, horizon=HORIZON)
        top = top_factors(found.fai, response, amplify=2.0, share=0.1) > 1
        shares[layers] = float(top[:, topic].sum() / top.sum())
        print(f"layers {layers}: topics among the highest tenth of FAI {shares[layers]:.3f}, among all {base:.3f}")
    share = shares[0,]
    print(f"{'tokens':<14}{'FAI':>8}{'WAAD':>8}{'change of WAAD':>17}")
    for name, where in (("topics", topic), ("word starts", start), ("inside words", inside)):
        means = [float(signal[:, where].mean()) for signal in (found.fai, found.waad, found.delta)]
        print(f"{name:<14}{means[0]:>8.4f}{means[1]:>8.2f}{means[2]:>17.3f}")
    words_topic, words_letter = swaps(model, ids, found, min(20, arguments.texts))
    print(
        f"last words alike after a swapped topic: {words_topic:.3f}, a letter of low FAI: {words_letter:.3f}",
        flush=True,
    )

    train = runpy.run_path(str(EXAMPLE))["train_policy"]
    print(f"{'factors':<10}{'while training':>16}{'after':>8}   each seed's")
    rewards, after = {}, {}
    for strategy in ("none", "random", "anchor"):
        runs = [train(strategy, seed, updates=arguments.updates) for seed in range(arguments.seeds)]
        after[strategy] = [run[-1] for run in runs]
        rewards[strategy] = statistics.mean(after[strategy])
        during = statistics.mean(statistics.mean(run[:-1]) for run in runs)
        each = "  ".join(f"{last:.3f}" for last in after[strategy])
        print(f"{strategy:<10}{during:>16.3f}{rewards[strategy]:>8.3f}   {each}", flush=True)

    gains = [one - other for one, other in zip(after["anchor"], after["random"], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")

    verdict(
        "preplan-anchor",
        f"topics are {share:.1%} of the highest tenth of FAI in layer 0, {shares[1, 2]:.1%} in the middle third, "
        f"{base:.1%} of all; words alike {words_topic:.2f} after a "
        f"swapped topic, {words_letter:.2f} after a letter; reward {rewards['anchor']:.3f} with factors from FAI, "
        f"{rewards['random']:.3f} at random, {rewards['none']:.3f} without ({statistics.mean(gains):+.3f} over random, "
        f"standard error {error:.3f})",
        share >= 3 * base and words_letter - words_topic >= 0.2 and rewards["anchor"] >= rewards["random"],
    )


if __name__ == "__main__":
    main()
