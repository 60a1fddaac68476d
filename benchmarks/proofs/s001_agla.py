"""Does fusing the whole picture with its relevant part answer better than the whole, and than random parts?

    python benchmarks/proofs/s001_agla.py [--scenes 1000] [--sigma 0.5]

Scenes of 10 x 10 cells with six objects and noise; the model sees 25 tokens of them. The matcher is the model itself on
the four quarters at full resolution, asked whether the shape is there; 20 of 100 cells are kept. Answers of plain
generation, fused ones for several least plausibilities, and fused ones with random cells instead.
An et al., 2024, arXiv 2406.12718.
"""

from __future__ import annotations

import argparse

import torch
from scene_bed import (
    ANSWER,
    COLOUR,
    COLOURS,
    NO,
    PRESENT,
    YES,
    Bed,
    Questions,
    Scenes,
    crop,
    questions,
    scenes,
    whole,
    zoom_bed,
)
from torch import Tensor

from glocal.papers.verdict import verdict
from glocal.steer.agla import AGLA
from glocal.steer.relevance import attention_relevance

KEPT = 20


def relevance(bed: Bed, seen: Scenes, asked: Questions) -> Tensor:
    """Of each of 100 cells to whether the shape is there, ``(B, 10, 10)``: one quarter after the other."""
    count = len(seen.cells)
    there = Questions(torch.full((count,), PRESENT), asked.shape, asked.answer, asked.cell)
    found = torch.zeros(count, 10, 10)
    for top in (0, 5):
        for left in (0, 5):
            part = crop(seen, torch.full((count,), top), torch.full((count,), left))
            inputs = {"inputs_embeds": bed.embed(part, there)}
            each = attention_relevance(bed.model, inputs, lambda logits: logits[:, YES] - logits[:, NO]).sum(0)
            found[:, top : top + 5, left : left + 5] = each[:, 1:26].view(-1, 5, 5)
    return found


def kept_cells(values: Tensor) -> Tensor:
    """The highest 20 of 100, booleans ``(B, 10, 10)``."""
    best = values.flatten(1).topk(KEPT).indices
    return torch.zeros(len(values), 100, dtype=torch.bool).scatter(1, best, True).view(-1, 10, 10)


def right(bed: Bed, seen: Scenes, asked: Questions, kept: Tensor | None, beta: float = 0.0) -> float:
    """Share of right answers by generate; fused with the scene's kept cells, or plain."""
    prompt = bed.embed(whole(seen), asked).detach()
    settings = dict(max_new_tokens=1, do_sample=False, attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long))
    if kept is None:
        answers = bed.model.generate(inputs_embeds=prompt, **settings)
    else:
        part = Scenes(seen.cells * kept[..., None], seen.shape, seen.colour)
        augmented = {"inputs_embeds": bed.embed(whole(part), asked).detach()}
        with AGLA(bed.model, augmented=augmented, alpha=2.0, beta=beta, spans=bed.spans(len(prompt))):
            answers = bed.model.generate(inputs_embeds=prompt, **settings)
    return float((answers[:, -1] == asked.answer).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--sigma", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    assert ANSWER + COLOURS == YES
    bed = zoom_bed()
    draw = torch.Generator().manual_seed(1)
    seen = scenes(arguments.scenes, draw, side=10, objects=(6, 6), sigma=arguments.sigma)

    print(f"{'question':<10}{'plain':>8}{'fused':>8}{'beta .1':>9}{'beta .5':>9}{'random':>8}{'object kept':>13}")
    found = {}
    for name, kind in (("colour", COLOUR), ("presence", PRESENT)):
        asked = questions(seen, kind, draw)
        cells = kept_cells(relevance(bed, seen, asked))
        noise = kept_cells(torch.rand(len(cells), 10, 10, generator=draw))
        plain = right(bed, seen, asked, None)
        fused = [right(bed, seen, asked, cells, beta) for beta in (0.0, 0.1, 0.5)]
        chance = right(bed, seen, asked, noise)
        there = asked.cell >= 0
        hit = cells.flatten(1).gather(1, asked.cell.clamp(min=0)[:, None])[there].double().mean()
        found[name] = (plain, *fused, chance)
        print(f"{name:<10}{plain:>8.3f}{fused[0]:>8.3f}{fused[1]:>9.3f}{fused[2]:>9.3f}{chance:>8.3f}{hit:>13.3f}")
    gains = {name: row[1] - row[0] for name, row in found.items()}
    verdict(
        "agla",
        f"colour {found['colour'][0]:.3f} plain, {found['colour'][1]:.3f} fused, {found['colour'][4]:.3f} with random "
        f"cells; presence {found['presence'][0]:.3f}, {found['presence'][1]:.3f}, {found['presence'][4]:.3f}",
        all(gain >= 0.05 for gain in gains.values()) and all(row[4] <= row[0] for row in found.values()),
    )


if __name__ == "__main__":
    main()
