"""Does attention lose its hold of single tokens as a text grows, and does it get touchier as it gets sharper?

    python benchmarks/proofs/s046_norm_limits.py [--passages 8]

The encoder MiniLM of the demo (6 layers of 12 heads) reads passages of the standard library's documentation, cut to 32,
64, 128 and 256 tokens. At each length the N = L/4 tokens with the greatest weights are chosen for each query; distances
are those of `glocal.inspect.selection_distance` over values of unit length, the mean over the other tokens. Then, at
256 tokens, temperatures from 1 down to 0.05: entropy of the weights, and the spectral norm of the softmax's Jacobian,
times T, over pairs of logits: the two greatest of each row. The norm cannot be above 0.5; with a pair that is nearly
tied it must come near. Mudarisov et al., 2025, arXiv 2508.17821.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor

from glocal.bench import encoder, text
from glocal.inspect import HeadCall, HeadSelection, gradient_sensitivity, normalise, record_heads, selection_report
from glocal.papers.verdict import verdict

LENGTHS, TEMPERATURES = (32, 64, 128, 256), (1.0, 0.5, 0.2, 0.1, 0.05)


def read(model: encoder.Encoder, passages: list[str], length: int) -> list[HeadCall]:
    """All layers, for all passages cut to one length."""
    cut = {"truncation": True, "max_length": length, "return_tensors": "pt"}
    ids = torch.cat([model.tokenizer(passage, **cut)["input_ids"] for passage in passages])
    return record_heads(model.model, input_ids=ids, attention_mask=torch.ones_like(ids))


def over_heads(rows: list[HeadSelection], name: str) -> Tensor:
    return torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passages", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = encoder.load()
    passages = text.from_library(arguments.passages)
    distance, separable = {}, {}
    columns = f"{'distance':>10}{'N_s/N':>8}{'least':>7}{'greatest':>10}{'critical N/L':>14}{'entropy/log L':>15}"
    print(f"{'tokens':<8}{columns}")
    for length in LENGTHS:
        calls = read(model, passages, length)
        rows = selection_report(calls)
        distance[length], share = over_heads(rows, "distance"), over_heads(rows, "separable")
        separable[length] = float(share.mean())
        print(
            f"{length:<8}{float(distance[length].mean()):>10.4f}{separable[length]:>8.3f}{float(share.min()):>7.3f}"
            f"{float(share.max()):>10.3f}{float(over_heads(rows, 'critical').nanmean()):>14.3f}"
            f"{float(over_heads(rows, 'entropy').mean()):>15.3f}",
            flush=True,
        )
    fallen = float((distance[LENGTHS[-1]] < distance[LENGTHS[0]]).double().mean())
    overall = sum(separable.values()) / len(separable)
    print(f"heads whose distance is less at {LENGTHS[-1]} tokens than at {LENGTHS[0]}: {fallen:.0%}\n")

    print(f"{'T':<6}{'norm x T, pairs':>16}{'norm x T, rows':>16}{'entropy/log L':>15}")
    pairs = torch.cat([call.weights.double().topk(2, -1).values.flatten(0, -2) for call in calls]).log()
    worst, entropy = {}, {}
    for temperature in TEMPERATURES:
        worst[temperature] = float(gradient_sensitivity(pairs, temperature).norm.max()) * temperature
        spread, whole = [], 0.0
        for call in calls:
            for logits in call.weights.double().log().unbind():
                weights = normalise(logits, temperature=temperature)
                spread.append(float(torch.special.entr(weights).sum(-1).mean()))
                some = gradient_sensitivity(logits[:, ::16], temperature).norm  # of every sixteenth query
                whole = max(whole, float(some.max()) * temperature)
        entropy[temperature] = sum(spread) / len(spread) / float(torch.tensor(LENGTHS[-1]).log())
        print(f"{temperature:<6}{worst[temperature]:>16.4f}{whole:>16.4f}{entropy[temperature]:>15.3f}", flush=True)
    falls = all(entropy[b] < entropy[a] for a, b in pairwise(TEMPERATURES))
    verdict(
        "norm-limits",
        f"with a quarter of the tokens chosen, their sum is nearer to the others at 256 tokens than at 32 in "
        f"{fallen:.0%} of {len(distance[LENGTHS[0]])} heads; {overall:.2f} of the chosen are separable; worst norm x T "
        f"over pairs {min(worst.values()):.3f} to {max(worst.values()):.3f} for T from 1 to 0.05, entropy/log L "
        f"{entropy[1.0]:.2f} to {entropy[0.05]:.2f}",
        fallen >= 0.7 and 0.5 < overall < 1 and all(abs(norm - 0.5) <= 0.025 for norm in worst.values()) and falls,
    )


if __name__ == "__main__":
    main()
