"""How far apart two models' attention is, or that of one model with and without an instruction.

Gao et al., 2023, arXiv 2310.19084. Maps are lists of ``(B, H, n, n)``, one a layer, queries by keys, as
`glocal.inspect.word_attention` gives them: short sentences end with zeros, rows need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = [
    "InstructionSensitivity",
    "instruction_sensitivity",
    "jensen_shannon",
    "layer_divergence",
    "part_divergence",
]


@torch.no_grad()
def jensen_shannon(p: Float[Tensor, "*lead n"], q: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead"]:
    """The Jensen-Shannon divergence of rows, in nats, from 0 to log 2.

    Args:
        p, q: not below 0, ``(..., n)``; each row is divided by its sum first.

    Returns:
        ``(...)`` in float64; NaN where either row has no mass.

    Raises:
        ValueError: rows that do not fit each other, or numbers below 0.

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])).exp()
    tensor(2., dtype=torch.float64)
    """
    if not p.dim() or p.shape[-1] != q.shape[-1]:
        raise ValueError(f"p and q must have rows of one length; they were {tuple(p.shape)} and {tuple(q.shape)}")
    for name, rows in (("p", p), ("q", q)):
        if bool((rows < 0).any()):
            raise ValueError(f"{name} must hold no number below 0; the least was {float(rows.min())}")
    p, q = (rows.double() / rows.double().sum(-1, keepdim=True) for rows in (p, q))
    middle = (p + q) / 2

    def from_middle(rows: Tensor) -> Tensor:
        return (torch.xlogy(rows, rows) - torch.xlogy(rows, middle)).sum(-1)

    # Rounding may leave a trifle below zero.
    return ((from_middle(p) + from_middle(q)) / 2).clamp(min=0)


def _check(maps: Sequence[Tensor], name: str) -> None:
    if not len(maps) or any(m.dim() != 4 or m.shape[2] != m.shape[3] for m in maps):
        raise ValueError(f"{name} must be (B, H, n, n), one a layer; it was {[tuple(m.shape) for m in maps]}")


@torch.no_grad()
def layer_divergence(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, "layers B"]:
    """Of two models of as many layers and heads: the mean over a sentence's words and heads, in nats.

    Two releases of one model, or two seeds of its training, give what counts as no difference.

    Args:
        a, b: maps, ``(B, H, n, n)`` for each layer.

    Returns:
        ``(layers, B)`` in float64, for paired tests over sentences (``scipy.stats.ttest_rel``); ``.mean(1)`` is a
        layer's.

    Raises:
        ValueError: other numbers of layers, heads or sentences; of models that differ in depth, see `part_divergence`.

    >>> maps = [torch.rand(2, 4, 5, 5).tril()] * 3
    >>> layer_divergence(maps, maps)
    tensor([[0., 0.],
            [0., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    _check(a, "a")
    _check(b, "b")
    if [m.shape for m in a] != [m.shape for m in b]:
        raise ValueError(
            f"a and b must have maps of the same shapes; they were {[tuple(m.shape) for m in a]} and "
            f"{[tuple(m.shape) for m in b]}"
        )
    return torch.stack([jensen_shannon(x, y).nanmean((1, 2)) for x, y in zip(a, b, strict=True)])


@torch.no_grad()
def part_divergence(a: Sequence[Tensor], b: Sequence[Tensor], parts: int = 4) -> Float[Tensor, "parts B"]:
    """Of models of any depth and number of heads, by quarters of their depth.

    A part's maps are averaged over its layers and all heads before they are compared.

    Args:
        a, b: maps, ``(B, H, n, n)`` for each layer.
        parts: into which the layers are split, as evenly as they can be.

    Returns:
        The mean over a sentence's words, ``(parts, B)`` in float64, in nats.

    Raises:
        ValueError: fewer layers than parts, or other sentences.

    >>> part_divergence([torch.rand(2, 4, 5, 5).tril()] * 4, [torch.rand(2, 6, 5, 5).tril()] * 9).shape
    torch.Size([4, 2])
    """
    means = []
    for name, maps in (("a", a), ("b", b)):
        _check(maps, name)
        if not 1 <= parts <= len(maps):
            raise ValueError(f"parts must be from 1 to the layers of {name}, {len(maps)}; it was {parts}")
        each = torch.stack([m.double().mean(1) for m in maps])
        means.append(torch.stack([part.mean(0) for part in each.tensor_split(parts)]))
    if means[0].shape != means[1].shape:
        raise ValueError(f"a and b must be of the same sentences; they were {a[0].shape} and {b[0].shape}")
    return jensen_shannon(*means).nanmean(-1)


class InstructionSensitivity(NamedTuple):
    """How far a prefix moves attention within the sentence, ``(layers, B)``, in nats."""

    instruction: Float[Tensor, "layers B"]
    """By an instruction, such as to translate."""
    control: Float[Tensor, "layers B"]
    """By words without sense, as many."""

    @property
    def excess(self) -> Float[Tensor, "layers B"]:
        """What an instruction does beyond any prefix. A tuned model is sensitive if its own differs from its base's."""
        return self.instruction - self.control


def instruction_sensitivity(
    plain: Sequence[Tensor], instructed: Sequence[Tensor], control: Sequence[Tensor]
) -> InstructionSensitivity:
    """Compare attention on sentences alone with that behind an instruction and behind a nonsense prefix.

    The control matters: a prefix of any kind moves attention, in an untuned model often more than an instruction does.

    Args:
        plain: maps of the sentences alone, ``(B, H, n, n)`` for each layer.
        instructed, control: of the same words behind a prefix, the prefix's own tokens left out (-1 in
            `glocal.inspect.word_attention`).

    Raises:
        ValueError: as `layer_divergence`.

    >>> plain = [torch.rand(2, 4, 5, 5).tril()] * 3
    >>> found = instruction_sensitivity(plain, [torch.rand(2, 4, 5, 5).tril()] * 3, plain)
    >>> bool((found.excess > 0).all())
    True
    """
    return InstructionSensitivity(layer_divergence(plain, instructed), layer_divergence(plain, control))
