"""Do raised scores of the right image tokens undo neglect of the picture, those of random tokens not?

    python benchmarks/proofs/s081_paint.py [--scenes 2000] [--sigma 0.4]

A tiny vision-language model on scenes of 5 x 5 cells, asked whether a shape is there. Neglect is implanted: a constant
is taken from the last row's scores of image tokens in every layer. Then the scores of the six cells of the largest
norm are raised, or those of six random cells. Arif et al., 2025, arXiv 2501.12206.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from scene_bed import PRESENT, Bed, Questions, plain_bed, questions, scenes
from torch import Tensor

from glocal.papers.verdict import verdict
from glocal.steer.hooks import Site
from glocal.steer.method import Method
from glocal.steer.paint import PAINT

CELLS, ALPHAS = 6, (0.3, 0.7, 1.5)


@dataclass
class Neglect(Method):
    """Takes a constant from the last row's scores of the image."""

    constant: float = 0.0

    def edits(self, site: Site) -> bool:
        return self.constant > 0

    def rows(self, site: Site) -> Tensor:
        return site.last

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        return scores - self.constant * site.where("image")[:, None, None]


def right(
    bed: Bed, cells: Tensor, asked: Questions, constant: float, local: Tensor | None = None, alpha: float = 0.7
) -> float:
    """Share of right answers with neglect, and with raised scores of ``local (B, 6)`` where given."""
    spans = bed.spans(len(cells))
    with ExitStack() as stack:
        stack.enter_context(Neglect(bed.model, spans=spans, constant=constant))
        if local is not None:
            stack.enter_context(PAINT(bed.model, layers=range(3), spans=spans, local=local, alpha=alpha))
        return bed.accuracy(cells, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--sigma", type=float, default=0.4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed = plain_bed()
    draw = torch.Generator().manual_seed(1)
    seen = scenes(arguments.scenes, draw, sigma=arguments.sigma)
    asked = questions(seen, PRESENT, draw)
    cells = seen.cells.flatten(1, 2)
    largest = cells.square().sum(-1).topk(CELLS).indices
    chance = torch.rand(cells.shape[:2], generator=draw).topk(CELLS).indices

    names = ("neglected", *(f"alpha {alpha}" for alpha in ALPHAS), "random .7")
    print(f"presence{''.join(f'{name:>11}' for name in names)}")
    found = {}
    for constant in (0.0, 2.0, 4.0, 6.0):
        plain = right(bed, cells, asked, constant)
        each = {alpha: right(bed, cells, asked, constant, largest, alpha) for alpha in ALPHAS}
        random = right(bed, cells, asked, constant, chance)
        found[constant] = (plain, each[0.7], random)
        columns = "".join(f"{each[alpha]:>11.3f}" for alpha in ALPHAS)
        print(f"  c = {constant:g} {plain:>11.3f}{columns}{random:>11.3f}", flush=True)
    base, (neglected, restored, random) = found[0.0][0], found[4.0]
    regained, by_chance = ((value - neglected) / (base - neglected) for value in (restored, random))
    print(f"without neglect the same emphasis changes {base:.3f} to {found[0.0][1]:.3f}")
    verdict(
        "paint",
        f"neglect of 4 takes presence from {base:.3f} to {neglected:.3f}, alpha .7 on the right cells gives "
        f"{restored:.3f} ({regained:.0%} of the loss), on random ones {random:.3f} ({by_chance:.0%}); "
        f"without neglect {found[0.0][1]:.3f}",
        regained >= 0.8 and by_chance < 0.8 and base - neglected > 0.05,
    )


if __name__ == "__main__":
    main()
