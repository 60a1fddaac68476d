"""Attention trained to look away from tokens that the model uses: a test of what is said to explain a model.

Small weights on a token do not show that it is unused. Pruthi et al., 2020, arXiv 1909.07913.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn.modes import evaluating
from glocal.patterns import Choose, Keys, Pattern
from glocal.shapes import Bool, Float

__all__ = ["DeceptionReport", "deception_penalty", "deception_report", "impermissible_share", "information_barrier"]

_FORMS = ("mean", "max", "joint")
_MOST = 1 - 1e-6  # of a row's mass: of more, the logarithm has no end


def deception_penalty(
    weights: Float[Tensor, "B *rows N"],
    impermissible: Bool[Tensor, "B N"],
    strength: float = 0.1,
    form: str = "mean",
    real: Bool[Tensor, "B *rows"] | None = None,
) -> Tensor:
    """What a model is fined for looking at some tokens: ``-strength * log(1 - their weights' sum)``.

    Added to the loss of a task. Weights are those after the softmax and before dropout: of a classifier ``(B, N)``; of
    an encoder those of the class token's row in the last layer, ``(B, H, N)``; of a decoder its alignment, ``(B, T,
    N)``.

    Args:
        weights: rows that sum to 1, or to 0.
        impermissible: booleans, true for tokens not to be looked at: ``(B, N)``, for all rows of an example, or of the
            shape of the weights.
        strength: the paper's lambda.
        form: over rows, heads and batch: ``"mean"`` of the logarithms; ``"max"``, the fine of the worst row of the
            whole batch; ``"joint"``, of the mean sum, one logarithm a batch, as for alignments.
        real: which rows count, booleans ``(B, *rows)``; all where None.

    Returns:
        A number, 0 where nothing is impermissible, in float32 or wider. It has no gradient of rows whose sum is above
        1 - 1e-6.

    Raises:
        ValueError: shapes that do not fit, a negative strength, an unknown form, no row that counts.

    >>> weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    >>> hidden = torch.tensor([[True, False, False], [False, False, True]])
    >>> round(float(deception_penalty(weights, hidden, 1.0)), 4)  # log(2) / 2
    0.3466
    """
    if form not in _FORMS:
        raise ValueError(f"form must be of {', '.join(_FORMS)}; it was {form!r}")
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0; it was {strength}")
    mass = _mass(weights.to(torch.promote_types(weights.dtype, torch.float32)), impermissible)
    if real is not None:
        if real.dtype != torch.bool or real.shape != mass.shape:
            raise ValueError(f"real must be booleans {tuple(mass.shape)}; it was {real.dtype} {tuple(real.shape)}")
        mass = mass[real]
    if not mass.numel():
        raise ValueError("real must mark at least one row; it marked none")
    fine = -torch.log1p(-(mass.mean() if form == "joint" else mass).clamp(max=_MOST))
    return strength * (fine.amax() if form == "max" else fine.mean())


def _mass(weights: Tensor, impermissible: Tensor) -> Tensor:
    """Sums of the weights of impermissible tokens, ``(B, *rows)``."""
    wanted, per_example = tuple(weights.shape), (*weights.shape[:1], *weights.shape[-1:])
    if impermissible.dtype != torch.bool or tuple(impermissible.shape) not in (wanted, per_example):
        raise ValueError(
            f"impermissible must be booleans {per_example} or {wanted}, for weights {wanted}; it was "
            f"{impermissible.dtype} {tuple(impermissible.shape)}"
        )
    if impermissible.dim() < weights.dim():
        impermissible = impermissible.view(len(weights), *(1,) * (weights.dim() - 2), -1)
    return (weights * impermissible).sum(-1)


def impermissible_share(scores: Float[Tensor, "B *rows N"], impermissible: Bool[Tensor, "B N"]) -> float:
    """How much of what a method attributes falls on impermissible tokens, from 0 to 1: the mean over rows.

    Of attention weights it is their mass; of norms of embeddings, or of `gradient_times_input` or `rollout`, the share
    that these give to tokens that the model was trained to hide.

    Args:
        scores: none negative, ``(B, *rows, N)``.
        impermissible: booleans, as in `deception_penalty`.

    Raises:
        ValueError: shapes that do not fit.

    >>> impermissible_share(torch.tensor([[3.0, 1.0]]), torch.tensor([[False, True]]))
    0.25
    """
    scores = scores.double()
    return float((_mass(scores, impermissible) / scores.sum(-1).clamp(min=torch.finfo(scores.dtype).tiny)).mean())


def information_barrier(
    impermissible: Bool[Tensor, "B N"], real: Bool[Tensor, "B N"] | None = None, first: int = 0
) -> Pattern:
    """Who sees whom, so that no other token can carry what impermissible ones say: only the class token sees both.

    Impermissible tokens see each other, the others see each other, none sees the class token, which sees all. Padding
    sees padding. Applied in every layer, in training and afterwards; then the class token's weights are all that
    passes. For `glocal.attend`, `glocal.hf.adapt`, or as an ``attention_mask`` of transformers, whose eager attention
    adds what it is given: ``-1e4 * ~information_barrier(m).mask(N)``, ``(B, 1, N, N)``.

    Args:
        impermissible: booleans ``(B, N)``, true for tokens that must not be looked at; of padding it does not count.
        real: booleans ``(B, N)``, true for tokens that are no padding; all where None.
        first: the class token's place.

    Raises:
        ValueError: shapes that do not fit, a place out of range.

    >>> information_barrier(torch.tensor([[False, True, False, False]])).mask(4)[0, 0].int().tolist()
    [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if impermissible.dtype != torch.bool or impermissible.dim() != 2:
        raise ValueError(
            f"impermissible must be booleans (B, N); it was {impermissible.dtype} {tuple(impermissible.shape)}"
        )
    if real is None:
        real = torch.ones_like(impermissible)
    if real.dtype != torch.bool or real.shape != impermissible.shape:
        raise ValueError(f"real must be booleans {tuple(impermissible.shape)}; it was {real.dtype} {tuple(real.shape)}")
    count = impermissible.shape[1]
    if not 0 <= first < count:
        raise ValueError(f"first must be one of {count} tokens; it was {first}")
    top = torch.arange(count, device=real.device) == first
    hidden = impermissible & real
    own = Choose(hidden[:, None], Keys(hidden & ~top), Keys(real & ~hidden & ~top))
    return Choose(top, Keys(real), Choose(real[:, None], own, Keys(~real)))


@dataclass(frozen=True)
class DeceptionReport:
    """What a classifier does with impermissible tokens. Made by `deception_report`.

    Args:
        accuracy: on what it is given.
        mass: of its attention on impermissible tokens, mean over examples.
        base_rate: share of the tokens that are impermissible.
        embedding_share: of the lengths of the embeddings.
        state_share: of the lengths of what is weighed.
        zeroed: accuracy with their weights set to 0: how far it does without looking at them.
        anonymised: accuracy with another token in their places: how far it does without them.
    """

    accuracy: float
    mass: float
    base_rate: float
    embedding_share: float
    state_share: float
    zeroed: float
    anonymised: float


@torch.no_grad()
def deception_report(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    impermissible: Bool[Tensor, "B N"],
    *,
    anonymous: int,
    real: Bool[Tensor, "B N"] | None = None,
) -> DeceptionReport:
    """Whether a classifier uses tokens that its attention does not show.

    Args:
        model: called as `glocal.models.language.attention_classifier.AttentionClassifier`, which it most often is. It
            runs in evaluation mode and is left as it was.
        ids: ``(B, N)``.
        labels: ``(B,)``.
        impermissible: booleans ``(B, N)``.
        anonymous: the token that replaces them.
        real: booleans ``(B, N)``, true for tokens that are no padding; all where None.

    Raises:
        ValueError: masks that do not fit.
    """
    real = torch.ones_like(impermissible) if real is None else real
    embed: Any = model

    def right(logits: Tensor) -> float:
        return float((logits.argmax(-1) == labels).double().mean())

    with evaluating(model):
        plain = model(ids, real)
        zeroed = model(ids, real, drop=impermissible)
        anonymised = model(ids.masked_fill(impermissible, anonymous), real)
        embedded = embed.get_input_embeddings()(ids)
    return DeceptionReport(
        right(plain.logits),
        impermissible_share(plain.weights, impermissible),
        impermissible_share(real, impermissible),
        impermissible_share(embedded.norm(dim=-1) * real, impermissible),
        impermissible_share(plain.states.norm(dim=-1) * real, impermissible),
        right(zeroed.logits),
        right(anonymised.logits),
    )
