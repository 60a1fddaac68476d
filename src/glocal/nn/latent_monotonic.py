"""Latent monotonic attention: each token chooses a frame after the last one, and looks at it in one of three forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glocal.nn.alignment import AdditiveAttention, Alignment, aligned_softmax
from glocal.shapes import Bool, Float

__all__ = ["LatentMonotonicAttention", "linear_alignment", "suffix_log_softmax"]

_FORMS = ("hard", "window", "segmental")


class LatentMonotonicAttention(AdditiveAttention):
    """Each step chooses a frame ``t`` that is not before the last one, by a softmax over the frames that are left.

    Zeyer et al., 2021, arXiv 2103.16710. What is looked at, once ``t`` is chosen:

    * ``hard``: frame ``t``, which may be the last one again;
    * ``window``: frames ``t - before`` to ``t + after``, by a second softmax of the same energies;
    * ``segmental``: the frames after the last ``t`` up to this one, by a softmax of energies other than the choice's.

    Where the last frame of the source is used up, it is chosen again. `AlignmentAttention.forward` chooses the most
    probable frame; `place` and `look_at` leave the choice to a search, or to a known alignment. Padding comes after
    what is real. `Alignment.position` is the last ``t``, -1 before the first step.

    Args:
        query_dim, memory_dim: as in `AlignmentAttention`.
        form: ``"hard"``, ``"window"`` or ``"segmental"``.
        hidden: channels of the small network.
        before, after: frames of the window on each side of ``t``.
        feedback: as in `AdditiveAttention`; where None, for ``"hard"`` only, as in the paper.

    Raises:
        ValueError: an unknown form, sizes below 1, a negative side of the window.

    >>> layer = LatentMonotonicAttention(16, 32, form="hard", hidden=24)
    >>> contexts, weights = layer.over(torch.randn(2, 4, 16), torch.randn(2, 50, 32))
    >>> bool((weights.argmax(-1).diff() >= 0).all()), weights.amax(-1).unique()
    (True, tensor([1.]))
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        *,
        form: str = "window",
        hidden: int = 128,
        before: int = 5,
        after: int = 4,
        feedback: bool | None = None,
    ) -> None:
        if form not in _FORMS:
            raise ValueError(f"form must be one of {', '.join(_FORMS)}; it was {form!r}")
        if before < 0 or after < 0:
            raise ValueError(f"before and after must be at least 0; they were {before} and {after}")
        feedback = form == "hard" if feedback is None else feedback
        super().__init__(query_dim, memory_dim, hidden=hidden, feedback=feedback)
        self.form, self.before, self.after = form, before, after
        if form == "segmental":
            self.boundary = nn.Linear(hidden, 1, bias=False)

    @property
    def stay(self) -> bool:
        """Whether a frame may be chosen twice."""
        return self.form == "hard"

    def start(self, memory: Float[Tensor, "B T memory_dim"], real: Bool[Tensor, "B T"] | None = None) -> Alignment:
        state = super().start(memory, real)
        return state._replace(position=state.position - 1)

    def opening(self, state: Alignment) -> Tensor:
        """The first frame that may be chosen, ``(B, 1)``."""
        last = state.real.sum(1, keepdim=True) - 1
        after = state.position.long() + (0 if self.stay else 1)
        return torch.minimum(after.clamp(min=0), last)

    def place(self, query: Tensor, state: Alignment) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probabilities of the frames to be chosen, and the energies that `look_at` goes by."""
        inner = self.inner(query, state)
        energies = self.energy(inner)[..., 0]
        choice = self.boundary(inner)[..., 0] if self.form == "segmental" else energies
        return suffix_log_softmax(choice, self.opening(state), state.real), energies

    def weights_at(self, at: Tensor, energies: Float[Tensor, "B T"], state: Alignment) -> Float[Tensor, "B T"]:
        """Weights of the frames, once frames ``at``, ``(B,)``, are chosen."""
        frames, at = torch.arange(energies.shape[1], device=at.device), at[:, None]
        if self.form == "hard":
            return (frames == at).to(energies.dtype)
        if self.form == "window":
            seen = (frames >= at - self.before) & (frames <= at + self.after)
        else:
            seen = (frames >= self.opening(state)) & (frames <= at)
        return aligned_softmax(energies, seen & state.real)

    def look_at(self, at: Tensor, energies: Float[Tensor, "B T"], state: Alignment) -> tuple[Tensor, Alignment]:
        """What is looked at, ``(B, memory_dim)``, once frames ``at``, ``(B,)``, are chosen, and the state after it."""
        weights = self.weights_at(at, energies, state).to(state.weights.dtype)
        return self.look(state, weights, at[:, None].to(state.position.dtype))

    def align(self, query: Tensor, state: Alignment) -> tuple[Tensor, Tensor]:
        chances, energies = self.place(query, state)
        at = chances.argmax(-1)
        return self.weights_at(at, energies, state).to(state.weights.dtype), at[:, None].to(state.position.dtype)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, before={self.before}, after={self.after}"


def suffix_log_softmax(
    energies: Float[Tensor, "B T"], first: Tensor, real: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B T"]:
    """Log of the softmax over the frames from ``first`` on; minus infinity for others; float32 or wider.

    Args:
        energies: ``(B, T)``.
        first: the first frame of the softmax, ``(B, 1)``.
        real: booleans ``(B, T)``, true for frames that are no padding; all where None.

    >>> suffix_log_softmax(torch.zeros(1, 4), torch.tensor([[2]])).exp()
    tensor([[0.0000, 0.0000, 0.5000, 0.5000]])
    """
    seen = torch.arange(energies.shape[1], device=energies.device) >= first
    seen = seen if real is None else seen & real
    wide = energies.to(torch.promote_types(energies.dtype, torch.float32))
    return wide.masked_fill(~seen, -torch.inf).log_softmax(-1)


def linear_alignment(frames: Tensor, tokens: Tensor, *, stay: bool = False) -> Tensor:
    """The alignment to begin training with: token ``i`` at ``round((i + 1) (frames - 1) / tokens)``.

    Args:
        frames: of each source, ``(B,)``.
        tokens: of each target, ``(B,)``.
        stay: whether two tokens may have the same frame; where not, steps are of one frame at least, up to the end.

    Returns:
        ``(B, most tokens)``, 0 after the last token.

    >>> linear_alignment(torch.tensor([9, 3]), torch.tensor([4, 4]), stay=True)
    tensor([[2, 4, 6, 8],
            [0, 1, 2, 2]])
    """
    if frames.shape != tokens.shape or frames.dim() != 1 or bool((frames < 1).any()) or bool((tokens < 1).any()):
        raise ValueError(f"frames and tokens must be (B,) and at least 1; they were {frames} and {tokens}")
    pace = ((frames - 1) / tokens)[:, None]
    at = torch.arange(int(tokens.max()), device=frames.device)
    found = ((at + 1) * pace.clamp(min=0 if stay else 1)).round().long()
    return torch.minimum(found, frames[:, None] - 1).masked_fill(at >= tokens[:, None], 0)
