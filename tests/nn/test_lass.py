"""S019: local attention and state space by loops and by its parts, full attention on coarse maps, any map."""

import itertools
import warnings

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, interpolate, layer_norm, silu

from glocal.nn.lass import LASS
from tests import oracle
from tests.nn.test_ss2d import definition as scanned


def make(window=3, heads=2, **options):
    torch.manual_seed(0)
    layer = LASS(8 * heads, heads, window, **options).double().eval()
    for name, p in layer.named_parameters():
        if name.endswith(("rpb", "places", "A_log", "D", "bn.weight", "bn.bias", "norm.weight", "norm.bias")):
            torch.nn.init.normal_(p)
    return layer


def rotated(x, layer):
    """D / 4 angles from 1 to 1 / 10,000, each for two neighbouring channels: first half rows, second half columns."""
    height, width, dim = *x.shape[2:4], x.shape[-1]
    rates = 10000 ** -torch.linspace(0, 1, dim // 4, dtype=x.dtype)
    rows, columns = torch.arange(height)[:, None, None] * rates, torch.arange(width)[None, :, None] * rates
    angles = torch.cat([rows.expand(height, width, -1), columns.expand(height, width, -1)], -1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten(-2)


def definition(layer, x):
    """Window after window, and the rest in a few lines."""
    height, width = x.shape[1:3]

    def heads(t):
        return t.unflatten(-1, (layer.num_heads, -1)).movedim(-2, 1)

    q, k, v = (heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotated(q, layer) * layer.head_dim**-0.5, rotated(k, layer)
    y = torch.zeros_like(v)
    sides = [min(w, n) for w, n in zip(layer.window, (height, width), strict=True)]
    for i, j in itertools.product(range(height), range(width)):
        top, left = (min(max(p - s // 2, 0), n - s) for p, s, n in zip((i, j), sides, (height, width), strict=True))
        places = list(itertools.product(range(top, top + sides[0]), range(left, left + sides[1])))
        bias = [layer.rpb[:, a - i + layer.window[0] - 1, b - j + layer.window[1] - 1] for a, b in places]
        scores = torch.stack([(q[:, :, i, j] * k[:, :, a, b]).sum(-1) for a, b in places], -1) + torch.stack(bias, -1)
        values = torch.stack([v[:, :, a, b] for a, b in places], -2)
        y[:, :, i, j] = (scores.softmax(-1)[..., None] * values).sum(-2)
    merged = y.movedim(1, -2).flatten(-2)
    lepe = conv2d(
        v.movedim(1, -2).flatten(-2).movedim(-1, 1), layer.lepe.weight, layer.lepe.bias, padding=2, groups=x.shape[-1]
    )
    if layer.full is None:
        z = conv2d(merged.movedim(-1, 1), layer.conv.weight, layer.conv.bias, padding=1, groups=x.shape[-1])
        z = batch_norm(z, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias)
        z = scanned(layer.scan, silu(z).movedim(1, -1))
        merged = layer_norm(z, z.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6) + merged
    else:
        scores = q.flatten(2, 3) @ k.flatten(2, 3).mT + layer.places
        merged = heads(merged).flatten(2, 3)
        merged = (scores.softmax(-1) @ merged).unflatten(2, (height, width)).movedim(1, -2).flatten(-2)
    return layer.o_proj(merged + lepe.movedim(1, -1))


@pytest.mark.parametrize(
    "size,window,full",
    [((5, 6), 3, None), ((3, 8), 5, None), ((2, 2), 3, None), ((4, 5), 3, (4, 5)), ((3, 3), 5, (3, 3))],
)
def test_by_definition_with_gradients(size, window, full):
    layer = make(window, full=full)
    x = torch.randn(2, *size, 16, dtype=torch.double, requires_grad=True)
    found = []
    for out in (layer(x), definition(layer, x)):
        weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def silent(layer):
    """Without what follows the windows."""
    with torch.no_grad():
        for p in (layer.norm.weight, layer.norm.bias, layer.lepe.weight, layer.lepe.bias):
            p.zero_()
    return layer


@pytest.mark.parametrize("size", [(5, 5), (3, 4)])
def test_a_window_of_the_whole_map_is_full_attention(size):
    layer = silent(make(5))
    layer.rpb.data.zero_()
    x = torch.randn(2, *size, 16, dtype=torch.double)
    q, k, v = layer.project(x, x, *[torch.cartesian_prod(*map(torch.arange, size))] * 2)
    mask = torch.ones(q[0, 0, ..., 0].numel(), q[0, 0, ..., 0].numel(), dtype=torch.bool)
    out, _ = oracle.attend(*(t.flatten(2, 3) for t in (q, k, v)), mask, scale=layer.scale)
    torch.testing.assert_close(layer(x), layer.o_proj(out.movedim(1, -2).flatten(-2)).view_as(x))


def test_windows_are_nattens():
    natten = pytest.importorskip("natten")
    layer = silent(make(5)).float()
    layer.rpb.data.zero_()
    x = torch.randn(1, 7, 9, 16)
    q, k, v = layer.project(x, x, *[torch.cartesian_prod(torch.arange(7), torch.arange(9))] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = natten.na2d(*(t.detach().movedim(1, -2) for t in (q, k, v)), kernel_size=5, backend="flex-fna")
    torch.testing.assert_close(layer(x), layer.o_proj(out.flatten(-2)), atol=1e-5, rtol=1e-5)


def test_only_the_scan_reaches_beyond_the_window():
    layer, x = make(3), torch.randn(1, 7, 9, 16, dtype=torch.double)
    other = x.clone()
    other[:, 0, 0] += 1
    far = (0, 6, 8)
    assert not torch.allclose(layer(x)[far], layer(other)[far])
    assert torch.equal(silent(layer)(x)[far], layer(other)[far])


def test_the_bias_of_places_is_resized_over_keys_and_queries():
    layer = make(3, full=(3, 4))
    wanted = layer.places.new_zeros(2, 30, 30)
    queries = layer.places.new_zeros(2, 30, 12)
    for h, j in itertools.product(range(2), range(12)):
        image = layer.places[h, :, j].view(1, 1, 3, 4)
        queries[h, :, j] = interpolate(image, (5, 6), mode="bicubic", align_corners=False).flatten()
    for h, i in itertools.product(range(2), range(30)):
        image = queries[h, i].view(1, 1, 3, 4)
        wanted[h, i] = interpolate(image, (5, 6), mode="bicubic", align_corners=False).flatten()
    torch.testing.assert_close(layer.place_bias((5, 6)), wanted)
    assert layer.place_bias((3, 4)) is layer.places
    layer(torch.randn(1, 5, 6, 16, dtype=torch.double)).sum().backward()
    assert layer.places.grad.abs().min() > 0


def test_starts_without_biases_of_places():
    layer = LASS(16, 2, 3)
    assert layer.rpb.shape == (2, 5, 5) and not layer.rpb.any()
    assert not LASS(16, 2, 3, full=(2, 2)).places.any()


def test_half_precision():
    layer = make(3).float()
    x = torch.randn(2, 6, 7, 16)
    wanted = layer(x)
    found = layer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16 and (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    full = make(3, full=(3, 3)).bfloat16()
    assert full(x.bfloat16()).isfinite().all()


def test_refuses():
    layer = make()
    x = torch.randn(1, 5, 6, 16, dtype=torch.double)
    with pytest.raises(ValueError, match="extra must be None"):
        layer(x, extra=x[:, 0])
    with pytest.raises(ValueError, match="keys must be None"):
        layer(x, keys=torch.ones(1, 5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="no noncausal-cross form: windows and scans"):
        layer(x, x)
    with pytest.raises(ValueError, match="no causal-self form: what it scans"):
        LASS(16, 2, causal=True)
    with pytest.raises(ValueError, match=r"x must be \(B, \*grid, 16\) with a grid of 2 axes"):
        layer(x[0])
    with pytest.raises(ValueError, match="window must be one integer or one for each axis"):
        LASS(16, 2, (3,))
