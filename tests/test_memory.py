"""Long inputs in bounded memory: forward and backward of 65,536 tokens, measured in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

import glocal
from glocal import Sliding, Window
from tests.conformance.cases import inputs, run

LIMIT = 2 * 2**30

SCRIPT = """
import sys, time
import torch, glocal

where, grid, backend = glocal.parse(sys.argv[1]), tuple(map(int, sys.argv[2].split("x"))), sys.argv[3]

def peak():
    # Not ru_maxrss: a child process starts with its parent's.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def step(grid):
    q, k, v = (torch.randn(1, 4, *grid, 64, requires_grad=True) for _ in range(3))
    glocal.attend(q, k, v, where, backend=backend).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))

step((32,) * len(grid))
before, start = peak(), time.perf_counter()
step(grid)
print(peak() - before, time.perf_counter() - start)
"""

CASES = [(Sliding(255, 0), "65536"), (Window((13, 13)), "256x256")]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("backend", ["sdpa", "native"])
@pytest.mark.parametrize(("where", "grid"), CASES, ids=repr)
def test_peak_memory(where, grid, backend):
    run(backend, *inputs((16,) * len(grid.split("x"))), where)  # skips where the backend cannot run
    source = os.path.dirname(os.path.dirname(glocal.__file__))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repr(where), grid, backend],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    peak, seconds = map(float, done.stdout.split())
    print(f"{where!r} on {grid}, {backend}: {peak / 2**20:.0f} MiB, {seconds:.1f} s, forward and backward")
    # Inputs and their gradients alone are 6 x 64 MiB: less would mean that nothing was measured.
    assert 300 * 2**20 < peak < LIMIT


def test_a_mask_would_not_fit():
    """What the limit is worth: booleans for every pair would take twice the limit, scores of 4 heads 32 times."""
    assert 2 * LIMIT <= 65536**2
    q = torch.empty(1, 4, 65536, 64, device="meta")
    assert q.numel() * q.element_size() == 64 * 2**20
