"""The alignment functions of a survey, each as a module: how well a key fits a query, before any normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["SCORE_FUNCTIONS", "ScoreFunction", "entmax15", "score_function", "sparsemax"]

Feature = Callable[[Tensor], Tensor]


class ScoreFunction(nn.Module):
    """Scores of all pairs, ``(B, N, M)``; for comparisons, as every one of them computes all pairs.

    Chaudhari et al., 2021, arXiv 1904.02874, table 5. See `score_function`.

    Args:
        query_dim, key_dim: channels of queries and keys.
        hidden: channels of the small network of ``concat``, ``additive``, ``deep`` and ``feature``.
        longest: keys that ``location`` has numbers for.
        activation: of the forms that have one.
        feature: of ``kernel``, and of the keys in ``feature``.

    Raises:
        ValueError: sizes below 1, or unequal where the form compares queries with keys channel by channel.
    """

    same_dims: ClassVar[bool] = False

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        *,
        hidden: int = 32,
        longest: int = 64,
        activation: Feature = torch.tanh,
        feature: Feature = torch.relu,
    ) -> None:
        super().__init__()
        for name, value in (("query_dim", query_dim), ("key_dim", key_dim), ("hidden", hidden), ("longest", longest)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if self.same_dims and query_dim != key_dim:
            raise ValueError(f"{type(self).__name__} needs key_dim equal to query_dim {query_dim}; it was {key_dim}")
        self.query_dim, self.key_dim, self.hidden, self.longest = query_dim, key_dim, hidden, longest
        self.activation, self.feature = activation, feature
        self.build()

    def build(self) -> None:
        """The parameters."""

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """``(B, N, M)``."""
        raise NotImplementedError

    def forward(self, q: Float[Tensor, "B N Dq"], k: Float[Tensor, "B M Dk"]) -> Float[Tensor, "B N M"]:
        """Scores of queries ``(B, N, query_dim)`` and keys ``(B, M, key_dim)``.

        Raises:
            ValueError: shapes that do not fit.
        """
        if q.dim() != 3 or q.shape[-1] != self.query_dim:
            raise ValueError(f"q must be (B, N, {self.query_dim}); it was {tuple(q.shape)}")
        if k.dim() != 3 or k.shape[-1] != self.key_dim or len(k) != len(q):
            raise ValueError(f"k must be ({len(q)}, M, {self.key_dim}); it was {tuple(k.shape)}")
        return self.score(q, k)


class Similarity(ScoreFunction):
    """The cosine of the angle between the two."""

    same_dims = True

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT


class Dot(ScoreFunction):
    """``k q``."""

    same_dims = True

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT


class ScaledDot(Dot):
    """``k q / sqrt(D)``."""

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = super().score(q, k) * self.query_dim**-0.5
        return out


class General(ScoreFunction):
    """``k W q``."""

    bias: ClassVar[bool] = False

    def build(self) -> None:
        self.proj = nn.Linear(self.query_dim, self.key_dim, bias=self.bias)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = self.proj(q) @ k.mT
        return out


class BiasedGeneral(General):
    """``k (W q + b)``."""

    bias = True


class ActivatedGeneral(General):
    """``f(k W q + b)``, with one b."""

    def build(self) -> None:
        super().build()
        self.offset = nn.Parameter(torch.zeros(()))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = self.activation(super().score(q, k) + self.offset)
        return out


class Kernel(ScoreFunction):
    """``f(q) f(k)``."""

    same_dims = True

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return self.feature(q) @ self.feature(k).mT


class Concat(ScoreFunction):
    """``w f(W [q; k] + b)``."""

    def build(self) -> None:
        self.proj = nn.Linear(self.query_dim + self.key_dim, self.hidden)
        self.energy = nn.Linear(self.hidden, 1, bias=False)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        pairs = torch.cat([q[:, :, None].expand(-1, -1, k.shape[1], -1), k[:, None].expand(-1, q.shape[1], -1, -1)], -1)
        out: Tensor = self.energy(self.activation(self.proj(pairs)))[..., 0]
        return out


class Additive(ScoreFunction):
    """``w f(W1 q + W2 k + b)``: `Concat` in another order of operations."""

    def build(self) -> None:
        self.query_proj = nn.Linear(self.query_dim, self.hidden)
        self.key_proj = nn.Linear(self.key_dim, self.hidden, bias=False)
        self.energy = nn.Linear(self.hidden, 1, bias=False)

    def inner(self, q: Tensor, k: Tensor) -> Tensor:
        """``(B, N, M, hidden)``."""
        return self.activation(self.query_proj(q)[:, :, None] + self.key_proj(k)[:, None])

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = self.energy(self.inner(q, k))[..., 0]
        return out


class Deep(Additive):
    """`Additive` with one more layer."""

    def build(self) -> None:
        super().build()
        self.deeper = nn.Linear(self.hidden, self.hidden)

    def inner(self, q: Tensor, k: Tensor) -> Tensor:
        return self.activation(self.deeper(super().inner(q, k)))


class Location(ScoreFunction):
    """``f(W q)``: a number a position, whatever stands there."""

    def build(self) -> None:
        self.proj = nn.Linear(self.query_dim, self.longest, bias=False)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        if k.shape[1] > self.longest:
            raise ValueError(f"k has {k.shape[1]} keys; location has numbers for {self.longest}")
        return self.activation(self.proj(q)[..., : k.shape[1]])


class FeatureBased(Additive):
    """``w f(W1 f1(k) + W2 f2(k) + b)``: of the keys alone, by two features of theirs; the same for every query."""

    def build(self) -> None:
        self.key_proj = nn.Linear(self.key_dim, self.hidden, bias=False)
        self.feature_proj = nn.Linear(self.key_dim, self.hidden)
        self.energy = nn.Linear(self.hidden, 1, bias=False)

    def inner(self, q: Tensor, k: Tensor) -> Tensor:
        made = self.activation(self.key_proj(k) + self.feature_proj(self.feature(k)))
        return made[:, None].expand(-1, q.shape[1], -1, -1)


SCORE_FUNCTIONS: dict[str, type[ScoreFunction]] = {
    "similarity": Similarity,
    "dot": Dot,
    "scaled_dot": ScaledDot,
    "general": General,
    "biased_general": BiasedGeneral,
    "activated_general": ActivatedGeneral,
    "kernel": Kernel,
    "concat": Concat,
    "additive": Additive,
    "deep": Deep,
    "location": Location,
    "feature": FeatureBased,
}
"""By the names that `glocal.papers.taxonomy` gives them."""


def score_function(name: str, query_dim: int, key_dim: int, **options: object) -> ScoreFunction:
    """One of `SCORE_FUNCTIONS`, with the options of `ScoreFunction`.

    Raises:
        ValueError: an unknown name, sizes that do not fit.

    >>> score_function("general", 8, 5)(torch.randn(2, 3, 8), torch.randn(2, 4, 5)).shape
    torch.Size([2, 3, 4])
    """
    if name not in SCORE_FUNCTIONS:
        raise ValueError(f"name must be one of {', '.join(SCORE_FUNCTIONS)}; it was {name!r}")
    return SCORE_FUNCTIONS[name](query_dim, key_dim, **options)  # type: ignore[arg-type]


def sparsemax(scores: Float[Tensor, "*lead M"]) -> Float[Tensor, "*lead M"]:
    """The nearest weights to the scores that are not negative and sum to one; many are 0.

    Martins and Astudillo, 2016, arXiv 1602.02068.

    >>> sparsemax(torch.tensor([2.0, 1.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    ordered = scores.sort(-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    sums = ordered.cumsum(-1)
    size = (1 + count * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, size - 1) - 1) / size
    return (scores - threshold).clamp(min=0)


def entmax15(scores: Float[Tensor, "*lead M"]) -> Float[Tensor, "*lead M"]:
    """Between softmax and `sparsemax`: ``clamp(scores / 2 - t, 0)^2`` with the t for which the sum is one.

    Peters et al., 2019, arXiv 1905.05702.

    >>> entmax15(torch.tensor([2.0, 1.0, -2.0]))
    tensor([0.8307, 0.1693, 0.0000])
    """
    half = scores / 2 - scores.amax(-1, keepdim=True).detach() / 2
    ordered = half.sort(-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    inner = (1 - spread) / count
    # Off the support the root may be of a negative number: it must not reach the gradient.
    thresholds = mean - torch.where(inner > 0, inner, 1).sqrt() * (inner > 0)
    size = ((thresholds <= ordered) & (inner > 0)).sum(-1, keepdim=True).clamp(min=1)
    return (half - thresholds.gather(-1, size - 1)).clamp(min=0).square()
