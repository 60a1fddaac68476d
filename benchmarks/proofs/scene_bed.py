"""The test beds of the steering proofs: a tiny language model that sees scenes of shapes and colours as codes.

TB1: a scene is 5 x 5 cells of 24 numbers, 16 for a shape and 8 for a colour, with noise; a linear map makes tokens of
them, and a small Llama reads ``[start, 25 cells, kind of question, shape]`` and answers with one token. TB1z: scenes
are 10 x 10, and the model sees 25 tokens of them: the whole in means over 2 x 2 cells, or a crop of 5 x 5.

Training takes a minute or two; weights are kept in ``build/beds``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bed import fit, kept, tiny_llama
from torch import Tensor, nn

from glocal.steer.spans import SpanMap

SHAPES, COLOURS, CELL = 8, 4, 24
START, COLOUR, PRESENT, DESCRIBE = 0, 1, 2, 3  # tokens: what is asked
SHAPE, ANSWER = 4, 12  # first shape, first colour
YES, NO, NONE, VOCAB = 16, 17, 18, 19


@dataclass
class Scenes:
    """Scenes ``cells (B, side, side, 24)``; ``shape`` and ``colour (B, side, side)``, -1 where nothing is."""

    cells: Tensor
    shape: Tensor
    colour: Tensor


@dataclass
class Questions:
    """One a scene, ``(B,)`` each: kind, shape asked for, the token that answers, the cell it is about (-1 none)."""

    kind: Tensor
    shape: Tensor
    answer: Tensor
    cell: Tensor


def codes() -> tuple[Tensor, Tensor]:
    """Fixed prototypes of shapes ``(8, 16)`` and colours ``(4, 8)``."""
    draw = torch.Generator().manual_seed(7)
    return torch.randn(SHAPES, 16, generator=draw), torch.randn(COLOURS, 8, generator=draw)


def scenes(
    count: int, draw: torch.Generator, *, side: int = 5, objects: tuple[int, int] = (2, 5), sigma: float | None = None
) -> Scenes:
    """Objects of different shapes at random cells; ``sigma`` from 0.2 to 0.8 where None."""
    places = torch.rand(count, side * side, generator=draw).argsort(1)
    kinds = torch.rand(count, SHAPES, generator=draw).argsort(1)
    number = torch.randint(objects[0], objects[1] + 1, (count,), generator=draw)
    shape = torch.full((count, side * side), -1)
    colour = torch.full((count, side * side), -1)
    rows = torch.arange(count)
    for n in range(objects[1]):
        some = rows[n < number]
        shape[some, places[some, n]] = kinds[some, n]
        colour[some, places[some, n]] = torch.randint(COLOURS, (len(some),), generator=draw)
    shapes, colours = codes()
    clean = torch.cat([shapes[shape.clamp(min=0)], colours[colour.clamp(min=0)]], -1) * (shape >= 0)[..., None]
    noise = torch.rand(count, 1, 1, generator=draw) * 0.6 + 0.2 if sigma is None else torch.tensor(sigma)
    cells = clean + noise * torch.randn(clean.shape, generator=draw)
    grid = (count, side, side)
    return Scenes(cells.view(*grid, CELL), shape.view(grid), colour.view(grid))


def questions(seen: Scenes, kind: int | None, draw: torch.Generator) -> Questions:
    """A question of a kind for each scene; of all kinds where None."""
    count = len(seen.cells)
    shape, colour = seen.shape.flatten(1), seen.colour.flatten(1)
    kinds = torch.randint(1, 4, (count,), generator=draw) if kind is None else torch.full((count,), kind)
    there = F.one_hot(shape + 1, SHAPES + 1).amax(1)[:, 1:].bool()
    noise = torch.rand(count, SHAPES, generator=draw)
    in_it, not_in_it = (noise - 9 * (~there)).argmax(1), (noise - 9 * there).argmax(1)
    positive = (kinds == COLOUR) | (torch.rand(count, generator=draw) < 0.5)
    asked = torch.where(positive, in_it, not_in_it)
    cell = (shape == asked[:, None]).long().argmax(1)
    cell = torch.where((shape == asked[:, None]).any(1), cell, -1)
    answer = torch.where(positive, YES, NO)
    answer = torch.where(kinds == COLOUR, ANSWER + colour.gather(1, cell.clamp(min=0)[:, None])[:, 0], answer)
    described = there.long().argmax(1)
    answer = torch.where(kinds == DESCRIBE, SHAPE + described, answer)
    asked_token = torch.where(kinds == DESCRIBE, NONE - SHAPE, asked)
    cell = torch.where(kinds == DESCRIBE, (shape == described[:, None]).long().argmax(1), cell)
    return Questions(kinds, asked_token, answer, cell)


class Bed(nn.Module):
    """Projector and language model."""

    def __init__(self, layers: int, cells: int = 25) -> None:
        super().__init__()
        self.cells = cells
        self.project = nn.Linear(CELL, 64)
        self.model = tiny_llama(VOCAB, layers)

    def embed(self, cells: Tensor, asked: Questions) -> Tensor:
        """Prompts ``(B, 28, 64)`` of cells ``(B, 25, 24)`` and questions."""
        words = self.model.get_input_embeddings()
        start = torch.full((len(cells), 1), START)
        text = torch.stack([asked.kind, asked.shape + SHAPE], 1)
        return torch.cat([words(start), self.project(cells), words(text)], 1)

    def spans(self, batch: int) -> SpanMap:
        """What the positions of a prompt are."""
        ids = torch.full((batch, self.cells + 3), 1)
        ids[:, 1 : self.cells + 1] = 9
        return SpanMap.of(ids, image_token=9)

    def logits(self, cells: Tensor, asked: Questions) -> Tensor:
        """Of the answer, ``(B, V)``."""
        found: Tensor = self.model(inputs_embeds=self.embed(cells, asked), use_cache=False).logits[:, -1]
        return found

    @torch.no_grad()
    def accuracy(self, cells: Tensor, asked: Questions) -> float:
        """Share of right answers."""
        return float((self.logits(cells, asked).argmax(-1) == asked.answer).double().mean())


def whole(seen: Scenes) -> Tensor:
    """Means over 2 x 2 of 10 x 10 cells, times 2: ``(B, 25, 24)``."""
    return F.avg_pool2d(seen.cells.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1, 2) * 2


def crop(seen: Scenes, top: Tensor, left: Tensor) -> Tensor:
    """5 x 5 of the cells from ``top`` and ``left (B,)`` on: ``(B, 25, 24)``."""
    rows = top[:, None, None] + torch.arange(5)[:, None]
    columns = left[:, None, None] + torch.arange(5)
    return seen.cells[torch.arange(len(top))[:, None, None], rows, columns].flatten(1, 2)


Batch = tuple[Tensor, Questions]


def plain_batch(draw: torch.Generator) -> Batch:
    """TB1's training batch."""
    seen = scenes(64, draw)
    return seen.cells.flatten(1, 2), questions(seen, None, draw)


def zoom_batch(draw: torch.Generator) -> Batch:
    """TB1z's: the whole or a crop, half of the scenes with random cells black; answers follow what can be seen."""
    seen = scenes(96, draw, side=10, objects=(2, 6))
    dark = torch.rand(96, 1, 1, generator=draw) * (torch.rand(96, 1, 1, generator=draw) < 0.5)
    hidden = torch.rand(96, 10, 10, generator=draw) < dark
    zoomed = torch.rand(96, generator=draw) < 0.5
    corner = torch.randint(6, (96, 2), generator=draw)
    rows, columns = torch.arange(10).view(10, 1), torch.arange(10).view(1, 10)
    top, left = corner[:, :1, None], corner[:, 1:, None]
    within = (rows >= top) & (rows < top + 5) & (columns >= left) & (columns < left + 5)
    unseen = hidden | (zoomed[:, None, None] & ~within)
    cells = seen.cells.masked_fill(hidden[..., None], 0.0)
    shape, colour = (t.masked_fill(unseen, -1) for t in (seen.shape, seen.colour))
    visible = Scenes(cells, shape, colour)
    asked = questions(visible, None, draw)
    empty = ~(shape >= 0).flatten(1).any(1)  # nothing to tell the colour of: ask whether a shape is there
    asked.kind[empty & (asked.kind != PRESENT)] = PRESENT
    asked.answer[empty] = NO
    asked.shape[empty] = asked.shape[empty].clamp(max=SHAPES - 1)
    asked.cell[empty] = -1
    part = crop(visible, corner[:, 0], corner[:, 1])
    return torch.where(zoomed[:, None, None], part, whole(visible)), asked


def train(
    bed: Bed,
    batch: Callable[[torch.Generator], Batch],
    steps: int,
    seed: int = 0,
    *,
    extra: Callable[[Questions], Tensor] | None = None,
    muon: bool = True,
) -> Bed:
    """Steps of `fit`, the layers' matrices by Muon or not; ``extra`` is a loss of its own, added."""
    draw = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        cells, asked = batch(draw)
        found = F.cross_entropy(bed.logits(cells, asked), asked.answer)
        return found if extra is None else found + extra(asked)

    return fit(bed, loss, steps, muon=bed.model.model.layers if muon else ())


def plain_bed() -> Bed:
    """TB1, trained: three layers, 1,000 steps."""
    return kept("tb1", lambda: Bed(3), lambda bed: train(bed, plain_batch, 1000))


def zoom_bed() -> Bed:
    """TB1z, trained: two layers, 2,000 steps."""
    return kept("tb1z", lambda: Bed(2), lambda bed: train(bed, zoom_batch, 2000))


def main() -> None:
    draw = torch.Generator().manual_seed(99)
    bed = plain_bed()
    print("TB1      colour  present  (share of right answers)")
    for sigma in (0.3, 0.6, 0.9):
        seen = scenes(1000, draw, sigma=sigma)
        right = [bed.accuracy(seen.cells.flatten(1, 2), questions(seen, kind, draw)) for kind in (COLOUR, PRESENT)]
        print(f"  {sigma}    {right[0]:.3f}   {right[1]:.3f}")
    bed = zoom_bed()
    print("TB1z, the whole; a crop with the object at 0.5")
    for sigma in (0.3, 0.5, 0.7):
        seen = scenes(1000, draw, side=10, objects=(6, 6), sigma=sigma)
        right = [bed.accuracy(whole(seen), questions(seen, kind, draw)) for kind in (COLOUR, PRESENT)]
        print(f"  {sigma}    {right[0]:.3f}   {right[1]:.3f}")
    seen = scenes(1000, draw, side=10, objects=(6, 6), sigma=0.5)
    asked = questions(seen, COLOUR, draw)
    top, left = (asked.cell // 10 - 2).clamp(0, 5), (asked.cell % 10 - 2).clamp(0, 5)
    print(f"  crop   {bed.accuracy(crop(seen, top, left), asked):.3f}")


if __name__ == "__main__":
    main()
