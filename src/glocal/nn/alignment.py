"""The frame of alignment attention: a decoder asks once a step, and where it looked before is part of the question."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from glocal.shapes import Bool, Float

__all__ = ["AdditiveAttention", "Alignment", "AlignmentAttention", "aligned_softmax"]


class Alignment(NamedTuple):
    """What a decoder carries from step to step, for a source of T frames."""

    memory: Tensor
    """Of the encoder, ``(B, T, memory_dim)``."""
    real: Tensor
    """Which frames are no padding, ``(B, T)``."""
    keys: Tensor
    """What the mechanism makes of the memory once for all steps, ``(B, T, ...)``."""
    weights: Tensor
    """The alignment of the last step, ``(B, T)``."""
    total: Tensor
    """The sum of the alignments of all steps so far, ``(B, T)``."""
    position: Tensor
    """Where the mechanism stands, in frames, ``(B, positions)``; in float32 or wider at first, which can count them."""
    step: int
    """Steps so far."""


class AlignmentAttention(nn.Module):
    """Attention of a recurrent decoder over an encoder's memory, one step at a time.

    A mechanism writes `align`, and `keys` where it needs something of the memory that does not change.

    Args:
        query_dim: channels of the decoder's state.
        memory_dim: channels of the memory.
        positions: numbers that say where the mechanism stands.

    Raises:
        ValueError: sizes below 1.

    >>> layer = AdditiveAttention(16, 32, hidden=24)
    >>> state = layer.start(torch.randn(2, 50, 32))
    >>> for _ in range(3):
    ...     context, state = layer(torch.randn(2, 16), state)
    >>> context.shape, state.weights.shape, state.step
    (torch.Size([2, 32]), torch.Size([2, 50]), 3)
    """

    def __init__(self, query_dim: int, memory_dim: int, *, positions: int = 1) -> None:
        super().__init__()
        for name, value in (("query_dim", query_dim), ("memory_dim", memory_dim), ("positions", positions)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        self.query_dim, self.memory_dim, self.positions = query_dim, memory_dim, positions

    # What a mechanism writes.

    def align(self, query: Float[Tensor, "B query_dim"], state: Alignment) -> tuple[Tensor, Tensor]:
        """Weights of the frames ``(B, T)``, 0 on padding, and the new position ``(B, positions)``."""
        raise NotImplementedError

    def keys(self, memory: Float[Tensor, "B T memory_dim"]) -> Tensor:
        """What `align` needs of the memory, made once."""
        return memory

    def first(self, memory: Float[Tensor, "B T memory_dim"]) -> Tensor:
        """The alignment before the first step, ``(B, T)``: none."""
        return memory.new_zeros(memory.shape[:2])

    # The frame.

    def start(self, memory: Float[Tensor, "B T memory_dim"], real: Bool[Tensor, "B T"] | None = None) -> Alignment:
        """The state before the first step.

        Args:
            memory: ``(B, T, memory_dim)``.
            real: booleans ``(B, T)``, true for frames that are no padding; all where None.

        Raises:
            ValueError: shapes that do not fit, a source without frames.
        """
        if memory.dim() != 3 or memory.shape[-1] != self.memory_dim or not memory.shape[1]:
            raise ValueError(f"memory must be (B, T, {self.memory_dim}) with T above 0; it was {tuple(memory.shape)}")
        if real is None:
            real = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        elif real.dtype != torch.bool or real.shape != memory.shape[:2]:
            raise ValueError(
                f"real must be booleans {tuple(memory.shape[:2])}; it was {real.dtype} {tuple(real.shape)}"
            )
        weights = self.first(memory)
        wide = torch.promote_types(memory.dtype, torch.float32)
        position = memory.new_zeros(memory.shape[0], self.positions, dtype=wide)
        return Alignment(memory, real, self.keys(memory), weights, torch.zeros_like(weights), position, 0)

    def forward(self, query: Float[Tensor, "B query_dim"], state: Alignment) -> tuple[Tensor, Alignment]:
        """One step.

        Args:
            query: the decoder's state, ``(B, query_dim)``.
            state: of `start` or of the step before.

        Returns:
            What was looked at, ``(B, memory_dim)``, and the state after the step, whose ``weights`` say where.

        Raises:
            ValueError: a query that does not fit.
        """
        if query.shape != (state.memory.shape[0], self.query_dim):
            raise ValueError(f"query must be {(state.memory.shape[0], self.query_dim)}; it was {tuple(query.shape)}")
        return self.look(state, *self.align(query, state))

    def look(
        self, state: Alignment, weights: Float[Tensor, "B T"], position: Float[Tensor, "B positions"]
    ) -> tuple[Tensor, Alignment]:
        """What stands where it looks, ``(B, memory_dim)``, and the state after the step."""
        context = (weights[:, None] @ state.memory)[:, 0]
        total, step = state.total + weights, state.step + 1
        return context, state._replace(weights=weights, total=total, position=position, step=step)

    def over(
        self,
        queries: Float[Tensor, "B N query_dim"],
        memory: Float[Tensor, "B T memory_dim"],
        real: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B N memory_dim"], Float[Tensor, "B N T"]]:
        """All steps of a decoder whose states do not depend on what was looked at: contexts, and where it looked."""
        state, contexts, weights = self.start(memory, real), [], []
        for query in queries.unbind(1):
            context, state = self(query, state)
            contexts.append(context)
            weights.append(state.weights)
        return torch.stack(contexts, 1), torch.stack(weights, 1)


class AdditiveAttention(AlignmentAttention):
    """Content attention by a small network: ``v^T tanh(W query + U memory + b)``, and features of where it looked.

    Bahdanau et al., 2015, arXiv 1409.0473; with ``filters`` location-sensitive, Chorowski et al., 2015, arXiv
    1506.07503: the last alignment, and the sum of all, go through a convolution into the network. With ``feedback``
    the sum of all, times ``0.5 sigmoid(w memory)``, goes in as one number a frame, as in Zeyer et al., 2018, arXiv
    1805.03294: frames differ in how often they are to be looked at.

    Args:
        query_dim, memory_dim: as in `AlignmentAttention`.
        hidden: channels of the small network.
        filters: of the convolution; 0 for none.
        width: frames that a filter covers, odd.
        feedback: how much a frame was looked at goes into the network.

    Raises:
        ValueError: sizes below 1, an even width.

    >>> layer = AdditiveAttention(16, 32, hidden=24, filters=8)
    >>> contexts, weights = layer.over(torch.randn(2, 4, 16), torch.randn(2, 50, 32))
    >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(2, 4))
    (torch.Size([2, 4, 50]), True)
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        *,
        hidden: int = 128,
        filters: int = 0,
        width: int = 31,
        feedback: bool = False,
    ) -> None:
        super().__init__(query_dim, memory_dim)
        if hidden < 1 or filters < 0:
            raise ValueError(f"hidden must be at least 1 and filters at least 0; they were {hidden} and {filters}")
        if width < 1 or width % 2 == 0:
            raise ValueError(f"width must be odd, so that a filter has a middle; it was {width}")
        self.query_proj = nn.Linear(query_dim, hidden)
        self.memory_proj = nn.Linear(memory_dim, hidden, bias=False)
        self.energy = nn.Linear(hidden, 1, bias=False)
        if filters:
            self.location = nn.Conv1d(2, filters, width, padding=width // 2, bias=False)
            self.location_proj = nn.Linear(filters, hidden, bias=False)
        if feedback:
            self.share = nn.Linear(memory_dim, 1, bias=False)
            self.feedback_proj = nn.Linear(1, hidden, bias=False)
        self.filters, self.feedback = filters, feedback

    def keys(self, memory: Tensor) -> Tensor:
        made: Tensor = self.memory_proj(memory)
        return made

    def inner(self, query: Tensor, state: Alignment) -> Float[Tensor, "B T hidden"]:
        """What the small network holds of each frame."""
        inner = state.keys + self.query_proj(query)[:, None]
        if self.filters:
            before = torch.stack([state.weights, state.total], 1)
            inner = inner + self.location_proj(self.location(before).mT)
        if self.feedback:
            looked = 0.5 * self.share(state.memory).sigmoid() * state.total[..., None]
            inner = inner + self.feedback_proj(looked)
        out: Tensor = inner.tanh()
        return out

    def energies(self, query: Tensor, state: Alignment) -> Float[Tensor, "B T"]:
        """Before the softmax."""
        out: Tensor = self.energy(self.inner(query, state))[..., 0]
        return out

    def align(self, query: Tensor, state: Alignment) -> tuple[Tensor, Tensor]:
        return aligned_softmax(self.energies(query, state), state.real), state.position


def aligned_softmax(energies: Float[Tensor, "*lead T"], seen: Bool[Tensor, "*lead T"]) -> Float[Tensor, "*lead T"]:
    """Softmax over the frames that are seen, in float32 or wider; zeros where none is.

    >>> aligned_softmax(torch.zeros(4), torch.tensor([True, False, True, False]))
    tensor([0.5000, 0.0000, 0.5000, 0.0000])
    """
    wide = energies.to(torch.promote_types(energies.dtype, torch.float32))
    top = wide.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min)
    shares = (wide - top.detach()).masked_fill(~seen, -torch.inf).exp()
    total = shares.sum(-1, keepdim=True)
    return (shares / torch.where(total > 0, total, 1)).to(energies.dtype)
