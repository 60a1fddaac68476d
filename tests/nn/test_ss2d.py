"""S019, S115: four scans of a map by loops, their symmetries and reach, and the gated layer around them."""

import itertools

import pytest
import torch
from torch.nn.functional import conv2d, layer_norm, silu, softplus

from glocal.inspect.uses import reach
from glocal.nn.ss2d import SS2D, CrossScan

WAYS = {  # the places of a map in the order of each scan
    0: lambda h, w: [(i, j) for i in range(h) for j in range(w)],
    1: lambda h, w: [(i, j) for j in range(w) for i in range(h)],
    2: lambda h, w: [(i, j) for i in reversed(range(h)) for j in reversed(range(w))],
    3: lambda h, w: [(i, j) for j in reversed(range(w)) for i in reversed(range(h))],
}


def make(kind=CrossScan, dim=5, **options):
    torch.manual_seed(0)
    layer = kind(dim, **options).double()
    for name, p in layer.named_parameters():
        if name.endswith(("D", "A_log")):  # else all channels have the same
            torch.nn.init.normal_(p)
    return layer


def definition(layer, x):
    """Scan after scan, place after place."""
    out = torch.zeros_like(x)
    for k, way in WAYS.items():
        h = torch.zeros(x.shape[0], layer.dim, layer.state, dtype=x.dtype)
        rates = -layer.A_log[k].exp()
        for i, j in way(*x.shape[1:3]):
            u = x[:, i, j]
            step, b, c = (u @ layer.x_proj[k].T).split([layer.rank, layer.state, layer.state], -1)
            delta = softplus(step @ layer.dt_weight[k].T + layer.dt_bias[k])
            h = torch.exp(delta[..., None] * rates) * h + (delta * u)[..., None] * b[:, None]
            y = (h * c[:, None]).sum(-1) + layer.D[k] * u
            out = out.index_put((torch.arange(len(x))[:, None], torch.tensor(i), torch.tensor(j)), y[:, None], True)
    return out


@pytest.mark.parametrize("state,size", [(1, (3, 5)), (16, (4, 2)), (2, (1, 6)), (1, (1, 1))])
def test_by_definition_with_gradients(state, size):
    layer = make(state=state)
    x = torch.randn(2, *size, 5, dtype=torch.double, requires_grad=True)
    found = []
    for out in (layer(x), definition(layer, x)):
        weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def tie(layer, pairs):
    with torch.no_grad():
        for p, (a, b) in itertools.product(layer.parameters(), pairs):
            p[b] = p[a]
    return layer


def test_turned_by_half_the_map_gives_the_map_turned_where_opposite_scans_share_weights():
    x = torch.randn(1, 4, 6, 5, dtype=torch.double)
    tied = tie(make(state=2), ((0, 2), (1, 3)))
    torch.testing.assert_close(tied(x.flip(1, 2)), tied(x).flip(1, 2))
    free = make(state=2)
    assert not torch.allclose(free(x.flip(1, 2)), free(x).flip(1, 2))


def test_transposed_where_rows_and_columns_share_weights():
    x = torch.randn(1, 4, 6, 5, dtype=torch.double)
    tied = tie(make(state=2), ((0, 1), (2, 3)))
    torch.testing.assert_close(tied(x.transpose(1, 2)), tied(x).transpose(1, 2))


def test_every_place_reaches_every_place_and_one_scan_only_what_follows():
    x = torch.randn(1, 3, 4, 5, dtype=torch.double)
    layer = make()
    assert reach(layer, x).all()
    with torch.no_grad():  # only the first scan is read
        layer.x_proj[1:, -1] = 0
        layer.D[1:] = 0
    assert torch.equal(reach(layer, x), torch.ones(12, 12, dtype=torch.bool).tril())


def test_starts_as_mamba_does():
    layer = CrossScan(64, 16)
    step = softplus(layer.dt_bias)
    assert layer.rank == 4 and 1e-3 * 0.99 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17).expand(4, 64, 16))
    assert torch.equal(layer.D, torch.ones(4, 64)) and layer.dt_weight.abs().max() <= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_input_only(dtype):
    layer = make(state=16).float()
    x = torch.randn(2, 9, 9, 5).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), layer(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x.float()), layer.double()(x.double()).float(), atol=1e-4, rtol=1e-4)


def test_the_gated_layer_by_definition():
    layer = make(SS2D, 6, state=3)
    x = torch.randn(2, 4, 5, 6, dtype=torch.double)
    u, gate = (x @ layer.in_proj.weight.T).chunk(2, -1)
    u = silu(conv2d(u.movedim(-1, 1), layer.conv.weight, layer.conv.bias, padding=1, groups=12).movedim(1, -1))
    y = layer_norm(definition(layer.scan, u), (12,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(x), (y * silu(gate)) @ layer.out_proj.weight.T)


def test_modulation_acts_before_and_after_the_norm():
    layer = make(SS2D, 6, state=3)
    x = torch.randn(2, 4, 5, 6, dtype=torch.double)
    none = torch.zeros(2, 1, 1, 1, dtype=torch.double)
    assert torch.equal(layer(x, (none, none, none)), layer(x))
    # The norm undoes a positive scale before it, but for eps; turned around, y changes its sign.
    layer.norm.bias.data.zero_()
    layer.norm.eps = 0.0
    torch.testing.assert_close(layer(x, (none + 1, none, none)), layer(x))
    torch.testing.assert_close(layer(x, (none - 2, none, none)), -layer(x))
    torch.testing.assert_close(layer(x, (none, none + 1, none)), 2 * layer(x))
    _, gate = layer.in_proj(x).chunk(2, -1)
    torch.testing.assert_close(layer(x, (none, none - 1, none + 3)), 3 * layer.out_proj(silu(gate)))


def test_parameters_of_sums_encoder():
    """57,501,196 of the network without the 13,859,212 outside: stages of a norm and the layer, and merges between."""
    dims, depths = (96, 192, 384, 768), (2, 2, 27, 2)
    with torch.device("meta"):
        layers = {dim: sum(p.numel() for p in SS2D(dim).parameters()) for dim in dims}
    blocks = sum(depth * (layers[dim] + 2 * dim) for dim, depth in zip(dims, depths, strict=True))
    merges = sum(2 * 4 * dim + 4 * dim * 2 * dim for dim in dims[:3])
    assert blocks + merges == 57_501_196 - 13_859_212


def test_refuses():
    with pytest.raises(ValueError, match="state of CrossScan must be at least 1; it was 0"):
        CrossScan(8, 0)
    for shape in ((2, 5, 8), (2, 5, 7, 9)):
        with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\)"):
            CrossScan(8)(torch.randn(shape))
