"""Are sinks among image tokens found, and does their attention, given to the other image tokens, bring answers back?

    python benchmarks/proofs/s099_var.py [--scenes 2000] [--sigma 0.4]

The tiny vision-language model has no massive activations, so the parts are tried one by one. The detector on states
with planted ones. Then, in heads that look at the picture, a part s of the last row's attention is planted on two empty
cells, and redistributed: in proportion to what the other cells have, as the paper does it, or evenly. Last, sinks whose
values are zero, as in large models, are masked altogether. Kang et al., 2025, arXiv 2503.03321.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from scene_bed import COLOUR, Bed, Questions, Scenes, plain_bed, questions, scenes
from torch import Tensor

from glocal.papers.verdict import verdict
from glocal.steer.hooks import Site
from glocal.steer.method import Method
from glocal.steer.sinks import VAR, sink_scores

RHO = 0.02  # planting leaves at most 1 - s on cells that are no sinks


def detector() -> tuple[float, float]:
    """Precision and recall on states with two dimensions at 30 times the root mean square on three tokens."""
    draw = torch.Generator().manual_seed(0)
    dims, tokens = [1415, 2533], [0, 40, 300]
    states = torch.randn(600, 4096, generator=draw)
    states[torch.tensor(tokens)[:, None], torch.tensor(dims)] = 30.0
    flagged = sink_scores(states, dims) > 20
    wanted = torch.zeros(600, dtype=torch.bool).index_fill(0, torch.tensor(tokens), True)
    both = float((flagged & wanted).sum())
    return both / max(1.0, float(flagged.sum())), both / float(wanted.sum())


@dataclass
class LastRow(Method):
    """Changes the last row's weights where heads look at the picture; ``sinks (B, 2)`` are cells."""

    sinks: Tensor | None = None
    surplus: float = 0.0
    form: str = "plant"

    def edits(self, site: Site) -> bool:
        return True

    def rows(self, site: Site) -> Tensor:
        return site.last

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        assert self.sinks is not None
        image = site.where("image")[:, None, None]
        sinks = torch.zeros(image.shape, dtype=torch.bool).scatter(-1, 1 + self.sinks[:, None, None], True)
        seen = (weights * image).sum(-1, keepdim=True) >= 0.5
        if self.form == "masked":
            changed = weights.masked_fill(sinks, 0.0)
            return changed / changed.sum(-1, keepdim=True)
        if self.form == "evenly":
            # What is taken goes to all other cells alike.
            taken = self.surplus * (weights * sinks).sum(-1, keepdim=True)
            others = image & ~sinks
            changed = weights.masked_fill(sinks, 0.0) + (1 - self.surplus) * weights * sinks
            changed = changed + others * taken / others.sum(-1, keepdim=True)
        else:
            on_sinks = 0.0 if self.form == "plant, values zero" else self.surplus * sinks / sinks.sum(-1, keepdim=True)
            changed = (1 - self.surplus) * weights + on_sinks
        return torch.where(seen, changed, weights)


def right(bed: Bed, cells: Tensor, asked: Questions, *steps: Method) -> float:
    """Share of right answers with these methods in the model, in this order."""
    with ExitStack() as stack:
        for step in steps:
            stack.enter_context(step)
        return bed.accuracy(cells, asked)


def empty_cells(seen: Scenes, draw: torch.Generator) -> Tensor:
    """Two of each scene without an object, ``(B, 2)``."""
    shape = seen.shape.flatten(1)
    return (torch.rand(shape.shape, generator=draw) - 9 * (shape >= 0)).topk(2).indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--sigma", type=float, default=0.4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    precision, recall = detector()
    print(f"detector: precision {precision:.2f}, recall {recall:.2f}")

    bed = plain_bed()
    draw = torch.Generator().manual_seed(1)
    seen = scenes(arguments.scenes, draw, sigma=arguments.sigma)
    asked = questions(seen, COLOUR, draw)
    cells, spans = seen.cells.flatten(1, 2), bed.spans(arguments.scenes)
    sinks = empty_cells(seen, draw)

    def last(form: str, surplus: float) -> LastRow:
        return LastRow(bed.model, spans=spans, sinks=sinks, form=form, surplus=surplus)

    def var(removed: float, rho: float = RHO) -> VAR:
        return VAR(bed.model, layers=range(3), spans=spans, sinks=sinks + 1, removed=removed, rho=rho)

    base = right(bed, cells, asked)
    names = ("planted", "moved .4", "moved .6", "moved 1", "rho .3", "evenly .6")
    print(f"colour, base {base:.3f}{''.join(f'{name:>11}' for name in names)}")
    found = {}
    for surplus in (0.5, 0.8):
        planted = last("plant", surplus)
        row = [right(bed, cells, asked, planted)]
        row += [right(bed, cells, asked, planted, var(removed)) for removed in (0.4, 0.6, 1.0)]
        row += [right(bed, cells, asked, planted, var(0.6, rho=0.3))]
        row += [right(bed, cells, asked, planted, last("evenly", 0.6))]
        found[surplus] = row
        print(f"  s = {surplus}          {''.join(f'{value:>11.3f}' for value in row)}", flush=True)
    idle = right(bed, cells, asked, last("plant, values zero", 0.5))
    masked = right(bed, cells, asked, last("plant, values zero", 0.5), last("masked", 0.0))
    print(f"sinks of s = 0.5 whose values are zero {idle:.3f}, the same masked {masked:.3f}")
    planted, moved, evenly = found[0.5][0], found[0.5][2], found[0.5][5]
    regained, by_chance = ((value - planted) / (base - planted) for value in (moved, evenly))
    verdict(
        "var",
        f"detector exact; planted sinks take colour from {base:.3f} to {planted:.3f}, removed .6 gives {moved:.3f} "
        f"({regained:.0%} of the loss), spread evenly {evenly:.3f} ({by_chance:.0%}); sinks without values "
        f"{idle:.3f}, masked {masked:.3f}",
        precision == recall == 1.0
        and base - planted > 0.05
        and regained >= 0.8
        and by_chance < 0.8
        and masked >= idle - 0.005,
    )


if __name__ == "__main__":
    main()
