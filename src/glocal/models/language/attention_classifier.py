"""The small classifiers on which it was asked whether attention explains: tokens, one softmax, one linear map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from glocal.nn import aligned_softmax
from glocal.shapes import Bool

__all__ = ["AttentionClassifier", "Classified"]


class Classified(NamedTuple):
    """What `AttentionClassifier` gives."""

    logits: Tensor
    """``(B, classes)``."""
    weights: Tensor
    """Of the tokens, ``(B, N)``; they sum to 1, and are 0 on padding. Zeros of a model without attention."""
    states: Tensor
    """What is weighed, ``(B, N, C)``."""


class AttentionClassifier(nn.Module):
    """Embeddings, or the states of a bidirectional LSTM over them, weighed by a softmax of a linear score.

    As in Pruthi et al., 2020, arXiv 1909.07913. Without attention, the LSTM's last state of each direction is read.

    Args:
        vocab: number of tokens.
        classes: logits.
        dim: channels of a token.
        hidden: channels of each direction of the LSTM; 0 for embeddings alone.
        attention: False for the network without attention.

    Raises:
        ValueError: sizes below 1, neither LSTM nor attention.

    >>> model = AttentionClassifier(50, 2, dim=16, hidden=8)
    >>> found = model(torch.randint(50, (3, 7)))
    >>> found.logits.shape, found.states.shape, torch.allclose(found.weights.sum(1), torch.ones(3))
    (torch.Size([3, 2]), torch.Size([3, 7, 16]), True)
    """

    def __init__(self, vocab: int, classes: int, *, dim: int = 128, hidden: int = 0, attention: bool = True) -> None:
        super().__init__()
        for name, value in (("vocab", vocab), ("classes", classes), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if hidden < 0 or not (hidden or attention):
            raise ValueError(f"hidden must be at least 0, and 1 without attention; it was {hidden}")
        width = 2 * hidden or dim
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True) if hidden else None
        self.score = nn.Linear(width, 1) if attention else None
        self.head = nn.Linear(width, classes)

    def get_input_embeddings(self) -> nn.Embedding:
        """Named as in transformers, so that `glocal.inspect.gradient_times_input` finds it."""
        return self.embed

    def forward(
        self, input_ids: Tensor, real: Bool[Tensor, "B N"] | None = None, drop: Bool[Tensor, "B N"] | None = None
    ) -> Classified:
        """Logits, and where it looked.

        Args:
            input_ids: integers ``(B, N)``.
            real: booleans ``(B, N)``, true for tokens that are no padding, which comes last; all where None.
            drop: booleans ``(B, N)``: tokens whose weights are set to 0 after the softmax, the others left as they are.

        Raises:
            ValueError: masks that do not fit, an example without tokens, something to drop without attention.
        """
        if real is None:
            real = torch.ones_like(input_ids, dtype=torch.bool)
        for name, mask in (("real", real), ("drop", drop)):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != input_ids.shape):
                raise ValueError(
                    f"{name} must be booleans {tuple(input_ids.shape)}; it was {mask.dtype} {tuple(mask.shape)}"
                )
        if not bool(real[:, :1].all()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ValueError("real must mark one token or more of each example, and padding must come last")
        states = self.embed(input_ids)
        ends = states[:, 0]
        if self.lstm is not None:
            lengths = real.sum(1).cpu()
            packed = nn.utils.rnn.pack_padded_sequence(states, lengths, batch_first=True, enforce_sorted=False)
            given, (last, _) = self.lstm(packed)
            states, _ = nn.utils.rnn.pad_packed_sequence(given, batch_first=True, total_length=real.shape[1])
            ends = torch.cat([last[0], last[1]], -1)
        if self.score is None:
            if drop is not None:
                raise ValueError("drop takes weights away; this model has no attention")
            return Classified(self.head(ends), torch.zeros_like(states[..., 0]), states)
        weights = aligned_softmax(self.score(states)[..., 0], real)
        used = weights if drop is None else weights * ~drop
        return Classified(self.head((used[:, None] @ states)[:, 0]), weights, states)
