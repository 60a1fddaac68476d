"""Python's own standard library as a corpus of bytes, parted the same way whatever the Python."""

from __future__ import annotations

import sysconfig
import zlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from glocal.bench.text import modules

__all__ = ["SHIFT", "VOCAB", "from_ids", "python_source", "to_ids"]

SHIFT = 3
"""Bytes as tokens: 0 to 2 are padding, end and unknown, as in transformers' ``ByT5Tokenizer``."""
VOCAB = 256 + SHIFT


@cache
def python_source(held_out: bool = False) -> Tensor:
    """Bytes of the standard library's public modules, ``(N,)`` in uint8, one module after the other.

    A tenth of the modules is held out, chosen by a checksum of the name: another Python has other text, but a module
    that one Python trains on is held out in none.

    >>> len(python_source(held_out=True)) < len(python_source()) // 4
    True
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen = [p for p in modules(root) if (zlib.crc32(p.relative_to(root).as_posix().encode()) % 10 == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in chosen)), dtype=torch.uint8)


def to_ids(data: bytes | str | Tensor) -> Tensor:
    """Token numbers of text or bytes, ``(N,)`` in int64.

    >>> to_ids("ab").tolist(), from_ids(to_ids("naïve"))
    ([100, 101], 'naïve')
    """
    if isinstance(data, Tensor):
        return data.long() + SHIFT
    raw = data.encode() if isinstance(data, str) else data
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() + SHIFT if raw else torch.zeros(0).long()


def from_ids(ids: Tensor) -> str:
    """The text of token numbers ``(N,)``; special tokens are left out, what is no UTF-8 is replaced."""
    return bytes(i - SHIFT for i in ids.tolist() if i >= SHIFT).decode(errors="replace")
