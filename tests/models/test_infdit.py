"""S093, the network: block by block equals all at once, what reads what, and the diffusion around it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate, layer_norm, pad, scaled_dot_product_attention

import glocal
from glocal.cache import BlockRowCache
from glocal.models.vision.infdit import InfDiT, denoise, denoising_loss, heun, noise_levels, upscale


def make(**options):
    torch.manual_seed(0)
    model = glocal.create("infdit_tiny", **options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(height, width, batch=2):
    torch.manual_seed(1)
    sizes = ((batch, 3, 8 * height, 8 * width), (batch,), (batch, 3, 4 * height, 4 * width), (batch, 12))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("direction", ["lt", "rb"])
@pytest.mark.parametrize("border", ["replicate", "drop"])
@pytest.mark.parametrize("side", [1, 2])
def test_block_by_block_equals_all_at_once(side, border, direction):
    model, given = make(border=border), inputs(3, 4)
    with torch.no_grad():
        want = model(*given, direction=direction, offset=(5, 7))
    torch.testing.assert_close(model.by_blocks(*given, side=side, direction=direction, offset=(5, 7)), want)


def test_pieces_hold_one_block_row():
    model, given = make(depth=2), inputs(5, 3)
    rows = [BlockRowCache(3) for _ in range(2)]
    with torch.no_grad():
        held = [rows[0].numel for _ in model.pieces(*given, rows=rows)]
    one_block = 2 * 2 * 16 * 32  # keys and values, batch, positions, channels
    assert max(held) == one_block * (3 + 1 + 1) and rows[0].numel == rows[1].numel


def test_one_block_is_a_plain_transformer():
    """The whole network again, for an image of one block without replicated neighbours."""
    model, (x, noise, low, image) = make(border="drop", depth=2), inputs(1, 1)

    def attention(layer, x, context, at, places):
        q, k, v = layer.q_proj(x), layer.k_proj(context), layer.v_proj(context)
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v))
        q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = (
            (q + places[0], k + places[1])
            if places
            else (layer.rope(q, at), layer.rope(k, at) + layer.roles[0][:, None])
        )
        return layer.o_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    both = torch.cat([x, interpolate(low, scale_factor=2, mode="bicubic")], 1)
    tokens = model.embed(both).flatten(2).mT
    rate = 10000.0 ** -(torch.arange(128) / 128)
    angle = noise[:, None] * rate.double()
    condition = model.time(torch.cat([angle.cos(), angle.sin()], -1)) + model.image(image)
    near = pad(model.embed_low(low), (2, 2, 2, 2)).flatten(2).mT
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    for block in model.blocks:
        shift1, scale1, shift2, scale2 = block.modulation(condition)[:, None].chunk(4, -1)
        h = layer_norm(tokens, (32,), eps=1e-6) * (1 + scale1) + shift1
        tokens = tokens + attention(block.attention, h, h, at, None)
        if block.cross is not None:
            places = (block.cross.q_places, block.cross.k_places)
            tokens = tokens + attention(block.cross, layer_norm(tokens, (32,), eps=1e-6), near, at, places)
        tokens = tokens + block.mlp(layer_norm(tokens, (32,), eps=1e-6) * (1 + scale2) + shift2)
    shift, scale = model.modulation(condition)[:, None].chunk(2, -1)
    pixels = model.head(layer_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift)
    want = torch.zeros_like(x)
    for n, (i, j) in enumerate(at.tolist()):
        want[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = pixels[:, n].view(-1, 2, 2, 3).permute(0, 3, 1, 2)
    # The angles of the time are float32 there and here.
    torch.testing.assert_close(model(x, noise, low, image), want, atol=1e-5, rtol=1e-5)


def test_the_small_image_is_read_in_the_blocks_around_by_the_first_layer():
    model, (x, noise, low, _) = make(depth=1), inputs(4, 4, 1)
    out = model(x, noise, low)
    other = low.clone()
    other[:, :, 0, 0] += 1  # the first block: three pixels of the enlarged image at most, and 3 x 3 blocks
    changed = (model(x, noise, other) - out).abs().view(1, 3, 4, 8, 4, 8).amax((0, 1, 3, 5)) > 1e-12
    assert changed.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("direction", ["lt", "rb"])
def test_pixels_reach_blocks_in_one_direction_within_the_depth(direction):
    model, (x, noise, low, _) = make(depth=2), inputs(4, 4, 1)
    out = model(x, noise, low, direction=direction)
    other = x.clone()
    other[:, :, 8:16, 8:16] += 1
    moved = (model(other, noise, low, direction=direction) - out).abs()
    reached = moved.view(1, 3, 4, 8, 4, 8).amax((0, 1, 3, 5)) > 1e-12
    block = torch.arange(4)
    line = (block >= 1) & (block <= 3) if direction == "lt" else block <= 1
    assert torch.equal(reached, line[:, None] & line)


def test_every_parameter_learns():
    model, (x, _, low, image) = make(), inputs(2, 2)
    denoising_loss(lambda x, noise: model(x, noise, low, image), x).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_published_size():
    with torch.device("meta"):
        model = glocal.create("infdit")
    count = sum(p.numel() for p in model.parameters())
    assert 700e6 < count < 800e6
    assert len(model.blocks) == 28 and model.blocks[0].attention.block_size == 32
    assert model.blocks[0].cross.k_places.shape == (16, 48 * 48, 80) and model.blocks[1].cross is None
    x, low = torch.zeros(1, 3, 256, 128, device="meta"), torch.zeros(1, 3, 64, 32, device="meta")
    assert model.embed(torch.cat([x, x], 1)).shape == (1, 1280, 64, 32) and low.shape[2] * 4 == 256


def test_conditions_start_at_zero():
    torch.manual_seed(0)
    model = glocal.create("infdit_tiny")
    x, noise, low, image = (t.float() for t in inputs(1, 2))
    out = model(x, noise, low, image)
    assert torch.equal(out, model(x, noise + 1, low, 2 * image)) and float(out.detach().std()) > 0


def gaussian(x, sigma):
    """The best denoiser of Gaussian data of deviation 0.5."""
    s = sigma[:, None, None, None]
    return x * 0.25 / (0.25 + s**2)


def test_preconditioning_is_karras_et_al():
    x, sigma = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.3, 7.0], dtype=torch.float64)
    torch.testing.assert_close(denoise(lambda x, noise: torch.zeros_like(x), x, sigma), gaussian(x, sigma))
    seen = {}
    denoise(lambda x, noise: seen.update(x=x, noise=noise) or x, x, sigma)
    torch.testing.assert_close(seen["noise"], sigma.log() / 4)
    s = sigma[:, None, None, None]
    torch.testing.assert_close(seen["x"], x / (0.25 + s**2).sqrt())
    # Whatever the noise, the target of the network has variance one: its weighted loss at zero output is one.
    clean = 0.5 * torch.randn(4000, 3, 2, 2, dtype=torch.float64)
    loss = denoising_loss(lambda x, noise: torch.zeros_like(x), clean, torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(1, abs=0.05)


def test_sampler_solves_the_gaussian_case():
    levels = noise_levels(20)
    assert levels[[0, -2, -1]].tolist() == pytest.approx([40, 0.002, 0])
    x = 40 * torch.randn(1, 3, 4, 4, dtype=torch.float64)
    exact = x * 0.5 / (0.25 + 40.0**2) ** 0.5
    errors = [float((heun(gaussian, x, noise_levels(n)) / exact - 1).abs().max()) for n in (20, 40, 80)]
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3  # second order


@pytest.mark.parametrize("alternate", [False, True])
def test_upscaling_block_by_block_equals_all_at_once(alternate):
    model, (_, _, low, image) = make(depth=2), inputs(2, 3, 1)
    found = [
        upscale(model, low, image, steps=3, side=side, alternate=alternate, generator=torch.Generator().manual_seed(0))
        for side in (None, 1, 2)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    more = upscale(model, low, image, steps=3, from_low=True, generator=torch.Generator().manual_seed(0))
    assert more.shape == (1, 3, 16, 24) and not torch.allclose(more, found[0])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="block must be a multiple of patch 4 and of 8; it was 12"):
        InfDiT(32, 1, 2, block=12)
    model, (x, noise, low, image) = make(), inputs(2, 2)
    with pytest.raises(ValueError, match=r"x must be .* whole blocks of 8 pixels"):
        model(x[..., :-1], noise, low)
    with pytest.raises(ValueError, match="low must be"):
        model(x, noise, x)
    with pytest.raises(ValueError, match="side must be at least 1; it was 0"):
        model.by_blocks(x, noise, low, side=0)
    with pytest.raises(ValueError, match="image must be None"):
        make(image_dim=0)(x, noise, low, image)
    with pytest.raises(ValueError, match="steps must be at least 2; it was 1"):
        noise_levels(1)
