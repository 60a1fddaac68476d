"""S037: L2ViT's published sizes, its windows, any image, gradients everywhere."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import glocal
from glocal.models.vision.l2vit import GlobalBlock, L2ViT, WindowBlock
from tests.models.networks import assert_a_step_changes, assert_exports

PUBLISHED = {
    "l2vit_tiny": 28_596_781,
    "l2vit_small": 50_199_157,
    "l2vit_base": 88_577_188,
    "l2vit_base_384": 88_577_188,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    with torch.device("meta"):
        model = glocal.create(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    for level in model.levels:
        assert [type(block) for block in level] == [WindowBlock, GlobalBlock] * (len(level) // 2)
        assert level[0].window == (12 if name.endswith("384") else 7)


def small(**options):
    torch.manual_seed(0)
    return L2ViT(16, (1, 2), (1, 2), **({"denom_min": 1.0, "num_classes": 5} | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (7, 9), (1, 1)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    half = [(n + 1) // 2 for n in size]
    quarter = [(n + 1) // 2 for n in half]
    assert [tuple(m.shape) for m in maps] == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 32)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def windows(block, x):
    """The block's attention of one window, by torch."""
    layer = block.attention
    q, k, v = (layer.heads(p(x), layer.num_heads).flatten(2, 3) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    mixed = scaled_dot_product_attention(q, k, v)
    return layer.o_proj(mixed.movedim(1, -2).flatten(-2)).view_as(x)


def test_a_map_of_one_window_is_torchs_attention():
    block = WindowBlock(16, 2).double()
    x = torch.randn(2, 7, 7, 16).double()
    torch.testing.assert_close(block._attend(x), windows(block, x))


def test_windows_do_not_see_each_other_and_zeros_fill_the_last():
    block = WindowBlock(16, 2, window=4).double()
    torch.nn.init.normal_(block.attention.k_proj.bias)
    torch.nn.init.normal_(block.attention.v_proj.bias)
    x = torch.randn(2, 6, 9, 16).double()
    full = torch.zeros(2, 8, 12, 16).double()
    full[:, :6, :9] = x
    wanted = torch.empty_like(full)
    for top in (0, 4):
        for left in (0, 4, 8):
            part = full[:, top : top + 4, left : left + 4]
            wanted[:, top : top + 4, left : left + 4] = windows(block, part)
    torch.testing.assert_close(block._attend(x), wanted[:, :6, :9])


def test_the_order_of_a_global_block():
    """Position, attention, concentration, feed-forward, each added."""
    block = GlobalBlock(16, 2, denom_min=1.0).eval()
    x = y = torch.randn(2, 5, 6, 16)
    y = y + block.position(y)
    y = y + block.attention(block.norm1(y))
    y = y + block.local[1](block.local[0](y))
    y = y + block.mlp(block.norm2(y))
    assert torch.allclose(block(x), y)
    assert GlobalBlock(16, 2, concentrate=False).local is None


def test_one_step_of_training_reaches_every_weight():
    model = small(drop_path=0.2).train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    # A bias before a batch norm is taken off again, and one that all keys share leaves softmax as it is.
    dead = {"stem.conv1.bias", "stem.conv2.bias"}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        soft = ".0.attention.k_proj.bias" in name
        assert name in dead or soft or p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_start_values():
    model = small()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
    convolutions = torch.cat([p.flatten() for n, p in model.named_parameters() if "conv" in n and n.endswith("weight")])
    assert 0.015 < convolutions.std() < 0.02 and convolutions.abs().max() < 2.01


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a level"):
        L2ViT(16, (1, 2), (1,))
    with pytest.raises(ValueError, match="window must be at least 1"):
        small(window=0)
    with pytest.raises(ValueError, match="denom_min must be more than 0"):
        small(denom_min=-1.0)
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
