"""Do feature crops give crops by attention back what they lose, the rest of the picture?

    python benchmarks/proofs/s017_abs.py [--pictures 300]

A tiny CLIP (`clip_bed`) has learned captions that name the largest of up to four objects. Which of the 16 captions is
right can only be seen with the others in view: one object has a radius of 6.5, three of 3.5. Accuracy with the whole
picture, with 30 raw crops at random, with 30 by the class token's own attention, and with 30 feature crops besides.
Cai et al., 2025, arXiv 2505.13233.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from clip_bed import COLOURS, SHAPES, largest_bed, pictures

from glocal.papers.verdict import verdict
from glocal.steer.abs import ABS

NOISES, CROPS = (0.1, 0.25, 0.4), 30
NAMES = ("full view", "random raw", "attention raw", "random both", "attention both")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=300)
    count = parser.parse_args().pictures
    torch.set_num_threads(1)

    bed = largest_bed()
    kind = torch.arange(SHAPES * COLOURS)
    halves = ((True, True), (True, False), (False, True))  # both, the colour alone, the shape alone
    texts = torch.stack(
        [bed.text(kind // SHAPES, kind % SHAPES, with_colour=colour, with_shape=shape) for colour, shape in halves], 1
    )
    common = dict(raw_crops=CROPS, feature_crops=CROPS, raw_scale=(0.4, 0.7), feature_scale=(1 / 6, 5 / 6))
    guided, blind = ABS(top=8, **common), ABS(top=None, temperature=1e6, **common)

    print(f"{'noise':<7}" + "".join(f"{name:>16}" for name in NAMES))
    draw, table = np.random.default_rng(1), []
    for noise in NOISES:
        radii = np.tile(np.array([6.5, 3.5, 3.5, 3.5], dtype=np.float32), (count, 1))
        seen = pictures(count, radii, draw, noise)
        looked, drawn = (
            method.features(bed.clip, seen.images(), processor=bed.processor) for method in (guided, blind)
        )
        each = (bed.image(seen.pixels)[:, None], drawn[:, :CROPS], looked[:, :CROPS], drawn, looked)  # raw ones first
        wanted = seen.colour[:, 0] * SHAPES + seen.shape[:, 0]
        right = [float((guided.match(crops, texts).argmax(1) == wanted).double().mean()) for crops in each]
        table.append(right)
        print(f"{noise:<7}" + "".join(f"{share:>16.3f}" for share in right), flush=True)
    figures = {name: "/".join(f"{row[n]:.2f}" for row in table) for n, name in enumerate(NAMES)}
    verdict(
        "abs",
        f"at noise {'/'.join(map(str, NOISES))} full view {figures['full view']}, random raw crops "
        f"{figures['random raw']}, by attention {figures['attention raw']}, with feature crops "
        f"{figures['attention both']} (random with feature crops {figures['random both']})",
        all(row[2] >= row[1] and row[4] >= row[2] + 0.3 for row in table),
    )


if __name__ == "__main__":
    main()
