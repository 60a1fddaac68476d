"""Does dividing by general attention find what a question is about, where something else draws all attention?

    python benchmarks/proofs/s089_carve.py [--scenes 1000] [--sigma 0.3] [--share 0.5]

Scenes of 10 x 10 cells with six objects; the model sees 25 tokens of them. A share of the last row's attention goes to
two random tokens, whatever is asked. Colour questions: answered plainly, and again on a crop around the token with most
attention, raw or by contrast with the general prompt "describe"; the crop without the distraction, and with it.
Then, on scenes of 5 x 5: the attention's entropy as noise grows. Ge et al., 2025, arXiv 2509.06461.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass

import torch
from scene_bed import (
    COLOUR,
    DESCRIBE,
    NONE,
    SHAPE,
    Bed,
    Questions,
    Scenes,
    crop,
    plain_bed,
    questions,
    scenes,
    whole,
    zoom_bed,
)
from torch import Tensor

from glocal.papers.verdict import verdict
from glocal.steer.carve import contrast
from glocal.steer.hooks import Site
from glocal.steer.method import Method
from glocal.steer.record import RecordRows, attention_entropy

LAMBDAS = (1e-8, 0.01, 0.1)
LAYER = 0  # where the bed retrieves


@dataclass
class Distract(Method):
    """A share of the last row's attention goes to the image tokens ``at (B, 2)``."""

    _: KW_ONLY
    at: Tensor
    share: float

    def edits(self, site: Site) -> bool:
        return True

    def rows(self, site: Site) -> Tensor:
        return site.last

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        drawn = torch.zeros(len(weights), site.keys).scatter(1, self.at + 1, 0.5)
        return (1 - self.share) * weights + self.share * drawn[:, None, None]


def looked(bed: Bed, cells: Tensor, asked: Questions) -> Tensor:
    """The last row's attention to the 25 tokens, ``(B, 25)``."""
    with torch.no_grad(), RecordRows(bed.model, layers=[LAYER], spans=bed.spans(len(cells))) as record:
        bed.logits(cells, asked)
    return torch.stack([record.images(row)[0][0, 0] for row in range(len(cells))])


def zoomed(seen: Scenes, tokens: Tensor) -> Tensor:
    """Crops around the 2 x 2 cells of tokens ``(B,)``."""
    top, left = (2 * (tokens // 5) - 1).clamp(0, 5), (2 * (tokens % 5) - 1).clamp(0, 5)
    return crop(seen, top, left)


def trial(bed: Bed, seen: Scenes, asked: Questions, at: Tensor, share: float) -> dict[str, tuple[float, ...]]:
    """For raw attention and each contrast: how often it finds the token, and right answers on the crop."""
    general = Questions(
        torch.full_like(asked.kind, DESCRIBE), torch.full_like(asked.shape, NONE - SHAPE), asked.answer, asked.cell
    )
    target = asked.cell // 20 * 5 + asked.cell % 10 // 2
    view = whole(seen)
    with Distract(bed.model, layers=[LAYER], at=at, share=share) if share else nullcontext():
        plain = bed.accuracy(view, asked)
        question, other = looked(bed, view, asked), looked(bed, view, general)
    found = {"plain": (float("nan"), plain, plain)}
    maps = {"raw": question} | {f"contrast {value:g}": contrast(question, other, value) for value in LAMBDAS}
    for name, values in maps.items():
        best = values.argmax(1)
        part = zoomed(seen, best)
        free = bed.accuracy(part, asked)
        with Distract(bed.model, layers=[LAYER], at=at, share=share) if share else nullcontext():
            held = bed.accuracy(part, asked)
        found[name] = (float((best == target).double().mean()), free, held)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--share", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed = zoom_bed()
    draw = torch.Generator().manual_seed(1)
    seen = scenes(arguments.scenes, draw, side=10, objects=(6, 6), sigma=arguments.sigma)
    asked = questions(seen, COLOUR, draw)
    at = torch.rand(arguments.scenes, 25, generator=draw).argsort(1)[:, :2]
    for share in (arguments.share, 0.0):
        print(f"{share:g} of the attention elsewhere")
        print(f"  {'zoom by':<16}{'found':>8}{'right':>8}{'distracted too':>17}")
        rows = trial(bed, seen, asked, at, share)
        for name, (hit, free, held) in rows.items():
            print(f"  {name:<16}{hit:>8.3f}{free:>8.3f}{held:>17.3f}")
        if share:
            found = rows

    print("entropy of the question's attention, as noise grows")
    bed, entropies, shares = plain_bed(), [], []
    for sigma in (0.6, 0.9, 1.2, 1.5):
        noisy = scenes(arguments.scenes, draw, sigma=sigma)
        cells, asked = noisy.cells.flatten(1, 2), questions(noisy, COLOUR, draw)
        entropies.append(float(attention_entropy(looked(bed, cells, asked)).mean()))
        shares.append(bed.accuracy(cells, asked))
        print(f"  sigma {sigma}: {entropies[-1]:.2f} nats, {shares[-1]:.3f} right")
    raw, plain = found["raw"][1], found["plain"][1]
    best = found["contrast 0.01"][1]
    verdict(
        "carve",
        f"colour {plain:.3f} distracted, {raw:.3f} zooming by raw attention, {best:.3f} by contrast at lambda 0.01 "
        f"({found['contrast 0.01'][2]:.3f} with the crop distracted too), {found['contrast 1e-08'][1]:.3f} at 1e-8; "
        f"entropy {entropies[0]:.2f} to {entropies[-1]:.2f} nats as noise "
        "grows",
        best - raw >= 0.15
        and best - plain >= 0.1
        and entropies == sorted(entropies)
        and shares == sorted(shares, reverse=True),
    )


if __name__ == "__main__":
    main()
