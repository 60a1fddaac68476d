"""A decoder whose alignment is latent and moves forward: training by the best alignment, and search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from glocal.models.language.aligned import AlignedDecoder, DecoderState
from glocal.models.registry import register
from glocal.nn import Hypothesis, LatentMonotonicAttention, align_tokens
from glocal.shapes import Bool, Float

__all__ = ["LatentDecoder", "latent_switchboard", "max_approximation_loss"]


class LatentDecoder(AlignedDecoder):
    """`AlignedDecoder` with `LatentMonotonicAttention`, by known frames, the best frames, or the most probable ones.

    Zeyer et al., 2021, arXiv 2103.16710. Training alternates `align`, which finds the best frames for known tokens,
    and steps on `max_approximation_loss` of what `forced` gives for these frames; `glocal.nn.linear_alignment` are
    frames to begin with, `glocal.nn.AlignmentStore` keeps the best ones. In the paper it starts from a model with soft
    attention, as by `from_soft`, and from scratch is clearly worse.

    Args:
        vocab, embed_dim, hidden, cell, dropout: as in `AlignedDecoder`.
        attention: a `LatentMonotonicAttention`.

    Raises:
        TypeError: another attention.
        ValueError: as in `AlignedDecoder`.

    >>> model = LatentDecoder(30, LatentMonotonicAttention(16, 32, form="segmental"), embed_dim=8, hidden=20)
    >>> memory, tokens = torch.randn(2, 50, 32), torch.randint(2, 30, (2, 7))
    >>> found = model.align(memory, tokens, tokens)
    >>> logits, chances = model.forced(memory, tokens, found.frames)
    >>> logits.shape, chances.shape
    (torch.Size([2, 7, 30]), torch.Size([2, 7]))
    >>> _ = max_approximation_loss(logits, chances, tokens).backward()
    >>> model.recognise(memory, start=0, stop=1, longest=5, beam=3).tokens.shape[0]
    2
    """

    attention: LatentMonotonicAttention

    def __init__(self, vocab: int, attention: LatentMonotonicAttention, **options: Any) -> None:
        if not isinstance(attention, LatentMonotonicAttention):
            raise TypeError(f"attention must be LatentMonotonicAttention; it was {type(attention).__name__}")
        super().__init__(vocab, attention, **options)

    def from_soft(self, soft: AlignedDecoder) -> LatentDecoder:
        """Take the weights of a decoder with soft attention of the same sizes, and give this one back.

        What only one of the two has, feedback or the boundaries of segments, is left as it is.

        Raises:
            ValueError: sizes that differ.
        """
        own, given = self.state_dict(), soft.state_dict()
        for name, weight in own.items():
            if name in given and given[name].shape != weight.shape:
                raise ValueError(f"soft must have {name} {tuple(weight.shape)}; it was {tuple(given[name].shape)}")
        self.load_state_dict(own | {name: weight for name, weight in given.items() if name in own})
        return self

    def place(self, state: DecoderState) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """As `LatentMonotonicAttention.place`, of the cell's state."""
        return self.attention.place(state.hidden, state.alignment)

    def look_at(self, at: Tensor, energies: Tensor, state: DecoderState) -> tuple[Float[Tensor, "B V"], DecoderState]:
        """Log-probabilities of the next token once frames ``(B,)`` are chosen, in float32 or wider, and the state."""
        context, alignment = self.attention.look_at(at, energies, state.alignment)
        return self._said(state._replace(context=context, alignment=alignment))

    def forced(
        self,
        memory: Float[Tensor, "B T memory_dim"],
        tokens: Tensor,
        frames: Tensor,
        real: Bool[Tensor, "B T"] | None = None,
        count: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B N V"], Float[Tensor, "B N"]]:
        """Log-probabilities of what follows each token at known frames, and those of the frames.

        Args:
            memory, tokens, real: as in `AlignedDecoder.forward`.
            frames: ``(B, N)``.
            count: tokens of each sample that matter, ``(B,)``; N where None. What comes after is 0 of the frames.

        Raises:
            ValueError: frames that do not fit, or go back.
        """
        if frames.shape != tokens.shape or tokens.dim() != 2:
            raise ValueError(f"frames must be as tokens {tuple(tokens.shape)}; they were {tuple(frames.shape)}")
        state, made, chances = self.start(memory, real), [], []
        for i, (token, at) in enumerate(zip(tokens.unbind(1), frames.unbind(1), strict=True)):
            state = self.ask(token, state)
            chance, energies = self.place(state)
            labels, state = self.look_at(at, energies, state)
            chosen = chance.gather(1, at[:, None])[:, 0]
            chances.append(chosen if count is None else chosen.where(count > i, 0))
            made.append(labels)
        out = torch.stack(chances, 1)
        if bool((out == -torch.inf).any()):
            raise ValueError("frames must move forward inside of what is real, by one at least but for the hard form")
        return torch.stack(made, 1), out

    @torch.no_grad()
    def align(
        self,
        memory: Float[Tensor, "B T memory_dim"],
        tokens: Tensor,
        targets: Tensor,
        real: Bool[Tensor, "B T"] | None = None,
        **options: Any,
    ) -> Hypothesis:
        """The best frames for known targets; see `glocal.nn.align_tokens`, which takes the options."""
        return align_tokens(self, self.start(memory, real), tokens, targets, **options)


def max_approximation_loss(
    labels: Float[Tensor, "B N V"],
    chances: Float[Tensor, "B N"],
    targets: Tensor,
    *,
    weight: float = 0.1,
    smoothing: float = 0.1,
    ignore: int = -100,
) -> Float[Tensor, ""]:
    """Mean of ``-log p(token) - weight log p(frame)`` over the targets: the loss at the best alignment.

    Args:
        labels: log-probabilities of tokens, ``(B, N, V)``.
        chances: log-probabilities of the frames, ``(B, N)``.
        targets: ``(B, N)``.
        weight: of the frames.
        smoothing: of the targets, over all tokens.
        ignore: the target of what does not count.

    >>> labels, chances = torch.full((1, 2, 4), 0.25).log(), torch.full((1, 2), 0.5).log()
    >>> float(max_approximation_loss(labels, chances, torch.tensor([[3, 1]])))  # log 4 + 0.1 log 2
    1.4556...
    """
    said = cross_entropy(labels.flatten(0, 1), targets.flatten(), ignore_index=ignore, label_smoothing=smoothing)
    return said - weight * chances[targets != ignore].mean()


@register
def latent_switchboard(form: str = "window", **options: Any) -> LatentDecoder:
    """The decoder published for telephone speech: 1,030 word pieces, over 2,048 channels of an encoder of one's own.

    Args:
        form: of `LatentMonotonicAttention`.
        options: of `LatentDecoder`.
    """
    attention = LatentMonotonicAttention(1000, 2048, form=form, hidden=1024)
    given: dict[str, Any] = {"vocab": 1030, "attention": attention, "dropout": 0.3}
    return LatentDecoder(**(given | options))
