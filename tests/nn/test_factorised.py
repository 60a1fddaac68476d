"""S002: factorised attention by unfold and by loops, against PVT and full attention, and what each place sees."""

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, pad, scaled_dot_product_attention, unfold

from glocal.nn.factorised import FactorizedAttention
from tests.peers import load_timm


def make(dim=32, heads=2, **options):
    torch.manual_seed(0)
    return FactorizedAttention(dim, heads, **options).double()


def local_map(layer, x):
    """Depthwise, then channels; the map that keys and values of the local groups come from."""
    dw, pw = layer.local
    x = x[..., layer.thin :].movedim(-1, 1)
    x = nn.functional.conv2d(x, dw.weight, dw.bias, padding=1, groups=x.shape[1])
    return nn.functional.conv2d(x, pw.weight[..., None, None], pw.bias)


def by_definition(layer, x, fusion):
    """The layer by its definition, channels first, with windows by unfold."""
    b, h, w, c = x.shape
    heads, n = layer.num_heads, h * w
    q = layer.q_proj(x).view(b, n, c)
    small = layer.reduce(x[..., : layer.thin].movedim(-1, 1))
    k, v = layer.kv_proj(layer.norm(small.movedim(1, -1))).chunk(2, -1)
    v = v + nn.functional.conv2d(
        v.movedim(-1, 1), layer.v_dw.weight, layer.v_dw.bias, padding=1, groups=layer.thin
    ).movedim(1, -1)
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    outs = [(q[..., : layer.thin] @ k.mT * layer.thin**-0.5).softmax(-1) @ v]
    by_head = q[..., layer.thin :].view(b, n, heads, -1)
    start, size = 0, layer.group
    for number, (own, d) in enumerate(zip(layer.groups, (1, layer.reduction), strict=False)):
        e, extent = size // heads, 6 * d + 1
        t = local_map(layer, x)[:, start : start + size]
        t = pad(t, (0, -w % extent, 0, -h % extent), "reflect")
        t = unfold(t, 7, d, 0, extent).view(b, heads, e, 49, -1).permute(0, 1, 3, 4, 2)  # (b, heads, 49, windows, e)
        if fusion == "mean":
            fused = t.mean(3)
        else:
            fused = adaptive_avg_pool1d(t.flatten(0, 2).flatten(1)[:, None], e)[:, 0].view(b, heads, 49, e)
        k, v = own.kv_proj(own.fuse_proj(fused)).split(e, -1)
        square = v.transpose(2, 3).reshape(b, size, 7, 7)
        square = square + nn.functional.conv2d(square, own.dw.weight, own.dw.bias, padding=1, groups=size)
        v = square.view(b, heads, e, 49).transpose(2, 3)
        part = by_head[..., number * e : (number + 1) * e].transpose(1, 2)
        outs.append(((part @ k.mT * e**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, size))
        start += size
    return layer.o_proj(torch.cat(outs, -1)).view(b, h, w, c)


@pytest.mark.parametrize("fusion", ["mean", "flat"])
@pytest.mark.parametrize(("grid", "reduction"), [((14, 21), 2), ((7, 7), 1), ((9, 15), 1), ((26, 14), 2)])
def test_by_definition(grid, reduction, fusion):
    layer = make(reduction=reduction, fusion=fusion)
    x = torch.randn(2, *grid, 32).double().requires_grad_()
    found, wanted = layer(x), by_definition(layer, x, fusion)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(found)
    inputs = [x, *layer.parameters()]
    one, other = (torch.autograd.grad((t * weights).sum(), inputs) for t in (found, wanted))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_mean_over_windows_by_loops():
    layer = make(reduction=2)
    x = torch.randn(1, 14, 21, layer.group).double()

    def at(i, n):
        """A place beyond the border, in the mirror."""
        return i if i < n else 2 * (n - 1) - i

    for own, d in zip(layer.groups, (1, 2), strict=True):
        extent = 6 * d + 1
        rows, columns = -(-14 // extent), -(-21 // extent)
        total = torch.zeros(7, 7, layer.group).double()
        for a in range(rows):
            for b in range(columns):
                for i in range(7):
                    for j in range(7):
                        total[i, j] += x[0, at(a * extent + i * d, 14), at(b * extent + j * d, 21)]
        torch.testing.assert_close(own.windows(x).mean(1)[0], total / (rows * columns))


def test_one_window_is_softmax_attention_over_its_49_tokens():
    layer = make(heads=2)
    x = torch.randn(2, 7, 7, 32).double()
    (own,) = layer.groups
    tokens = local_map(layer, x).view(2, 2, -1, 49).transpose(2, 3)
    k, v = own.kv_proj(own.fuse_proj(tokens)).chunk(2, -1)
    nn.init.zeros_(own.dw.weight), nn.init.zeros_(own.dw.bias)
    q = layer.q_proj(x)[..., layer.thin :].view(2, 49, 2, -1).transpose(1, 2)
    wanted = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 7, -1)
    layer.o_proj = nn.Identity()
    torch.testing.assert_close(layer(x)[..., layer.thin :], wanted)
    for fusion in ("mean", "flat"):  # of one window there is nothing to fuse
        own.fusion = fusion
        torch.testing.assert_close(layer(x)[..., layer.thin :], wanted)


def test_the_global_group_is_the_attention_of_pvt():
    kind = load_timm("models.pvt_v2").Attention
    layer = make(64, 1, reduction=4)
    thin = layer.thin
    peer = kind(thin, num_heads=1, sr_ratio=4, linear_attn=False, qkv_bias=True).double().eval()
    nn.init.zeros_(layer.v_dw.weight), nn.init.zeros_(layer.v_dw.bias)
    with torch.no_grad():
        layer.q_proj.weight[:thin] = 0  # the peer's queries know no other channels
        layer.q_proj.weight[:thin, :thin] = peer.q.weight
        layer.q_proj.bias[:thin] = peer.q.bias
    layer.kv_proj.load_state_dict(peer.kv.state_dict())
    layer.reduce.load_state_dict(peer.sr.state_dict())
    layer.norm.load_state_dict(peer.norm.state_dict())
    layer.o_proj = nn.Identity()
    x = torch.randn(2, 8, 12, 64).double()
    theirs = peer(x[..., :thin].flatten(1, 2), (8, 12)).view(2, 8, 12, thin)
    torch.testing.assert_close(peer.proj(layer(x)[..., :thin]), theirs)


def test_whole_windows_may_change_places():
    layer = make(reduction=2)
    own = layer.groups[0]
    x = torch.randn(1, 14, 21, layer.group).double()
    windows = x.view(1, 2, 7, 3, 7, -1).transpose(2, 3).reshape(1, 6, 7, 7, -1)[:, torch.randperm(6)]
    moved = windows.view(1, 2, 3, 7, 7, -1).transpose(2, 3).reshape(1, 14, 21, -1)
    for mine, theirs in zip(own(moved), own(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    own.fusion = "flat"  # mixes runs of windows and channels: the order counts
    assert not torch.allclose(own(moved)[0], own(x)[0])


def test_every_place_sees_the_corners():
    layer = make(reduction=2)
    x = torch.randn(1, 16, 27, 32).double().requires_grad_()
    for place in ((0, 0), (3, 5), (15, 26)):
        (grad,) = torch.autograd.grad(layer(x)[0][place].sum(), x)
        assert all(grad[0, i, j, layer.thin :].abs().max() > 0 for i in (0, -1) for j in (0, -1))


def test_a_map_too_small_to_mirror_repeats_its_last_places():
    layer = make(reduction=8)
    own = layer.groups[1]
    x = torch.arange(8.0).double().view(1, 1, 8, 1).expand(1, 8, 8, layer.group)
    seen = own.windows(x)[0, 0, :, :, 0]
    assert torch.equal(seen, torch.tensor([0.0, *[7.0] * 6]).double().expand(7, 7))
    assert layer(torch.randn(1, 8, 9, 32).double()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, x = make(reduction=2).float(), torch.randn(1, 14, 15, 32)
    wanted = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), wanted, atol=0.05)


def test_gradients():
    layer = make(16, 1, reduction=2, window=3)
    x = torch.randn(1, 4, 5, 16).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_dropout_is_for_training():
    layer = make(reduction=2, attention_dropout=0.5, dropout=0.5)
    x = torch.randn(1, 14, 14, 32).double()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_bad_input():
    for match, args, options in (
        ("multiple of 16", (24, 1), {"reduction": 2}),
        ("multiple of 8", (20, 1), {}),
        ("num_heads must divide the 14", (32, 4), {"reduction": 2}),
        ("fusion", (32, 2), {"fusion": "max"}),
        ("reduction must", (32, 2), {"reduction": 0}),
        ("attention_dropout", (32, 2), {"attention_dropout": 1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            FactorizedAttention(*args, **options)
    with pytest.raises(ValueError, match="4 places a side"):
        make(reduction=4)(torch.randn(1, 3, 9, 32).double())
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 32\)"):
        make()(torch.randn(1, 49, 32).double())
