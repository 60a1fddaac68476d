"""What an assistant for streams is to learn of each frame: silence or speech, and when to look closer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ask_high_frames", "interval_targets"]


def interval_targets(
    count: int, intervals: Sequence[tuple[int, int]], *, silent: int, respond: int, first: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Stage 1: within a valid interval every frame is to say "respond", the later the more.

    The weights rise evenly from ``first`` of the last one's to it; over an interval they sum to the number of frames
    that are to be silent over the number of those that are not, which weighs silence and replies against each other.

    Args:
        count: frames, N.
        intervals: first and last frame of each, apart from each other.
        silent: the token of frames outside.
        respond: the token of frames within.
        first: of an interval's first frame, relative to its last.

    Returns:
        Target tokens and their weights in the loss, ``(N,)`` each.

    Raises:
        ValueError: intervals that are not within the frames, or overlap.

    >>> targets, weights = interval_targets(6, [(1, 2)], silent=0, respond=9)
    >>> targets.tolist(), [round(x, 3) for x in weights.tolist()]
    ([0, 9, 9, 0, 0, 0], [1.0, 0.462, 1.538, 1.0, 1.0, 1.0])
    """
    if not 0 <= first <= 1:
        raise ValueError(f"first must be from 0 to 1; it was {first:g}")
    targets, weights = torch.full((count,), silent), torch.ones(count)
    within = torch.zeros(count, dtype=torch.long)
    for low, high in intervals:
        if not 0 <= low <= high < count:
            raise ValueError(f"intervals must be first and last of {count} frames; one was {(low, high)}")
        within[low : high + 1] += 1
    if bool((within > 1).any()):
        raise ValueError(f"intervals must not overlap; they were {list(intervals)}")
    ratio = float((within == 0).sum()) / max(1, int(within.sum()))
    for low, high in intervals:
        rising = torch.linspace(first, 1, high - low + 1) if high > low else torch.ones(1)
        targets[low : high + 1], weights[low : high + 1] = respond, rising * ratio / rising.sum()
    return targets, weights


def ask_high_frames(
    count: int, intervals: Sequence[tuple[int, int]], changes: Sequence[int] = (), errors: Sequence[int] = ()
) -> Tensor:
    """Stage 2: the frames that are to ask for a closer look.

    Those of valid intervals, and for each frame at which the model of stage 1 was wrong, those from the newest visual
    change before it to it.

    Args:
        count: frames, N.
        intervals: first and last frame of each.
        changes: frames at which the picture changed.
        errors: frames at which the model was wrong.

    Returns:
        Booleans ``(N,)``.

    >>> ask_high_frames(8, [(6, 7)], changes=[1, 5], errors=[3]).int().tolist()
    [0, 1, 1, 1, 0, 0, 1, 1]
    """
    asks = torch.zeros(count, dtype=torch.bool)
    spans = [(max((c for c in changes if c <= error), default=0), error) for error in errors]
    for low, high in [*intervals, *spans]:
        if not 0 <= low <= high < count:
            raise ValueError(f"intervals and errors must be within {count} frames; one was {(low, high)}")
        asks[low : high + 1] = True
    return asks
