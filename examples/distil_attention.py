"""Train a small diffusion model of digits, then distil its self-attention into gated convolutions.

    python examples/distil_attention.py --out runs/distil         # some six minutes on a CPU core
    python examples/distil_attention.py --out runs/distil         # again, after a stop: it goes on where it was

Three steps, after Dong et al., 2025, arXiv 2504.21292. A denoiser with self-attention over all pixels of scikit-learn's
digits, at 16 x 16, learns to predict the noise (`glocal.models.vision.denoiser`). How the attention of each of its
layers falls with distance says how large a convolution has to be (`glocal.inspect.layer_localities`). A `DeltaConv` of
that size takes the place of each, and these alone are trained (`glocal.models.distillation`): on the noise, on the
teacher's output, and on its hidden states, with the paper's weights and optimizer, but at a higher learning rate and
for fewer steps, as so small a model allows.

Both trainings write ``checkpoint.safetensors``, the teacher's in the folder ``teacher``, every ``--save-every`` steps
and on Ctrl-C, each as a whole. A run that was stopped and resumed ends with the same weights as one that was not. At
the end the folder holds ``model.safetensors``, the student, which `load` reads, and ``training.json`` with what was
measured and the curve.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from glocal.bench.training import CHECKPOINT, Training
from glocal.inspect import Locality, layer_localities
from glocal.models.distillation import Distillation, replace_layers
from glocal.models.vision.denoiser import Denoiser, noised
from glocal.nn import DeltaConv

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "proofs"))
from digits_bed import digits

SIZE, HELD_OUT, HEAD = 16, 297, 16


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, weights and curve.")],
    steps: Annotated[int, typer.Option(help="Steps of distillation.")] = 2000,
    teacher_steps: Annotated[int, typer.Option(help="Steps of the model with self-attention, before.")] = 1600,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 16,
    width: Annotated[int, typer.Option(help="Channels, a multiple of 16.")] = 32,
    layers: Annotated[int, typer.Option(help="Layers.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of the distillation.")] = 2e-3,
    warm_up: Annotated[int, typer.Option(help="Steps in which it is reached.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    stop_after: Annotated[int | None, typer.Option(help="Stop, resumable, at this step of distillation.")] = None,
) -> None:
    """Train and distil, or go on with what was stopped."""
    console = Console(stderr=True)
    try:
        _check(steps, teacher_steps, batch, width, layers, lr, warm_up, save_every)
        first = start(width, layers, seed=seed)
        (out / "teacher").mkdir(parents=True, exist_ok=True)
        if (out / "teacher" / CHECKPOINT).exists():
            first.load(out / "teacher" / CHECKPOINT)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    if first.step < teacher_steps and not teach(first, out / "teacher", teacher_steps, batch, save_every, console):
        raise typer.Exit(130)
    teacher = first.model
    assert isinstance(teacher, Denoiser)
    found = measured(teacher)
    console.print(table(found))
    try:
        run = distilling(teacher, found, lr=lr, warm_up=warm_up, seed=seed, teacher_steps=first.step)
        run.take_up(out, console)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    distillation = run.model
    assert isinstance(distillation, Distillation)

    def loss_of(step: int) -> Tensor:
        x, time, noise = pieces(seed + 1, step, batch)
        total: Tensor = distillation(x, time, target=noise).total
        return total

    reached = run.run(
        out,
        loss_of,
        lambda: figures(distillation),
        steps=steps,
        last=steps if stop_after is None else min(steps, stop_after),
        save_every=save_every,
        say=lambda loss: f"distilling: {loss:.3f}",
        console=console,
    )
    if run.step < steps:
        raise typer.Exit(0 if reached else 130)
    last = export(run, out, found)
    console.print(
        f"Error of the noise on held-out digits: {last['held_out']:.4f} with convolutions, {last['teacher']:.4f} with "
        f"attention. Written to {out}."
    )


def start(width: int, layers: int, *, seed: int) -> Training:
    """A denoiser with random weights, and its optimizers."""
    torch.manual_seed(seed)
    model = Denoiser(width, layers, width // HEAD)
    return Training(model, model.blocks, lr=3e-3, identity={"seed": seed, "width": width, "layers": layers})


def teach(run: Training, out: Path, steps: int, batch: int, save_every: int, console: Console) -> bool:
    """Train the model with self-attention, or go on; whether that came to its end."""
    model, seed = run.model, run.identity["seed"]
    if run.step:
        console.print(f"The teacher goes on after step {run.step}.")

    def loss_of(step: int) -> Tensor:
        x, time, noise = pieces(seed, step, batch)
        return mse_loss(model(x, time), noise)

    return run.run(
        out,
        loss_of,
        lambda: {"held_out": noise_error(model)},
        steps=steps,
        last=steps,
        save_every=save_every,
        say=lambda loss: f"teacher: {loss:.3f}",
        console=console,
    )


def distilling(
    teacher: Denoiser, found: dict[str, Locality], *, lr: float, warm_up: int, seed: int, teacher_steps: int
) -> Training:
    """The student, its new layers with random weights, and their optimizer: the paper's, with its constant rate."""
    kernels = {name: one.kernel_size() for name, one in found.items()}
    torch.manual_seed(seed)
    distillation = Distillation(teacher, lambda name, layer: DeltaConv(layer.dim, kernels[name]))
    identity = {"seed": seed, "kernels": kernels, "width": teacher.dim, "teacher_steps": teacher_steps}
    optimizer = torch.optim.AdamW(distillation.learned(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(step: int, steps: int) -> float:
        return min(1.0, (step + 1) / warm_up)

    return Training(distillation, (), lr=lr, identity=identity, optimizers=[optimizer], rate=rate)


def export(run: Training, out: Path, found: dict[str, Locality]) -> dict[str, float]:
    """The student's weights, and what was measured."""
    distillation = run.model
    assert isinstance(distillation, Distillation) and isinstance(distillation.teacher, Denoiser)
    weights = {name: t.contiguous() for name, t in distillation.student.state_dict().items()}
    save_file(weights, out / "model.part")
    os.replace(out / "model.part", out / "model.safetensors")
    about = {
        name: {"exponent": one.exponent, "floor": one.floor, "field": one.side(), "kernel": one.kernel_size()}
        for name, one in found.items()
    }
    teacher, last = distillation.teacher, figures(distillation)
    sizes = {"width": teacher.dim, "layers": len(teacher.blocks)}
    run.write(out, **sizes, attention=about, **last)
    return last


def load(folder: Path) -> Denoiser:
    """The student that a finished run has written."""
    about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model = Denoiser(about["width"], about["layers"], about["width"] // HEAD)
    replace_layers(model, lambda name, layer: DeltaConv(layer.dim, about["attention"][name]["kernel"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@cache
def images() -> Tensor:
    """Digits ``(1797, 1, 16, 16)`` from -1 to 1; the first ones are held out."""
    return digits(SIZE)[0]


def pieces(seed: int, step: int, count: int, *, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, the levels of their noise, and the noise: by seed and step only, as a resumed run needs them."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    kept = images()[:HELD_OUT] if held_out else images()[HELD_OUT:]
    clean = kept[torch.randint(len(kept), (count,), generator=draw)]
    time, noise = torch.rand(count, generator=draw), torch.randn(clean.shape, generator=draw)
    return noised(clean, time, noise), time, noise


@torch.no_grad()
def noise_error(model: torch.nn.Module, count: int = 256) -> float:
    """Mean squared error of the noise on held-out digits."""
    x, time, noise = pieces(0, 0, count, held_out=True)
    return float(mse_loss(model(x, time), noise))


@torch.no_grad()
def figures(distillation: Distillation, count: int = 256) -> dict[str, float]:
    """Errors of the noise of student and teacher, and how far their hidden states are apart, on held-out digits."""
    x, time, noise = pieces(0, 0, count, held_out=True)
    found = distillation(x, time, target=noise)
    theirs = noise_error(distillation.teacher, count)
    return {"held_out": float(found.noise), "teacher": theirs, "features": float(found.features)}


def measured(teacher: Denoiser) -> dict[str, Locality]:
    """How the attention of each layer falls with distance, over all levels of noise."""
    x, time, _ = pieces(0, 1, 64, held_out=True)
    return layer_localities(teacher, x, time)


def table(found: dict[str, Locality]) -> Table:
    """What was measured, a row a layer."""
    out = Table("layer", "within 4 tokens", "same everywhere", "exponent", "field", "kernel")
    for name, one in found.items():
        floor = f"{one.floor * SIZE**2:.0%}"
        out.add_row(name, f"{one.within(4):.0%}", floor, f"{one.exponent:.2f}", str(one.side()), str(one.kernel_size()))
    return out


def _check(
    steps: int, teacher_steps: int, batch: int, width: int, layers: int, lr: float, warm_up: int, save_every: int
) -> None:
    counts = {"steps": steps, "teacher-steps": teacher_steps, "batch": batch, "layers": layers}
    for name, value in (counts | {"warm-up": warm_up, "save-every": save_every}).items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1; it was {value}")
    if width < HEAD or width % HEAD:
        raise ValueError(f"--width must be a multiple of {HEAD}; it was {width}")
    if not lr > 0:
        raise ValueError(f"--lr must be above 0; it was {lr}")


if __name__ == "__main__":
    typer.run(train)
