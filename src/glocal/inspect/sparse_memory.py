"""Sparse distributed memory: neurons near an address store what is written there, those near a query give it back.

Kanerva, 1988; that reading it is close to softmax attention: Bricken and Pehlevan, 2021, arXiv 2111.05498.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glocal.inspect.overlaps import ball_overlaps, cap_overlap, check_ball
from glocal.shapes import Bool, Float

__all__ = ["Settled", "SparseMemory", "hamming", "neuron_read", "settle"]


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Bits in which binary vectors ``a (..., n)`` and ``b (m, n)`` differ, ``(..., m)``, as whole floats.

    >>> hamming(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 1], [1, 1, 0]]))
    tensor([[0., 3.]])
    """
    for name, t in (("a", a), ("b", b)):
        if not bool(((t == 0) | (t == 1)).all()):
            raise ValueError(f"{name} must hold bits, 0 or 1; it was from {float(t.min())} to {float(t.max())}")
    a, b = a.to(torch.float32), b.to(torch.float32)
    return a.sum(-1, keepdim=True) + b.sum(-1) - 2 * a @ b.mT


@dataclass(frozen=True)
class SparseMemory:
    """A memory whose neurons lie evenly in space, so that only the distances from a query to the addresses count.

    What was written at an address comes back by the neurons that are near the address and near the query:
    ``sum_m w_m v_m / sum_m w_m``, the weight being the expected number of such neurons, ``I(d) * neurons / 2^bits``.

    Args:
        bits: of an address, n; in geometries other than ``"bits"`` the channels of a vector.
        radius: Hamming distance within which a neuron is active.
        neurons: how many there are, R; None where every address has one.
        geometry: ``"bits"``: addresses and queries are 0 or 1, and the output is rounded to 0 or 1, above one half.
            ``"cosine"``: they are vectors, made unit length, whose cosine c is a distance of ``n (1 - c) / 2``, cut to
            a whole number. ``"caps"``: they are vectors, and neurons lie on the sphere.

    Raises:
        ValueError: numbers out of range.

    >>> memory = SparseMemory(bits=6, radius=2)
    >>> stored = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    >>> memory.read(torch.tensor([0, 1, 0, 0, 0, 0]), stored)
    tensor([0., 0., 0., 0., 0., 0.])
    """

    bits: int
    radius: int
    neurons: int | None = None
    geometry: Literal["bits", "cosine", "caps"] = "bits"

    def __post_init__(self) -> None:
        check_ball(self.bits, self.radius)
        if self.neurons is not None and self.neurons < 1:
            raise ValueError(f"neurons must be at least 1, or None for all; it was {self.neurons}")
        if self.geometry not in ("bits", "cosine", "caps"):
            raise ValueError(f"geometry must be 'bits', 'cosine' or 'caps'; it was {self.geometry!r}")
        if self.geometry == "caps" and (self.bits < 3 or not 1 <= self.radius <= self.bits / 2):
            raise ValueError(f"'caps' needs bits >= 3 and 1 <= radius <= bits / 2; it was {self.bits}, {self.radius}")

    def expected(self) -> Tensor:
        """Neurons that a query and an address share, by their distance from 0 to ``bits``, ``(n + 1,)`` in float64."""
        count = 2**self.bits if self.neurons is None else self.neurons
        shared = [overlap * count / 2**self.bits for overlap in ball_overlaps(self.bits, self.radius)]
        return torch.tensor(shared, dtype=torch.float64)

    def weights(
        self,
        query: Float[Tensor, "*queries n"] | Tensor,
        addresses: Float[Tensor, "m n"] | Tensor,
        *,
        live: Bool[Tensor, "*any m"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Weight of each address for each query, not normalised, ``(..., m)`` in float64.

        Args:
            query: ``(..., n)``.
            addresses: ``(m, n)``.
            live: which addresses a query may read, broadcasts to ``(..., m)``; all where None.
            generator: where given, neurons are whole: the expected number cut, and one more by the chance of the rest.

        Raises:
            ValueError: shapes that do not fit; other numbers than 0 and 1 in geometry ``"bits"``; whole neurons of a
                sphere without ``neurons``.
        """
        for name, t in (("query", query), ("addresses", addresses)):
            if t.dim() < 1 or t.shape[-1] != self.bits or (name == "addresses" and t.dim() != 2):
                wanted = "(m, n)" if name == "addresses" else "(..., n)"
                raise ValueError(f"{name} must be {wanted} with n = {self.bits}; it was {tuple(t.shape)}")
        if self.geometry == "bits":
            weights = self.expected().to(query.device)[hamming(query, addresses).long()]
        else:
            wide = torch.promote_types(query.dtype, torch.float32)
            cosine = normalize(query.to(wide), dim=-1) @ normalize(addresses.to(wide), dim=-1).mT
            if self.geometry == "cosine":
                # The small number keeps what is whole but for rounding from being cut to the next number below.
                distance = (self.bits * (1 - cosine) / 2 + 1e-4).floor().clamp(0, self.bits)
                weights = self.expected().to(query.device)[distance.long()]
            else:
                if generator is not None and self.neurons is None:
                    raise ValueError("neurons must be given for whole neurons on a sphere; it was None")
                weights = cap_overlap(cosine, self.bits, self.radius).exp() * (self.neurons or 1)
        if generator is not None:
            more = torch.rand(weights.shape, generator=generator, dtype=weights.dtype, device=weights.device)
            weights = weights.floor() + (more < weights - weights.floor())
        return weights if live is None else weights * live

    def read(
        self,
        query: Float[Tensor, "*queries n"] | Tensor,
        addresses: Float[Tensor, "m n"] | Tensor,
        values: Float[Tensor, "m e"] | Tensor | None = None,
        *,
        live: Bool[Tensor, "*any m"] | None = None,
        generator: torch.Generator | None = None,
        rounded: bool = True,
    ) -> Tensor:
        """What the memory gives for each query.

        Args:
            query, addresses, live, generator: as for `weights`.
            values: what was written, ``(m, e)``; the addresses themselves where None.
            rounded: False leaves means of bits as they are.

        Returns:
            ``(..., e)``, in float32 or the wider type of the values. A query that reaches no address stays as it is
            where the values are as wide, and gives zeros otherwise.

        Raises:
            ValueError: as in `weights`; values of another number than the addresses.
        """
        values = addresses if values is None else values
        weights = self.weights(query, addresses, live=live, generator=generator)
        if values.dim() != 2 or len(values) != len(addresses):
            raise ValueError(f"values must be ({len(addresses)}, e); it was {tuple(values.shape)}")
        return _answer(weights @ values.double(), weights.sum(-1), query, values, rounded and self.geometry == "bits")


def neuron_read(
    query: Tensor,
    neurons: Tensor,
    addresses: Tensor,
    values: Tensor | None = None,
    *,
    radius: int,
    rounded: bool = True,
) -> Tensor:
    """Read a binary memory neuron by neuron: each adds up what is written near it, a query averages the near neurons.

    Args:
        query: bits ``(..., n)``.
        neurons: addresses of the neurons, bits ``(R, n)``.
        addresses: where it is written, bits ``(m, n)``.
        values: what is written, ``(m, e)``; the addresses themselves where None.
        radius: Hamming distance within which a neuron is active, for writing and for reading.
        rounded: to 0 or 1, above one half.

    Returns:
        ``(..., e)``, as in `SparseMemory.read`.

    Raises:
        ValueError: shapes that do not fit, or other numbers than 0 and 1.

    >>> every = torch.cartesian_prod(*[torch.arange(2)] * 4)
    >>> neuron_read(torch.tensor([1, 1, 1, 0]), every, torch.tensor([[1, 1, 1, 1]]), radius=1)
    tensor([1., 1., 1., 1.])
    """
    values = addresses if values is None else values
    if values.dim() != 2 or len(values) != len(addresses):
        raise ValueError(f"values must be ({len(addresses)}, e); it was {tuple(values.shape)}")
    check_ball(query.shape[-1], radius)
    written = (hamming(neurons, addresses) <= radius).double()
    active = (hamming(query, neurons) <= radius).double()
    return _answer(active @ (written @ values.double()), active @ written.sum(-1), query, values, rounded)


class Settled(NamedTuple):
    """Where repeated reading ends."""

    pattern: Tensor
    steps: int
    """Reads that changed something."""
    fixed: bool
    """Whether the last read changed nothing."""


def settle(read: Callable[[Tensor], Tensor], query: Tensor, limit: int = 100) -> Settled:
    """Read with what was read, until it does not change.

    Args:
        read: from ``(..., n)`` to the same shape.
        query: ``(..., n)``.
        limit: reads at most.

    >>> settle(lambda x: (x - 1).clamp(min=0), torch.tensor([3.0]))
    Settled(pattern=tensor([0.]), steps=3, fixed=True)
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1; it was {limit}")
    for steps in range(limit):
        found = read(query)
        if torch.equal(found, query.to(found)):
            return Settled(found, steps, True)
        query = found
    return Settled(query, limit, False)


def _answer(total: Tensor, weight: Tensor, query: Tensor, values: Tensor, rounded: bool) -> Tensor:
    weight = weight[..., None]
    mean = total / weight.where(weight > 0, 1.0)
    if rounded:
        mean = (mean > 0.5).to(mean)
    kept = query.to(mean) if query.shape[-1] == values.shape[-1] else torch.zeros_like(mean)
    return mean.where(weight > 0, kept).to(torch.promote_types(values.dtype, torch.float32))
