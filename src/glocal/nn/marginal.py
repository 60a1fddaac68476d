"""Attention as a marginal: which edges a query has is latent, and a value is what is expected over them."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Pattern
from glocal.shapes import Float

__all__ = [
    "STRUCTURES",
    "Expanding",
    "MultiHopAttention",
    "expanding_attention",
    "hopfield_retrieve",
    "marginal_attention",
    "marginals",
    "slot_step",
]

STRUCTURES = {
    "categorical": "one edge: softmax",
    "bernoulli": "each edge by itself: sigmoid",
    "subset": "any set of `size` edges",
    "span": "one run of neighbouring edges",
}
"""Sets of edges that a query can have. The last two, and ``bernoulli``, are the library's instances of the idea."""


def marginals(
    logits: Float[Tensor, "*lead M"], structure: str = "categorical", *, size: int = 1
) -> tuple[Float[Tensor, "*lead M"], Float[Tensor, "*lead"]]:
    """How probable each edge is, where a set of edges has the weight ``exp`` of the sum of its logits.

    The marginal of an edge is the derivative of log Z by its logit: that is what the sums over all sets come to. Priors
    are added to logits; an edge that cannot be has ``-inf``. Singh and Buckley, 2023, arXiv 2304.04556.

    Args:
        logits: ``(..., M)``; computed in float32 or wider.
        structure: one of `STRUCTURES`.
        size: edges of a ``subset``.

    Returns:
        Probabilities ``(..., M)``, 0 where no set is possible, and log Z ``(...)``, then ``-inf``.

    Raises:
        ValueError: an unknown structure, a size that M edges do not have.

    >>> marginals(torch.zeros(4), "subset", size=2)[0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    >>> marginals(torch.tensor([0.0, 9.0, 9.0, -9.0]), "span")[0].round()
    tensor([0., 1., 1., 0.])
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}; it was {structure!r}")
    if structure == "subset" and not 1 <= size <= logits.shape[-1]:
        raise ValueError(f"size must be from 1 to the {logits.shape[-1]} edges; it was {size}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if structure == "categorical":
        log_z = _logsumexp(wide, -1)
        return (wide - _finite(log_z)[..., None]).exp(), log_z
    if structure == "bernoulli":
        return wide.sigmoid(), nn.functional.softplus(wide).sum(-1)
    before, after, log_z = _subsets(wide, size) if structure == "subset" else _spans(wide)
    return (before + after - _finite(log_z)[..., None]).exp(), log_z


def _subsets(logits: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logit of an edge, the log of the sum over the other ``size - 1`` edges, and log Z.

    Elementary symmetric polynomials from both sides: ``e_j(..i) = e_j(..i - 1) + exp(logit_i) e_{j - 1}(..i - 1)``.
    """

    def sums(edges: tuple[Tensor, ...]) -> list[Tensor]:
        """Before each edge: over its predecessors, for 0 to ``size`` of them, ``(..., size + 1)``."""
        now = torch.full((*logits.shape[:-1], size + 1), -torch.inf, dtype=logits.dtype, device=logits.device)
        now = torch.cat([torch.zeros_like(now[..., :1]), now[..., 1:]], -1)
        found = [now]
        for edge in edges:
            more = torch.cat([torch.full_like(now[..., :1], -torch.inf), now[..., :-1] + edge[..., None]], -1)
            now = _logsumexp(torch.stack([now, more]), 0)
            found.append(now)
        return found

    edges = logits.unbind(-1)
    forwards, backwards = sums(edges), sums(edges[::-1])[::-1]
    others = [
        _logsumexp(before[..., :size] + after[..., :size].flip(-1), -1)
        for before, after in zip(forwards[:-1], backwards[1:], strict=True)
    ]
    return logits, torch.stack(others, -1), forwards[-1][..., size]


def _spans(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the sum over runs that end at an edge, over what can follow it, and log Z."""

    def ending(edges: tuple[Tensor, ...]) -> list[Tensor]:
        found: list[Tensor] = []
        for edge in edges:  # a run is the edge alone, or it prolongs one that ended just before
            more = edge if not found else edge + _logsumexp(torch.stack([torch.zeros_like(edge), found[-1]]), 0)
            found.append(more)
        return found

    edges = logits.unbind(-1)
    before = torch.stack(ending(edges), -1)
    starting = torch.stack(ending(edges[::-1])[::-1], -1)
    after = starting - _finite(logits)  # the edge itself is counted in both
    return before, after, _logsumexp(before, -1)


def _finite(t: Tensor) -> Tensor:
    """0 for ``-inf``: what is taken off ``-inf`` must not make it undefined."""
    return torch.where(t == -torch.inf, 0.0, t)


def _logsumexp(t: Tensor, dim: int) -> Tensor:
    """With a gradient of 0 where all are ``-inf``."""
    top = _finite(t.detach().amax(dim, keepdim=True))
    total = (t - top).exp().sum(dim)
    none = total == 0
    return torch.where(none, -torch.inf, torch.where(none, 1.0, total).log() + top.squeeze(dim))


def marginal_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M E"],
    where: Pattern | None = None,
    *,
    prior: Tensor | None = None,
    structure: str = "categorical",
    size: int = 1,
    scale: float | None = None,
) -> Float[Tensor, "B H N E"]:
    """Values weighted by `marginals` of the edges to their keys, with logits ``scale q k + prior``.

    One edge is softmax attention and goes through `glocal.attend`: a mask is a prior of 0, a relative bias a log prior,
    causal attention a prior on what came before. The other structures make all ``N x M`` logits.

    Args:
        q, k, v: ``(B, H, N, D)``, ``(B, H, M, D)``, ``(B, H, M, E)``.
        where: the edges that can be; all where None.
        prior: log priors that broadcast to ``(B, H, N, M)``.
        structure, size: as in `marginals`.
        scale: ``D ** -0.5`` where None.

    Returns:
        ``(B, H, N, E)``; zeros where a query can have no edge.

    Raises:
        ValueError: as in `marginals` and `glocal.attend`.

    >>> q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    >>> marginal_attention(q, k, v, structure="span").shape
    torch.Size([1, 2, 6, 8])
    """
    where = Full() if where is None else where
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if structure == "categorical":
        out: Tensor = attend(q, k, v, where, bias=prior, scale=scale)
        return out
    logits = scale * (q @ k.mT) if prior is None else scale * (q @ k.mT) + prior
    mask = where.mask((q.shape[2],), (k.shape[2],)).to(q.device)
    weights, _ = marginals(logits.masked_fill(~mask, -torch.inf), structure, size=size)
    return weights.to(v.dtype) @ v


def hopfield_retrieve(
    state: Float[Tensor, "*lead N D"],
    memories: Float[Tensor, "*lead M D"],
    *,
    beta: float = 1.0,
    steps: int = 50,
    tolerance: float = 1e-6,
) -> Float[Tensor, "*lead N D"]:
    """Attention again and again: a state becomes what it attends to among the memories, until it stays.

    Ramsauer et al., 2020, arXiv 2008.02217, as iterated inference: marginals of the edge, then the state given them.

    Args:
        state: ``(..., N, D)``.
        memories: ``(..., M, D)``.
        beta: factor of the scores.
        steps: at most.
        tolerance: the largest change at which it stops.

    Raises:
        ValueError: fewer than one step.

    >>> memories = torch.eye(3)
    >>> hopfield_retrieve(torch.tensor([[0.9, 0.2, 0.1]]), memories, beta=20.0).round(decimals=3)
    tensor([[1., 0., 0.]])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; it was {steps}")
    for _ in range(steps):
        before, state = state, marginals(beta * state @ memories.mT)[0].to(state.dtype) @ memories
        if bool((state - before).detach().abs().max() <= tolerance):
            break
    return state


def slot_step(
    slots: Float[Tensor, "*lead S D"], inputs: Float[Tensor, "*lead M D"], *, scale: float | None = None
) -> tuple[Float[Tensor, "*lead S D"], Float[Tensor, "*lead S M"]]:
    """One step of slot attention: inputs choose among slots, and a slot becomes the mean of what chose it.

    Locatello et al., 2020, arXiv 2006.15055, without its learned maps.

    Args:
        slots: ``(..., S, D)``.
        inputs: ``(..., M, D)``.
        scale: ``D ** -0.5`` where None.

    Returns:
        New slots, and the weights of their means ``(..., S, M)``.

    >>> slots, weights = slot_step(torch.randn(3, 4), torch.randn(10, 4))
    >>> torch.allclose(weights.sum(-1), torch.ones(3))
    True
    """
    scale = slots.shape[-1] ** -0.5 if scale is None else scale
    chosen, _ = marginals(scale * (inputs @ slots.mT))  # over slots
    weights = (chosen / chosen.sum(-2, keepdim=True)).mT.to(inputs.dtype)
    return weights @ inputs, weights


class Expanding(NamedTuple):
    """What `expanding_attention` found.

    Args:
        out: ``(B, H, N, E)``.
        weights: of the distances, ``(B, H, N, N)``.
        a, b: of the Beta distribution of ``theta``, ``(B, H, N)``: the window ends after a step with that probability.
    """

    out: Tensor
    weights: Tensor
    a: Tensor
    b: Tensor


def expanding_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N E"],
    *,
    a: float = 1.0,
    b: float = 4.0,
    steps: int = 3,
    scale: float | None = None,
) -> Expanding:
    """Causal attention that finds out how far to look: a geometric prior on the distance, whose rate is latent too.

    Mean-field inference: the expected distance says what the rate is, the rate how fast the prior falls. Makes all
    ``N x N`` logits.

    Args:
        q, k, v: ``(B, H, N, D)``, ``(B, H, N, D)``, ``(B, H, N, E)``.
        a, b: the Beta prior of the rate; a small ``a / b`` looks far.
        steps: of inference.
        scale: ``D ** -0.5`` where None.

    Raises:
        ValueError: numbers that are not positive, queries and keys of unequal number.

    >>> q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    >>> found = expanding_attention(q, k, v)
    >>> found.out.shape, found.a.shape
    (torch.Size([1, 2, 6, 8]), torch.Size([1, 2, 6]))
    """
    if min(a, b) <= 0 or steps < 1:
        raise ValueError(f"a and b must be above 0 and steps at least 1; they were {a}, {b} and {steps}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must be of one sequence; they had {q.shape[2]} and {k.shape[2]} tokens")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (scale * (q @ k.mT)).to(torch.promote_types(q.dtype, torch.float32))
    at = torch.arange(q.shape[2], device=q.device, dtype=logits.dtype)
    distance = at[:, None] - at
    logits = logits.masked_fill(distance < 0, -torch.inf)
    rate_a, rate_b = (torch.full(q.shape[:3], x, dtype=logits.dtype, device=q.device) for x in (a, b))
    weights = logits
    for _ in range(steps):
        both = torch.digamma(rate_a + rate_b)
        stop, go = (torch.digamma(x) - both for x in (rate_a, rate_b))  # expected logarithms
        weights, _ = marginals(logits + stop[..., None] + go[..., None] * distance.clamp(min=0))
        rate_a, rate_b = torch.full_like(rate_a, a + 1), b + (weights * distance).sum(-1)
    return Expanding(weights.to(v.dtype) @ v, weights, rate_a, rate_b)


class MultiHopAttention(Attention):
    """Two steps along the attention graph in one layer: ``A X V1 + A A X V2``.

    The value of a pair of edges depends on the nodes of both, and its expectation is a product of marginals. Singh and
    Buckley, 2023, arXiv 2304.04556.

    Args:
        dim, num_heads: as in `Attention`, with its options.

    >>> layer = MultiHopAttention(16, 2)
    >>> layer(torch.randn(1, 10, 16)).shape
    torch.Size([1, 10, 16])
    """

    uses: ClassVar[tuple[str, ...]] = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "a new token would need the queries of all tokens before it, which no cache keeps",
        "noncausal-cross": "the second step starts where the first one ends, among the queries' own tokens",
        "causal-cross": "the second step starts where the first one ends, among the queries' own tokens",
    }
    tiny: ClassVar[dict[str, Any]] = {}

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        bias = self.v_proj.bias is not None
        self.far_proj = nn.Linear(self.kv_dim, self.num_kv_heads * self.head_dim, bias=bias)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        far = super().mix(q, k, self.heads(self.far_proj(call.context), self.num_kv_heads), call)
        group = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))  # a second step's values are a query head's own
        return super().mix(q, k, v + far, call)
