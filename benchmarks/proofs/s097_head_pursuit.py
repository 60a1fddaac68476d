"""Is the head that writes colours, by pursuit, the one that answers about colours need?

    python benchmarks/proofs/s097_head_pursuit.py [--scenes 1000]

A tiny vision-language model of three layers and four heads. What each head writes at the last row of 600 mixed
questions is explained by the four colours' rows of the unembedding; the head that they explain best is taken out, or
turned around, and each other head for comparison. The same for the shapes' rows. Basile et al., 2025, arXiv 2510.21518.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from scene_bed import ANSWER, COLOUR, COLOURS, DESCRIBE, PRESENT, SHAPE, SHAPES, Bed, plain_bed, questions, scenes

from glocal.papers.verdict import verdict
from glocal.steer.head_pursuit import HeadScale, head_writes, rank_heads, unembedding

KINDS = {"colour": COLOUR, "presence": PRESENT, "describe": DESCRIBE}
SIGMA = 0.3


def right(bed: Bed, count: int) -> list[float]:
    """Share of right answers to each kind of question."""
    draw = torch.Generator().manual_seed(2)
    seen = scenes(count, draw, sigma=SIGMA)
    return [bed.accuracy(seen.cells.flatten(1, 2), questions(seen, kind, draw)) for kind in KINDS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed = plain_bed()
    draw = torch.Generator().manual_seed(1)
    seen = scenes(600, draw, sigma=SIGMA)
    prompts = bed.embed(seen.cells.flatten(1, 2), questions(seen, None, draw)).detach()
    writes = head_writes(bed.model, {"inputs_embeds": prompts, "use_cache": False})

    concepts = {"colours": range(ANSWER, ANSWER + COLOURS), "shapes": range(SHAPE, SHAPE + SHAPES)}
    ranks = {}
    for name, tokens in concepts.items():
        rows = unembedding(bed.model, list(tokens))
        ranks[name] = rank_heads(writes, rows)
        lens = rank_heads(writes, rows, by="lens")
        best = "  ".join(f"({r.layer}, {r.head}) {r.score:.2f}" for r in ranks[name][:4])
        print(f"{name}: share explained {best}; by the logit lens first ({lens[0].layer}, {lens[0].head})")

    print(f"\n{'heads':<26}" + "".join(f"{kind:>10}" for kind in KINDS))
    plain = right(bed, arguments.scenes)
    print(f"{'as it is':<26}" + "".join(f"{share:>10.3f}" for share in plain))
    colour = ranks["colours"][0][:2]
    found = {}
    for name, head in (("colours", colour), ("shapes", ranks["shapes"][0][:2])):
        for factor in (0.0, -1.0):
            with HeadScale(bed.model, heads=[head], factor=factor):
                found[name, factor] = right(bed, arguments.scenes)
            label = f"first for {name} {head} x {factor:g}"
            print(f"{label:<26}" + "".join(f"{share:>10.3f}" for share in found[name, factor]), flush=True)
    changes = {}
    for factor in (0.0, -1.0):
        others = []
        for rank in ranks["colours"][1:]:
            with HeadScale(bed.model, heads=[rank[:2]], factor=factor):
                others.append(right(bed, arguments.scenes))
        middle = [median(column) for column in zip(*others, strict=True)]
        changes[factor] = median(abs(row[0] - plain[0]) for row in others)
        label = f"each other x {factor:g}, median"
        print(f"{label:<26}" + "".join(f"{share:>10.3f}" for share in middle))
        each = "  ".join(
            f"({r.layer}, {r.head}) {row[0]:.3f}" for r, row in zip(ranks["colours"][1:], others, strict=True)
        )
        print(f"  colour: {each}")
    least = min(found["colours", factor][0] for factor in (0.0, -1.0))
    verdict(
        "head-pursuit",
        f"head {colour} ranks first for colours; colour {plain[0]:.3f} as it is, {found['colours', 0.0][0]:.3f} "
        f"without it, {found['colours', -1.0][0]:.3f} with it turned around; each other head changes it by "
        f"{changes[0.0]:.3f} on median",
        least < 0.35 and max(changes.values()) < 0.02,
    )


if __name__ == "__main__":
    main()
