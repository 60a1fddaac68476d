"""S104: attention by a kernel against unfold, natten, windows and full attention; borders, shifts, decoding."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, unfold

from glocal.inspect import verify
from glocal.nn import USES
from glocal.nn.conv_attention import ConvAttention, MSAConv, conv_attend
from tests import oracle
from tests.nn.layers import steps

KERNELS = [((3, 3), 1), ((5, 3), 1), ((3, 5), 2), ((7, 7), 1), ((3, 3), (1, 3)), ((1, 1), 1)]


def tensors(*grid, heads=2, d=4, e=3, dtype=torch.double):
    torch.manual_seed(0)
    return [torch.randn(2, heads, *grid, n, dtype=dtype).requires_grad_() for n in (d, d, e)]


def taps(t, kernel, dilation):
    """``(B, heads, N, taps, D)`` by torch's unfold; zeros outside."""
    b, heads, h, w, d = t.shape
    apart = (dilation, dilation) if isinstance(dilation, int) else dilation
    pad = [a * (n // 2) for a, n in zip(apart, kernel, strict=True)]
    image = t.movedim(-1, 2).reshape(b, heads * d, h, w)
    return unfold(image, kernel, apart, pad).view(b, heads, d, -1, h * w).permute(0, 1, 4, 3, 2)


def by_unfold(q, k, v, kernel, dilation=1, value_kernel=None, live=None):
    keys, values = taps(k, kernel, dilation), taps(v, value_kernel or kernel, dilation)
    scores = torch.einsum("bhnd,bhntd->bhnt", q.flatten(2, 3), keys) * q.shape[-1] ** -0.5
    if live is not None:
        scores = scores.masked_fill(~live, -torch.inf)
    return torch.einsum("bhnt,bhntd->bhnd", scores.softmax(-1), values).view(*q.shape[:-1], -1)


def assert_agree(found, wanted, inputs):
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(found)
    one, other = (torch.autograd.grad((t * weights).sum(), inputs) for t in (found, wanted))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("kernel", "dilation"), KERNELS)
def test_by_unfold(kernel, dilation):
    q, k, v = tensors(7, 9)
    assert_agree(conv_attend(q, k, v, kernel, dilation=dilation), by_unfold(q, k, v, kernel, dilation), (q, k, v))


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(("kernel", "value_kernel"), [((5, 1), (1, 5)), ((3, 5), (15, 1))])
def test_two_kernels_by_unfold(kernel, value_kernel, border):
    q, k, v = tensors(6, 7)
    live = None
    if border == "mask":
        ones = torch.ones(2, 2, 6, 7, 1, dtype=torch.double)
        live = (taps(ones, kernel, 1) * taps(ones, value_kernel, 1))[..., 0] > 0
    found = conv_attend(q, k, v, kernel, value_kernel=value_kernel, border=border)
    assert_agree(found, by_unfold(q, k, v, kernel, 1, value_kernel, live), (q, k, v))


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_the_path_of_two_kernels_is_that_of_one_where_they_are_equal(border):
    from glocal.nn.conv_attention import _two_kernels

    q, k, v = tensors(6, 7)
    keys = torch.rand(2, 6, 7) > 0.4
    found = _two_kernels(q, k, v, ((3, 5), (3, 5)), (2, 1), border, keys, None, 0.0)
    assert_agree(found, conv_attend(q, k, v, (3, 5), dilation=(2, 1), border=border, keys=keys), (q, k, v))


def test_far_from_borders_it_is_neighborhood_attention():
    natten = pytest.importorskip("natten")
    q, k, v = (t.detach() for t in tensors(12, 14, d=8, e=8, dtype=torch.float))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = natten.na2d(*(t.movedim(1, -2) for t in (q, k, v)), kernel_size=(5, 3), backend="flex-fna")
    inner = (slice(None), slice(None), slice(2, -2), slice(1, -1))
    for border in ("zero", "mask"):
        mine = conv_attend(q, k, v, (5, 3), border=border)
        torch.testing.assert_close(mine[inner], theirs.movedim(-2, 1)[inner], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine, theirs.movedim(-2, 1), atol=1e-3)


def test_at_a_corner_five_of_nine_taps_are_zeros():
    ones = torch.ones(1, 1, 4, 5, 1, dtype=torch.double)
    for height in (1.0, 2.0):  # keys of zeros have scores of 0, the others of height ** 2
        out = conv_attend(height * ones, height * ones, ones, 3)[0, 0, ..., 0]
        taken = torch.tensor(height**2).double().exp()
        for place, inside in (((0, 0), 4), ((3, 4), 4), ((0, 2), 6), ((2, 0), 6), ((1, 1), 9)):
            assert out[place] == pytest.approx(float(inside * taken / (inside * taken + 9 - inside)))
    assert torch.allclose(conv_attend(ones, ones, ones, 3, border="mask"), ones)


def test_a_masked_kernel_over_the_whole_map_is_full_attention():
    q, k, v = tensors(5, 6)
    found = conv_attend(q, k, v, (9, 11), border="mask")
    wanted = scaled_dot_product_attention(*(t.flatten(2, 3) for t in (q, k, v)))
    assert_agree(found, wanted.view_as(found), (q, k, v))


def test_one_tap_gives_its_value():
    q, k, v = tensors(5, 6)
    assert torch.allclose(conv_attend(q, k, v, 1), v)


@pytest.mark.parametrize("length", [1, 4, 20])
def test_causal_by_a_row_of_taps_is_a_sliding_window(length):
    q, k, v = tensors(length)
    at = torch.arange(length)
    back = at[:, None] - at
    mask = (back >= 0) & (back <= 3)
    wanted, _ = oracle.attend(q, k, v, mask)
    torch.testing.assert_close(conv_attend(q, k, v, (7,), causal=True, border="mask"), wanted)
    # Zeros before the start: keys are there, with values of 0.
    before, after = (torch.cat([torch.zeros_like(t)[:, :, :1].expand(-1, -1, 3, -1), t], 2) for t in (k, v))
    rows, columns = torch.arange(3, length + 3), torch.arange(length + 3)
    back = rows[:, None] - columns
    wanted, _ = oracle.attend(q, before, after, (back >= 0) & (back <= 3))
    torch.testing.assert_close(conv_attend(q, k, v, (7,), causal=True), wanted)


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_padding_is_outside_the_map(border):
    q, k, v = tensors(13)
    keys = torch.arange(13) >= torch.tensor([[4], [0]])
    found = conv_attend(q, k, v, (5,), keys=keys, border=border)
    alone = conv_attend(*(t[:1, :, 4:] for t in (q, k, v)), (5,), border=border)
    torch.testing.assert_close(found[:1, :, 4:], alone)
    nothing = conv_attend(q, k, v, (5,), keys=torch.zeros(2, 13, dtype=torch.bool), border=border)
    assert not nothing.any()


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("use", USES)
def test_uses(use, border):
    kind = type("Kind", (ConvAttention,), {"tiny": {"kernel": (7,), "border": border}})
    assert verify(kind, use).holds


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_decoding(border):
    layer = ConvAttention(16, 2, (5,), dilation=2, border=border, causal=True).double()
    x = torch.randn(2, 17, 16).double()
    for prompt in (0, 5):
        torch.testing.assert_close(steps(layer, x, prompt)[0], layer(x))


def test_it_moves_with_the_map_and_no_parameter_knows_its_size():
    torch.manual_seed(0)
    layer = MSAConv(8, kernel=5, num_heads=2).double().eval()
    x = torch.randn(1, 16, 19, 8).double()
    moved = layer(x.roll((3, 3), (1, 2)))
    torch.testing.assert_close(moved[:, 6:-3, 6:-3], layer(x)[:, 3:-6, 3:-6])
    # A part of a map gives what the map gives there, but for its border.
    torch.testing.assert_close(layer(x[:, 2:, 1:-2])[:, 3:-3, 3:-3], layer(x)[:, 5:-3, 4:-5])


def test_the_layer_by_unfold():
    layer = MSAConv(8, 6, kernel=(3, 5), stride=2).double().eval()
    x = torch.randn(2, 7, 8, 8).double()
    at = layer.attention
    q, k, v = (p(x)[:, None] for p in (at.q_proj, at.k_proj, at.v_proj))  # one head
    mixed = by_unfold(q, k, v, (3, 5))[:, 0] + x
    wanted = nn.functional.conv2d(mixed.movedim(-1, 1), layer.conv.weight, stride=2, padding=1).clamp(min=0)
    torch.testing.assert_close(layer(x), wanted.movedim(1, -1))


def test_shifted_channels_see_four_ways():
    torch.manual_seed(0)
    layer = MSAConv(8, kernel=1, shift=3, side=1).double().eval()
    x = torch.randn(1, 9, 9, 8).double().requires_grad_()
    layer(x)[0, 4, 4].sum().backward()
    seen = {tuple(place) for place in (x.grad[0].abs().sum(-1) > 0).nonzero().tolist()}
    # One tap: a quarter of the channels, at home again, was made of what lay beside it when all were moved.
    shifts = ((3, 0), (-3, 0), (0, 3), (0, -3))
    assert seen == {((4 + a - c) % 9, (4 + b - d) % 9) for a, b in shifts for c, d in shifts}


def test_gradients():
    q, k, v = (t[:1, :1, :2, :3] for t in tensors(4, 5, d=2, e=2))
    for options in ({}, {"border": "mask"}, {"value_kernel": (1, 9)}):
        assert torch.autograd.gradcheck(lambda *t, o=options: conv_attend(*t, (3, 3), **o), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_kernel", [None, (1, 9)])
def test_half_precision(dtype, value_kernel):
    q, k, v = (t.detach().to(dtype) for t in tensors(7, 9))
    found = conv_attend(q, k, v, 3, value_kernel=value_kernel)
    wanted = conv_attend(*(t.double() for t in (q, k, v)), 3, value_kernel=value_kernel)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=6 * torch.finfo(dtype).eps, rtol=0.02)


def test_heads_of_one_channel_and_shared_keys():
    layer = ConvAttention(6, 6, 3).double()
    assert layer(torch.randn(1, 5, 7, 6).double()).shape == (1, 5, 7, 6)
    q, k, v = tensors(5, 6)
    for options in ({}, {"value_kernel": (1, 9)}):
        found = conv_attend(q, k[:, :1], v[:, :1], 3, **options)
        wanted = conv_attend(q, *(t[:, :1].expand(-1, 2, -1, -1, -1) for t in (k, v)), 3, **options)
        torch.testing.assert_close(found, wanted)


def test_bad_input():
    q, k, v = tensors(5, 6)
    for match, kernel, options in (
        ("odd sides", (3, 4), {}),
        ("grid has 2 axes", (3,), {}),
        ("as many taps", 3, {"value_kernel": 5}),
        ("'zero' or 'mask'", 3, {"border": "reflect"}),
        ("causal needs", 3, {"causal": True}),
        ("causal needs", (1, 3), {"causal": True, "value_kernel": (3, 1)}),
        ("keys must be booleans", 3, {"keys": torch.ones(2, 5, dtype=torch.bool)}),
        ("dilation must be at least 1", 3, {"dilation": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            conv_attend(q, k, v, kernel, **options)
    for shapes in ((q, k[:, :, :4], v), (q[:1], k, v), (q, k, v[0]), (q[..., :2], k, v), (q[:, :, 0, 0], k, v)):
        with pytest.raises(ValueError, match="q, k and v must be"):
            conv_attend(*shapes, (3, 1), value_kernel=(1, 3))
    with pytest.raises(ValueError, match="at most as many places"):
        conv_attend(q, k[:, :, :4], v[:, :, :4], 3)
    with pytest.raises(ValueError, match="equal grids"):
        conv_attend(q[:, :, :4], k, v, (3, 1), value_kernel=(1, 3))
    with pytest.raises(ValueError, match="odd sides"):
        ConvAttention(8, 2, 4)
    with pytest.raises(ValueError, match="softcap"):
        ConvAttention(8, 2, 3, softcap=1.0)
    with pytest.raises(ValueError, match="2 axes of kernel"):
        ConvAttention(8, 2, 3)(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="multiple of 4"):
        MSAConv(6, shift=1)
    with pytest.raises(ValueError, match="side must be odd"):
        MSAConv(8, side=2)
