"""Bars do not change what is stepped through, and are gone when it is left."""

import io

import pytest
from rich import progress as rich_progress
from rich.console import Console

from glocal.progress import progress_bar, shown


@pytest.mark.parametrize("progress", [False, True])
def test_the_steps_are_what_was_given(progress):
    assert list(shown(range(5), progress)) == list(range(5))
    assert list(shown((letter for letter in "abc"), progress, "letters")) == ["a", "b", "c"]


def test_the_bar_is_gone_after_an_error_in_a_step(monkeypatch):
    bars = []

    class Bar(rich_progress.Progress):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(rich_progress, "Progress", Bar)
    with pytest.raises(ZeroDivisionError):
        for step in shown(range(5), True, "stepping"):
            assert bars[0].live.is_started and bars[0].tasks[0].description == "stepping"
            step / 0
    assert len(bars) == 1 and not bars[0].live.is_started


def test_the_bar_of_training_says_how_far_it_is():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console) as bar:
        bar.update(bar.add_task("learning", total=20), completed=7)
    said = console.file.getvalue()
    assert "learning" in said and "7/20" in said
