"""The custom operators as torch sees them, and the package without its native part."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import glocal
from glocal import Keys, PerHead, Selected, Sliding, Window, attend
from glocal.kernels import native
from glocal.scores import RelativePosition

OPERATORS = ["tiles", "native"]


def operator(name):
    if name == "native" and native.available() is not None:
        pytest.skip(native.available())
    return getattr(torch.ops.glocal, name)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    q, k, v = (torch.randn(2, 2, 12, 4, requires_grad=True) for _ in range(3))
    table, bias = torch.randn(2, 23, requires_grad=True), torch.randn(1, 2, 12, 12, requires_grad=True)
    plain = (q, k, v, None, None, None, [], "sliding(2, 1) | prefix(1)", [12], [12], 0.5, 0.0, 0.0)
    data = [torch.rand(2, 12) < 0.7, torch.tensor([[0, -1]] * 3)]
    full = (q, k, v, bias, table, None, data, "keys($0) & selected($1, 4)", [12], [12], 0.5, 2.0, 0.0)
    for arguments in (plain, full):
        found = torch.library.opcheck(operator(name), arguments)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "grid, where",
    [
        ((7,), Sliding(2, 1) | glocal.Prefix(1)),
        ((4, 5), Window((3, 2), dilation=(1, 2))),
        ((8,), PerHead([Sliding(1, 0), ~Sliding(1, 0)])),
        ((6,), Selected(torch.tensor([[0, 2], [1, -1], [2, 1]]), 2)),
    ],
    ids=repr,
)
def test_gradcheck_of_the_native_kernel(grid, where):
    """In float32, which is all that the kernel computes in: wide steps, and bounds to match."""
    operator("native")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, *grid, 3, requires_grad=True) for _ in range(3))
    values = torch.randn(2, *[3] * len(grid), requires_grad=True)

    def run(q, k, v, values):
        bias = RelativePosition(values)
        return attend(q, k, v, where, bias=bias, softcap=4.0, return_lse=True, backend="native")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*double precision floating point.*")
        assert torch.autograd.gradcheck(run, (q, k, v, values), eps=1e-2, atol=4e-3, rtol=4e-3, nondet_tol=0.0)


def test_auto_takes_the_native_kernel_where_it_can():
    operator("native")
    q = torch.randn(1, 2, 16, 8)
    told = glocal.explain(q, q, q, Sliding(3, 0) & Keys(torch.ones(1, 16, dtype=torch.bool)))
    assert told.backend == "native" and "first that can" in told.why
    assert "float32" in glocal.explain(q.double(), q.double(), q.double(), Sliding(3, 0)).others["native"]
    assert "dropout" in glocal.explain(q, q, q, Sliding(3, 0), dropout_p=0.1).others["native"]


def test_the_package_works_without_its_native_part():
    """What a build without a compiler leaves: everything but the extension, and a line that says so."""
    code = """
import sys
sys.modules["glocal.kernels.native._native"] = None  # an import of it now fails
import torch, glocal
q = torch.randn(1, 2, 32, 8)
print(glocal.explain(q, q, q, "sliding(3, 0)"))
assert glocal.attend(q, q, q, "sliding(3, 0)").shape == q.shape
try:
    glocal.attend(q, q, q, "sliding(3, 0)", backend="native")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend sdpa" in done.stdout
    assert "not native: the native extension is not part of this build" in done.stdout
    assert "backend 'native' cannot run this: the native extension is not part of this build" in done.stdout
