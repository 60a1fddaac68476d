"""Pre-training by replaced tokens (ELECTRA): a small generator fills in masked tokens, the encoder finds them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, gelu

from glocal.models.language.convbert import ConvBERT, init_bert

__all__ = ["MaskedTokens", "ReplacedLoss", "ReplacedTokens", "replaced_token_loss"]


class MaskedTokens(nn.Module):
    """An encoder with BERT's head for masked tokens, whose output matrix is the embedding.

    Args:
        encoder: `ConvBERT`.

    >>> model = MaskedTokens(ConvBERT(100, 32, depth=1, num_heads=4, embed_dim=16))
    >>> model(torch.randint(100, (1, 20))).shape
    torch.Size([1, 20, 100])
    """

    def __init__(self, encoder: ConvBERT) -> None:
        super().__init__()
        embed_dim = encoder.embeddings.word.embedding_dim
        self.encoder, self.dense = encoder, nn.Linear(encoder.dim, embed_dim)
        self.norm, self.bias = nn.LayerNorm(embed_dim, eps=1e-12), nn.Parameter(torch.zeros(encoder.vocab))
        init_bert(self.dense)

    def forward(self, tokens: Tensor, *, at: Tensor | None = None, **options: Any) -> Tensor:
        """Tokens ``(B, N)`` to logits ``(B, N, vocab)``, or ``(n, vocab)`` where booleans ``at (B, N)`` are true."""
        x = self.encoder(tokens, **options)
        x = self.norm(gelu(self.dense(x if at is None else x[at])))
        return cast(Tensor, x @ self.encoder.embeddings.word.weight.mT + self.bias)


class ReplacedTokens(nn.Module):
    """An encoder with ELECTRA's head, which says of each token whether it has been replaced.

    Args:
        encoder: `ConvBERT`.

    >>> ReplacedTokens(ConvBERT(100, 32, depth=1, num_heads=4))(torch.randint(100, (1, 20))).shape
    torch.Size([1, 20])
    """

    def __init__(self, encoder: ConvBERT) -> None:
        super().__init__()
        self.encoder, self.dense, self.head = encoder, nn.Linear(encoder.dim, encoder.dim), nn.Linear(encoder.dim, 1)
        self.dense.apply(init_bert)
        self.head.apply(init_bert)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Tokens ``(B, N)`` to logits ``(B, N)``, positive where a token seems replaced."""
        return cast(Tensor, self.head(gelu(self.dense(self.encoder(tokens, **options)))).squeeze(-1))


class ReplacedLoss(NamedTuple):
    """What a step of pre-training gives."""

    loss: Tensor
    """``masked + weight * detected``."""
    masked: Tensor
    """Cross-entropy of the generator at the chosen tokens, in nats."""
    detected: Tensor
    """Binary cross-entropy of the detector over all real tokens, in nats."""
    tokens: Tensor
    """What the detector has read, ``(B, N)``."""
    replaced: Tensor
    """Which of it differ from the text, booleans ``(B, N)``."""


class _Fills(Protocol):
    def __call__(self, tokens: Tensor, *, at: Tensor, **options: Any) -> Tensor: ...


class _Detects(Protocol):
    def __call__(self, tokens: Tensor, **options: Any) -> Tensor: ...


def replaced_token_loss(
    generator: _Fills,
    detector: _Detects,
    tokens: Tensor,
    mask_token: int,
    *,
    keys: Tensor | None = None,
    maskable: Tensor | None = None,
    share: float = 0.15,
    weight: float = 50.0,
    rng: torch.Generator | None = None,
) -> ReplacedLoss:
    """The loss of one step: the generator fills in masked tokens, the detector finds those that are not the text's.

    No gradient goes from the detector to the generator. In the paper both share their embeddings
    (``generator.encoder.embeddings = detector.encoder.embeddings``), and the generator has a quarter of the width, a
    third in the base size. Clark et al., 2020, arXiv 2003.10555, with ConvBERT's settings.

    ConvBERT is trained so for a million steps of 128 rows of 128 tokens, 256 rows in the base size, at rates of 5e-4
    (medium-small), 3e-4 (small) and 2e-4 (base) that rise for 10,000 steps and then fall linearly, weight decay 0.01.

    Args:
        generator: `MaskedTokens`, or whatever is called as ``generator(tokens, at=booleans)`` and gives ``(n, vocab)``.
        detector: `ReplacedTokens`, or whatever gives ``(B, N)``.
        tokens: ``(B, N)``.
        mask_token: what a masked token becomes.
        keys: ``(B, N)``, true for real tokens; given to both models where not None.
        maskable: ``(B, N)``, true for tokens that may be chosen; the real ones where None.
        share: of the real tokens that are chosen in each row, one at least; 85 of 100 of them are masked for the
            generator, which sees the others.
        weight: of the detector's loss.
        rng: for the choice of tokens and for sampling; on the tokens' device.

    Raises:
        ValueError: a share out of range, shapes that do not fit, a row without tokens to choose.

    >>> generator, detector = (kind(ConvBERT(100, 32, depth=1, num_heads=4)) for kind in (MaskedTokens, ReplacedTokens))
    >>> generator.encoder.embeddings = detector.encoder.embeddings
    >>> found = replaced_token_loss(generator, detector, torch.randint(99, (2, 20)), mask_token=99)
    >>> found.tokens.shape, bool(found.replaced.sum() <= 6)  # 3 of 20 in each row
    (torch.Size([2, 20]), True)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; it was {share}")
    for name, value in (("keys", keys), ("maskable", maskable)):
        if value is not None and (value.dtype != torch.bool or value.shape != tokens.shape):
            raise ValueError(
                f"{name} must be booleans {tuple(tokens.shape)}; it was {value.dtype} {tuple(value.shape)}"
            )
    real = torch.ones_like(tokens, dtype=torch.bool) if keys is None else keys
    free = real if maskable is None else real & maskable
    if not bool(free.any(1).all()):
        raise ValueError("maskable must have a real token in each row; it had a row without")
    options = {} if keys is None else {"keys": keys}

    def noise() -> Tensor:
        return torch.rand(tokens.shape, generator=rng, device=tokens.device)

    count = (real.sum(1, keepdim=True) * share).round().clamp(min=1)
    ranks = noise().masked_fill(~free, 2).argsort(1).argsort(1)
    chosen = free & (ranks < count)
    logits = generator(tokens.masked_fill(chosen & (noise() < 0.85), mask_token), at=chosen, **options).float()
    masked = cross_entropy(logits, tokens[chosen])
    filled = torch.multinomial(logits.detach().softmax(-1), 1, generator=rng)[:, 0]
    given = tokens.masked_scatter(chosen, filled)
    replaced = given != tokens
    found = detector(given, **options)[real].float()
    detected = binary_cross_entropy_with_logits(found, replaced[real].float())
    return ReplacedLoss(masked + weight * detected, masked, detected, given, replaced)
