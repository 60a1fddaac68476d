"""Byte-level language modelling on text that every Python carries: the standard library's own source."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.bench.text import modules

__all__ = ["bits_per_byte", "library_source", "train_bytes"]

VOCAB = 256


@cache
def library_source(megabytes: float = 2.0) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules: for training, and the last tenth, of other modules, held out.

    Modules in alphabetical order of their paths, spread evenly over the library.

    >>> train, held = library_source(0.5)
    >>> len(held) < len(train) // 8, train.dtype
    (True, torch.uint8)
    """
    paths = list(modules(Path(sysconfig.get_path("stdlib"))))
    sizes = [path.stat().st_size for path in paths]
    step = max(1, int(sum(sizes) / (megabytes * 1e6)))
    data = b"".join(path.read_bytes() for path in paths[::step])[: int(megabytes * 1e6)]
    cut = len(data) * 9 // 10
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return text[:cut], text[cut:]


def train_bytes(
    model: nn.Module,
    *,
    length: int = 256,
    batch: int = 16,
    steps: int = 400,
    lr: float = 2e-3,
    seed: int = 0,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> nn.Module:
    """Train a model from tokens ``(B, N)`` to logits ``(B, N, 256)`` by next-byte loss, AdamW, cosine to a tenth."""
    train, _ = library_source()
    data = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        at = torch.randint(len(train) - length - 1, (batch,), generator=data)
        rows = torch.stack([train[i : i + length + 1] for i in at.tolist()]).long()
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        if penalty is not None:
            loss = loss + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return model


@torch.no_grad()
def bits_per_byte(model: nn.Module, *, length: int = 256, pieces: int = 64) -> float:
    """Held-out bits per byte, each piece of ``length`` bytes on its own."""
    _, held = library_source()
    starts = torch.linspace(0, len(held) - length - 1, pieces).long().tolist()
    rows = torch.stack([held[i : i + length + 1] for i in starts]).long()
    model.eval()
    loss = [
        cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        for part in rows.split(16)
    ]
    return float(sum(loss)) / (pieces * length) / math.log(2)
