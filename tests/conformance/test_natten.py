"""NATTEN's FlexAttention backend, which runs on a CPU without gradients: windows, dilation, stride, causal axes."""

import functools
import warnings

import pytest
import torch

from glocal import Sliding, Window
from glocal.patterns import from_natten
from tests.conformance.cases import Case, check, having, inputs, run, seen_by

natten = pytest.importorskip("natten", reason="natten is not installed")


def neighborhood(q, k, v, **window):
    """natten on heads-first tensors; its layout is ``(B, *grid, heads, D)``."""
    function = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[q.dim() - 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FlexAttention runs without a compiler
        out = function(*(t.detach().movedim(1, -2) for t in (q, k, v)), backend="flex-fna", **window)
    return out.movedim(-2, 1)


@functools.cache
def theirs(case: Case):
    """Inputs of a case and natten's output: half a second each."""
    tensors = inputs(case.grid)
    return tensors, neighborhood(*tensors, **case.window)


@pytest.mark.parametrize("case", having("window"), ids=str)
@pytest.mark.parametrize("backend", ["dense", "sdpa", "native"])
def test_windows(backend, case: Case):
    where = from_natten(**case.window)
    assert where == case.pattern
    tensors, want = theirs(case)
    torch.testing.assert_close(run(backend, *tensors, where), want, rtol=0, atol=2e-6)


def test_gradients():
    """natten gives none on a CPU, so: v is linear, which makes its gradient exact; q and k by differences."""
    window = dict(kernel_size=(3, 4), dilation=(2, 1), stride=(1, 2), is_causal=(False, True))
    where = from_natten(**window)
    tensors, steps = inputs((7, 5)), inputs((7, 5), seed=1)
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2))
    leaves = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad((run("sdpa", *leaves, where) * weight).sum(), leaves)
    for place, tolerance in ((0, 0.02), (1, 0.02), (2, 1e-4)):
        step = 1.0 if place == 2 else 0.02
        moved = [
            neighborhood(
                *(t + sign * step * s * (n == place) for n, (t, s) in enumerate(zip(tensors, steps, strict=True))),
                **window,
            )
            for sign in (1, -1)
        ]
        slope = ((moved[0] - moved[1]).double() * weight).sum() / (2 * step)
        assert abs(float(slope - (grads[place] * steps[place]).sum())) < tolerance


DIFFERENCES = [
    # setting of natten, what it might be taken for, keys seen by each query, why
    (dict(kernel_size=3), Sliding(1, 1), [3] * 8, "the window moves inward at a border, it is not clipped"),
    (dict(kernel_size=4), Sliding(1, 2), [4] * 8, "an even window has its spare key on the left"),
    (dict(kernel_size=3, is_causal=True), Window(3), [1, 2, 3, 3, 3, 3, 3, 3], "a causal window is clipped"),
    (
        dict(kernel_size=4, stride=2, is_causal=True),
        Sliding(3, 0),
        [1, 2, 3, 4, 3, 4, 3, 4],
        "the window starts where the leader's does, so a causal query that does not lead sees fewer",
    ),
]


@pytest.mark.parametrize(
    ("window", "mistaken", "counts", "why"), DIFFERENCES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_known_differences(window, mistaken, counts, why):
    seen = seen_by(lambda q, k, v: neighborhood(q, k, v, **window), 8, 8)
    assert seen.sum(-1).tolist() == counts
    assert torch.equal(seen, from_natten(**window).mask(8)), why
    assert not torch.equal(seen, mistaken.mask(8)), why


def test_what_natten_refuses_and_we_allow():
    """natten demands a window of two; one key, a projection of v, has a meaning here."""
    q, k, v = inputs((5,))
    with pytest.raises(Exception, match="kernel"):
        neighborhood(q, k, v, kernel_size=1)
    check("sdpa", (q, k, v), Window(1), lambda q, k, v: v + 0 * q + 0 * k)


@pytest.mark.parametrize(
    "window", [dict(kernel_size=9), dict(kernel_size=4, dilation=3), dict(kernel_size=3, stride=4)]
)
def test_what_both_refuse(window):
    q, k, v = inputs((8,))
    with pytest.raises(Exception, match=r"(?i)kernel|dilation|stride|window"):
        neighborhood(q, k, v, **window)
    with pytest.raises(ValueError, match="Window"):
        run("dense", q, k, v, from_natten(**window))
