"""Small tasks, at least one for each way to use attention, on which any mechanism can be trained in a minute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.bench.bytes import library_source
from glocal.nn import Attention, Block, SwiGLU

__all__ = ["TASKS", "Items", "Reader", "Task", "evaluate", "train"]

_KEYS, _VALUES, _MASK = 16, 16, 256
_IGNORED = -100


class Items(NamedTuple):
    """``tokens (B, N)``, what they attend to, ``context (B, M)`` or None, ``targets (B, N)``, -100 where none."""

    tokens: Tensor
    context: Tensor | None
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: of it.
        use: the use of attention that it needs.
        about: what it is, in a line.
        unit: what the score counts.
        better: ``"+"`` where more is better, ``"-"`` where less is.
        vocab: tokens that there are, and of the context.
        classes: answers that there are.
        draw: items, given how many, the length, the generator and whether they are held out.
    """

    name: str
    use: str
    about: str
    unit: str
    better: str
    vocab: int
    classes: int
    draw: Callable[[int, int, torch.Generator, bool], Items]


def _rows(count: int, length: int, generator: torch.Generator, held: bool) -> Tensor:
    text = library_source()[int(held)]
    at = torch.randint(len(text) - length, (count,), generator=generator)
    return torch.stack([text[i : i + length] for i in at.tolist()]).long()


def _bytes(count: int, length: int, generator: torch.Generator, held: bool) -> Items:
    rows = _rows(count, length + 1, generator, held)
    return Items(rows[:, :-1], None, rows[:, 1:])


def _masked(count: int, length: int, generator: torch.Generator, held: bool) -> Items:
    rows = _rows(count, length, generator, held)
    gone = torch.rand(rows.shape, generator=generator) < 0.15
    return Items(rows.masked_fill(gone, _MASK), None, rows.masked_fill(~gone, _IGNORED))


def _pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each key once, in any order, as tokens ``key * values + value``; and the values by key."""
    keys = torch.rand(count, _KEYS, generator=generator).argsort(1)
    values = torch.randint(_VALUES, (count, _KEYS), generator=generator)
    return keys * _VALUES + values.gather(1, keys), values


def _recall(count: int, length: int, generator: torch.Generator, held: bool) -> Items:
    """Pairs, then as many noise tokens as there is room for, then keys."""
    pairs, values = _pairs(count, generator)
    asked = torch.randint(_KEYS, (count, _KEYS), generator=generator)
    noise = torch.full((count, max(0, length - 2 * _KEYS)), _KEYS * _VALUES + _KEYS)
    tokens = torch.cat([pairs, noise, _KEYS * _VALUES + asked], 1)
    targets = torch.full_like(tokens, _IGNORED)
    targets[:, -_KEYS:] = values.gather(1, asked)
    return Items(tokens, None, targets)


def _lookup(count: int, length: int, generator: torch.Generator, held: bool) -> Items:
    """Pairs among noise in the context, keys as queries, as many as tokens of the context."""
    pairs, values = _pairs(count, generator)
    size = max(length, _KEYS)
    context = torch.full((count, size), _KEYS * _VALUES + _KEYS)
    places = torch.rand(count, size, generator=generator).argsort(1)[:, :_KEYS]
    context.scatter_(1, places, pairs)
    asked = torch.randint(_KEYS, (count, size), generator=generator)
    return Items(_KEYS * _VALUES + asked, context, values.gather(1, asked))


def _stream(count: int, length: int, generator: torch.Generator, held: bool) -> Items:
    """The same while the context streams in: a query asks for a key that has come by its place, or counts for none."""
    items = _lookup(count, length, generator, held)
    assert items.context is not None
    keys = items.tokens - _KEYS * _VALUES
    shown = torch.where(items.context < _KEYS * _VALUES, items.context // _VALUES, -1)
    come = (shown[:, None, :] == keys[:, :, None]).tril().any(-1)
    return Items(items.tokens, items.context, items.targets.masked_fill(~come, _IGNORED))


_ALL = _KEYS * _VALUES + _KEYS + 1
TASKS = {
    task.name: task
    for task in (
        Task("bytes", "causal-self", "the next byte of Python source", "bits per byte", "-", 257, 256, _bytes),
        Task("recall", "causal-self", "the value of a key, shown before noise", "right", "+", _ALL, _VALUES, _recall),
        Task("masked", "noncausal-self", "masked bytes of Python source", "bits per byte", "-", 257, 256, _masked),
        Task("lookup", "noncausal-cross", "the value of a key in a context", "right", "+", _ALL, _VALUES, _lookup),
        Task("stream", "causal-cross", "the same, in a context that streams in", "right", "+", _ALL, _VALUES, _stream),
    )
}
"""By name."""


class Reader(nn.Module):
    """Embeddings of tokens and places, two blocks around the mechanism, an output at each token.

    Args:
        task: what it reads and answers.
        length: tokens at most.
        make: an attention layer of so many channels and heads.
        dim: channels.
        num_heads: heads.
        grid: the axes of the map that the tokens are laid out on, row by row, for mechanisms of maps; None for a
            sequence.
    """

    def __init__(
        self,
        task: Task,
        length: int,
        make: Callable[[int, int], Attention],
        *,
        dim: int = 64,
        num_heads: int = 4,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Embedding(task.vocab, dim)
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            Block(dim, make(dim, num_heads), SwiGLU(dim, 2 * dim), norm=nn.RMSNorm) for _ in range(2)
        )
        self.outer, self.norm, self.head = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.Linear(dim, task.classes)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits ``(B, N, classes)``."""
        x = self._laid(self.embed(tokens) + self.place[: tokens.shape[1]])
        other = None
        if context is not None:  # blocks normalise what they get, not what they attend to
            other = self._laid(self.outer(self.embed(context) + self.place[: context.shape[1]]))
        for block in self.blocks:
            x = block(x) if other is None else block(x, context=other)
        logits: Tensor = self.head(self.norm(x)).flatten(1, -2)
        return logits

    def _laid(self, x: Tensor) -> Tensor:
        return x if self.grid is None else x.unflatten(1, self.grid)


def train(
    model: nn.Module,
    task: Task,
    length: int,
    steps: int,
    *,
    batch: int = 32,
    seed: int = 0,
    step: Callable[[int], None] = lambda n: None,
) -> None:
    """AdamW at 3e-3 with a cosine, clipped; every mechanism sees the same items."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for n in range(steps):
        step(n)
        items = task.draw(batch, length, generator, False)
        logits = model(items.tokens, items.context)
        loss = cross_entropy(logits.flatten(0, 1), items.targets.flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, length: int, count: int = 128) -> float:
    """The score on items that training has not drawn: share of right answers, or bits for each answer."""
    items = task.draw(count, length, torch.Generator().manual_seed(10_007), True)
    logits = model(items.tokens, items.context)
    counts = items.targets != _IGNORED
    if task.better == "+":
        return float((logits.argmax(-1) == items.targets)[counts].double().mean())
    return float(cross_entropy(logits[counts], items.targets[counts])) / math.log(2)
