"""S055: HyenaPixel and Hyena by definition with direct convolutions, their kernels and how they are kept, padding."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, layer_norm, pad

from glocal.nn.hyena import Hyena, HyenaPixel, PixelFilter, SequenceFilter

LOW, HIGH = math.log(0.01) / 1.5, math.log(0.01) / 0.3


def pixel(dim=4, side=5, seed=0, **options):
    torch.manual_seed(seed)
    return _stir(HyenaPixel(dim, side, features=8, **options))


def sequence(dim=4, length=12, seed=0, **options):
    torch.manual_seed(seed)
    return _stir(Hyena(dim, length, features=9, hidden=16, **options))


def _stir(layer):
    """Every weight off its start value, in float64."""
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def by_cells(filter, window):
    """The network on one cell after the other, times the window."""
    z = filter.z.flatten(1)
    columns = []
    for cell in range(z.shape[1]):
        t = z[:, cell]
        for layer, rate in zip(filter.hidden, filter.rates, strict=True):
            t = torch.sin(rate * (layer.weight @ t + layer.bias))
        columns.append(filter.last.weight @ t)
    return torch.stack(columns, 1).view_as(window) * window


def pixel_kernel(filter):
    size = filter.z.shape[-1]
    at = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    distance = torch.cdist(at, torch.full((1, 2), (size - 1) / 2).double()).view(size, size)
    return by_cells(
        filter, torch.stack([torch.exp(-distance * abs(f)) for f in filter.fade]) + filter.shift[:, None, None]
    )


def sequence_kernel(filter, causal):
    size, dim = filter.z.shape[-1], filter.last.out_features
    away = [lag / (size - 1) if causal else abs(lag - (size - 1) / 2) / ((size - 1) / 2) for lag in range(size)]
    rows = [[math.exp(-abs(LOW + (HIGH - LOW) * c / (dim - 1)) * a) for a in away] for c in range(dim)]
    return by_cells(filter, torch.tensor(rows, dtype=torch.double))


def norm(t, module):
    return layer_norm(t, t.shape[-1:], module.weight, None, 1e-6) if isinstance(module, nn.LayerNorm) else t


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("grid,side", [((6, 5), 6), ((5, 5), 3), ((3, 4), 7), ((1, 1), 2)])
def test_pixels_by_definition(grid, side, with_norm):
    layer = pixel(side=side, norm=with_norm)
    x = torch.randn(2, *grid, 4).double().requires_grad_()
    w = layer.in_proj
    streams = conv2d(
        (x @ w.weight.T + w.bias).permute(0, 3, 1, 2), layer.short.weight, layer.short.bias, padding=2, groups=12
    )
    q, k, v = streams.permute(0, 2, 3, 1).split(4, -1)
    t = norm(q * k, layer.norm1)
    flipped = pixel_kernel(layer.filter).flip(1, 2)[:, None]
    far = conv2d(t.permute(0, 3, 1, 2), flipped, padding=side - 1, groups=4).permute(0, 2, 3, 1)
    wanted = norm(v * (far + layer.bias * t), layer.norm2) @ layer.out_proj.weight.T + layer.out_proj.bias
    assert_layer(layer, x, wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n,length,with_norm", [(12, 12, False), (7, 12, True), (15, 6, False), (1, 2, True)])
def test_sequences_by_definition(n, length, causal, with_norm):
    layer = sequence(length=length, causal=causal, norm=with_norm)
    x = torch.randn(2, n, 4).double().requires_grad_()
    around = (2, 0) if causal else (1, 1)
    streams = conv1d(pad(layer.in_proj(x).mT, around), layer.short.weight, layer.short.bias, groups=12)
    x0, x1, v = streams.mT.split(4, -1)
    t = norm(x1 * v, layer.norm1)
    kernel = sequence_kernel(layer.filter, causal)
    around = (length - 1, 0) if causal else (length - 1, length - 1)
    far = conv1d(pad(t.mT, around), kernel.flip(1)[:, None], groups=4).mT
    wanted = layer.out_proj(norm(x0 * (far + layer.bias * t), layer.norm2))
    assert_layer(layer, x, wanted)


def assert_layer(layer, x, wanted):
    found = layer(x)
    assert found.shape == x.shape and torch.allclose(found, wanted, atol=1e-11)
    weights, inputs = torch.randn_like(wanted), [x, *layer.parameters()]
    one, other = (torch.autograd.grad((out * weights).sum(), inputs) for out in (found, wanted))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    if x.shape[1:-1].numel() > 1:
        assert all(a.abs().max() > 0 for a in one)


class Delta(nn.Module):
    def forward(self):
        return (
            torch.zeros(4, 9, 9)
            .double()
            .index_put((torch.arange(4), *[torch.tensor(4)] * 2), torch.tensor(1.0).double())
        )


def test_a_kernel_of_one_cell_is_the_product_of_the_three_streams():
    layer = pixel(norm=False)
    layer.filter = Delta()
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.randn(2, 5, 7, 4).double()
    q, k, v = layer.short(layer.in_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).chunk(3, -1)
    assert torch.allclose(layer(x), layer.out_proj(v * q * k), atol=1e-12)


def test_the_past_does_not_change_with_the_future_and_all_of_the_past_counts():
    layer = sequence(length=20, causal=True)
    x = torch.randn(1, 20, 4).double()
    out = layer(x)
    for t in (0, 7, 19):
        other = x.clone()
        other[:, t] += 1
        moved = (layer(other) - out).abs().amax(-1)[0]
        # A Fourier transform mixes all tokens: what should stay does so up to rounding.
        assert moved[:t].max() < 1e-12 if t else True
        assert moved[t:].min() > 1e-6
    assert torch.allclose(layer(x[:, :9]), out[:, :9], atol=1e-12)
    both = sequence(length=20)
    other = x.clone()
    other[:, 19] += 1
    assert (both(other) - both(x)).abs().amax(-1).min() > 1e-6


def test_shifted_images_give_shifted_results_where_no_border_is_seen():
    layer = pixel(side=3)
    x = torch.randn(1, 16, 19, 4).double()
    out, moved = layer(x), layer(x.roll((2, -3), (1, 2)))
    reach = 2 + 2  # of the two convolutions
    inside = moved.roll((-2, 3), (1, 2))
    rows, columns = slice(reach, 16 - reach - 2), slice(reach + 3, 19 - reach)
    assert torch.allclose(inside[:, rows, columns], out[:, rows, columns], atol=1e-12)
    assert not torch.allclose(inside, out, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_fade_with_distance_from_the_token_itself(causal):
    """A network that says 1 everywhere leaves the window: 1 at the token, least at the oldest lag."""
    filter = SequenceFilter(3, 8, causal=causal, features=5, hidden=4).double()
    _say_one(filter)
    kernel = filter()
    own = 0 if causal else 7
    assert torch.allclose(kernel[:, own], torch.ones(3).double())
    assert (kernel[:, own:].diff(dim=1) < 0).all()
    ends = torch.tensor([0.01 ** (1 / 1.5), 0.01 ** ((1 / 1.5 + 1 / 0.3) / 2), 0.01 ** (1 / 0.3)]).double()
    assert torch.allclose(kernel[:, -1], ends) and (causal or torch.allclose(kernel, kernel.flip(1)))


def test_the_window_of_pixels_is_round():
    filter = PixelFilter(2, 6, features=8).double()
    _say_one(filter)
    kernel = filter()
    assert kernel.shape == (2, 11, 11) and torch.allclose(kernel[:, 5, 5], torch.ones(2).double())
    assert torch.allclose(kernel[:, 5 + 3, 5 - 4], kernel[:, 5, 10])  # both at distance 5
    assert torch.allclose(kernel[0, 5, 10].log(), torch.tensor(5 * LOW / 11).double(), rtol=1e-6)
    assert torch.allclose(kernel[1, 5, 10].log(), torch.tensor(5 * HIGH / 11).double(), rtol=1e-6)


def _say_one(filter):
    with torch.no_grad():
        for layer in filter.hidden:
            layer.weight.zero_()
            layer.bias.fill_(math.pi / 2)
        filter.last.weight.fill_(1 / filter.last.in_features)


def test_features_at_first():
    z = PixelFilter(2, 4, features=8).z
    assert torch.equal(z[:4, :1].expand(4, 7, 7), z[:4]) and torch.equal(z[4:, :, :1].expand(4, 7, 7), z[4:])
    assert torch.allclose(z[0, 0], torch.arange(7.0).sin()) and torch.allclose(
        z[7, :, 0], (torch.arange(7.0) / 100).cos()
    )
    z = SequenceFilter(2, 4, features=5).z
    assert torch.allclose(z[0], torch.tensor([0, 1, 2, 3, 2, 1, 0]) / 3)
    assert torch.allclose(z[2], (2 * math.pi * torch.arange(7) / 7).cos(), atol=1e-5)
    assert torch.allclose(z[4], -(2 * math.pi * torch.arange(7) / 7).sin(), atol=1e-5)
    assert torch.allclose(SequenceFilter(2, 4, causal=True, features=5).z[0], torch.tensor([3, 2, 1, 0]) / 3)


def test_another_resolution_keeps_the_kernel_in_finer_cells():
    """Three times as many cells: every third centre falls on an old one, where bicubic values are the old ones."""
    layer = pixel(side=4)
    before = layer.filter.make()
    layer.resize(11)
    after = layer.filter.make()
    assert after.shape == (4, 21, 21) and torch.allclose(after[:, 1::3, 1::3], before, atol=1e-7)
    layer.resize(4)
    assert torch.allclose(layer.filter.make(), before, atol=1e-7)
    other = HyenaPixel(4, 4, features=8).double()
    other.resize(11)
    layer.resize(11)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 11, 9, 4).double()
    assert torch.equal(other(x), layer(x))
    assert layer.filter.z.requires_grad


def kept(layer):
    with torch.no_grad():
        return layer.filter()


def test_the_kernel_is_kept_in_eval_and_made_anew_when_weights_change():
    layer = pixel().eval()
    first = kept(layer)
    assert kept(layer) is first and torch.equal(first, layer.filter.make())

    def swap_data():
        layer.filter.z.data = layer.filter.z.data + 1

    changes = [
        lambda: layer.filter.hidden[1].weight.data.mul_(2) is layer.eval(),
        lambda: nn.init.normal_(layer.filter.shift),
        lambda: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
        lambda: setattr(layer.filter, "fade", nn.Parameter(torch.ones(4).double())),
        swap_data,
        swap_data,  # must not be taken for the first one, whose memory may be used again
        lambda: layer.filter.cells.add_(2),
        lambda: layer.resize(4),
        lambda: _step(layer),
    ]
    for change in changes:
        before = kept(layer)
        change()
        after = kept(layer)
        assert torch.equal(after, layer.filter.make())
        assert after.shape != before.shape or not torch.equal(after, before)
        assert kept(layer) is after
    assert kept(layer.float()).dtype == torch.float32


def _step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(1, 5, 5, 4).double()).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()


def test_the_kernel_is_not_kept_where_gradients_are_asked_for():
    layer = pixel().eval()
    for _ in range(2):
        assert layer.filter().requires_grad
    layer.train()
    assert kept(layer) is not kept(layer)
    layer.eval().requires_grad_(False)
    with torch.inference_mode():
        first = layer.filter()
    assert not first.is_inference()  # such a tensor cannot be saved for a backward pass
    x = torch.randn(1, 5, 5, 4).double().requires_grad_()
    layer(x).sum().backward()
    assert layer.filter() is first and x.grad.abs().min() > 0


def test_copies_and_functional_calls_have_kernels_of_their_own():
    layer = pixel().eval()
    first = kept(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.filter.shift.add_(1)
    assert not torch.equal(kept(other), first) and kept(layer) is first
    x = torch.randn(1, 5, 5, 4).double()
    weights = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    changed = copy.deepcopy(layer)
    changed.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert torch.allclose(torch.func.functional_call(layer, weights, (x,)), changed(x), atol=1e-12)
        stacked = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
        both = torch.vmap(lambda w: torch.func.functional_call(layer, w, (x,)))(stacked)
        assert torch.allclose(both[1], changed(x), atol=1e-12)
    assert kept(layer) is first


@pytest.mark.parametrize("length", [3, 9])
def test_padding_is_as_what_lies_outside(length):
    x, keys = torch.randn(2, 9, 4).double(), torch.ones(2, 9, dtype=torch.bool)
    keys[0, length:] = False
    layer = sequence()
    assert torch.allclose(layer(x, keys=keys)[0, :length], layer(x[:1, :length])[0], atol=1e-12)
    layer, left = sequence(causal=True, norm=True), keys.flip(1)
    assert torch.allclose(layer(x, keys=left)[0, 9 - length :], layer(x[:1, 9 - length :])[0], atol=1e-12)
    layer = pixel(side=9)
    x, keys = torch.randn(2, 7, 9, 4).double(), torch.ones(2, 7, 9, dtype=torch.bool)
    keys[0, :, length:], keys[0, 5:] = False, False
    out = layer(x, keys=keys)
    assert torch.allclose(out[0, :5, :length], layer(x[:1, :5, :length])[0], atol=1e-12) and out.isfinite().all()


def test_grids_are_read_row_by_row():
    layer, x = sequence(), torch.randn(2, 3, 4, 4).double()
    assert torch.equal(layer(x), layer(x.view(2, 12, 4)).view_as(x))
    keys = torch.rand(2, 3, 4) > 0.3
    assert torch.equal(layer(x, keys=keys), layer(x.view(2, 12, 4), keys=keys.view(2, 12)).view_as(x))


@pytest.mark.parametrize("make", [pixel, sequence])
def test_half_precision_and_autocast(make):
    exact = make(norm=True).eval()
    layer, x = copy.deepcopy(exact).bfloat16(), torch.randn(2, 5, 5, 4).bfloat16()
    with torch.no_grad():
        wanted = exact.bfloat16().double()(x.double())
        assert layer.filter().dtype == torch.float32
        found = layer(x)
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.double(), wanted, atol=0.03 * wanted.abs().max())
        layer = layer.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = layer.filter()
            assert torch.allclose(layer(x.float()).double(), wanted, atol=0.03 * wanted.abs().max())
        assert inside.dtype == torch.float32 and torch.allclose(inside, layer.filter.make())


@pytest.mark.parametrize("make", [pixel, sequence])
def test_export_and_compilation(make):
    layer, x = make().eval(), torch.randn(2, 5, 5, 4).double()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        assert torch.allclose(exported(x), layer(x), atol=1e-12)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), layer(x), atol=1e-12)
        layer.filter.last.weight.mul_(2)
        assert torch.allclose(compiled(x), layer(x), atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="side must be at least 1; it was 0"):
        HyenaPixel(4, 0)
    with pytest.raises(ValueError, match="short must be at least 1 and odd; it was 4"):
        HyenaPixel(4, 5, short=4)
    with pytest.raises(ValueError, match="multiple of 4"):
        HyenaPixel(4, 5, features=6)
    with pytest.raises(ValueError, match=r"features must be odd.* it was 8"):
        Hyena(4, 5, features=8)
    with pytest.raises(ValueError, match="length must be at least 1; it was 0"):
        Hyena(4, 0)
    with pytest.raises(ValueError, match="side must be at least 1; it was 0"):
        pixel().resize(0)
    with pytest.raises(ValueError, match=r"\(B, H, W, 4\); it was \(2, 5, 4\)"):
        pixel()(torch.zeros(2, 5, 4).double())
    with pytest.raises(ValueError, match=r"\(B, \*grid, 4\); it was \(2, 5, 3\)"):
        sequence()(torch.zeros(2, 5, 3).double())
    for keys in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"keys must be booleans \(2, 5\)"):
            sequence()(torch.zeros(2, 5, 4).double(), keys=keys)
