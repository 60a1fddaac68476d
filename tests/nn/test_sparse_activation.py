"""S062: Top-K activations against numpy's argpartition, limits, idempotence and finite differences; in networks."""

import numpy as np
import pytest
import torch
from torch import nn

from glocal.models.language.transformer import Transformer
from glocal.nn import MLP, Attention, Block, Rope, SwiGLU, TopKActivation, insert_top_k

from ..models.networks import assert_exports
from ..peers import load_timm

AXES = pytest.mark.parametrize("axis", ["space", "channel"])
SHAPES = pytest.mark.parametrize(
    ("shape", "channel_dim"), [((2, 3, 5, 7), 1), ((2, 11, 4), -1), ((2, 3, 5, 6), -1), ((1, 6, 9), 1), ((2, 1, 1), -1)]
)


def by_numpy(x, fraction, axis, channel_dim):
    rows = np.moveaxis(x, channel_dim, 1)
    shape = rows.shape
    rows = rows.reshape(*shape[:2], -1)
    out = np.zeros_like(rows)
    for b in range(len(rows)):
        for n in range(rows.shape[1 if axis == "space" else 2]):
            at = (b, n) if axis == "space" else (b, slice(None), n)
            row = rows[at]
            k = max(1, int(fraction * len(row)))
            kept = np.argpartition(np.abs(row), len(row) - k)[len(row) - k :]
            new = np.zeros_like(row)
            new[kept] = row[kept]
            out[at] = new
    return np.moveaxis(out.reshape(shape), 1, channel_dim)


@AXES
@SHAPES
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.99, 1.0])
def test_it_is_numpy_s_partition(axis, shape, channel_dim, fraction):
    x = torch.randn(shape, dtype=torch.float64)
    found = TopKActivation(fraction, axis=axis, channel_dim=channel_dim)(x)
    np.testing.assert_array_equal(found.numpy(), by_numpy(x.numpy(), fraction, axis, channel_dim))


@pytest.mark.parametrize(("fraction", "kept"), [(1e-9, 1), (0.1, 3), (0.5, 17), (0.999, 34)])
def test_how_many_are_kept(fraction, kept):
    x = torch.randn(4, 6, 5, 7)
    assert (TopKActivation(fraction, channel_dim=1)(x).flatten(2) != 0).sum(-1).eq(kept).all()
    assert (TopKActivation(fraction, axis="channel")(torch.randn(4, 9, 35)) != 0).sum(-1).eq(kept).all()


@AXES
def test_ties_keep_no_more(axis):
    assert (TopKActivation(0.5, axis=axis)(torch.ones(2, 8, 6)) != 0).sum() == 48


@AXES
@SHAPES
def test_all_is_the_input_and_twice_is_once(axis, shape, channel_dim):
    x = torch.randn(shape)
    assert torch.equal(TopKActivation(1.0, axis=axis, channel_dim=channel_dim)(x), x)
    layer = TopKActivation(0.3, axis=axis, channel_dim=channel_dim)
    once = layer(x)
    assert torch.equal(layer(once), once)


@AXES
def test_the_mix(axis):
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    full, none, some = (TopKActivation(0.3, axis=axis, mix=m)(x) for m in (1.0, 0.0, 0.25))
    assert torch.equal(none, x)
    torch.testing.assert_close(some, 0.25 * full + 0.75 * x)


@AXES
@pytest.mark.parametrize("mix", [1.0, 0.6])
def test_gradients(axis, mix):
    layer = TopKActivation(0.4, axis=axis, mix=mix)
    # Values that are far apart, so that a small step changes no rank.
    x = (torch.randperm(2 * 6 * 5).double() - 30.25).view(2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    grad = torch.autograd.grad(layer(x).sum(), x)[0]
    np.testing.assert_allclose(grad.numpy(), mix * (by_numpy(x.detach().numpy(), 0.4, axis, -1) != 0) + 1 - mix)


def test_channels_of_a_token_do_not_look_at_others():
    layer, x = TopKActivation(0.3, axis="channel"), torch.randn(1, 9, 10)
    torch.testing.assert_close(layer(x)[:, :4], layer(x[:, :4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_memory_that_is_not_contiguous(dtype):
    x = torch.randn(2, 7, 5, 6).to(dtype).transpose(1, 3)
    before = x.clone()
    found = TopKActivation(0.3)(x)
    assert found.dtype == dtype and torch.equal(found, TopKActivation(0.3)(x.contiguous())) and torch.equal(x, before)


def test_bad_input():
    for fraction in (0, 1.1):
        with pytest.raises(ValueError, match="fraction must be above 0 and at most 1"):
            TopKActivation(fraction)
    with pytest.raises(ValueError, match="axis must be 'space' or 'channel'; it was 'tokens'"):
        TopKActivation(axis="tokens")
    with pytest.raises(ValueError, match="channel_dim must be 1 or -1; it was 2"):
        TopKActivation(channel_dim=2)
    with pytest.raises(ValueError, match="mix must be from 0 to 1; it was 2"):
        TopKActivation(mix=2)
    with pytest.raises(ValueError, match="x must have a batch, channels and a grid"):
        TopKActivation()(torch.randn(3, 4))


# In networks.


@AXES
def test_in_timms_vision_transformer(axis):
    """Every block computed by hand from timm's own layers."""
    torch.manual_seed(0)
    timm = load_timm("models.vision_transformer")
    build = {"depth": 2, "img_size": 32, "num_classes": 4}
    vit, model = timm.vit_tiny_patch16_224(**build).eval(), timm.vit_tiny_patch16_224(**build).eval()
    model.load_state_dict(vit.state_dict())
    assert len(insert_top_k(model, 0.3, axis=axis)) == 2 and model.state_dict().keys() == vit.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    t = vit._pos_embed(vit.patch_embed(x))
    for block in vit.blocks:
        t = t + block.attn(block.norm1(t))
        hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(t))).detach()
        t = t + block.mlp.fc2(torch.from_numpy(by_numpy(hidden.numpy(), 0.3, axis, -1)))
    torch.testing.assert_close(model.forward_features(x), vit.norm(t))


def blocks(mlp=MLP, **options):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(8, Attention(8, 2, **options), mlp(8, 16)) for _ in range(2)])


def test_a_causal_model_stays_causal():
    model = blocks(causal=True, rope=Rope()).eval()
    assert [layer.axis for layer in insert_top_k(model)] == ["channel", "channel"]
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(model(x)[:, :4], model(x[:, :4]))


def test_all_that_is_kept_trains_and_exports():
    model = blocks()
    insert_top_k(model, 0.5)
    model(torch.randn(2, 6, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert_exports(model.eval(), torch.randn(2, 6, 8))


def test_insertion_that_cannot_be():
    with pytest.raises(ValueError, match="model must have feed-forwards with fc1, act and fc2"):
        insert_top_k(blocks(SwiGLU))
    with pytest.raises(ValueError, match="model must have feed-forwards"):
        insert_top_k(Transformer(9, 16, [lambda dim: Attention(dim, 2)]))
    with pytest.raises(ValueError, match="axis must be 'channel' in a causal model"):
        insert_top_k(blocks(causal=True), axis="space")
    model = blocks()
    insert_top_k(model)
    with pytest.raises(ValueError, match="has TopKActivation"):
        insert_top_k(model)
