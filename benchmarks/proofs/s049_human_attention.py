"""Do the metrics of saliency rank predictors as they should, and does the shuffled area see through a centre bias?

    python benchmarks/proofs/s049_human_attention.py [--fixations 100] [--seeds 5]

Photographs of scikit-image at 96 x 128. Fixations are drawn from 0.7 of the density of edges and 0.3 of a Gaussian in
the middle; the people's map is their blur (4 pixels). Predictors: the density itself, the spectral residual of the
picture (Hou and Zhang, 2007), the Gaussian, and no preference. Cartella et al., 2024, arXiv 2402.18673.
"""

from __future__ import annotations

import argparse

import torch
from scipy.ndimage import gaussian_filter, sobel, uniform_filter
from skimage import color, data, transform
from torch import Tensor

from glocal.bench.saliency import auc_judd, auc_shuffled, correlation, normalised_scanpath, shares
from glocal.papers.verdict import verdict

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket", "moon", "clock")
HEIGHT, WIDTH, BLUR = 96, 128, 4.0
METRICS = ("NSS", "CC", "AUC-Judd", "shuffled AUC")


def blurred(x: Tensor, sigma: float) -> Tensor:
    return torch.as_tensor(gaussian_filter(x.double().numpy(), sigma))


def density(x: Tensor) -> Tensor:
    """A map divided by its sum."""
    return shares(x.flatten()).view_as(x)


def photograph(name: str) -> Tensor:
    """Grey, ``(HEIGHT, WIDTH)``, from 0 to 1."""
    image = getattr(data, name)()
    grey = color.rgb2gray(image) if image.ndim == 3 else image / 255
    return torch.as_tensor(transform.resize(grey, (HEIGHT, WIDTH), anti_aliasing=True)).double()


def edges(image: Tensor) -> Tensor:
    """Blurred strength of the gradient."""
    across, down = (torch.as_tensor(sobel(image.numpy(), axis)) for axis in (1, 0))
    return density(blurred(torch.hypot(across, down), BLUR))


def spectral_residual(image: Tensor) -> Tensor:
    """What of the log spectrum its neighbourhood does not foretell, as a picture; at the scale the method is for."""
    small = torch.as_tensor(transform.resize(image.numpy(), (48, 64), anti_aliasing=True))
    spectrum = torch.fft.fft2(small)
    logs = spectrum.abs().clamp(min=1e-12).log()
    residual = logs - torch.as_tensor(uniform_filter(logs.numpy(), 3, mode="wrap"))
    return blurred(torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs().square(), 2.5)


def centre() -> Tensor:
    rows, columns = torch.arange(HEIGHT).double(), torch.arange(WIDTH).double()
    far = ((rows[:, None] - (HEIGHT - 1) / 2) / HEIGHT) ** 2 + ((columns - (WIDTH - 1) / 2) / WIDTH) ** 2
    return density((-far / (2 * 0.2**2)).exp())


def fixated(wanted: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """``count`` pixels drawn without replacement."""
    seen = torch.zeros(wanted.numel(), dtype=torch.bool)
    seen[torch.multinomial(wanted.flatten(), count, generator=draw)] = True
    return seen.view_as(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fixations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = [photograph(name) for name in PHOTOGRAPHS]
    true = [0.7 * edges(image) + 0.3 * centre() for image in images]
    predictors = {
        "density": true,
        "spectral residual": [spectral_residual(image) for image in images],
        "centre": [centre()] * len(images),
        "uniform": [torch.ones(HEIGHT, WIDTH).double()] * len(images),
    }
    scores: dict[str, list[list[float]]] = {name: [] for name in predictors}
    for seed in range(arguments.seeds):
        draw = torch.Generator().manual_seed(seed)
        seen = torch.stack([fixated(wanted, arguments.fixations, draw) for wanted in true])
        for n in range(len(images)):
            others = torch.cat([seen[:n], seen[n + 1 :]])
            people = blurred(seen[n], BLUR)
            for name, maps in predictors.items():
                found = maps[n]
                scores[name].append(
                    [
                        float(normalised_scanpath(found, seen[n])),
                        float(correlation(found, people)),
                        auc_judd(found, seen[n]),
                        auc_shuffled(found, seen[n], others, seed=seed),
                    ]
                )
    means = {name: torch.tensor(rows).mean(0).tolist() for name, rows in scores.items()}
    print(
        f"{len(images)} photographs, {arguments.seeds} draws of {arguments.fixations} fixations, blur {BLUR:g} pixels"
    )
    print(f"{'predictor':<20}" + "".join(f"{metric:>14}" for metric in METRICS))
    for name, row in means.items():
        print(f"{name:<20}" + "".join(f"{value:>14.3f}" for value in row), flush=True)
    best, middle, flat, biased = (means[n] for n in ("density", "spectral residual", "uniform", "centre"))
    verdict(
        "human-attention-survey",
        "density / spectral residual / uniform: "
        + ", ".join(f"{METRICS[m]} {best[m]:.2f} / {middle[m]:.2f} / {flat[m]:.2f}" for m in range(3))
        + f"; the centre map's AUC-Judd is {biased[2]:.2f}, its shuffled AUC {biased[3]:.2f}",
        all(best[m] > middle[m] > flat[m] for m in range(3)) and abs(biased[3] - 0.5) <= 0.05 and biased[2] > biased[3],
    )


if __name__ == "__main__":
    main()
