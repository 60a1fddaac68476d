"""Find the needle: can a network carry one symbol over a distance that its local windows do not reach?

A stream of random filler symbols holds one class symbol, far from the position that is read: the first one of an
encoder, the last one of a causal model. The class is predicted from that position by a linear head; chance is 1 in 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.models.language.transformer import Transformer

__all__ = ["CLASSES", "FILLER", "READ", "VOCAB", "Found", "Needle", "train_needle"]

FILLER, CLASSES = 44, 8
READ = FILLER + CLASSES  # the symbol at the position that is read
VOCAB = READ + 1


@dataclass(frozen=True)
class Needle:
    """The task: ``length`` symbols, the class symbol at least ``margin`` away from the one that is read.

    Args:
        length: symbols of a sequence, the read symbol included.
        margin: least distance.
        causal: read the last position; the first one otherwise.
        at: the position that is read, where it is neither.

    >>> tokens, classes, places = Needle(16, 8).batch(2, torch.Generator().manual_seed(0))
    >>> tokens.shape, int(tokens[0, -1]) == READ, bool((places <= 7).all())
    (torch.Size([2, 16]), True, True)
    """

    length: int = 128
    margin: int = 64
    causal: bool = True
    at: int | None = None

    @property
    def read(self) -> int:
        """The position that is read."""
        return self.at if self.at is not None else self.length - 1 if self.causal else 0

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """``tokens (size, length)``, ``classes (size,)`` and where the class symbols stand, ``(size,)``."""
        places = torch.arange(self.length)
        far = places[(places - self.read).abs() >= self.margin]
        if not len(far):
            raise ValueError(f"margin must leave a place in a length of {self.length}; it was {self.margin}")
        tokens = torch.randint(FILLER, (size, self.length), generator=generator)
        classes = torch.randint(CLASSES, (size,), generator=generator)
        at = far[torch.randint(len(far), (size,), generator=generator)]
        tokens[torch.arange(size), at] = FILLER + classes
        tokens[:, self.read] = READ
        return tokens, classes, at


@dataclass(frozen=True)
class Found:
    """A trained network, its share of right answers on fresh sequences, and the steps that it took."""

    accuracy: float
    steps: int
    model: Transformer
    head: nn.Linear


def train_needle(
    layers: Sequence[Callable[[int], nn.Module]],
    task: Needle | None = None,
    *,
    dim: int = 64,
    steps: int = 700,
    batch: int = 16,
    lr: float = 2e-3,
    seed: int = 0,
    stop: float = 0.995,
    penalty: Callable[[Transformer], Tensor] | None = None,
) -> Found:
    """Train a `Transformer` of these layers on the task and measure it.

    Args:
        layers: one function a layer, from ``dim`` to an attention layer.
        task: `Needle` with its defaults where None.
        dim: channels.
        steps: at most; training stops early at ``stop`` on 256 held-out sequences, looked at every 50 steps.
        batch, lr, seed: of AdamW and of the data.
        stop: share of right answers that is enough; above 1 trains all steps.
        penalty: added to the loss, from the model after a forward pass.

    >>> from glocal.nn import Attention
    >>> train_needle([lambda dim: Attention(dim, 4, causal=True)], Needle(8, 4), steps=1).steps
    1
    """
    task = Needle() if task is None else task
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)
    held = torch.Generator().manual_seed(10_000 + seed)
    model, head = Transformer(VOCAB, dim, layers), nn.Linear(dim, CLASSES)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    checks, step = task.batch(256, held), 0

    def accuracy(tokens: Tensor, classes: Tensor) -> float:
        model.eval()
        with torch.no_grad():
            states = torch.cat([model.features(part)[:, task.read] for part in tokens.split(64)])
            right = head(states).argmax(-1) == classes
        model.train()
        return float(right.float().mean())

    for step in range(1, steps + 1):
        tokens, classes, _ = task.batch(batch, data)
        loss = cross_entropy(head(model.features(tokens)[:, task.read]), classes)
        if penalty is not None:
            loss = loss + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 and accuracy(*checks[:2]) >= stop:
            break
    return Found(accuracy(*task.batch(512, held)[:2]), step, model, head)
