"""S094: gated convolutions by loops over taps, by torch's own resizing, and where they can be said in a line."""

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, linear
from torch.utils.flop_counter import FlopCounterMode

from glocal.nn import MLP, Attention, Block
from glocal.nn.delta_conv import DeltaConv


def make(*args, seed=0, **options):
    """A layer that is not zero."""
    torch.manual_seed(seed)
    layer = DeltaConv(*args, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def convolve(t, conv):
    """A depthwise convolution of ``(H, W, C)`` by loops over places and taps; outside is zero."""
    h, w, _ = t.shape
    side = conv.weight.shape[-1]
    out = torch.zeros_like(t) if conv.bias is None else conv.bias.expand_as(t).clone()
    for i in range(h):
        for j in range(w):
            for a in range(side):
                for b in range(side):
                    y, x = i + a - side // 2, j + b - side // 2
                    if 0 <= y < h and 0 <= x < w:
                        out[i, j] += conv.weight[:, 0, a, b] * t[y, x]
    return out


def pool(t, rows, columns):
    """Means over cells of ``(H, W, C)``: cell i of n is from the floor of i H / n to the ceiling of (i + 1) H / n."""
    h, w, _ = t.shape

    def span(i, size, count):
        return slice(i * size // count, -(-(i + 1) * size // count))

    cells = [[t[span(i, h, rows), span(j, w, columns)].mean((0, 1)) for j in range(columns)] for i in range(rows)]
    return torch.stack([torch.stack(row) for row in cells])


def stretch(t, rows, columns):
    """Bilinear between the centres of cells, ``(h, w, C)``."""
    h, w, _ = t.shape

    def between(i, size, count):
        at = min(max((i + 0.5) * size / count - 0.5, 0), size - 1)
        low = int(at)
        return low, min(low + 1, size - 1), at - low

    out = t.new_zeros(rows, columns, t.shape[-1])
    for i in range(rows):
        for j in range(columns):
            (y, y1, fy), (x, x1, fx) = between(i, h, rows), between(j, w, columns)
            top = t[y, x] * (1 - fx) + t[y, x1] * fx
            out[i, j] = top * (1 - fy) + (t[y1, x] * (1 - fx) + t[y1, x1] * fx) * fy
    return out


@pytest.mark.parametrize("gate", ["simple", "sigmoid"])
@pytest.mark.parametrize("size,bias", [((6, 4), True), ((5, 7), False)])  # odd sides are halved and rounded down
def test_by_loops(gate, size, bias):
    layer = make(8, 3, gate=gate, conv_bias=bias)
    x = torch.randn(2, *size, 8).double()
    with torch.no_grad():
        for one, found in zip(x, layer(x), strict=True):
            inner, parts = linear(one, layer.down_proj.weight, layer.down_proj.bias), []
            for conv, small in zip(layer.convs, (False, True), strict=True):
                t = pool(inner, size[0] // 2, size[1] // 2) if small else inner
                t = convolve(t, conv)
                a, b = t[..., :2], t[..., 2:]
                t = a * b * 2**0.5 if gate == "simple" else a / (1 + (-b).exp())
                parts.append(stretch(t, *size) if small else t)
            wanted = linear(torch.cat(parts, -1), layer.o_proj.weight, layer.o_proj.bias)
            wanted = wanted + linear(one.flatten(0, 1).mean(0), layer.mean_proj.weight, layer.mean_proj.bias)
            assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (1.0, 0.5, 0.34), (0.01,)])
def test_by_functions_of_torch_with_channels_first(scales):
    layer = make(12, 5, scales=scales)
    x = torch.randn(3, 11, 8, 12).double()
    inner, parts = layer.down_proj(x).permute(0, 3, 1, 2), []
    for conv, scale in zip(layer.convs, scales, strict=True):
        t = adaptive_avg_pool2d(inner, (max(1, int(11 * scale)), max(1, int(8 * scale))))
        a, b = conv2d(t, conv.weight, conv.bias, padding=2, groups=6).split(3, 1)
        parts.append(interpolate(a * b * 3**0.5, (11, 8), mode="bilinear", align_corners=False))
    wanted = layer.o_proj(torch.cat(parts, 1).permute(0, 2, 3, 1)) + layer.mean_proj(x.mean((1, 2)))[:, None, None]
    assert torch.allclose(layer(x), wanted, atol=1e-12)


@pytest.mark.parametrize("factor", [None, 0.0, 0.7])
def test_with_convolutions_of_one_place_it_is_a_product(factor):
    layer = make(16, 7, scales=(1.0,), factor=factor)
    nn.init.dirac_(layer.convs[0].weight, groups=8), nn.init.zeros_(layer.convs[0].bias)
    nn.init.zeros_(layer.mean_proj.weight), nn.init.zeros_(layer.mean_proj.bias)
    x = torch.randn(2, 5, 4, 16).double()
    u = layer.down_proj(x)
    assert torch.allclose(layer(x), layer.o_proj(u[..., :4] * u[..., 4:] * (2.0 if factor is None else factor)))


@pytest.mark.parametrize("dim,side", [(8, 3), (32, 13)])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters(dim, side, bias):
    wanted = dim * dim // 2 + dim // 2 + 2 * (side**2 * dim // 2 + bias * dim // 2) + dim * dim // 2 + dim
    assert sum(p.numel() for p in DeltaConv(dim, side, conv_bias=bias).parameters()) == wanted + dim**2 + dim


def test_pointwise_and_a_mean_know_no_places():
    layer = make(8, 1, scales=(1.0,))
    x = torch.randn(2, 4, 5, 8).double()
    order = torch.randperm(20)

    def shuffled(t):
        return t.flatten(1, 2)[:, order].view_as(t)

    assert torch.allclose(layer(shuffled(x)), shuffled(layer(x)), atol=1e-12)
    wider = make(8, 3, scales=(1.0,))
    assert not torch.allclose(wider(shuffled(x)), shuffled(wider(x)), atol=1e-2)


def test_near_tokens_count_by_the_kernel_and_far_ones_by_the_mean_only():
    layer = make(8, 5, scales=(1.0,))
    x = torch.randn(1, 9, 9, 8).double().requires_grad_()
    (found,) = torch.autograd.grad(layer(x)[0, 4, 4].sum(), x)
    far = layer.mean_proj.weight.sum(0) / 81
    here = torch.zeros(9, 9, dtype=torch.bool)
    here[2:7, 2:7] = True
    assert torch.allclose(found[0][~here], far.expand(56, 8), atol=1e-12)
    assert not torch.isclose(found[0][here], far, atol=1e-6).all(-1).any()


def test_it_starts_as_nothing_and_a_block_passes_its_input_on():
    torch.manual_seed(0)
    block = Block(8, DeltaConv(8, 3), MLP(8, 16))
    nn.init.zeros_(block.mlp.fc2.weight), nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(block(x), x)
    # What is zero learns first, and in the next step all the rest.
    layer, optimizer = block.attention, torch.optim.SGD(block.attention.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).sub(x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_tokens_in_a_row_are_those_of_the_grid():
    layer = make(8, 3, grid=(3, 5))
    x = torch.randn(2, 3, 5, 8).double()
    assert torch.equal(layer(x.flatten(1, 2)), layer(x).flatten(1, 2))
    assert layer(torch.randn(2, 4, 4, 8).double()).shape == (2, 4, 4, 8)  # maps may have any size


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (3, 2), (7, 13)])
def test_any_map(size):
    layer = make(8, 13)
    x = torch.randn(2, *size, 8).double()
    before = x.clone()
    out = layer(x.mT.contiguous().mT)  # strides of another layout
    assert out.shape == x.shape and out.isfinite().all() and torch.equal(x, before)
    assert torch.allclose(out, torch.cat([layer(x[:1]), layer(x[1:])]), atol=1e-12)


def test_four_times_the_tokens_are_four_times_the_work():
    def work(layer, side):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            layer(torch.randn(1, side, side, 16))
        return counted.get_total_flops()

    mine = DeltaConv(16, 5)
    assert 3.8 < work(mine, 64) / work(mine, 32) < 4.2
    softmax = Attention(16, 1, backend="sdpa").eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert work(softmax, 64) / work(softmax, 32) > 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["simple", "sigmoid"])
def test_half_precision(dtype, gate):
    layer, x = make(16, 5, gate=gate), torch.randn(2, 5, 7, 16).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.4)
        wanted = layer(x)
        found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=0.05 * wanted.std().item())


@pytest.mark.parametrize("gate", ["simple", "sigmoid"])
def test_gradients(gate):
    layer = make(4, 3, gate=gate)
    x = torch.randn(1, 3, 5, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_it_exports():
    layer, x = make(8, 5), torch.randn(2, 7, 6, 8).double()
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    "options,match",
    [
        (dict(dim=6), "dim must be a multiple of 4; it was 6"),
        (dict(kernel_size=4), "kernel_size must be odd; it was 4"),
        (dict(kernel_size=-1), "kernel_size must be odd; it was -1"),
        (dict(scales=()), "scales must be"),
        (dict(scales=(1.0, 2.0)), "scales must be numbers above 0 and at most 1"),
        (dict(scales=(0.0,)), "scales must be"),
        (dict(gate="glu"), "gate must be 'simple' or 'sigmoid'; it was 'glu'"),
        (dict(gate="sigmoid", factor=2.0), "factor is of the simple gate"),
    ],
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        DeltaConv(**({"dim": 8} | options))


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\); it was \(2, 9, 8\)"):
        DeltaConv(8)(torch.randn(2, 9, 8))
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\)"):
        DeltaConv(8)(torch.randn(2, 3, 3, 4))
    with pytest.raises(ValueError, match=r"tokens of grid \(2, 5\)"):
        DeltaConv(8, grid=(2, 5))(torch.randn(2, 9, 8))
