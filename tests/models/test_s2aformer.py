"""S020: S2AFormer in our reading: any image from 29, strides of 4 to 32, gradients everywhere, its order of parts."""

import pytest
import torch

import glocal
from glocal.models.vision.s2aformer import HybridPerceptionBlock, S2AFormer
from glocal.nn.strip import StripAttention
from tests.models.networks import assert_a_step_changes, assert_exports


def small(**options):
    torch.manual_seed(0)
    return S2AFormer((16, 24), (1, 2), (1, 2), (4, 1), **({"num_classes": 5} | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (13, 90)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    quarter = [(n + 3) // 4 for n in size]
    assert [tuple(m.shape) for m in maps] == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 24)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_the_named_network():
    model = glocal.create("s2aformer_ref_tiny", num_classes=5).eval()
    maps = model.forward_features(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 24, 32), (8, 12, 64), (4, 6, 128), (2, 3, 192)]
    layers = [m for m in model.modules() if isinstance(m, StripAttention)]
    assert [layer.reduction for layer in layers] == [8, 8, 4, 4, 2, 2, 2, 2, 1, 1]
    assert all(layer.q_proj.out_features == layer.num_heads for layer in layers)


def test_the_order_of_a_block():
    torch.manual_seed(0)
    block = HybridPerceptionBlock(8, StripAttention(8, 2, reduction=2)).eval()
    x = torch.randn(2, 4, 6, 8)
    one = block.dw(x) + x
    two = block.attention(block.norm1(one)) + one
    three = block.local(block.norm2(two)) + two
    torch.testing.assert_close(block(x), block.mlp(block.norm3(three)) + three)
    assert not torch.allclose(HybridPerceptionBlock(8, block.attention, local=False)(x), block(x))


def test_one_step_of_training_reaches_every_weight():
    model = small(drop_path=0.2).train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        # A bias that all keys share leaves softmax as it is.
        assert p.grad is not None, name
        assert name.endswith("k_proj.bias") or p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="depths must have one entry a stage"):
        S2AFormer((16, 32), (1,))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
