"""Are the heads that make a small model go on with what repeats found by their scores, and do they do it?

    python benchmarks/proofs/s068_head_taxonomy.py [--sequences 256]

A model of two layers of attention on sequences that repeat (`induction_bed`). Heads are scored on fresh sequences; then
the induction head with the highest score and the one with the lowest of its layer are ablated, and the direction in
which the former writes the symbol that it copies is subtracted from its output. Zheng et al., 2024, arXiv 2409.03752.
"""

from __future__ import annotations

import argparse

import torch
from induction_bed import LENGTH, Induction, induction_bed, repeat_loss, repeats
from torch import Tensor

from glocal.bench.table import markdown
from glocal.inspect import ablate, add_direction, copying_score, detect, edit_heads, head_weights, record
from glocal.papers.verdict import verdict


@torch.no_grad()
def losses(bed: Induction, ids: Tensor, again: Tensor, mean: bool) -> list[list[float]]:
    """How much more is lost at what repeats without each head, which gives zeros or its mean."""
    other, _ = repeats(256, torch.Generator().manual_seed(1))
    means = record(bed, other, keep=["outputs"]) if mean else None
    whole, rows = float(repeat_loss(bed, ids, again)), []
    for layer in range(2):
        row = []
        for head in range(4):
            with edit_heads(bed, ablate([(layer, head)], means)):
                row.append(float(repeat_loss(bed, ids, again)) - whole)
        rows.append(row)
    return rows


@torch.no_grad()
def taken_out(bed: Induction, ids: Tensor, again: Tensor, layer: int, head: int) -> tuple[float, float]:
    """How much the logit of the symbol that is copied falls, and those of the others, by one length of the output."""
    stream = record(bed, ids, keep=["outputs"])[layer].outputs[:, head]
    o = head_weights(bed.layers[layer].attention).o[head]
    words = torch.nn.functional.normalize((bed.head.weight * bed.norm.weight) @ o.mT, dim=-1)  # (symbols, D)
    following = ids.roll(-1, 1)
    strength = stream.norm(dim=-1, keepdim=True)
    with edit_heads(bed, add_direction([(layer, head)], strength * words[following], -1.0)):
        change = bed(ids)
    change = (change - bed(ids))[:, :-1][again[:, 1:]]
    symbol = following[:, :-1][again[:, 1:]][:, None]
    fall = change.gather(1, symbol).mean()
    return float(fall), float((change.sum(1).mean() - fall) / (change.shape[1] - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed = induction_bed()
    ids, again = repeats(arguments.sequences, torch.Generator().manual_seed(99))
    assert ids.shape[1] == LENGTH
    found = detect(record(bed, ids), ["previous", "duplicate", "induction"])
    even = detect(record(bed, ids), ["previous", "duplicate", "induction"], corrected=True)
    zero, mean = losses(bed, ids, again, False), losses(bed, ids, again, True)
    copies = [
        copying_score(head_weights(each.attention), bed.embed.weight, bed.head.weight).tolist() for each in bed.layers
    ]
    rows = [
        (
            f"{layer}.{head}",
            *(f"{found[kind][layer, head]:.3f} ({even[kind][layer, head]:+.3f})" for kind in found),
            f"{copies[layer][head]:.2f}",
            f"{zero[layer][head]:.3f}",
            f"{mean[layer][head]:.3f}",
        )
        for layer in range(2)
        for head in range(4)
    ]
    names = [f"{kind} (over even)" for kind in found]
    print(markdown(("head", *names, "copying", "loss without", "loss with its mean"), rows), flush=True)
    previous, induction = found["previous"][0].max().item(), found["induction"][1]
    best, worst = int(induction.argmax()), int(induction.argmin())
    harm, other = zero[1][best], zero[1][worst]
    fall, rest = taken_out(bed, ids, again, 1, best)
    print(f"logit of the copied symbol {fall:+.3f} by subtraction of its direction, of others {rest:+.3f}")
    verdict(
        "head-taxonomy",
        f"previous-token score {previous:.2f} in layer 0, induction {induction.max():.2f} in layer 1; loss at "
        f"repeats {harm:+.3f} without that head, {other:+.3f} without the lowest; its symbol's logit {fall:+.2f} by "
        "subtraction",
        previous >= 0.4 and bool(induction.max() >= 0.5) and harm >= 3 * max(other, 0.0) and harm > 0 and fall < 0,
    )


if __name__ == "__main__":
    main()
