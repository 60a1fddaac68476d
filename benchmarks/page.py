"""Pages whose tables a script writes, between marks: ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def put(page: Path, name: str, text: str) -> None:
    """Replace what is between a page's marks of that name.

    Raises:
        ValueError: the page has no such marks.
    """
    found = page.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- begin {name} -->).*?(<!-- end {name} -->)", re.DOTALL)
    if not marks.search(found):
        raise ValueError(f"{page} has no marks for {name}")
    page.write_text(marks.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", found), encoding="utf-8")
