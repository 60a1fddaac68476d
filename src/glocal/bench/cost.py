"""What attention costs: seconds, measured, and the memory it takes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.attention import attend
from glocal.patterns import Full, Pattern

__all__ = ["Probe", "call", "inputs", "seconds"]


def inputs(heads: int, head_dim: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``q``, ``k``, ``v`` of one sequence, ``(1, heads, length, head_dim)``, always the same."""
    make = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, head_dim, generator=make) for _ in range(3))
    return q, k, v


def call(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is measured: `attend`, and for full attention torch's own operator, the reference."""
    if isinstance(pattern, Full):
        return F.scaled_dot_product_attention(q, k, v)
    out = attend(q, k, v, pattern)
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def seconds(
    patterns: Sequence[Pattern],
    heads: int,
    head_dim: int,
    length: int,
    *,
    rounds: int = 5,
    patience: float = 4.0,
    step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Median seconds of one forward pass for each pattern.

    Every pattern runs once first, untimed; then the patterns take turns, so that a slow spell of the machine meets
    all of them. One that has used ``patience`` seconds sits out the further rounds, after three runs at least.
    """
    q, k, v = inputs(heads, head_dim, length)
    taken: list[list[float]] = [[] for _ in patterns]
    for pattern in patterns:
        call(pattern, q, k, v)
    for _ in range(rounds):
        for pattern, mine in zip(patterns, taken, strict=True):
            if len(mine) < 3 or sum(mine) < patience:
                start = time.perf_counter()
                call(pattern, q, k, v)
                mine.append(time.perf_counter() - start)
        step()
    return [statistics.median(mine) for mine in taken]


class Probe:
    """A process of its own that measures memory; a context manager.

    It counts what the operating system holds resident for it (Linux only), and gives every larger block back when it
    is freed, so that a peak cannot hide in memory that an earlier one left behind.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        own = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "1000000"}
        path = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glocal.bench.probe", str(heads), str(head_dim), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(os.environ) | own | {"PYTHONPATH": path},
        )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def peak(self, pattern: Pattern, length: int) -> int | None:
        """Bytes that one forward pass holds at its peak beyond its inputs, its output included; None if unknown."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([repr(pattern), length]) + "\n")
            self._process.stdin.flush()
            found = json.loads(self._process.stdout.readline() or "null")
        except (OSError, ValueError):
            return None
        return found if isinstance(found, int) else None
