"""Training that can be stopped: model, optimizers, step and curve in one file that is replaced as a whole."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from glocal.progress import progress_bar

__all__ = ["CHECKPOINT", "Training"]

CHECKPOINT = "checkpoint.safetensors"


class Training:
    """A model in training, and all that a stopped run needs to end with the weights of one that was not stopped.

    The matrices of ``layers`` are trained by Muon (Jordan et al., 2024), all else by AdamW; the learning rate warms up
    over 100 steps and falls in a straight line over the last third. What a step sees must depend on its number only.

    Args:
        model: in training.
        layers: parts of it whose matrices Muon trains.
        lr: highest learning rate.
        identity: what a checkpoint must agree with to be taken up: seed, sizes.
        optimizers: train the model instead of these two, at learning rates by the same rule.
        rate: instead of that rule: given a step and the steps in all, the share of ``lr``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        *,
        lr: float,
        identity: Mapping[str, Any],
        optimizers: Iterable[torch.optim.Optimizer] | None = None,
        rate: Callable[[int, int], float] | None = None,
    ) -> None:
        self.model, self.lr, self.identity = model, lr, dict(identity)
        self.rate = _rate if rate is None else rate
        self.optimizers = self._by_muon(layers) if optimizers is None else tuple(optimizers)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.seconds, self._since = 0.0, time.monotonic()
        self._losses: list[float] = []

    def _by_muon(self, layers: Iterable[nn.Module]) -> tuple[torch.optim.Optimizer, ...]:
        matrices = {id(p): p for layer in layers for p in layer.parameters() if p.dim() > 1}
        others = [p for p in self.model.parameters() if id(p) not in matrices]
        return (
            torch.optim.Muon(list(matrices.values()), lr=self.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
        )

    def advance(self, loss_of: Callable[[int], Tensor], steps: int) -> float:
        """One step of ``steps``: ``loss_of(step)`` is its loss, which is returned."""
        self.model.train()
        loss = loss_of(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.rate(self.step, steps)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._losses.append(float(loss.detach()))
        return self._losses[-1]

    def note(self, **figures: float) -> None:
        """Add a point to the curve: the mean loss since the last one in nats, and figures of held-out data."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        mean = sum(self._losses) / max(1, len(self._losses))
        self.curve.append({"step": self.step, "loss": mean, **figures, "seconds": round(self.seconds, 1)})
        self._losses = []

    def run(
        self,
        out: Path,
        loss_of: Callable[[int], Tensor],
        held_out: Callable[[], Mapping[str, float]],
        *,
        steps: int,
        last: int,
        save_every: int,
        say: Callable[[float], str],
        console: Console,
    ) -> bool:
        """Train up to step ``last``, with a progress bar; whether that was reached, and not Ctrl-C pressed.

        Args:
            out: folder of the checkpoint.
            loss_of: as in `advance`.
            held_out: figures for the curve, every ``save_every`` steps.
            steps: of the whole run, by which the learning rate goes.
            last: at which to stop.
            save_every: steps between checkpoints.
            say: a loss in words, beside the bar.
            console: where the bar is drawn.
        """
        reached = True
        try:
            with progress_bar(console) as bar:
                task = bar.add_task("training", total=last, completed=self.step)
                while self.step < last:
                    loss = self.advance(loss_of, steps)
                    bar.update(task, completed=self.step, description=say(loss))
                    if self.step % save_every == 0:
                        self.note(**held_out())
                        self.save(out / CHECKPOINT)
        except KeyboardInterrupt:
            reached = False
        finally:
            self.save(out / CHECKPOINT)
        if self.step < steps:
            console.print(f"Stopped after step {self.step}; the same command goes on from there.")
        return reached

    def write(self, out: Path, **figures: Any) -> None:
        """``training.json`` beside the weights: these figures, the curve, and on what it was trained."""
        about = {**figures, "curve": self.curve, "seconds": self.seconds}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        (out / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def save(self, path: Path) -> None:
        """Write all of it beside the target, then rename: a stop half way leaves the older file whole."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for which, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{which}.{number}.{name}": value for name, value in state.items()}
        about = {"step": self.step, "curve": self.curve, "seconds": self.seconds, "losses": self._losses}
        about |= {"identity": self.identity}
        part = path.with_suffix(".part")
        save_file(tensors, part, {"training": json.dumps(about)})
        os.replace(part, path)

    def take_up(self, out: Path, console: Console) -> None:
        """Make the folder, or go on with the run whose checkpoint lies in it.

        Raises:
            ValueError: as in `load`.
            OSError: there can be no such folder.
        """
        out.mkdir(parents=True, exist_ok=True)
        if (out / CHECKPOINT).exists():
            self.load(out / CHECKPOINT)
            console.print(f"Going on after step {self.step}.")

    def load(self, path: Path) -> None:
        """Take up a checkpoint, or none of it.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            identity = about["identity"]
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"checkpoint {str(path)!r} is damaged ({error}); delete it to begin anew") from None
        for what, mine in self.identity.items():
            if identity.get(what) != mine:
                raise ValueError(f"checkpoint {str(path)!r} has {what} {identity.get(what)}, asked for was {mine}")
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, which, number, key = name.split(".", 3)
                states[int(which)].setdefault(int(number), {})[key] = value
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.step, self.curve = about["step"], about["curve"]
        self.seconds, self._losses = about["seconds"], about["losses"]


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100, (steps - step) / (steps / 3))
