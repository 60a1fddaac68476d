"""local-attention and x-transformers, whose windows count differently from everyone else's."""

import pytest
import torch

from glocal import Block, Causal, Full, Sliding
from glocal.patterns import from_flash
from tests.conformance.cases import BACKENDS, check, inputs, run, seen_by


def local(window_size: int, *, backward: int = 1, forward: int = 0, causal: bool = True, exact: bool = True):
    """`LocalAttention` without rotary positions."""
    module = pytest.importorskip("local_attention", reason="local-attention is not installed")
    return module.LocalAttention(
        window_size=window_size,
        causal=causal,
        look_backward=backward,
        look_forward=forward,
        exact_windowsize=exact,
        autopad=True,
        use_rotary_pos_emb=False,
    )


LOCAL = [
    # settings, what its queries see
    (dict(window_size=4), Sliding(4, 0)),
    (dict(window_size=3, backward=2), Sliding(6, 0)),
    (dict(window_size=1, backward=2), Sliding(2, 0)),
    (dict(window_size=3, forward=1, causal=False), Sliding(3, 3)),
    (dict(window_size=2, backward=2, forward=1, causal=False), Sliding(4, 2)),
    (dict(window_size=4, backward=0, exact=False), Block(4) & Causal()),
    (dict(window_size=4, backward=0, causal=False, exact=False), Block(4)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("settings", "where"), LOCAL, ids=str)
def test_local_attention(backend, settings, where):
    check(backend, inputs((12,)), where, local(**settings))


@pytest.mark.parametrize("length", [11, 13])
def test_local_attention_on_a_length_that_is_padded(length):
    check("sdpa", inputs((length,)), Sliding(4, 0), local(4))


LOCAL_DIFFERENCES = [
    # settings, what it might be taken for, distances query - key that it sees besides, why
    (dict(window_size=4), Sliding(3, 0), {4}, "looking back b windows of W sees b W + 1 keys"),
    (dict(window_size=4, backward=2), Sliding(7, 0), {8}, "looking back b windows of W sees b W + 1 keys"),
    (dict(window_size=4, exact=False), Sliding(4, 0), {5, 6, 7}, "not exact: all of the window before, up to 2 W keys"),
    (dict(window_size=4, forward=1, causal=False), Sliding(3, 3), {-4, 4}, "both reaches are whole windows"),
]


@pytest.mark.parametrize(
    ("settings", "mistaken", "besides", "why"), LOCAL_DIFFERENCES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_known_differences_of_local_attention(settings, mistaken, besides, why):
    extra = (seen_by(local(**settings), 16, 16) ^ mistaken.mask(16)).nonzero()
    assert set((extra[:, 0] - extra[:, 1]).tolist()) == besides, why


def x_attention(**settings):
    """One `Attention` layer of x-transformers, and the same layer with our attention inside."""
    module = pytest.importorskip("x_transformers.x_transformers", reason="x-transformers is not installed")
    torch.manual_seed(0)
    layer = module.Attention(dim=16, heads=2, dim_head=8, **settings)

    def ours(backend, x, where):
        q, k, v = (to(x).unflatten(-1, (2, 8)).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v))
        return layer.to_out(run(backend, q, k, v, where).transpose(1, 2).flatten(2))

    return layer, ours


X = [
    # settings, what its queries see
    (dict(), Full()),
    (dict(causal=True), Causal()),
    (dict(causal=True, max_attend_past=3), from_flash((3, 0))),
    (dict(causal=True, max_attend_past=0), from_flash((0, 0))),
    (dict(max_attend_past=2), from_flash((2, -1))),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("settings", "where"), X, ids=str)
def test_x_transformers(backend, settings, where):
    layer, ours = x_attention(**settings)
    grad = backend != "flex"
    layer.requires_grad_(grad)
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0))
    mine, other = x.clone().requires_grad_(grad), x.clone().requires_grad_(grad)
    got, want = ours(backend, mine, where), layer(other)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    if grad:
        got.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-5)


def test_known_difference_of_x_transformers():
    """``max_attend_past=M`` sees M + 1 keys: M is a distance, not a count."""
    layer, ours = x_attention(causal=True, max_attend_past=3)
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2] += 1.0
    moved = (layer(x) - layer(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, True, True, True, False, False, False]
    assert not torch.allclose(ours("dense", x, Sliding(2, 0)), layer(x), atol=1e-3)
