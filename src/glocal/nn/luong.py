"""Luong's attention: a score of query and memory, over the whole source or a window that is placed or predicted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glocal.nn.alignment import Alignment, AlignmentAttention, aligned_softmax
from glocal.shapes import Float

__all__ = ["LuongAttention"]

_SCORES = ("dot", "general", "concat", "concat_code", "location")
_PLACES = ("global", "local_m", "local_p")


class LuongAttention(AlignmentAttention):
    """Global and local attention of a sequence-to-sequence decoder; no scaling and no biases.

    Luong et al., 2015, arXiv 1508.04025. A local form looks at ``2 * window + 1`` frames only: around the decoder's
    step (``local_m``, monotonic) or around ``p = T sigmoid(v^T tanh(W query))`` (``local_p``, predictive), where a
    Gaussian around ``p`` weakens what is far; the weights are not normalised again. What is looked at is joined with
    the query by `attentional`.

    Args:
        query_dim, memory_dim: as in `AlignmentAttention`; equal for ``dot`` and ``concat_code``.
        score: ``"dot"`` is ``q m``, ``"general"`` ``q W m``, ``"concat"`` ``v tanh(W [q; m])``, ``"concat_code"``
            ``v tanh(m + W q)`` as in the released code, ``"location"`` one number a frame from the query alone.
        place: ``"global"``, ``"local_m"`` or ``"local_p"``.
        window: frames on each side of the middle, for the local forms.
        longest: frames that ``location`` has numbers for; those after them get no weight.
        renorm_scores: the Gaussian multiplies scores before the softmax instead of weights after it, which the
            released code can do and the authors found worse.

    Raises:
        ValueError: an unknown score or place, sizes that do not fit, ``renorm_scores`` without ``local_p``.

    >>> layer = LuongAttention(32, 32, score="general", place="local_p", window=5)
    >>> state = layer.start(torch.randn(2, 40, 32))
    >>> query = torch.randn(2, 32)
    >>> context, state = layer(query, state)
    >>> layer.attentional(context, query).shape, int((state.weights > 0).sum(-1).max()) <= 11
    (torch.Size([2, 32]), True)
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        *,
        score: str = "general",
        place: str = "global",
        window: int = 10,
        longest: int = 50,
        renorm_scores: bool = False,
    ) -> None:
        super().__init__(query_dim, memory_dim)
        if score not in _SCORES:
            raise ValueError(f"score must be one of {', '.join(_SCORES)}; it was {score!r}")
        if place not in _PLACES:
            raise ValueError(f"place must be one of {', '.join(_PLACES)}; it was {place!r}")
        if score in ("dot", "concat_code") and query_dim != memory_dim:
            raise ValueError(f"score {score!r} needs memory_dim equal to query_dim {query_dim}; it was {memory_dim}")
        if window < 1 or longest < 1:
            raise ValueError(f"window and longest must be at least 1; they were {window} and {longest}")
        if renorm_scores and place != "local_p":
            raise ValueError(f"renorm_scores needs the Gaussian of place 'local_p'; place was {place!r}")
        self.score, self.place, self.window, self.longest = score, place, window, longest
        self.renorm_scores = renorm_scores
        if score == "general":
            self.score_proj = nn.Linear(query_dim, memory_dim, bias=False)
        if score == "location":
            self.score_proj = nn.Linear(query_dim, longest, bias=False)
        if score in ("concat", "concat_code"):
            self.score_proj = nn.Linear(query_dim, query_dim, bias=False)
            self.energy = nn.Linear(query_dim, 1, bias=False)
        if score == "concat":
            self.memory_proj = nn.Linear(memory_dim, query_dim, bias=False)
        if place == "local_p":
            self.place_proj = nn.Linear(query_dim, query_dim, bias=False)
            self.place_energy = nn.Linear(query_dim, 1, bias=False)
        self.out_proj = nn.Linear(memory_dim + query_dim, query_dim, bias=False)

    def attentional(self, context: Float[Tensor, "B C"], query: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """``tanh(W [context; query])``: what the output is made of, and what is fed to the next step."""
        out: Tensor = self.out_proj(torch.cat([context, query], -1)).tanh()
        return out

    def keys(self, memory: Tensor) -> Tensor:
        made: Tensor = self.memory_proj(memory) if self.score == "concat" else memory
        return made

    def energies(self, query: Tensor, keys: Tensor, at: Tensor) -> Float[Tensor, "B n"]:
        """Scores of some frames: their keys ``(B, n, A)``, and which they are, ``(B, n)``."""
        moved = query if self.score == "dot" else self.score_proj(query)
        if self.score in ("dot", "general"):
            out: Tensor = (keys @ moved[..., None])[..., 0]
        elif self.score == "location":
            out = moved.gather(1, at.clamp(0, self.longest - 1))
        else:
            out = self.energy((keys + moved[:, None]).tanh())[..., 0]
        return out

    def align(self, query: Tensor, state: Alignment) -> tuple[Tensor, Tensor]:
        batch, frames = state.real.shape
        whole = torch.arange(frames, device=query.device).expand(batch, -1)
        if self.place == "global":
            seen = state.real if self.score != "location" else state.real & (whole < self.longest)
            return aligned_softmax(self.energies(query, state.keys, whole), seen), state.position
        at = self.middle(query, state)
        around = torch.arange(-self.window, self.window + 1, device=query.device)
        index = at.detach().floor().long() + around  # (B, 2 window + 1)
        inside = (index >= 0) & (index < (frames if self.score != "location" else min(frames, self.longest)))
        index = index.clamp(0, frames - 1)
        keys = state.keys.gather(1, index[..., None].expand(-1, -1, state.keys.shape[-1]))
        energies = self.energies(query, keys, index)
        near = torch.ones_like(energies)
        if self.place == "local_p":
            near = (-(2 / self.window**2) * (index - at).square()).exp()  # sigma is window / 2
        if self.renorm_scores:
            energies = energies * near
        weights = aligned_softmax(energies, inside & state.real.gather(1, index))
        if not self.renorm_scores:
            weights = weights * near
        return torch.zeros_like(state.weights).scatter_add(1, index, weights), at

    def middle(self, query: Tensor, state: Alignment) -> Float[Tensor, "B 1"]:
        """Where the window stands, counted from 0."""
        lengths = state.real.sum(1, keepdim=True).to(query.dtype)
        if self.place == "local_m":
            return torch.minimum(lengths - 1, torch.full_like(lengths, state.step))
        share: Tensor = self.place_energy(self.place_proj(query).tanh()).sigmoid()
        return lengths * share

    def extra_repr(self) -> str:
        return f"score={self.score!r}, place={self.place!r}, window={self.window}"
