"""Does a loss on where the answer looks make a small model learn to find things sooner, and do gates join two sensors?

    python benchmarks/proofs/s069_earthmind.py [--steps 600] [--fusion-steps 600] [--scenes 1000]

Spatial attention prompting: scenes of 5 x 5 cells, three layers, trained from the same seed without the loss, with it
on the last layer and on the first, weight 0.1: the answer's row is to look at the cell of what is asked. Right answers
to colour and presence questions at noise 0.3, and how often the cell that is looked at most is that cell. By AdamW, as
the claim has been checked before; by Muon, which all other proofs train this model with, it learns without help.

Fusion: two views of each scene; in each, every cell has its own noise. Two layers read both, as plain concatenation,
gated as the authors' code does it, and with adaptive gates; equal seed and steps; a gain counts if it is more than two
standard errors. Shu et al., 2025, arXiv 2506.01667.
"""

from __future__ import annotations

import argparse

import torch
from scene_bed import CELL, COLOUR, PRESENT, Bed, Questions, plain_batch, questions, scenes, train
from torch import Tensor, nn

from glocal.nn.sensor_fusion import SensorFusion
from glocal.papers.verdict import verdict
from glocal.steer.spatial import SpatialPrompting

WEIGHT, SIDE = 0.1, 5
LEVELS = (0.1, 1.5)  # noise of a cell


def masks(asked: Questions) -> list[Tensor]:
    """The cell of what is asked; empty where it is not there."""
    cells = torch.arange(SIDE * SIDE) == asked.cell[:, None]
    return list(cells.view(-1, 1, SIDE, SIDE))


def answer_rows(count: int) -> Tensor:
    """The prompt's last position."""
    return (torch.arange(SIDE * SIDE + 3) == SIDE * SIDE + 2).expand(count, -1)


def prompted(layer: int | None, steps: int) -> Bed:
    """TB1 from scratch, with the loss on a layer or without."""
    torch.manual_seed(0)
    bed = Bed(3)
    if layer is None:
        return train(bed, plain_batch, steps, muon=False)
    with SpatialPrompting(bed.model, queries=answer_rows(64), layers=[layer], spans=bed.spans(64)) as prompting:
        return train(bed, plain_batch, steps, extra=lambda asked: WEIGHT * prompting.loss(masks(asked)), muon=False)


def by_muon(steps: int) -> Bed:
    """The same without the loss, trained as the test bed is."""
    torch.manual_seed(0)
    return train(Bed(3), plain_batch, steps)


@torch.no_grad()
def hits(bed: Bed, layer: int, cells: Tensor, asked: Questions) -> float:
    """How often the answer's row looks most at the cell of what is asked."""
    count = len(cells)
    with SpatialPrompting(bed.model, queries=answer_rows(count), layers=[layer], spans=bed.spans(count)) as seen:
        bed.logits(cells, asked)
    found = torch.cat([seen.maps(row).argmax(-1) for row in range(count)])
    return float((found == asked.cell).double().mean())


class TwoSensors(Bed):
    """Reads two views, cells ``(B, 50, 24)``, 25 optical and 25 radar, each by a projector of its own."""

    def __init__(self, fusion: str) -> None:
        super().__init__(2, cells=2 * SIDE * SIDE)
        self.radar = nn.Linear(CELL, 64)
        self.fuse = None if fusion == "concatenated" else SensorFusion(64, fusion=fusion)

    def views(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        optical, radar = cells.chunk(2, 1)
        return self.project(optical), self.radar(radar)

    def embed(self, cells: Tensor, asked: Questions) -> Tensor:
        optical, radar = self.views(cells)
        both = torch.cat([radar, optical], 1) if self.fuse is None else self.fuse(optical, radar)
        words = self.model.get_input_embeddings()
        text = torch.stack([asked.kind, asked.shape + 4], 1)
        return torch.cat([words(torch.zeros(len(cells), 1, dtype=torch.long)), both, words(text)], 1)


def two_views(count: int, draw: torch.Generator, kind: int | None) -> tuple[Tensor, Questions]:
    """Scenes seen twice, the noise of every cell of either view high or low."""
    seen = scenes(count, draw, sigma=0.0)
    clean = seen.cells.flatten(1, 2).repeat(1, 2, 1)
    levels = torch.tensor(LEVELS)[torch.randint(len(LEVELS), (*clean.shape[:2], 1), generator=draw)]
    return clean + levels * torch.randn(clean.shape, generator=draw), questions(seen, kind, draw)


def fused(fusion: str, steps: int) -> TwoSensors:
    """Trained without an alignment loss, so that the gates are all that differs."""
    torch.manual_seed(0)
    return train(TwoSensors(fusion), lambda draw: two_views(64, draw, None), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--fusion-steps", type=int, default=600)
    parser.add_argument("--scenes", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    draw = torch.Generator().manual_seed(1)
    seen = scenes(arguments.scenes, draw, sigma=0.3)
    cells = seen.cells.flatten(1, 2)
    colour, present = (questions(seen, kind, draw) for kind in (COLOUR, PRESENT))
    print(f"{'attention loss':<16}{'colour':>8}{'presence':>10}{'hit, first layer':>18}{'hit, last':>11}")
    found = {}
    for name, layer in (("none", None), ("last layer", 2), ("first layer", 0), ("none, by Muon", None)):
        bed = by_muon(arguments.steps) if "Muon" in name else prompted(layer, arguments.steps)
        right = [bed.accuracy(cells, asked) for asked in (colour, present)]
        looked = [hits(bed, number, cells, colour) for number in (0, 2)]
        found[name] = (right[0], looked)
        print(f"{name:<16}{right[0]:>8.3f}{right[1]:>10.3f}{looked[0]:>18.3f}{looked[1]:>11.3f}", flush=True)

    print(f"{'two sensors':<16}{'colour':>8}{'presence':>10}")
    both = {}
    for fusion in ("concatenated", "coded", "adaptive"):
        bed = fused(fusion, arguments.fusion_steps)
        draw = torch.Generator().manual_seed(2)
        both[fusion] = [bed.accuracy(*two_views(arguments.scenes, draw, kind)) for kind in (COLOUR, PRESENT)]
        print(f"{fusion:<16}{both[fusion][0]:>8.3f}{both[fusion][1]:>10.3f}", flush=True)

    plain, last = found["none"], found["last layer"]
    prompting = last[0] >= plain[0] + 0.2 and last[1][1] >= 3 * plain[1][1]
    joined = {name: sum(right) / 2 for name, right in both.items()}
    gain = joined["adaptive"] - joined["concatenated"]
    # Of a difference of two shares of 2 * scenes questions each.
    error = (2 * joined["adaptive"] * (1 - joined["adaptive"]) / (2 * arguments.scenes)) ** 0.5
    claim = "beat" if gain > 2 * error else "do not beat"
    verdict(
        "earthmind",
        f"colour by AdamW {plain[0]:.3f} without the loss, {last[0]:.3f} with it, looking at the right cell "
        f"{plain[1][1]:.3f} and {last[1][1]:.3f}; two sensors: adaptive gates {joined['adaptive']:.3f}, concatenated "
        f"{joined['concatenated']:.3f}, so that gates {claim} concatenation",
        prompting and gain > 2 * error,
    )


if __name__ == "__main__":
    main()
