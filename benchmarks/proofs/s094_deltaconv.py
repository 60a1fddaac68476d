"""Is the self-attention of a trained diffusion model local, and can gated convolutions be distilled from it?

    python benchmarks/proofs/s094_deltaconv.py [--seeds 2] [--steps 1200]

A small denoiser of digits of 16 x 16 with one self-attention over all 256 pixels is trained to predict the noise. How
its attention falls with distance is measured, which gives the kernel of a DeltaConv. That takes the place of the
attention and alone is trained for 500 steps: with the three losses of distillation, and again, from the same weights
and on the same batches, with the noise loss only. On held-out digits: the error of the noise, and the distance of the
hidden states after the new layer to those of the model with attention. Dong et al., 2025, arXiv 2504.21292.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bed import fit
from digits_bed import digits, mean
from torch import Tensor
from torch.nn.functional import mse_loss

from glocal.inspect import layer_localities
from glocal.models.distillation import Distillation
from glocal.models.vision.denoiser import Denoiser, noised
from glocal.nn import DeltaConv
from glocal.papers.verdict import verdict

SIZE, DIM, HEADS, TEST, DISTIL, RADIUS = 16, 32, 2, 297, 500, 4
ARMS: dict[str, dict[str, Any]] = {"distilled": {}, "noise only": {"output": 0.0, "features": 0.0}}


def batch(images: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, the levels of their noise, and the noise."""
    some = images[torch.randint(len(images), (count,), generator=draw)]
    time, noise = torch.rand(count, generator=draw), torch.randn(some.shape, generator=draw)
    return noised(some, time, noise), time, noise


def trained(images: Tensor, steps: int, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    model, draw = Denoiser(DIM, 1, HEADS), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        x, time, noise = batch(images, 32, draw)
        return mse_loss(model(x, time), noise)

    return fit(model, loss, steps, model.blocks)


def distilled(teacher: Denoiser, images: Tensor, kernel: int, seed: int, weights: dict[str, Any]) -> Distillation:
    torch.manual_seed(seed)
    run, draw = Distillation(teacher, lambda _, layer: DeltaConv(layer.dim, kernel), **weights), torch.Generator()
    draw.manual_seed(1000 + seed)

    def loss() -> Tensor:
        x, time, noise = batch(images, 16, draw)
        total: Tensor = run(x, time, target=noise).total
        return total

    return fit(run, loss, DISTIL)


@torch.no_grad()
def measured(run: Distillation, images: Tensor) -> tuple[float, float, float]:
    """Error of the noise of student and of teacher, and the distance of hidden states, the same noise for all."""
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(20):
        x, time, noise = batch(images, 64, draw)
        loss = run(x, time, target=noise)
        found.append(torch.stack([loss.noise, mse_loss(run.teacher(x, time), noise), loss.features]))
    student, teacher, features = torch.stack(found).mean(0).tolist()
    return student, teacher, features


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, _ = digits(SIZE)
    test, train = images[:TEST], images[TEST:]
    near: list[float] = []
    gap: list[float] = []
    closer: list[float] = []
    kernels: list[int] = []
    exponents: list[float] = []
    for seed in range(arguments.seeds):
        teacher = trained(train, arguments.steps, seed)
        x, time, _ = batch(test, 128, torch.Generator().manual_seed(2))
        (found,) = layer_localities(teacher, x, time).values()
        near.append(found.within(RADIUS))
        kernels.append(found.kernel_size())
        exponents.append(found.exponent)
        print(
            f"seed {seed}: attention within {RADIUS} {near[-1]:.1%} (all alike {uniform(RADIUS):.1%}), above floor "
            f"{1 - SIZE**2 * found.floor:.1%}, power {exponents[-1]:.2f}, field {found.side()}, kernel {kernels[-1]}",
            flush=True,
        )
        distances = {}
        for name, weights in ARMS.items():
            run = distilled(teacher, train, kernels[-1], seed, weights)
            student, theirs, distances[name] = measured(run, test)
            print(
                f"  {name:<12} error of the noise {student:.4f}, with attention {theirs:.4f} "
                f"({student / theirs - 1:+.1%}); hidden states {distances[name]:.4f} away",
                flush=True,
            )
            if name == "distilled":
                gap.append(student / theirs - 1)
        closer.append(distances["noise only"] / distances["distilled"])
    verdict(
        "deltaconv",
        f"error of the noise {mean(gap):+.1%} over attention's; hidden states {mean(closer):.1f} times closer than by "
        f"the noise loss alone; {mean(near):.0%} of the attention within {RADIUS} tokens, exponent "
        f"{mean(exponents):.1f}, kernels {', '.join(map(str, kernels))}",
        mean(gap) <= 0.10 and mean(closer) >= 2 and mean(near) > 0.6,
    )


def uniform(radius: int) -> float:
    """Share of all pairs that is at most this far."""
    at = torch.cartesian_prod(*[torch.arange(SIZE).double()] * 2)
    return float((torch.cdist(at, at) <= radius + 1e-9).double().mean())


if __name__ == "__main__":
    main()
