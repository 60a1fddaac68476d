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
from torch.nn.functional import avg_pool2d

from glocal.nn import Attention, DescriptorAttention
from glocal.papers.verdict import verdict

VIEWS, SIDE, SPECIAL, DIM, FACTORS = 6, 24, 5, 64, (2, 3, 4)


def views(seed: int) -> Tensor:
    """Tokens ``(1, n P, C)``: five special ones and a crop of the map, for each view."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, DIM, SIDE + 24, SIDE + 24, generator=generator)
    for _ in range(2):
        scene = avg_pool2d(scene, 5, stride=1)
    scene = (scene - scene.mean()) / scene.std()
    out = []
    for _ in range(VIEWS):
        y, x = torch.randint(0, scene.shape[-1] - SIDE, (2,), generator=generator).tolist()
        crop = scene[0, :, y : y + SIDE, x : x + SIDE].flatten(1).T
        crop = crop + 0.1 * torch.randn(crop.shape, generator=generator)
        out.append(torch.cat([torch.randn(SPECIAL, DIM, generator=generator), crop]))
    return torch.cat(out)[None]


def plain(layer: Attention) -> Attention:
    """Projections that change nothing: queries, keys and values are the features."""
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            part.weight.copy_(torch.eye(DIM))
    return layer


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
