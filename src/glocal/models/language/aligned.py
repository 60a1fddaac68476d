"""A recurrent decoder that looks at a memory by alignment attention, of any mechanism."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glocal.nn import Alignment, AlignmentAttention, Hypothesis, recognise_tokens
from glocal.shapes import Bool, Float

__all__ = ["AlignedDecoder", "DecoderState"]

_CELLS: dict[str, type[nn.LSTMCell | nn.GRUCell]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


class DecoderState(NamedTuple):
    """What decoding carries from token to token."""

    hidden: Tensor
    """Of the cell, ``(B, query_dim)``."""
    cell: Tensor
    """Of an LSTM, ``(B, query_dim)``; zeros for a GRU."""
    embedded: Tensor
    """The last token, ``(B, embed_dim)``."""
    context: Tensor
    """What was looked at last, ``(B, memory_dim)``."""
    alignment: Alignment


class AlignedDecoder(nn.Module):
    """Tokens one by one: a cell reads the last token and what was looked at, asks the attention, and all three speak.

    As in Zeyer et al., 2021, arXiv 2103.16710: logits are a linear map of the larger of two linear maps (maxout) of the
    cell's state, the last token and what is looked at.

    Args:
        vocab: number of tokens.
        attention: whose ``query_dim`` is the size of the cell.
        embed_dim: channels of a token.
        hidden: numbers before maxout, even.
        cell: ``"lstm"`` or ``"gru"``.
        dropout: before the logits, in training.

    Raises:
        ValueError: sizes below 1, an odd ``hidden``, an unknown cell.

    >>> from glocal.nn import GMMAttention
    >>> model = AlignedDecoder(30, GMMAttention(16, 32), embed_dim=8, hidden=20)
    >>> model(torch.randn(2, 50, 32), torch.randint(30, (2, 7))).shape
    torch.Size([2, 7, 30])
    >>> model.recognise(torch.randn(2, 50, 32), start=0, stop=1, longest=5, beam=3).tokens.shape[0]
    2
    """

    def __init__(
        self,
        vocab: int,
        attention: AlignmentAttention,
        *,
        embed_dim: int = 621,
        hidden: int = 1000,
        cell: str = "lstm",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if vocab < 1 or embed_dim < 1:
            raise ValueError(f"vocab and embed_dim must be at least 1; they were {vocab} and {embed_dim}")
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden must be even, for maxout of two; it was {hidden}")
        if cell not in _CELLS:
            raise ValueError(f"cell must be one of {', '.join(_CELLS)}; it was {cell!r}")
        dim, seen = attention.query_dim, attention.memory_dim
        self.attention = attention
        self.embed = nn.Embedding(vocab, embed_dim)
        self.cell = _CELLS[cell](embed_dim + seen, dim)
        self.readout = nn.Linear(dim + embed_dim + seen, hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden // 2, vocab)

    def start(self, memory: Float[Tensor, "B T memory_dim"], real: Bool[Tensor, "B T"] | None = None) -> DecoderState:
        """The state before the first token; arguments as of `AlignmentAttention.start`."""
        alignment = self.attention.start(memory, real)
        hidden = memory.new_zeros(len(memory), self.attention.query_dim)
        embedded = memory.new_zeros(len(memory), self.embed.embedding_dim)
        return DecoderState(hidden, hidden, embedded, torch.zeros_like(memory[:, 0]), alignment)

    def ask(self, token: Tensor, state: DecoderState) -> DecoderState:
        """The state once a token ``(B,)`` was read, before it looks."""
        embedded = self.embed(token)
        given = torch.cat([embedded, state.context], -1)
        if isinstance(self.cell, nn.LSTMCell):
            hidden, cell = self.cell(given, (state.hidden, state.cell))
        else:
            hidden, cell = self.cell(given, state.hidden), state.cell
        return state._replace(hidden=hidden, cell=cell, embedded=embedded)

    def speak(self, state: DecoderState) -> Float[Tensor, "B V"]:
        """Logits of the next token, once it looked."""
        made = self.readout(torch.cat([state.hidden, state.embedded, state.context], -1))
        out: Tensor = self.head(self.dropout(made.unflatten(-1, (-1, 2)).amax(-1)))
        return out

    def place(self, state: DecoderState) -> tuple[Float[Tensor, "B n"], Float[Tensor, "B n"]]:
        """For a search: nothing to be chosen, that is one frame of probability 1."""
        none = state.context.new_zeros(len(state.context), 1)
        return none, none

    def look_at(self, at: Tensor, energies: Tensor, state: DecoderState) -> tuple[Float[Tensor, "B V"], DecoderState]:
        """Log-probabilities of the next token, in float32 or wider, and the state; for a search, see `place`."""
        context, alignment = self.attention(state.hidden, state.alignment)
        return self._said(state._replace(context=context, alignment=alignment))

    def _said(self, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits = self.speak(state)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1), state

    @torch.no_grad()
    def recognise(
        self, memory: Float[Tensor, "B T memory_dim"], real: Bool[Tensor, "B T"] | None = None, **options: Any
    ) -> Hypothesis:
        """The best tokens by a beam; see `glocal.nn.recognise_tokens`, which takes the options."""
        state = self.start(memory, real)
        return recognise_tokens(self, state, batch=len(memory), device=memory.device, **options)

    def step(self, token: Tensor, state: DecoderState) -> tuple[Float[Tensor, "B V"], DecoderState]:
        """The logits after one more token ``(B,)``, and the state after it."""
        state = self.ask(token, state)
        context, alignment = self.attention(state.hidden, state.alignment)
        state = state._replace(context=context, alignment=alignment)
        return self.speak(state), state

    def forward(
        self, memory: Float[Tensor, "B T memory_dim"], tokens: Tensor, real: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B N V"]:
        """Logits of what follows each token.

        Args:
            memory: of an encoder, ``(B, T, memory_dim)``.
            tokens: ``(B, N)``.
            real: booleans ``(B, T)``, true for frames that are no padding; all where None.

        Raises:
            ValueError: tokens that do not fit, and as in `AlignmentAttention.start`.
        """
        if tokens.dim() != 2 or len(tokens) != len(memory) or not tokens.shape[1]:
            raise ValueError(f"tokens must be ({len(memory)}, N) with N above 0; they were {tuple(tokens.shape)}")
        state, logits = self.start(memory, real), []
        for token in tokens.unbind(1):
            now, state = self.step(token, state)
            logits.append(now)
        return torch.stack(logits, 1)
