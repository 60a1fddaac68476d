"""Long convolutions against torch's direct ones, by gradcheck, at every size around that of the input."""

import pytest
import torch
from scipy.fft import next_fast_len
from torch.nn.functional import conv1d, conv2d, conv3d, pad

from glocal.kernels.longconv import fast_length, long_conv


def direct(x, kernel):
    """The definition by torch's convolution, which is a correlation: with the kernel flipped."""
    axes = kernel.dim() - 1
    conv = (conv1d, conv2d, conv3d)[axes - 1]
    flipped = kernel.flip(tuple(range(1, axes + 1)))[:, None]
    return conv(x, flipped, padding=[size // 2 for size in kernel.shape[1:]], groups=len(kernel))


def tensors(*grid, sizes, channels=3):
    torch.manual_seed(0)
    x, kernel = torch.randn(2, channels, *grid).double(), torch.randn(channels, *sizes).double()
    return x.requires_grad_(), kernel.requires_grad_()


def assert_agree(found, wanted, *inputs):
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-12)
    weights = torch.randn_like(wanted)
    one, other = (torch.autograd.grad((out * weights).sum(), inputs) for out in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [1, 3, 5, 9, 11, 13, 27])
def test_images(size):
    """Kernels smaller than the image, as large as what its outputs see (11 by 9), and larger."""
    x, kernel = tensors(6, 5, sizes=(size, size))
    assert_agree(long_conv(x, kernel), direct(x, kernel), x, kernel)


@pytest.mark.parametrize(
    "grid,sizes", [((7, 1), (3, 13)), ((1, 1), (1, 3)), ((5, 12), (23, 1)), ((2, 3, 4), (3, 5, 7))]
)
def test_axes_of_unlike_sizes(grid, sizes):
    x, kernel = tensors(*grid, sizes=sizes)
    assert_agree(long_conv(x, kernel), direct(x, kernel), x, kernel)


@pytest.mark.parametrize("size", [1, 3, 7, 13, 21])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_sequences(n, size):
    x, kernel = tensors(n, sizes=(size,))
    assert_agree(long_conv(x, kernel), direct(x, kernel), x, kernel)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 21])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_causal_sequences(n, size):
    x, kernel = tensors(n, sizes=(size,))
    wanted = conv1d(pad(x, (size - 1, 0)), kernel.flip(1)[:, None], groups=3)
    assert_agree(long_conv(x, kernel, causal=True), wanted, x, kernel)


def test_gradcheck():
    x, kernel = tensors(3, 4, sizes=(5, 3), channels=2)
    assert torch.autograd.gradcheck(long_conv, (x, kernel))


def test_leading_axes_and_strided_tensors():
    x, kernel = (t.detach() for t in tensors(6, 5, sizes=(5, 5)))
    wanted = direct(x, kernel)
    assert torch.allclose(long_conv(x[0], kernel), wanted[0])
    assert torch.allclose(long_conv(x.expand(4, 2, 3, 6, 5), kernel)[3], wanted)
    last = x.movedim(1, -1).contiguous()
    assert torch.allclose(long_conv(last.movedim(-1, 1), kernel), wanted)
    before = last.clone(), kernel.clone()
    long_conv(last.movedim(-1, 1), kernel)
    assert torch.equal(last, before[0]) and torch.equal(kernel, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_lose_no_more_than_their_own_rounding(dtype):
    x, kernel = (t.detach() for t in tensors(40, 33, sizes=(65, 79)))
    x = (200 * x).to(dtype)  # sums beyond 65504 within the transform
    found = long_conv(x, kernel.float() / 50)
    wanted = long_conv(x.double(), kernel / 50)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=wanted.abs().max() * 1e-5)
    rounded = long_conv(x, kernel.to(dtype))
    wanted = long_conv(x.double(), kernel.to(dtype).double())
    small = wanted.abs() < 60000  # float16 ends soon after
    assert rounded.dtype == dtype
    assert torch.allclose(rounded.double()[small], wanted[small], rtol=torch.finfo(dtype).eps, atol=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = long_conv(x, kernel.float() / 50)
    assert torch.equal(inside, found)


def test_fast_lengths_are_those_of_scipy():
    assert [fast_length(n) for n in range(1, 3000)] == [next_fast_len(n, real=True) for n in range(1, 3000)]


@pytest.mark.parametrize(
    "x,kernel,causal,message",
    [
        ((2, 3, 8), (4, 5), False, r"\(2, 3, 8\) and \(4, 5\)"),
        ((3, 8), (3, 5, 5), False, "as many sizes as the grid"),
        ((2, 3, 0), (3, 5), False, "none of them 0"),
        ((2, 3, 8), (3, 4), False, "must be odd"),
        ((2, 3, 8, 8), (3, 5, 5), True, "one axis"),
        ((3,), (3,), False, "as many sizes as the grid"),
    ],
)
def test_bad_input(x, kernel, causal, message):
    with pytest.raises(ValueError, match=message):
        long_conv(torch.zeros(x), torch.zeros(kernel), causal=causal)
    with pytest.raises(ValueError, match="floating point"):
        long_conv(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 3))
