"""Does a rectangle around the last place keep a tracker on its object among look-alikes, and let it find it elsewhere?

    python benchmarks/proofs/s103_vptracker.py [--steps 1000] [--videos 400]

A frame is 6 x 6 cells of 24 numbers, codes of a shape and a colour with noise. The target and one object that looks the
same move by one cell a frame, three others stand still. A Llama of two layers reads ``[start, 36 cells, template]``,
where the template is the target's cell in the first frame, and answers with the number of a cell. Two are trained on
single frames, one of them with a further channel that is 1 in the rectangle, which holds the target nine times out of
ten. Then both track 12 frames, the rectangle 3 x 3 cells around the last answer. Wang et al., 2025, arXiv 2512.22799.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from bed import fit, tiny_llama
from scene_bed import CELL, COLOURS, SHAPES, codes
from torch import Tensor, nn

from glocal.papers.verdict import verdict
from glocal.steer.tracker import VPTracker, jitter

SIDE, FRAMES, OBJECTS, LAST = 6, 12, 5, 37
SIZE = (SIDE, SIDE)


class Finder(nn.Module):
    """Cells and a template to logits of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(CELL + 1, 64)
        self.places = nn.Parameter(torch.randn(SIDE * SIDE, 64) * 0.3)
        self.model = tiny_llama(LAST, 2)

    def forward(self, cells: Tensor, template: Tensor, region: Tensor, attentions: bool = False) -> tuple[Tensor, ...]:
        """Logits ``(B, 36)``, and the last row's attention to cells ``(B, H, 36)`` in the first layer."""
        start = self.model.get_input_embeddings()(torch.full((len(cells), 1), LAST - 1))
        seen = self.project(torch.cat([cells, region[..., None]], -1)) + self.places
        asked = self.project(F.pad(template, (0, 1)))[:, None]
        out = self.model(
            inputs_embeds=torch.cat([start, seen, asked], 1), use_cache=False, output_attentions=attentions
        )
        found = (out.logits[:, -1, : LAST - 1],)
        return (*found, out.attentions[0][:, :, -1, 1:LAST]) if attentions else found


def drawn(shape: Tensor, colour: Tensor, places: Tensor, sigma: Tensor, draw: torch.Generator) -> Tensor:
    """Frames ``(B, 36, 24)`` of objects ``(B, n)`` at their cells; a place of -1 is out of the frame."""
    shapes, colours = codes()
    clean = torch.zeros(len(places), SIDE * SIDE + 1, CELL)
    rows = torch.arange(len(places))[:, None]
    clean[rows, places] = torch.cat([shapes[shape], colours[colour]], -1)
    clean = clean[:, :-1]
    return clean + sigma * torch.randn(clean.shape, generator=draw)


def objects(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, colours and cells ``(B, 5)``: the first two look the same, the others otherwise, in part alike."""
    kinds = torch.rand(count, SHAPES * COLOURS, generator=draw).argsort(1)[:, : OBJECTS - 1]
    kinds = torch.cat([kinds[:, :1], kinds], 1)
    shape, colour = kinds // COLOURS, kinds % COLOURS
    # The third object has the target's shape, the fourth its colour.
    colour[:, 2] = (colour[:, 0] + 1 + colour[:, 2] % (COLOURS - 1)) % COLOURS
    shape[:, 2] = shape[:, 0]
    shape[:, 3] = (shape[:, 0] + 1 + shape[:, 3] % (SHAPES - 1)) % SHAPES
    colour[:, 3] = colour[:, 0]
    return shape, colour, torch.rand(count, SIDE * SIDE, generator=draw).argsort(1)[:, :OBJECTS]


def noise(count: int, draw: torch.Generator) -> Tensor:
    return torch.rand(count, 1, 1, generator=draw) * 0.6 + 0.2


def template_of(shape: Tensor, colour: Tensor, sigma: Tensor, draw: torch.Generator) -> Tensor:
    """The target's cell as another frame shows it, ``(B, 24)``."""
    shapes, colours = codes()
    clean = torch.cat([shapes[shape[:, 0]], colours[colour[:, 0]]], -1)
    return clean + sigma[:, 0] * torch.randn(clean.shape, generator=draw)


def cells_in(boxes: list[tuple[float, float, float, float]]) -> Tensor:
    """Which cells' middles are in boxes, ``(B, 36)`` of 0 and 1."""
    left, top, right, bottom = torch.tensor(boxes).T[..., None]
    y, x = (torch.arange(SIDE * SIDE) // SIDE + 0.5, torch.arange(SIDE * SIDE) % SIDE + 0.5)
    return ((x > left) & (x < right) & (y > top) & (y < bottom)).float()


def cell_box(cell: int) -> tuple[float, float, float, float]:
    y, x = divmod(cell, SIDE)
    return x, y, x + 1, y + 1


def train(prior: bool, steps: int, seed: int) -> Finder:
    torch.manual_seed(seed)
    finder, draw = Finder(), torch.Generator().manual_seed(seed)
    finder.model.set_attn_implementation("eager")

    def loss() -> Tensor:
        shape, colour, places = objects(64, draw)
        alone = torch.rand(64, generator=draw) < 0.5
        places[alone, 1] = -1
        sigma = noise(64, draw)
        region = torch.zeros(64, SIDE * SIDE)
        if prior:
            boxes = [jitter(cell_box(int(cell)), SIZE, draw, scales=(3, 5)) for cell in places[:, 0]]
            region = cells_in(boxes)
        logits, seen = finder(
            drawn(shape, colour, places, sigma, draw), template_of(shape, colour, sigma, draw), region, True
        )
        target = places[:, 0]
        # A tenth of the loss asks the last row to look at the target: retrieval sets in earlier.
        mass = seen.mean(1).gather(1, target[:, None])
        return F.cross_entropy(logits, target) - 0.1 * mass.clamp(min=1e-6).log().mean()

    return fit(finder, loss, steps, muon=finder.model.model.layers)


def step(places: Tensor, draw: torch.Generator) -> Tensor:
    """The first two objects move to a neighbouring free cell, drawn at random."""
    places = places.clone()
    for mover in (0, 1):
        y, x = places[:, mover] // SIDE, places[:, mover] % SIDE
        ways = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])
        rows, columns = y[:, None] + ways[:, 0], x[:, None] + ways[:, 1]
        to = rows * SIDE + columns
        free = (rows >= 0) & (rows < SIDE) & (columns >= 0) & (columns < SIDE)
        free &= (to[..., None] != places[:, None]).all(-1)
        score = torch.rand(len(places), 4, generator=draw).masked_fill(~free, -1)
        chosen = to.gather(1, score.argmax(1)[:, None])[:, 0]
        places[:, mover] = torch.where(free.any(1), chosen, places[:, mover])
    return places


@torch.no_grad()
def track(finder: Finder | None, prior: bool, videos: int) -> float:
    """Share of frames, after the first, whose answer is the target's cell.

    Without a finder: what one can do that knows what stands where, and guesses between two look-alikes.
    """
    draw, tracker = torch.Generator().manual_seed(99), VPTracker(scale=3)
    shape, colour, places = objects(videos, draw)
    sigma = noise(videos, draw)
    template = template_of(shape, colour, sigma, draw)
    last, right = places[:, 0], []
    for _ in range(FRAMES - 1):
        places = step(places, draw)
        region = cells_in([tracker.region(cell_box(int(cell)), SIZE) for cell in last])
        if finder is None:
            value = torch.rand(videos, 2, generator=draw) + region.gather(1, places[:, :2])
            last = places.gather(1, value.argmax(1)[:, None])[:, 0]
        else:
            cells = drawn(shape, colour, places, sigma, draw)
            last = finder(cells, template, region * prior)[0].argmax(-1)
        right.append((last == places[:, 0]).double().mean())
    return float(torch.stack(right).mean())


@torch.no_grad()
def jumped(finder: Finder, twin: bool, count: int = 2000) -> float:
    """Accuracy where the target is outside of the rectangle, which holds nothing that looks like it."""
    draw = torch.Generator().manual_seed(98)
    shape, colour, places = objects(count, draw)
    if not twin:
        places[:, 1] = -1
    sigma = noise(count, draw)
    centres = torch.randint(SIDE * SIDE, (count,), generator=draw)
    region = cells_in([VPTracker(scale=3).region(cell_box(int(cell)), SIZE) for cell in centres])
    out = F.pad(region, (0, 1)).gather(1, places[:, :2] % (SIDE * SIDE + 1)).sum(1) == 0
    cells, template = drawn(shape, colour, places, sigma, draw), template_of(shape, colour, sigma, draw)
    found = finder(cells, template, region)[0].argmax(-1)
    return float((found == places[:, 0])[out].double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--videos", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'tracker':<28}{'right frames of 11':>20}{'after a jump':>14}{'with a twin':>13}")
    without = train(False, arguments.steps, arguments.seed)
    plain = track(without, False, arguments.videos)
    print(f"{'without a rectangle':<28}{plain:>20.3f}", flush=True)
    with_it = train(True, arguments.steps, arguments.seed)
    prior = track(with_it, True, arguments.videos)
    jump, twin = jumped(with_it, False), jumped(with_it, True)
    print(f"{'with a rectangle':<28}{prior:>20.3f}{jump:>14.3f}{twin:>13.3f}")
    best = track(None, True, arguments.videos)
    print(f"{'guessing between two alike':<28}{best:>20.3f}")
    verdict(
        "vptracker",
        f"{prior:.3f} of the frames right with the rectangle, {plain:.3f} without, {best:.3f} by one that sees all and "
        f"guesses between look-alikes inside; {jump:.3f} found after a jump out of it",
        prior >= plain + 0.15 and jump >= 0.5,
    )


if __name__ == "__main__":
    main()
