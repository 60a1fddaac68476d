"""Sums and maxima over all monotonic alignments, exact where energies do not depend on the frames chosen before."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.shapes import Bool, Float

__all__ = ["best_path", "log_marginal"]

_FLOOR = -1e30  # of log-probabilities; finite, so that differences of two have a gradient


def log_marginal(
    energies: Float[Tensor, "B S T"],
    labels: Float[Tensor, "B S T"] | Float[Tensor, "B S T+1 T"],
    *,
    stay: bool = False,
    real: Bool[Tensor, "B T"] | None = None,
    count: Tensor | None = None,
) -> Float[Tensor, "B"]:
    """Log of the probability of the tokens, summed over all monotonic alignments; its gradient is their posterior.

    Zeyer et al., 2021, arXiv 2103.16710, take the best alignment instead of the sum. The frame of token ``i`` is drawn
    by a softmax of its energies over the frames from the last one on, or after the last one, as in
    `LatentMonotonicAttention`. In O(S T), by log-sums from both ends; in O(S T^2) where ``labels`` depend on the last
    frame.

    Args:
        energies: by which frames are drawn, ``(B, S, T)``.
        labels: log-probability of token ``i`` at frame ``t``, ``(B, S, T)``; where it depends on the frame of the
            token before too, as with segments, ``(B, S, T + 1, T)``, with that frame plus one in the third place, 0
            for none.
        stay: whether two tokens may have the same frame.
        real: booleans ``(B, T)``, true for frames that are no padding, which comes last; all where None.
        count: tokens of each sample, ``(B,)``; S where None.

    Raises:
        ValueError: shapes that do not fit.

    >>> energies, labels = torch.randn(2, 3, 50), torch.randn(2, 3, 50).log_softmax(-1)
    >>> log_marginal(energies, torch.zeros_like(labels)).abs().max() < 1e-5  # probabilities of alignments sum to 1
    tensor(True)
    """
    alpha, _ = _forward(energies, labels, stay, real, count, best=False)
    return alpha.logsumexp(-1)


def best_path(
    energies: Float[Tensor, "B S T"],
    labels: Float[Tensor, "B S T"] | Float[Tensor, "B S T+1 T"],
    *,
    stay: bool = False,
    real: Bool[Tensor, "B T"] | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Float[Tensor, "B"]]:
    """The most probable alignment, by Viterbi's algorithm, and the log-probability of it and the tokens.

    Args:
        energies, labels, stay, real, count: as of `log_marginal`.

    Returns:
        Frames ``(B, S)``, 0 after the last token, and ``(B,)``.

    Raises:
        ValueError: shapes that do not fit.

    >>> energies = torch.tensor([[[0., 9., 0., 0.], [9., 0., 0., 8.]]])
    >>> best_path(energies, torch.zeros_like(energies))[0]
    tensor([[1, 3]])
    """
    alpha, pointers = _forward(energies, labels, stay, real, count, best=True)
    score, at = alpha.max(-1)
    frames = [at]
    for back in reversed(pointers):
        at = back.gather(1, at[:, None])[:, 0]
        frames.append(at)
    path = torch.stack(frames[::-1], 1)
    if count is not None:
        path = path.masked_fill(torch.arange(path.shape[1], device=path.device) >= count[:, None], 0)
    return path, score


def _forward(
    energies: Tensor, labels: Tensor, stay: bool, real: Tensor | None, count: Tensor | None, *, best: bool
) -> tuple[Tensor, list[Tensor]]:
    """Log-weights of the frames of the last token, and of which frame each came, where the best is wanted."""
    batch, tokens, frames = _checked(energies, labels)
    device = energies.device
    real = torch.ones(batch, frames, dtype=torch.bool, device=device) if real is None else real
    wide = torch.promote_types(energies.dtype, torch.float32)
    energies = energies.to(wide).masked_fill(~real[:, None], _FLOOR)
    labels = labels.to(wide).clamp(min=_FLOOR)
    rest = energies.flip(-1).logcumsumexp(-1).flip(-1)  # what the softmax from a frame on divides by
    at, last = torch.arange(frames, device=device), real.sum(1, keepdim=True) - 1
    opening = at.expand(batch, -1) if stay else torch.minimum(at + 1, last)
    reach = at.expand(batch, -1) if stay else torch.where(at == last, last, at - 1)  # the last frame one may come from
    come = at[:, None] <= reach[:, None]  # (B, from, to)
    pairs = labels.dim() == 4

    alpha = energies[:, 0] - rest[:, 0, :1] + (labels[:, 0, 0] if pairs else labels[:, 0])
    pointers = []
    for i in range(1, tokens):
        leave = (alpha - rest[:, i].gather(1, opening)).masked_fill(~real, _FLOOR)
        if pairs:
            each = (leave[..., None] + labels[:, i, 1:]).masked_fill(~come, _FLOOR)
            arrive, back = each.max(1) if best else (each.logsumexp(1), at)
        else:
            upto, back = leave.cummax(-1) if best else (leave.logcumsumexp(-1), at)
            index = reach.clamp(min=0)
            arrive = upto.gather(1, index).masked_fill(reach < 0, _FLOOR) + labels[:, i]
            back = back.gather(1, index) if best else back
        new = energies[:, i] + arrive
        if count is not None:  # a sample that has ended stays where it is
            going = (i < count)[:, None]
            new, back = torch.where(going, new, alpha), torch.where(going, back, at)
        alpha = new
        if best:
            pointers.append(back)
    return alpha, pointers


def _checked(energies: Tensor, labels: Tensor) -> tuple[int, int, int]:
    if energies.dim() != 3 or not energies.shape[1] or not energies.shape[2]:
        raise ValueError(f"energies must be (B, S, T) with S and T above 0; they were {tuple(energies.shape)}")
    batch, tokens, frames = energies.shape
    allowed = ((batch, tokens, frames), (batch, tokens, frames + 1, frames))
    if labels.shape not in allowed:
        raise ValueError(f"labels must be {allowed[0]} or {allowed[1]}; they were {tuple(labels.shape)}")
    return batch, tokens, frames
