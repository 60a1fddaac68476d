"""What every comparison shares: progress, interruption, and complaints about settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Interrupted", "Step", "check_lengths", "short"]

Step = Callable[[str, int, int], None]
"""Told ``(what, done, total)`` along the way."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; ``partial`` is the comparison as far as it was measured."""

    def __init__(self, partial: Any) -> None:
        super().__init__("interrupted")
        self.partial = partial


def short(text: str, show: Callable[[str], str] = repr) -> str:
    """A text of the user's, cut where it would drown the message."""
    return show(text if len(text) <= 160 else text[:157] + "...")


def check_lengths(lengths: Iterable[int], lowest: int = 1) -> None:
    """Raise a ValueError unless all are from ``lowest`` to 2**20."""
    for length in lengths:
        if not lowest <= length <= 1 << 20:
            raise ValueError(f"lengths must be from {lowest} to {1 << 20}; one was {length}")
