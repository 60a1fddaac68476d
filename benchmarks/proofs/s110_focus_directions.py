"""Does one learned vector a head move attention to what is relevant, though nothing in the question names it?

    python benchmarks/proofs/s110_focus_directions.py [--prompts 2000] [--steps 150]

A tiny Llama looks up values of keys that stand there twice, tagged T and U; asked without a cue it takes either.
Directions are trained for the attention of such questions to T tokens, and tried on others: the share of answers that
are T's by strength, with all heads, with the three that read T's pair most under a cue, and with as many at random.
Zhu et al., 2025, arXiv 2503.23306.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
from retrieval_bed import EITHER, VALUE, Lookups, Retrieval, T, tagged, tagged_bed
from torch import Tensor
from transformers.models.llama import modeling_llama

from glocal.papers.verdict import verdict
from glocal.steer.contextual import FocusSample, contextual_scores
from glocal.steer.focus import Directions, FocusDirections, train_directions

KEYS, STRENGTHS = 8, (-0.5, 0.0, 0.2, 0.5, 1.0, 2.0)


def prompt(bed: Retrieval, seen: Lookups) -> dict[str, Tensor]:
    embeds = bed.embed(seen).detach()
    return {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}


def sample(bed: Retrieval, seen: Lookups, gold: Tensor) -> FocusSample:
    """The last row, and which pairs ``(B, n)`` are relevant."""
    rows = torch.zeros(len(gold), gold.shape[1] + 1, dtype=torch.bool)
    rows[:, -1] = True
    return FocusSample(prompt(bed, seen), torch.cat([gold, torch.zeros(len(gold), 1, dtype=torch.bool)], 1), rows)


def share(bed: Retrieval, seen: Lookups, found: Directions, alpha: float, heads: list[tuple[int, int]]) -> float:
    """Share of answers that are the T value of the key."""
    with FocusDirections(bed.model, directions=found, heads=heads, alpha=alpha):
        answers = bed.model.generate(**prompt(bed, seen), max_new_tokens=1, do_sample=False)[:, -1]
    assert seen.tag is not None
    of_t = ((seen.key == seen.asked) & (seen.tag == 0)).long().argmax(1, keepdim=True)
    return float((answers == seen.value.gather(1, of_t)[:, 0] + VALUE).double().mean())


@torch.no_grad()
def keys_alone(bed: Retrieval, seen: Lookups, found: Directions) -> float:
    """How much logits change where the directions of layer 0 are added to all keys after rotation instead."""
    rotate = modeling_llama.apply_rotary_pos_emb

    def moved(q: Tensor, k: Tensor, *given: Tensor, **options: int) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *given, **options)
        return q, k + found.query[0][:, None]

    before = bed.model(**prompt(bed, seen)).logits
    with patch.object(modeling_llama, "apply_rotary_pos_emb", moved):
        after = bed.model(**prompt(bed, seen)).logits
    return float((after - before).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed = tagged_bed()
    draw = torch.Generator().manual_seed(1)
    neutral = [tagged(64, KEYS, draw, EITHER, questions=1) for _ in range(arguments.steps)]
    samples = [sample(bed, seen, seen.tag == 0) for seen in neutral]
    found = train_directions(bed.model, samples, epochs=1, lr=1e-2, cached=False)

    cued = tagged(256, KEYS, draw, T, questions=1)
    scores = contextual_scores(bed.model, [sample(bed, cued, (cued.key == cued.asked) & (cued.tag == 0))])
    best = scores.top(3)
    others = [head for head in scores.top(8) if head not in best]
    chance = [others[n] for n in torch.randperm(len(others), generator=draw)[:3].tolist()]
    test = tagged(arguments.prompts, KEYS, draw, EITHER, questions=1)

    print(
        "attention to T's pair under the cue, by layer and head: "
        + str([[round(x, 2) for x in r] for r in scores.gold.tolist()])
    )
    print(f"share of T answers without a cue\n{'strength':<10}{'all heads':>10}{'best 3':>8}{'other 3':>9}")
    rates = {}
    for alpha in STRENGTHS:
        each = [share(bed, test, found, alpha, heads) for heads in ([], best, chance)]
        rates[alpha] = each[0]
        print(f"{alpha:<10}{each[0]:>10.3f}{each[1]:>8.3f}{each[2]:>9.3f}", flush=True)
    change = keys_alone(bed, test, found)
    gain = rates[0.5] - rates[0.0]
    verdict(
        "focus-directions",
        "share of T answers "
        + ", ".join(f"{rates[alpha]:.3f} at {alpha:g}" for alpha in STRENGTHS)
        + f"; the same vectors on keys change logits by {change:.0e}",
        gain >= 0.3 and rates[-0.5] < rates[0.0] and change < 1e-4,
    )


if __name__ == "__main__":
    main()
