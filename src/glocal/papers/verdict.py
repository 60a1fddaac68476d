"""The line that every proof ends with, which ``make proofs`` collects."""

from __future__ import annotations

from glocal import papers

__all__ = ["verdict"]


def verdict(paper: str, finding: str, holds: bool) -> str:
    """Print, and return, the paper's code and key, what was found with its figures, and whether the claim holds.

    >>> verdict("moba", "recall .69 at block 8, chance .02", True)
    S114 moba: recall .69 at block 8, chance .02: holds
    'S114 moba: recall .69 at block 8, chance .02: holds'
    """
    record = papers.get(paper)
    line = f"{record.code} {record.key}: {finding}: {'holds' if holds else 'does not hold at this size'}"
    print(line)
    return line
