"""Luong's translator: LSTMs on both sides, attention after the decoder's recurrence, and input feeding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from glocal.models.registry import register
from glocal.nn import Alignment, LuongAttention
from glocal.shapes import Bool, Float

__all__ = ["Translator", "TranslatorState", "luong_wmt"]


class TranslatorState(NamedTuple):
    """What decoding carries from token to token."""

    hidden: Tensor
    """Of the LSTM, ``(layers, B, dim)``; ``cell`` too."""
    cell: Tensor
    alignment: Alignment | None
    fed: Tensor
    """What the last output was made of, ``(B, dim)``."""


class Translator(nn.Module):
    """An encoder and a decoder of stacked LSTMs, with Luong's attention between them.

    Luong et al., 2015, arXiv 1508.04025. The source is read backwards; positions of the attention count from its
    beginning. Weights start uniform in ±0.1.

    Args:
        source_vocab, target_vocab: numbers of tokens.
        dim: channels of embeddings and states.
        layers: of each LSTM.
        attention: options of `LuongAttention`; None for a decoder that sees the last state of the encoder only.
        feeding: what the last step's output was made of goes into the next one.
        dropout: between layers, in training.

    Raises:
        ValueError: sizes below 1, feeding without attention.

    >>> model = Translator(100, 90, dim=32, layers=1)
    >>> source, target = torch.randint(100, (2, 7)), torch.randint(90, (2, 5))
    >>> model(source, target).shape
    torch.Size([2, 5, 90])
    >>> model.generate(source, start=1, stop=2, longest=4).shape[0]
    2
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        *,
        dim: int = 1000,
        layers: int = 4,
        attention: dict[str, Any] | None = {},  # noqa: B006  it is not changed
        feeding: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("source_vocab", source_vocab), ("target_vocab", target_vocab), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if attention is None and feeding:
            raise ValueError("feeding is of what the attention gives: without attention it must be False")
        self.dim, self.layers, self.feeding = dim, layers, feeding
        self.source_embed = nn.Embedding(source_vocab, dim)
        self.target_embed = nn.Embedding(target_vocab, dim)
        between = dropout if layers > 1 else 0.0
        self.encoder = nn.LSTM(dim, dim, layers, batch_first=True, dropout=between)
        self.decoder = nn.LSTM(2 * dim if feeding else dim, dim, layers, batch_first=True, dropout=between)
        self.attention = None if attention is None else LuongAttention(dim, dim, **attention)
        self.head = nn.Linear(dim, target_vocab, bias=False)
        for p in self.parameters():
            nn.init.uniform_(p, -0.1, 0.1)

    def encode(self, source: Tensor, real: Bool[Tensor, "B S"] | None = None) -> TranslatorState:
        """The state before the first target token.

        Args:
            source: tokens ``(B, S)``, padding at the end.
            real: booleans ``(B, S)``, true for what is no padding; all where None.

        Raises:
            ValueError: shapes that do not fit, padding before a token, a source without tokens.
        """
        if source.dim() != 2 or not source.shape[1]:
            raise ValueError(f"source must be tokens (B, S) with S above 0; it was {tuple(source.shape)}")
        real = torch.ones_like(source, dtype=torch.bool) if real is None else real
        if real.shape != source.shape or real.dtype != torch.bool:
            raise ValueError(f"real must be booleans {tuple(source.shape)}; it was {real.dtype} {tuple(real.shape)}")
        lengths = real.sum(1)
        at = torch.arange(source.shape[1], device=source.device)
        if bool((real != (at < lengths[:, None])).any()) or bool((lengths == 0).any()):
            raise ValueError("real must be true for at least one token of each source, and padding come after them")
        turn = (lengths[:, None] - 1 - at).clamp(min=0)  # its own inverse on what is real
        embedded = self.source_embed(source.gather(1, turn))
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, (hidden, cell) = self.encoder(packed)
        if self.attention is None:
            return TranslatorState(hidden, cell, None, hidden[-1])
        memory, _ = pad_packed_sequence(out, batch_first=True, total_length=source.shape[1])
        memory = memory.gather(1, turn[..., None].expand_as(memory))
        return TranslatorState(hidden, cell, self.attention.start(memory, real), torch.zeros_like(hidden[-1]))

    def step(self, token: Tensor, state: TranslatorState) -> tuple[Float[Tensor, "B V"], TranslatorState]:
        """The logits after one more target token, and the state after it."""
        embedded = self.target_embed(token)
        given = torch.cat([embedded, state.fed], -1) if self.feeding else embedded
        out, (hidden, cell) = self.decoder(given[:, None], (state.hidden, state.cell))
        top, alignment = out[:, 0], state.alignment
        if self.attention is not None and alignment is not None:
            context, alignment = self.attention(top, alignment)
            top = self.attention.attentional(context, top)
        return self.head(top), TranslatorState(hidden, cell, alignment, top)

    def forward(
        self, source: Tensor, target: Tensor, real: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B N V"]:
        """Logits of what follows each target token, ``(B, N, target_vocab)``; arguments as of `encode`."""
        state, logits = self.encode(source, real), []
        for token in target.unbind(1):
            now, state = self.step(token, state)
            logits.append(now)
        return torch.stack(logits, 1)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        real: Bool[Tensor, "B S"] | None = None,
        *,
        start: int,
        stop: int,
        longest: int,
    ) -> Tensor:
        """The most probable token each time, ``(B, n)``, at most ``longest``; what follows ``stop`` is ``stop``."""
        state = self.encode(source, real)
        token, done, tokens = torch.full_like(source[:, 0], start), torch.zeros_like(source[:, 0]) > 0, []
        for _ in range(longest):
            logits, state = self.step(token, state)
            token = torch.where(done, stop, logits.argmax(-1))
            done = done | (token == stop)
            tokens.append(token)
            if bool(done.all()):
                break
        return torch.stack(tokens, 1) if tokens else source[:, :0]


@register
def luong_wmt(**options: Any) -> Translator:
    """English to German as published: 50,000 words a side, 4 layers of 1,000, local-p attention with general scores."""
    given: dict[str, Any] = {"attention": {"score": "general", "place": "local_p", "window": 10}, "dropout": 0.2}
    return Translator(**({"source_vocab": 50_000, "target_vocab": 50_000} | given | options))
