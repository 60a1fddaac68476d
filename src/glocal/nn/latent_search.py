"""Search over the frames that a latent decoder looks at: of known tokens, or together with the tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["AlignmentStore", "Hypothesis", "SearchDecoder", "align_tokens", "recognise_tokens"]

S = TypeVar("S")


class SearchDecoder(Protocol[S]):
    """What a search needs of a decoder; states are tuples of tensors with the hypotheses in front."""

    def ask(self, token: Tensor, state: S) -> S:
        """The state once tokens ``(N,)`` were read."""
        ...

    def place(self, state: S) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next frame, ``(N, T)``, and energies ``(N, T)``, which `look_at` takes."""
        ...

    def look_at(self, at: Tensor, energies: Tensor, state: S) -> tuple[Tensor, S]:
        """Log-probabilities of the next token, ``(N, V)``, once frames ``(N,)`` were chosen, and the state after."""
        ...


class Hypothesis(NamedTuple):
    """The best hypothesis of a search."""

    tokens: Tensor
    """``(B, n)``."""
    frames: Tensor
    """Which frame was chosen for each token, ``(B, n)``."""
    score: Tensor
    """Log-probability of tokens, and of frames by their weight, ``(B,)``, over the number of tokens."""


def align_tokens(
    decoder: SearchDecoder[S],
    state: S,
    tokens: Tensor,
    targets: Tensor,
    *,
    count: Tensor | None = None,
    beam: int = 4,
    weight: float = 1.0,
) -> Hypothesis:
    """The best frames for known tokens, by a beam whose hypotheses are joined where they stand at the same frame.

    Zeyer et al., 2021, arXiv 2103.16710. Of joined hypotheses the best stays; that, and so the search with a beam of
    all frames, is exact where the decoder does not depend on frames chosen before, and approximate otherwise.

    Args:
        decoder: see `SearchDecoder`.
        state: of it, before the first token.
        tokens: that are read, ``(B, n)``: the start, and all targets but the last.
        targets: ``(B, n)``.
        count: of targets of each sample, ``(B,)``; n where None.
        beam: hypotheses that are kept.
        weight: of the log-probability of frames.

    Returns:
        Frames are 0 after the last target.

    Raises:
        ValueError: shapes that do not fit, a beam below 1.

    >>> from glocal.models.language.latent_decoder import LatentDecoder
    >>> from glocal.nn import LatentMonotonicAttention
    >>> decoder = LatentDecoder(9, LatentMonotonicAttention(16, 32, form="hard"), embed_dim=8, hidden=20)
    >>> state, targets = decoder.start(torch.randn(2, 50, 32)), torch.randint(9, (2, 7))
    >>> found = align_tokens(decoder, state, targets.roll(1, 1), targets)
    >>> bool((found.frames.diff() >= 0).all()), found.score.shape
    (True, torch.Size([2]))
    """
    if tokens.shape != targets.shape or tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens and targets must be (B, n); they were {tuple(tokens.shape)}, {tuple(targets.shape)}")
    if beam < 1:
        raise ValueError(f"beam must be at least 1; it was {beam}")
    batch, steps = tokens.shape
    count = torch.full((batch,), steps, device=tokens.device) if count is None else count
    if count.shape != (batch,) or bool((count < 1).any()) or bool((count > steps).any()):
        raise ValueError(f"count must be 1 to {steps} of each sample; it was {count.tolist()}")
    first = torch.arange(batch, device=tokens.device)[:, None]
    rows, paths = first[:, 0], tokens.new_zeros(batch, 0)
    score = torch.zeros(batch, 1, device=tokens.device)
    for i in range(steps):
        width = score.shape[1]
        state = decoder.ask(tokens[:, i].repeat_interleave(width), state)
        chances, energies = decoder.place(state)
        going = (i < count)[:, None]  # what has ended goes on at no cost
        step = torch.where(going[..., None], _weighed(chances.view(batch, width, -1), weight), 0)
        joined, source = (score[..., None] + step).max(1)  # (B, T)
        score, at = joined.topk(min(beam, joined.shape[1]), 1)
        rows = (first * width + source.gather(1, at)).flatten()
        labels, state = decoder.look_at(at.flatten(), energies[rows], _pick(state, rows))
        said = labels.view(*at.shape, -1).gather(2, targets[:, i, None, None].expand(*at.shape, 1))[..., 0]
        score = score + torch.where(going, said, 0)
        paths = torch.cat([paths[rows], at.flatten()[:, None]], 1)
    best, which = score.max(1)
    frames = paths.view(batch, -1, steps)[first[:, 0], which]
    frames = frames.masked_fill(torch.arange(steps, device=frames.device) >= count[:, None], 0)
    return Hypothesis(targets, frames, best / count)


def recognise_tokens(
    decoder: SearchDecoder[S],
    state: S,
    *,
    batch: int,
    start: int,
    stop: int,
    longest: int,
    beam: int = 12,
    positions: int = 48,
    weight: float = 1.0,
    device: torch.device | str | None = None,
) -> Hypothesis:
    """The best tokens and frames together: a beam of frames at each step, then one of tokens.

    Args:
        decoder: see `SearchDecoder`.
        state: of it, before the first token.
        batch: samples.
        start, stop: tokens that begin and end; ``stop`` counts as one of those found.
        longest: tokens at most.
        beam: hypotheses that are kept once tokens are chosen.
        positions: hypotheses that are kept once frames are chosen.
        weight: of the log-probability of frames; 1 for the hard form, 0.1 for the segmental one in the paper.
        device: of the state.

    Returns:
        What follows ``stop`` is ``stop``. Hypotheses of different length are compared by their score per token.

    Raises:
        ValueError: beams or a longest below 1.

    >>> from glocal.models.language.latent_decoder import LatentDecoder
    >>> from glocal.nn import LatentMonotonicAttention
    >>> decoder = LatentDecoder(9, LatentMonotonicAttention(16, 32, form="window"), embed_dim=8, hidden=20)
    >>> state = decoder.start(torch.randn(2, 50, 32))
    >>> found = recognise_tokens(decoder, state, batch=2, start=0, stop=1, longest=6, beam=3, positions=5)
    >>> found.tokens.shape == found.frames.shape
    True
    """
    if min(beam, positions, longest) < 1:
        raise ValueError(f"beam, positions and longest must be at least 1; they were {beam}, {positions}, {longest}")
    first = torch.arange(batch, device=device)[:, None]
    token = torch.full((batch,), start, device=device)
    score, ended = torch.zeros(batch, 1, device=device), torch.zeros(batch, 1, dtype=torch.bool, device=device)
    length = torch.zeros(batch, 1, device=device)
    said = frames = token.new_zeros(batch, 0)
    for i in range(longest):
        width = score.shape[1]
        state = decoder.ask(token, state)
        chances, energies = decoder.place(state)
        length = torch.where(ended, length, i + 1)
        step = _alone(_weighed(chances.view(batch, width, -1), weight), ended, 0)
        source, at, score = _best(score[..., None] + step, length, positions)
        rows = (first * width + source).flatten()
        ended, length = ended.gather(1, source), length.gather(1, source)
        said, frames = said[rows], torch.cat([frames[rows], at.flatten()[:, None]], 1)
        labels, state = decoder.look_at(at.flatten(), energies[rows], _pick(state, rows))

        width = score.shape[1]
        step = _alone(labels.view(batch, width, -1), ended, stop)
        source, chosen, score = _best(score[..., None] + step, length, beam)
        rows, token = (first * width + source).flatten(), chosen.flatten()
        ended, length = ended.gather(1, source) | (chosen == stop), length.gather(1, source)
        said, frames, state = torch.cat([said[rows], token[:, None]], 1), frames[rows], _pick(state, rows)
        if bool(ended.all()):
            break
    best, which = (score / length).max(1)
    rows = first[:, 0] * score.shape[1] + which
    return Hypothesis(said[rows], frames[rows], best)


class AlignmentStore:
    """The alignments that training goes by: of each sample the best that any search has found.

    >>> store = AlignmentStore()
    >>> _ = store.better(["a"], torch.tensor([[1, 2]]), torch.tensor([-0.5]))
    >>> store.better(["a"], torch.tensor([[0, 3]]), torch.tensor([-0.7]))
    tensor([[1, 2]])
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[float, Tensor]] = {}

    def better(self, names: Sequence[Hashable], frames: Tensor, scores: Float[Tensor, "B"]) -> Tensor:
        """Keep alignments whose scores per token are higher than those kept, and give what is kept.

        Args:
            names: of the samples.
            frames: ``(B, n)``.
            scores: of `Hypothesis`, ``(B,)``; as they were when found, with the weights of that time.
        """
        if len(names) != len(frames) or scores.shape != frames.shape[:1]:
            raise ValueError(f"names, frames and scores must be as many; {len(names)}, {len(frames)}, {len(scores)}")
        for name, row, score in zip(names, frames, scores.tolist(), strict=True):
            if name not in self._kept or score > self._kept[name][0]:
                self._kept[name] = (score, row.clone())
        return self.known(names)

    def known(self, names: Sequence[Hashable]) -> Tensor:
        """What is kept of some samples, ``(B, n)``, 0 after the last token of each."""
        rows = [self._kept[name][1] for name in names]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _weighed(chances: Tensor, weight: float) -> Tensor:
    """Log-probabilities times their weight; what is impossible stays so."""
    return torch.where(chances == -torch.inf, chances, weight * chances)


def _alone(step: Tensor, ended: Tensor, only: int) -> Tensor:
    """Ended hypotheses go on in one way, at no cost."""
    way = torch.full_like(step[0, 0], -torch.inf)
    way[only] = 0
    return torch.where(ended[..., None], way, step)


def _best(scores: Tensor, length: Tensor, beam: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best per token of scores ``(B, K, n)``: which hypothesis, what it chose, the score, ``(B, beam)`` each."""
    flat, options = scores.flatten(1), scores.shape[2]
    _, found = (scores / length[..., None]).flatten(1).topk(min(beam, flat.shape[1]), 1)
    return found // options, found % options, flat.gather(1, found)


def _pick(state: S, rows: Tensor) -> S:
    """Some hypotheses of a state, in a new order."""
    if isinstance(state, Tensor):
        return cast(S, state[rows])
    if isinstance(state, tuple):
        parts: list[Any] = [_pick(part, rows) for part in state]
        return cast(S, type(state)(*parts) if hasattr(state, "_fields") else tuple(parts))
    return state
