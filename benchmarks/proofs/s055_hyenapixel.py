"""Does one layer with a kernel as large as the image see all of it, at no loss, for a cost nearly linear in pixels?

    python benchmarks/proofs/s055_hyenapixel.py [--epochs 8] [--seeds 2]

Handwritten digits (scikit-learn's, 8 x 8) enlarged to 32 x 32; one block of 16 channels on the pixels, HyenaPixel or
the 7 x 7 separable convolution of ConvFormer, then the mean and a linear layer. After training: accuracy on held-out
digits, and the share of the gradient of the central output that falls on pixels more than 8 away. Cost is counted, not
timed: the arithmetic of a forward pass, 2.5 n log2 n for each real Fourier transform of n numbers, at 32 x 32 and at
64 x 64, with the kernel kept. Spravil et al., 2024, arXiv 2402.19305.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from glocal.models.vision.metaformer import SepConv
from glocal.nn.hyena import HyenaPixel
from glocal.papers.verdict import verdict

SIDE, DIM, TEST, RADIUS, BATCH = 32, 16, 500, 8, 32
MIXERS = {"HyenaPixel": lambda side: HyenaPixel(DIM, side, features=16), "DW 7 x 7": lambda side: SepConv(DIM)}


class Classifier(nn.Module):
    """One mixer over pixels."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.mixer = nn.Linear(1, DIM), nn.LayerNorm(DIM), mixer
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 64), nn.GELU())
        self.last = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.mixer(self.norm(self.embed(images[..., None])))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.head(self.features(images)).mean((1, 2)))


def train(kind: str, images: Tensor, labels: Tensor, epochs: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(MIXERS[kind](SIDE))
    images, labels = images[TEST:], labels[TEST:]
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images))
        chosen = order[step % (len(images) // BATCH) * BATCH :][:BATCH]
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def far(model: Classifier, images: Tensor) -> float:
    """Share of the central output's gradient on pixels further away than the radius, mean over channels."""
    images = images.clone().requires_grad_()
    centre = model.features(images)[:, SIDE // 2, SIDE // 2]
    mass = sum(torch.autograd.grad(c.sum(), images, retain_graph=True)[0].abs().sum(0) for c in centre.unbind(1))
    at = torch.arange(SIDE) - SIDE // 2
    return float(mass[torch.hypot(at[:, None].float(), at.float()) > RADIUS].sum() / mass.sum())


class Operations(TorchDispatchMode):
    """Counts arithmetic: products and convolutions by torch's formulas, transforms, one for each other number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in (torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2r):
            real = args[0] if packet is torch.ops.aten._fft_r2c else out
            each = math.prod(real.shape[dim] for dim in args[1])
            self.count += 2.5 * real.numel() * math.log2(each)
        elif isinstance(out, Tensor) and not func.is_view:
            self.count += out.numel()
        return out


@torch.no_grad()
def operations(kind: str, side: int) -> float:
    """Of a forward pass of the mixer alone."""
    mixer = MIXERS[kind](side).eval()
    x = torch.randn(1, side, side, DIM)
    mixer(x)  # the kernel is kept from here on
    with Operations() as counter:
        mixer(x)
    return counter.count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    images = F.interpolate(images[:, None], size=(SIDE, SIDE), mode="bilinear")[:, 0]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)

    print(f"{'mixer':<12}{'accuracy':>10}{'beyond 8':>10}{'operations':>13}{'x4 pixels':>11}   each seed's accuracy")
    right, beyond, growth = {}, {}, {}
    for kind in MIXERS:
        models = [train(kind, images, labels, arguments.epochs, seed) for seed in range(arguments.seeds)]
        with torch.no_grad():
            each = [float((m(images[:TEST]).argmax(-1) == labels[:TEST]).float().mean()) for m in models]
        right[kind] = sum(each) / len(each)
        beyond[kind] = sum(far(m, images[:50]) for m in models) / len(models)
        small, large = operations(kind, SIDE), operations(kind, 2 * SIDE)
        growth[kind] = large / small
        print(
            f"{kind:<12}{right[kind]:>10.3f}{beyond[kind]:>10.1%}{small:>13.3g}{growth[kind]:>11.2f}   "
            + "  ".join(f"{share:.3f}" for share in each),
            flush=True,
        )
    ours, other = MIXERS
    verdict(
        "hyenapixel",
        f"{beyond[ours]:.0%} of the gradient from beyond 8 pixels against {beyond[other]:.0%}; accuracy "
        f"{right[ours]:.3f} against {right[other]:.3f}; operations x{growth[ours]:.2f} for 4 times the pixels",
        beyond[ours] > 0.2 and beyond[other] == 0 and right[ours] >= right[other] and growth[ours] < 6,
    )


if __name__ == "__main__":
    main()
