"""Tune what a mechanism has to learn in a pretrained model, whose own weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from glocal.hf.adapt import Adapted, adapt
from glocal.hf.install import attention_modules
from glocal.hf.mechanism import Mechanism
from glocal.nn import gate_rate, head_balance
from glocal.nn.modes import evaluating

__all__ = ["PENALTIES", "final_states", "full_states", "tune"]

Batch = Tensor | Mapping[str, Any]
Parts = dict[str, float]


def _lifetime(frames: nn.ModuleList) -> Tensor:
    return torch.stack([frame.lifetime() for frame in frames]).mean()  # type: ignore[operator]


PENALTIES: Mapping[str, tuple[Callable[[nn.ModuleList], Tensor], float]] = MappingProxyType(
    {"aha": (gate_rate, 0.1), "moh": (head_balance, 0.01), "nats": (_lifetime, 0.1)}
)
"""What the loss holds down, by a mechanism's name, and its weight where none is given."""


def tune(
    target: Adapted | nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 1e-2,
    parameters: Iterable[nn.Parameter] | None = None,
    labels: float = 1.0,
    teacher: float = 0.0,
    weight: float | None = None,
    penalty: Callable[[], Tensor] | None = None,
    progress: Callable[[int, Parts], None] | None = None,
    seed: int = 0,
) -> list[Parts]:
    """Train a few parameters of an adapted model, in place; all others are frozen meanwhile.

    The loss is ``labels`` times that of the model's head, ``teacher`` times the distance of its final states to those
    that it has with full attention (as in Neural Attention Search; arXiv 2502.13251), and ``weight`` times the
    mechanism's penalty: for ``aha`` the share of tokens and heads that see all, for ``nats`` the share of the sequence
    for which tokens are kept, for ``moh`` how unevenly heads are taken. AdamW, the learning rate constant and over the
    last third straight down to zero.

    What has no parameters of its own (``cca``, ``sf_attn``) is tuned by adapters of low rank in the projections, by
    the library peft::

        lora = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
        with adapt(model, "sf_attn(group_size=512)") as handle:
            tune(handle, batches, steps=200, lr=1e-3, parameters=[p for p in lora.parameters() if p.requires_grad])
        lora.save_pretrained("adapter")  # and the model, restored, attends in full with the adapters

    An exception or Ctrl-C leaves the model with what was learned so far, everything else as it was. Equal seeds and
    batches give equal parameters.

    Args:
        target: what `adapt` gave, or a model.
        batches: token numbers ``(B, N)``, or the model's keyword arguments; gone through again when they end.
        steps: one batch each.
        lr: highest learning rate; 1e-2 suits ``aha`` and ``nats``, a few 1e-3 ``moh`` and adapters.
        parameters: what is learned; the mechanisms' own where None.
        labels: weight of the model's own loss. Token numbers are their own labels; a mapping must hold ``labels``.
        teacher: weight of the distillation. Not with adapters in the model, which would move the teacher.
        weight: of the penalty; that of `PENALTIES` where None.
        penalty: a scalar of the forward pass just done, instead of the mechanism's.
        progress: called after each step with its number, from 1, and the parts of the loss.
        seed: of all that is drawn.

    Returns:
        For each step ``loss``, and its parts ``labels``, ``teacher`` and ``penalty`` where they count, unweighted.

    Raises:
        TypeError: neither a model nor an adaptation.
        ValueError: nothing to learn, numbers out of range, no part of the loss, or batches that are used up.
        FloatingPointError: the loss is not finite.

    Example::

        handle = adapt(model, "aha(window=64)")
        tune(handle, batches, steps=200)
        handle.save("folder")  # `readapt` takes it up
    """
    model = target.model if isinstance(target, Adapted) else target
    if not isinstance(model, nn.Module):
        raise TypeError(f"target must be a model or what adapt gave; it was {type(target).__name__}")
    if isinstance(target, Adapted) and target._installed is None:
        raise ValueError("target has been restored: adapt the model again")
    own = list(target.parameters()) if isinstance(target, Adapted) else []
    learned = own if parameters is None else list(parameters)
    if not learned:
        raise ValueError("target has nothing of its own to learn: give parameters, such as those of adapters by peft")
    _check(steps, lr, labels, teacher, weight)
    held_down, weight = _penalty(target, penalty, weight)
    if teacher and not {id(p) for p in learned} <= {id(p) for p in own}:
        raise ValueError(
            "teacher must be 0 where the model's own parameters or adapters learn: it would move with them"
        )
    if not labels and not teacher and not (held_down and weight):
        raise ValueError("labels, teacher and weight are all 0: there is no loss")
    history: list[Parts] = []
    feed = _around(batches)
    device = learned[0].device
    with _only(model, learned, own), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
        for step in range(1, steps + 1):
            batch = _inputs(next(feed), device)
            aim = full_states(model, batch) if teacher else None
            parts: dict[str, Tensor] = {}
            out = model(**batch, output_hidden_states=True) if teacher else model(**batch)
            if labels:
                if getattr(out, "loss", None) is None:
                    raise ValueError("the model gave no loss: batches must hold labels, or give labels=0")
                parts["labels"] = out.loss
            if aim is not None:
                real = batch.get("attention_mask")
                parts["teacher"] = _distance(final_states(out), aim, real)
            if held_down is not None and weight:
                parts["penalty"] = held_down()
            weights = {"labels": labels, "teacher": teacher, "penalty": weight}
            loss = torch.stack([weights[name] * part.float() for name, part in parts.items()]).sum()
            if not math.isfinite(float(loss.detach())):
                raise FloatingPointError(f"the loss of step {step} is not finite: lower lr {lr}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 3 * (steps - step + 1) / steps)
            optimizer.step()
            history.append({"loss": float(loss.detach())} | {name: float(p.detach()) for name, p in parts.items()})
            if progress is not None:
                progress(step, history[-1])
    return history


@torch.no_grad()
def full_states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's final states ``(B, N, dim)`` with full attention in all layers, whatever it is adapted to.

    Full is what the model itself lets a query see: causality and its own windows stay.
    """
    with evaluating(model), adapt(model, dict.fromkeys(attention_modules(model), "full()")):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return final_states(model(**inputs, output_hidden_states=True))


def final_states(out: Any) -> Tensor:
    """The last hidden states of a model's output that has them."""
    states: Tensor = out.hidden_states[-1] if getattr(out, "hidden_states", None) else out.last_hidden_state
    return states


def _distance(states: Tensor, aim: Tensor, real: Tensor | None) -> Tensor:
    """Squared distance, as a share of the aim's square."""
    states, aim = states.float(), aim.float()
    if real is not None:
        states, aim = states[real.bool()], aim[real.bool()]
    return (states - aim).square().sum() / aim.square().sum().clamp(min=1e-12)


def _penalty(
    target: Adapted | nn.Module, given: Callable[[], Tensor] | None, weight: float | None
) -> tuple[Callable[[], Tensor] | None, float]:
    """What is held down, and its weight."""
    if given is not None:
        if weight is None:
            raise ValueError("weight must be given with a penalty")
        return given, weight
    frames: dict[str, list[nn.Module]] = {}
    if isinstance(target, Adapted):
        for path, chosen in target.where.items():
            if isinstance(chosen, Mechanism) and chosen.name in PENALTIES:
                frames.setdefault(chosen.name, []).append(target.frames[path])
    if not frames:
        if weight:
            raise ValueError(f"weight must be 0 without a penalty; those of {', '.join(PENALTIES)} are known")
        return None, 0.0
    if len(frames) > 1:
        raise ValueError(f"give penalty and weight: the model is adapted to several mechanisms, {', '.join(frames)}")
    ((name, layers),) = frames.items()
    function, usual = PENALTIES[name]
    return lambda: function(nn.ModuleList(layers)), usual if weight is None else weight


def _check(steps: int, lr: float, labels: float, teacher: float, weight: float | None) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1; it was {steps!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive; it was {lr}")
    for name, value in (("labels", labels), ("teacher", teacher), ("weight", weight or 0.0)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative; it was {value}")


def _around(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        some = False
        for batch in batches:
            some = True
            yield batch
        if not some:
            raise ValueError("batches are used up: give as many as there are steps, or a list to go through again")


def _inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch, "labels": batch}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _only(model: nn.Module, learned: list[nn.Parameter], own: list[nn.Parameter]) -> Iterator[None]:
    """Training mode, and gradients for the learned parameters only; afterwards all flags are as they were."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in [*model.parameters(), *own, *learned]}
    try:
        for p in flags:
            p.requires_grad_(False)
        for p in learned:
            p.requires_grad_(True)
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for p in learned:
            p.grad = None
