"""Location-relative attention: it moves along the memory by learned steps, and never looks at what stands there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from glocal.nn.alignment import Alignment, AlignmentAttention, aligned_softmax
from glocal.shapes import Float

__all__ = ["DynamicConvolutionAttention", "GMMAttention", "beta_binomial"]

_VERSIONS = ("v0", "v1", "v2", "v1b", "v2b")


class GMMAttention(AlignmentAttention):
    """Weights are a mixture of Gaussians over the frames, whose means move forward by a positive step each time.

    Battenberg et al., 2020, arXiv 1910.10288; ``v0`` is of Graves, 2013, arXiv 1308.0850. Of the query a small network
    makes three numbers a component, ``w``, ``d`` and ``s``; the weight of frame ``j`` is the sum over components of
    ``share / Z * exp(-(j - mean)^2 / (2 width^2))`` with

    ========  ===========  ===============  ====================  =====================
    version   share        step of a mean   width                 Z
    ========  ===========  ===============  ====================  =====================
    v0        exp w        exp d            sqrt(exp(-s) / 2)     1
    v1        softmax w    exp d            sqrt(exp s)           sqrt(2 pi) width
    v2        softmax w    softplus d       softplus s            sqrt(2 pi) width
    ========  ===========  ===============  ====================  =====================

    ``v1b`` and ``v2b`` start with biases that make the step 1 frame and the width 10. Weights are not normalised over
    the frames; those of ``v0`` have no bound. The means, in `Alignment.position`, start at frame 0.

    Args:
        query_dim, memory_dim: as in `AlignmentAttention`.
        version: a row of the table, or one with biases.
        components: of the mixture.
        hidden: channels of the small network.

    Raises:
        ValueError: an unknown version, sizes below 1.

    >>> layer = GMMAttention(16, 32)
    >>> contexts, weights = layer.over(torch.randn(2, 4, 16), torch.randn(2, 50, 32))
    >>> contexts.shape, weights.shape, bool(weights.sum(-1).max() < 1.01)
    (torch.Size([2, 4, 32]), torch.Size([2, 4, 50]), True)
    """

    def __init__(
        self, query_dim: int, memory_dim: int, *, version: str = "v2b", components: int = 5, hidden: int = 128
    ) -> None:
        if version not in _VERSIONS:
            raise ValueError(f"version must be one of {', '.join(_VERSIONS)}; it was {version!r}")
        if components < 1 or hidden < 1:
            raise ValueError(f"components and hidden must be at least 1; they were {components} and {hidden}")
        super().__init__(query_dim, memory_dim, positions=components)
        self.version, self.components = version, components
        self.inner = nn.Linear(query_dim, hidden)
        self.mixture = nn.Linear(hidden, 3 * components)
        with torch.no_grad():
            if version == "v1b":
                self.mixture.bias[components : 2 * components] = 0
                self.mixture.bias[2 * components :] = math.log(10**2)
            if version == "v2b":  # inverses of softplus
                self.mixture.bias[components : 2 * components] = math.log(math.expm1(1))
                self.mixture.bias[2 * components :] = math.log(math.expm1(10))

    def components_of(self, query: Float[Tensor, "B query_dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Peaks ``share / Z``, steps and widths in frames, ``(B, components)`` each, in float32 or wider."""
        made = self.mixture(self.inner(query).tanh())
        share, step, width = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(3, -1)
        if self.version == "v0":
            return share.exp(), step.exp(), ((-share.new_tensor(2).log() - width) / 2).exp()
        if self.version.startswith("v1"):
            step, width = step.exp(), (width / 2).exp()
        else:
            step, width = softplus(step), softplus(width)
        width = width.clamp(min=1e-6)  # far below a frame; zero would divide
        return share.softmax(-1) / (math.sqrt(2 * math.pi) * width), step, width

    def align(self, query: Tensor, state: Alignment) -> tuple[Tensor, Tensor]:
        peaks, steps, widths = self.components_of(query)
        means = state.position + steps
        frames = torch.arange(state.real.shape[1], device=query.device, dtype=means.dtype)
        apart = (frames[:, None] - means[:, None]) / widths[:, None]  # (B, T, components)
        weights = ((-0.5 * apart.square()).exp() * peaks[:, None]).sum(-1)
        return weights.masked_fill(~state.real, 0).to(state.weights.dtype), means

    def extra_repr(self) -> str:
        return f"version={self.version!r}, components={self.components}"


class DynamicConvolutionAttention(AlignmentAttention):
    """The next weights are made of the last ones by convolutions: static, of the query, and a prior that moves forward.

    Battenberg et al., 2020, arXiv 1910.10288. Energies are ``v^T tanh(U f + T g + b) + log(max(P * last, 1e-6))`` of
    the last weights convolved with static filters, ``f``, and with filters that a small network makes of the query,
    ``g``; ``P`` is `beta_binomial` over 0 to ``reach`` frames forward. All weight stands on frame 0 before the first
    step, so padding comes after what is real.

    Args:
        query_dim, memory_dim: as in `AlignmentAttention`.
        hidden: channels of the small networks.
        filters: static ones, and as many made of the query.
        width: frames that a filter covers, odd.
        reach: frames by which the prior moves forward at most.
        alpha, beta: of the prior, whose mean step is ``reach * alpha / (alpha + beta)``.

    Raises:
        ValueError: sizes below 1, an even width, an alpha or beta that is not positive.

    >>> layer = DynamicConvolutionAttention(16, 32, hidden=24)
    >>> contexts, weights = layer.over(torch.randn(2, 4, 16), torch.randn(2, 50, 32))
    >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(2, 4))
    (torch.Size([2, 4, 50]), True)
    """

    prior: Tensor

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        *,
        hidden: int = 128,
        filters: int = 8,
        width: int = 21,
        reach: int = 10,
        alpha: float = 0.1,
        beta: float = 0.9,
    ) -> None:
        if hidden < 1 or filters < 1:
            raise ValueError(f"hidden and filters must be at least 1; they were {hidden} and {filters}")
        if width < 1 or width % 2 == 0:
            raise ValueError(f"width must be odd, so that a filter has a middle; it was {width}")
        prior = beta_binomial(reach, alpha, beta)
        super().__init__(query_dim, memory_dim)
        self.filters, self.width, self.reach = filters, width, reach
        self.static = nn.Linear(width, filters, bias=False)
        self.static_proj = nn.Linear(filters, hidden, bias=False)
        self.filter_inner = nn.Linear(query_dim, hidden)
        self.filter_proj = nn.Linear(hidden, filters * width, bias=False)
        self.dynamic_proj = nn.Linear(filters, hidden)
        self.energy = nn.Linear(hidden, 1, bias=False)
        self.register_buffer("prior", prior.to(torch.get_default_dtype()), persistent=False)

    def first(self, memory: Tensor) -> Tensor:
        weights = super().first(memory)
        weights[:, 0] = 1
        return weights

    def prior_logits(self, last: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Log of the last weights moved forward by the prior, at least log 1e-6; in float32 or wider."""
        wide = last.to(torch.promote_types(last.dtype, torch.float32))
        before = pad(wide, (self.reach, 0)).unfold(1, self.reach + 1, 1)  # (B, T, reach + 1), the farthest first
        return (before @ self.prior.to(wide.dtype).flip(0)).clamp(min=1e-6).log()

    def align(self, query: Tensor, state: Alignment) -> tuple[Tensor, Tensor]:
        last = state.weights
        made = self.filter_proj(self.filter_inner(query).tanh()).unflatten(-1, (self.filters, self.width))
        around = pad(last, (self.width // 2, self.width // 2)).unfold(1, self.width, 1)  # (B, T, width)
        inner = self.static_proj(self.static(around)) + self.dynamic_proj(around @ made.mT)
        energies = self.energy(inner.tanh())[..., 0] + self.prior_logits(last)
        return aligned_softmax(energies, state.real).to(last.dtype), state.position

    def extra_repr(self) -> str:
        return f"filters={self.filters}, width={self.width}, reach={self.reach}"


def beta_binomial(n: int, alpha: float, beta: float) -> Float[Tensor, "n+1"]:
    """Probabilities of 0 to ``n`` successes of ``n`` draws whose own probability is from Beta(alpha, beta); float64.

    Raises:
        ValueError: an n below 0, an alpha or beta that is not positive.

    >>> [round(p, 3) for p in beta_binomial(10, 0.1, 0.9)[[0, 1, 10]].tolist()]
    [0.74, 0.075, 0.013]
    """
    if n < 0 or alpha <= 0 or beta <= 0:
        raise ValueError(f"n must be at least 0, alpha and beta positive; they were {n}, {alpha} and {beta}")

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    logs = [
        -math.log(n + 1) - log_beta(n - k + 1, k + 1) + log_beta(k + alpha, n - k + beta) - log_beta(alpha, beta)
        for k in range(n + 1)
    ]
    return torch.tensor(logs, dtype=torch.float64).exp()
