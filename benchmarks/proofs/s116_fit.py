"""Do a few latents a group carry what groups of tokens must know of each other, at a cost near N ** (4 / 3)?

    python benchmarks/proofs/s116_fit.py [--seeds 2] [--steps 400]

Pictures of 32 x 32 pixels in 16 groups of 8 x 8; the first and the last group hold a handwritten 0 or 1 (scikit-learn's
digits), the others noise; are the two the same? FIT "(1)2(1)" against local layers only, "(2)" (as many local layers)
and "(4)" (as many layers), all with a mean over what the last layers give and a linear classifier. Then the FLOPs of
attention in a forward pass, counted from its calls, with groups of the cube root of N. Smaller than in the catalogue's
plan: two digits of ten, digits at their own size, patches of 4 x 4, N nearest to 1,024, 4,096 and 16,384 that divides.
FIT learned at a learning rate of 1e-3, width 48 and 4 latents; at 2e-3 and 3e-3, width 32 and 2 latents it stayed at
chance. Local layers ran at the former only. Chen and Li, 2023, arXiv 2305.12689.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.attention import explain
from glocal.models.vision.fit import FIT
from glocal.models.vision.fit_image import FITImage
from glocal.nn import Attention
from glocal.papers.verdict import verdict

LAYERS = ("(1)2(1)", "(2)", "(4)")
LENGTHS = ((10, 102), (16, 256), (25, 655))  # tokens of a group, groups


def batch(pool: dict[int, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures ``(size, 1, 32, 32)``, a digit in the first group and one in the last, and whether they are the same."""
    x = 0.2 * torch.randn(size, 1, 32, 32, generator=generator)
    classes = torch.randint(2, (size, 2), generator=generator)
    for side, place in enumerate((slice(0, 8), slice(24, 32))):
        for c, images in pool.items():
            where = classes[:, side] == c
            x[where, 0, place, place] = images[torch.randint(len(images), (int(where.sum()),), generator=generator)]
    return x, (classes[:, 0] == classes[:, 1]).long()


def train(layers: str, pools: tuple[dict[int, Tensor], dict[int, Tensor]], steps: int, seed: int) -> tuple[float, int]:
    """Share of right answers on 512 held-out pictures, and the steps taken."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"dim": 48, "latent_dim": 48, "num_heads": 4, "latent_heads": 4, "latents": 4}
    model = FITImage(layers, 32, group=(2, 2), patch=4, channels=1, num_classes=2, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    x, y = batch(pools[1], 512, torch.Generator().manual_seed(100 + seed))

    @torch.no_grad()
    def accuracy() -> float:
        return float((model(x).argmax(-1) == y).float().mean())

    step = 0
    for step in range(1, steps + 1):
        pictures, same = batch(pools[0], 32, generator)
        loss = cross_entropy(model(pictures), same)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 and accuracy() > 0.98:
            break
    return accuracy(), step


@torch.no_grad()
def flops(tokens: int, groups: int) -> tuple[int, int]:
    """FLOPs of the attention in a forward pass of FIT, and of as many layers of full attention."""
    model = FIT(
        "(1)1(1)", 4, groups=groups, tokens=tokens, latents=1, dim=16, latent_dim=16, num_heads=1, latent_heads=1
    )
    counted: list[int] = []

    def count(layer: Attention, args: tuple[Tensor, ...], out: Tensor) -> None:
        x, context = args[0], args[-1]
        q, k = (torch.empty(t.shape[0], 1, t.shape[1], layer.head_dim) for t in (x, context))
        counted.append(explain(q, k, k, backend="sdpa").flops)

    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(count)
    model(torch.randn(1, groups, tokens, 4))
    full = torch.empty(1, 1, groups * tokens, 16)
    return sum(counted), 3 * explain(full, full, full, backend="sdpa").flops


def slope(points: list[tuple[int, int]]) -> float:
    """Of the line through the logarithms."""
    xs, ys = ([math.log(p[axis]) for p in points] for axis in (0, 1))
    return statistics.linear_regression(xs, ys).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)

    found = {n * t: flops(n, t) for n, t in LENGTHS}
    print(f"{'N':>8}{'FIT, MFLOP':>14}{'full, MFLOP':>14}")
    for length, (own, full) in found.items():
        print(f"{length:>8,}{own / 1e6:>14.1f}{full / 1e6:>14.1f}")
    slopes = [slope([(length, pair[i]) for length, pair in found.items()]) for i in range(2)]
    print(f"{'slope':>8}{slopes[0]:>14.2f}{slopes[1]:>14.2f}")

    digits = load_digits(n_class=2)
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels, held = torch.tensor(digits.target), torch.arange(len(images)) % 4 == 0
    pools = tuple({c: images[(labels == c) & part] for c in range(2)} for part in (~held, held))
    mean = {}
    for layers in LAYERS:
        results = [train(layers, pools, options.steps, seed) for seed in range(options.seeds)]
        mean[layers] = statistics.fmean(accuracy for accuracy, _ in results)
        print(f"{layers:<10}" + "".join(f"  {a:.3f} after {s} steps" for a, s in results))
    local = max(mean[layers] for layers in LAYERS[1:])
    verdict(
        "fit",
        f"same or different digit in two far groups: {100 * mean[LAYERS[0]]:.0f} % with {LAYERS[0]}, "
        f"{100 * local:.0f} % with local layers only (chance 50); attention FLOPs grow as N^{slopes[0]:.2f} "
        f"(full N^{slopes[1]:.2f})",
        mean[LAYERS[0]] > local + 0.2 and slopes[0] < 1.45,
    )


if __name__ == "__main__":
    main()
