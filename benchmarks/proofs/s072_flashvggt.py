"""Are descriptors better keys than as many tokens at random, and is attention to them as cheap as counted?

    python benchmarks/proofs/s072_flashvggt.py [--seeds 3]

Six views are crops of one smooth random map of 64 channels, as in the proof of S067; queries and keys are the
normalised features as they are. The output of attention to bilinear descriptors is compared with that of full
attention, against as many tokens chosen at random. Then one layer of 128 channels is timed on 8 frames of 32 x 32
patches, 8,232 tokens, without keyframes. No model is trained, none is loaded: camera and depth errors are not
measured here. FlashVGGT, 2025, arXiv 2512.01540.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from glocal.bench.views import DIM, SIDE, SPECIAL, VIEWS, plain, views
from glocal.nn import Attention, DescriptorAttention
from glocal.papers.verdict import verdict

FACTORS = (2, 3, 4)


def seconds(layer: nn.Module, x: Tensor) -> float:
    """The fastest of three calls after one that warms up."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        layer(x)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)

    common = {"qk_norm": "layer", "scale": 4 * DIM**-0.5}  # as sharp as heads that match
    found = {(name, r): 0.0 for name in ("descriptors", "random tokens") for r in FACTORS}
    for seed in range(seeds):
        x = views(seed)
        torch.manual_seed(seed)
        full = plain(Attention(DIM, 1, **common))
        with torch.no_grad():
            wanted = full(x)
            for r in FACTORS:
                layer = plain(DescriptorAttention(DIM, 1, patches=(SIDE, SIDE), special=SPECIAL, factor=r, **common))
                count = VIEWS * (SPECIAL + (SIDE // r) ** 2)
                some = full(x, x[:, torch.randperm(x.shape[1])[:count]])
                for name, out in (("descriptors", layer(x)), ("random tokens", some)):
                    found[name, r] += float((out - wanted).norm() / wanted.norm()) / seeds
    print(f"{'factor':<16}" + "".join(f"{r:>8}" for r in FACTORS))
    for name in ("descriptors", "random tokens"):
        print(f"{name:<16}" + "".join(f"{found[name, r]:>8.3f}" for r in FACTORS))

    tokens = torch.randn(1, 8 * (SPECIAL + 32**2), 128)
    with torch.no_grad():
        dense = seconds(Attention(128, 4), tokens)
        few = seconds(DescriptorAttention(128, 4, patches=(32, 32), special=SPECIAL, factor=4), tokens)
    print(f"{tokens.shape[1]} tokens: full {dense:.3f} s, factor 4 {few:.3f} s")
    mine, theirs = ([found[name, r] for r in FACTORS] for name in ("descriptors", "random tokens"))
    verdict(
        "flashvggt",
        f"relative error at factor 2 / 3 / 4: {' / '.join(f'{e:.3f}' for e in mine)}, of as many random tokens "
        f"{' / '.join(f'{e:.3f}' for e in theirs)}; a layer on {tokens.shape[1]:,} tokens takes {few / dense:.1%} of "
        "the time of full attention at factor 4",
        all(a < b for a, b in zip(mine, theirs, strict=True)) and few < 0.2 * dense,
    )


if __name__ == "__main__":
    main()
