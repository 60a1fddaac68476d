"""Do several rotary bases together find what the trained one overlooks?

    python benchmarks/proofs/s031_attention_buckets.py [--prompts 4000]

A tiny Llama that was trained to look up one of 2 to 16 pairs at base 10000 is asked about one of 32, with positions
stretched 4, 16 and 64 times. The share of right answers, and the worst by where the pair stands (eight bins of four):
the trained base, attention buckets with six bases, and each of these alone. Chen et al., 2023, arXiv 2312.04455.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from retrieval_bed import VALUE, Lookups, Retrieval, lookups, plain_bed
from torch import Tensor

from glocal.papers.verdict import verdict
from glocal.steer.buckets import AttentionBuckets
from glocal.steer.waveform import waveform

PAIRS, STRIDES, OWN = 32, (4, 16, 64), 10000
BASES = (2500, 5000, 10000, 15000, 20000, 30000)


def by_bin(bed: Retrieval, seen: Lookups, stride: int, bases: tuple[int, ...]) -> Tensor:
    """Share of right answers for each bin of four places, ``(8,)``."""
    found = []
    for some in torch.arange(len(seen.key)).split(1000):
        part = Lookups(*(each[some] for each in (seen.key, seen.value, seen.asked, seen.at, seen.answer)))
        prompt = bed.embed(part).detach()
        positions = (torch.arange(PAIRS + 1) * stride).expand(len(some), -1)
        given = dict(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
            position_ids=positions,
        )
        with AttentionBuckets(bed.model, bases=bases):
            found.append(bed.model.generate(**given, max_new_tokens=1, do_sample=False)[:, -1])
    right = (torch.cat(found) == seen.answer[:, 0] + VALUE).double()
    bins = seen.at[:, 0] // 4
    return torch.stack([right[bins == n].mean() for n in range(PAIRS // 4)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed = plain_bed()
    seen = lookups(arguments.prompts, PAIRS, torch.Generator().manual_seed(1), questions=1)

    print("bins of four places, the nearest to the question last; waveform: of base 10000, mean over the bin")
    print(f"{'stride':<8}{'bases':<12}{'mean':>7}{'worst':>8}   by bin")
    found = {}
    for stride in STRIDES:
        for name, bases in (("10000", (OWN,)), ("buckets", BASES), *((str(base), (base,)) for base in BASES)):
            if name == str(OWN) and (stride, name) in found:
                continue
            each = found[stride, name] = by_bin(bed, seen, stride, bases)
            print(
                f"{stride:<8}{name:<12}{each.mean():>7.3f}{each.min():>8.3f}   "
                + "  ".join(f"{rate:.2f}" for rate in each.tolist()),
                flush=True,
            )
        distances = (PAIRS - np.arange(PAIRS)) * stride
        wave = waveform(distances, OWN, 32).reshape(-1, 4).mean(1)
        print(f"{stride:<8}{'waveform':<12}{'':>15}   " + "  ".join(f"{height:.2f}" for height in wave))
    pairs = [(found[stride, "10000"], found[stride, "buckets"]) for stride in STRIDES]
    best = [max(float(found[stride, str(base)].mean()) for base in BASES) for stride in STRIDES]
    verdict(
        "attention-buckets",
        "mean (worst four places) of "
        + "; ".join(
            f"{plain.mean():.3f} ({plain.min():.3f}) at base 10000, {merged.mean():.3f} ({merged.min():.3f}) in "
            f"buckets, best base {top:.3f} at stride {stride}"
            for stride, (plain, merged), top in zip(STRIDES, pairs, best, strict=True)
        ),
        all(merged.mean() > plain.mean() and merged.min() > plain.min() for plain, merged in pairs),
    )


if __name__ == "__main__":
    main()
