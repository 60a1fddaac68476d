"""Progress bars, by rich, which is imported only where one is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["progress_bar", "shown"]

T = TypeVar("T")


def shown(steps: Iterable[T], progress: bool, what: str = "Working...") -> Iterator[T]:
    """The steps, with a bar where it is asked for; it is gone when they end, or are left.

    >>> list(shown(range(3), progress=False))
    [0, 1, 2]
    """
    if not progress:
        yield from steps
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        yield from bar.track(steps, description=what)


def progress_bar(console: Console) -> Progress:
    """A bar of training: what is done, steps of all of them, time gone and to come. For a ``with`` block."""
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
    )
