"""Run as a program by `glocal.bench.cost.Probe`: peak resident memory of attention."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch

from glocal.bench.cost import call, inputs
from glocal.patterns import parse

__all__ = ["main", "resident"]


def resident(name: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest since the last reset) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def peak(pattern: str, heads: int, head_dim: int, length: int) -> int:
    """Bytes beyond the inputs that one forward pass holds at its peak."""
    q, k, v = inputs(heads, head_dim, length)
    where, found, start = parse(pattern), 0, time.monotonic()
    with torch.no_grad():
        call(where, q, k, v)  # plans, thread pools and library buffers are not the pattern's
        gc.collect()
        # Linux keeps its count with a slack of some pages a processor, downward too: the highest of a few.
        for _ in range(5):
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            call(where, q, k, v)
            found = max(found, resident("VmHWM") - before)
            if time.monotonic() - start > 1:
                break
    return found


def main() -> None:
    """Arguments: heads, head dimension, threads. A line of input asks ``[pattern, length]``, a line answers bytes."""
    heads, head_dim, threads = map(int, sys.argv[1:4])
    torch.set_num_threads(threads)
    for line in sys.stdin:
        pattern, length = json.loads(line)
        try:
            found: int | None = peak(pattern, heads, head_dim, length)
        except (OSError, MemoryError, RuntimeError, ValueError):
            found = None
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
