"""Does a red circle make CLIP talk about what is in it, because its training pictures had such circles?

    python benchmarks/proofs/s090_red_circle.py [--pictures 300]

A tiny CLIP (`clip_bed`) has learned from pictures of three objects and captions that name one; on a quarter of the
pictures it is the one with a red ring. Given a caption and three boxes, which is meant? Marks are tried out, the red
ring with its bank of captions, a ring in a colour never seen, and all of them with a CLIP that never saw any ring.
Shtedritski, Rupprecht and Vedaldi, 2023, arXiv 2304.06712.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from clip_bed import COLOURS, SHAPES, ring_bed, three

from glocal.papers.verdict import verdict
from glocal.steer.red_circle import RedCircle

WAYS = {
    "red ring": RedCircle(width=1),
    "red ring, bank": RedCircle(width=1),
    "purple ring": RedCircle(width=1, colour=(160, 0, 200)),
    "blur": RedCircle(("blur",)),
    "grey": RedCircle(("grey",)),
    "crop": RedCircle(("crop",)),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=300)
    count = parser.parse_args().pictures
    torch.set_num_threads(1)

    draw = np.random.default_rng(1)
    seen, named = three(count, draw, 0.1), draw.integers(3, size=count)
    images, rows = seen.images(), torch.arange(count)
    kind = torch.arange(SHAPES * COLOURS)
    print(f"{'rings in training':<19}" + "".join(f"{name:>16}" for name in WAYS) + "   (chance .333)")
    found: dict[float, dict[str, float]] = {}
    for share in (0.25, 0.0):
        bed = ring_bed(share)
        texts, bank = (
            bed.text(seen.colour[rows, named], seen.shape[rows, named]),
            bed.text(kind // SHAPES, kind % SHAPES),
        )
        found[share] = {}
        for name, way in WAYS.items():
            captions = bank if name.endswith("bank") else None
            right = [
                int(way.choose(bed.clip, bed.processor, images[n], seen.box[n], texts[n : n + 1], bank=captions))
                == named[n]
                for n in range(count)
            ]
            found[share][name] = sum(right) / count
        print(f"{share:<19.0%}" + "".join(f"{part:>16.3f}" for part in found[share].values()), flush=True)
    some, none = found[0.25], found[0.0]
    verdict(
        "red-circle",
        f"red ring {some['red ring']:.3f} (with a bank {some['red ring, bank']:.3f}), "
        f"purple {some['purple ring']:.3f}, blur {some['blur']:.3f}, grey {some['grey']:.3f}, crop {some['crop']:.3f}; "
        f"red ring where training had none {none['red ring']:.3f}, chance .333",
        some["red ring"] >= 0.9 and some["purple ring"] <= some["red ring"] - 0.2 and none["red ring"] <= 0.43,
    )


if __name__ == "__main__":
    main()
