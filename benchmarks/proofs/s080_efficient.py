"""Does efficient attention bring one far pixel's feature to all of a map, and at what memory?

    python benchmarks/proofs/s080_efficient.py [--seeds 3] [--steps 600]

Crops of 16 x 16 pixels of photographs: one gives the brightness, its highest raised by one standard deviation, another
the colors. Every pixel is asked for the color where the map is brightest. A network of 32 channels that is pointwise
but for one efficient attention, against one with convolutions of as many weights in its place, and one with softmax
attention. Then one pass over a map of 128 x 128 with 64 channels, and what its tensors hold at most. Shen et al., 2018,
arXiv 1812.01243.
"""

from __future__ import annotations

import argparse

import torch
from skimage import data
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from glocal.nn import Attention
from glocal.nn.efficient import EfficientAttention
from glocal.papers.verdict import verdict

SIDE, DIM, HEADS, NARROW = 16, 32, 4, 7


class Convolutions(nn.Module):
    """Two of 3 x 3 through a few channels, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(DIM, NARROW, 3, padding=1), nn.Conv2d(NARROW, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.movedim(-1, 1)).relu()).movedim(1, -1)


class Copier(nn.Module):
    """Pointwise, a mixer with its input added, pointwise."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.mixer = mixer
        self.read = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.read(x + self.mixer(x))


def photographs() -> list[Tensor]:
    """Three, every fourth pixel, each channel with mean 0 and variance 1."""
    found = [torch.from_numpy(image()[::4, ::4].copy()).float() for image in (data.astronaut, data.coffee, data.rocket)]
    return [(image - image.mean((0, 1))) / image.std((0, 1)) for image in found]


def examples(images: list[Tensor], count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Brightness and colors ``(count, 16, 16, 4)``, and the color where it is brightest, ``(count, 1, 1, 3)``."""
    crops = []
    for which in torch.randint(len(images), (2 * count,), generator=draw).tolist():
        image = images[which]
        top, left = (int(torch.randint(n - SIDE + 1, (), generator=draw)) for n in image.shape[:2])
        crops.append(image[top : top + SIDE, left : left + SIDE])
    crop = torch.stack(crops)
    bright, color = crop[:count].mean(-1, keepdim=True), crop[count:]
    at, rows = bright.flatten(1).argmax(1), torch.arange(count)
    bright.flatten(1)[rows, at] += 1  # a view: many crops have several pixels that are quite white
    wanted = color.flatten(1, 2)[rows, at]
    return torch.cat([bright, color], -1), wanted[:, None, None]


def train(mixer: nn.Module, seed: int, steps: int) -> float:
    """Mean squared error on new crops, over the variance of what is asked for."""
    images, draw = photographs(), torch.Generator().manual_seed(seed)
    model = Copier(mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        x, y = examples(images, 32, draw)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, y = examples(images, 1024, torch.Generator().manual_seed(1000 + seed))
        return float((model(x) - y).square().mean() / y.var(0).mean())


def peak(layer: nn.Module, x: Tensor) -> float:
    """MiB that tensors hold at most during a pass, beyond what they held before it."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        layer(x)
    held = highest = 0
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            highest = max(highest, held)
    return highest / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    biases = dict(qkv_bias=True, out_bias=True)
    mixers = {
        "convolutions": Convolutions,
        "efficient": lambda: EfficientAttention(DIM, HEADS, **biases),
        "softmax": lambda: Attention(DIM, HEADS, **biases),
    }
    print(f"{'mixer':<14}{'weights':>9}{'error / variance':>18}   each seed's")
    errors = {}
    for name, make in mixers.items():
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            mixer = make()
            found.append(train(mixer, seed, arguments.steps))
        errors[name] = sum(found) / len(found)
        weights = sum(p.numel() for p in mixer.parameters())
        print(f"{name:<14}{weights:>9,}{errors[name]:>18.4f}   {'  '.join(f'{e:.4f}' for e in found)}", flush=True)

    torch.manual_seed(0)
    large = torch.randn(1, 128, 128, 64)
    mib = peak(EfficientAttention(64, 4, **biases), large)
    pairs = (128 * 128) ** 2 * 4 / 2**20
    print(f"128 x 128 map, 64 channels: {mib:.0f} MiB at most; scores of all pairs {pairs:.0f} MiB a head")
    gain = errors["convolutions"] / errors["efficient"]
    verdict(
        "efficient",
        f"error over variance {errors['efficient']:.3f}, convolutions {errors['convolutions']:.3f} ({gain:.1f} times), "
        f"softmax {errors['softmax']:.3f}; a map of 128 x 128 in {mib:.0f} MiB, where scores of all pairs take "
        f"{pairs:.0f} a head",
        gain >= 5 and mib < 200,
    )


if __name__ == "__main__":
    main()
