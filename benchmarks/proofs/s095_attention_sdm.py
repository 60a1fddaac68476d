"""Is reading a sparse distributed memory like softmax attention at a temperature that its radius gives?

    python benchmarks/proofs/s095_attention_sdm.py [--patterns 100] [--queries 1000]

Addresses of 64 bits; the published radii 5, 11 and 15. First, how straight the log of what two balls share is over
the cosine of their centres. Then random patterns are read from queries with 2 to 10 flipped bits, by the memory's exact
weights and by `glocal.attend` over unit vectors at the fitted temperature: how often do both give the same bits? Where
the MiniLM of the demo is installed, the temperatures of its heads are set beside them; they count for nothing in the
verdict. Bricken and Pehlevan, 2021, arXiv 2111.05498.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glocal import attend
from glocal.bench import encoder, text
from glocal.inspect import SparseMemory, effective_beta, fit_beta, record_heads
from glocal.papers.verdict import verdict

BITS, RADII = 64, (5, 11, 15)


def flipped(patterns: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """``count`` queries: patterns, each with 2 to 10 bits turned."""
    which = torch.randint(len(patterns), (count,), generator=draw)
    order = torch.rand(count, BITS, generator=draw).argsort(1).argsort(1)
    turned = order < torch.randint(2, 11, (count, 1), generator=draw)
    return patterns[which] ^ turned


def by_softmax(queries: Tensor, patterns: Tensor, beta: float) -> Tensor:
    """Bits by attention over unit vectors."""
    q, k = ((2.0 * t.double() - 1)[None, None] / BITS**0.5 for t in (queries, patterns))
    return attend(q, k, patterns.double()[None, None], scale=beta)[0, 0] > 0.5


def heads() -> None:
    """Effective temperatures of a trained encoder's heads."""
    try:
        model = encoder.load()
    except (ImportError, ValueError) as reason:
        print(f"\nno trained heads to set beside them: {reason}")
        return
    ids = model.tokenizer(text.from_library(8), truncation=True, max_length=128, return_tensors="pt")
    calls = record_heads(model.model, **ids)
    found = torch.stack([effective_beta(call.q, call.k, scale=call.scale) for call in calls]).flatten()
    low, middle, high = found.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
    print(f"\n|q||k|/sqrt(D) of {len(found)} heads of {model.name}: {low:.1f} to {high:.1f}, median {middle:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patterns", type=int, default=100)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fits, same = {}, {}
    print(f"{'radius':<8}{'R2':>7}{'beta':>8}{'published':>11}{'total variation':>17}{'same bits':>11}{'recalled':>10}")
    for radius in RADII:
        fits[radius] = fit_beta(BITS, radius)
        memory, agree, recalled = SparseMemory(BITS, radius), 0, 0
        for seed in range(arguments.seeds):
            draw = torch.Generator().manual_seed(seed)
            patterns = torch.randint(2, (arguments.patterns, BITS), generator=draw).bool()
            queries = flipped(patterns, arguments.queries, draw)
            read = memory.read(queries, patterns).bool()
            agree += int((read == by_softmax(queries, patterns, fits[radius].beta)).all(1).sum())
            recalled += int((read[:, None] == patterns).all(2).any(1).sum())
        count = arguments.seeds * arguments.queries
        same[radius] = agree / count
        fit, legacy = fits[radius], fit_beta(BITS, radius, legacy_ddof=True)
        print(
            f"{radius:<8}{fit.r2:>7.3f}{fit.beta:>8.1f}{legacy.beta:>11.1f}{fit.total_variation:>17.2f}"
            f"{same[radius]:>11.1%}{recalled / count:>10.1%}",
            flush=True,
        )
    heads()
    verdict(
        "attention-sdm",
        f"log overlap of balls of radius 5 / 11 / 15 in 64 bits is straight with R2 "
        f"{' / '.join(f'{fit.r2:.3f}' for fit in fits.values())}, beta "
        f"{' / '.join(f'{fit.beta:.1f}' for fit in fits.values())}; memory and softmax give the same bits in "
        f"{' / '.join(f'{share:.1%}' for share in same.values())} of queries",
        min(fit.r2 for fit in fits.values()) >= 0.85 and min(same.values()) >= 0.95,
    )


if __name__ == "__main__":
    main()
