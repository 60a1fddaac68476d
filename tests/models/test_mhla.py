"""S060: DeiT's published sizes and what MHLA changes in them, any image, gradients everywhere."""

import pytest
import torch
from torch.nn.functional import pad

import glocal
from glocal.models.vision.mhla import MHLADeiT
from tests.models.networks import assert_a_step_changes, assert_exports

DEIT = {"tiny": (192, 5_717_416), "small": (384, 22_050_664), "base": (768, 86_567_656)}


@pytest.mark.parametrize("name", DEIT)
def test_parameters_are_those_of_deit_but_for_what_differs(name):
    dim, published = DEIT[name]
    with torch.device("meta"):
        model = glocal.create(f"mhla_deit_{name}")
    # No class token with its position, 256 positions for 196, no biases of q, k and v; in each layer a norm more, norms
    # of q and k without biases, a convolution of 5 x 5 and a matrix of 16 x 16.
    changed = -2 * dim + 60 * dim + 12 * (-3 * dim + 2 * dim + 2 * dim + 26 * dim + 256)
    assert sum(p.numel() for p in model.parameters()) == published + changed


def small(**options):
    torch.manual_seed(0)
    settings = dict(patch=4, blocks=(2, 2), size=30, num_classes=5)
    return MHLADeiT(16, 2, 2, **(settings | options))


@pytest.mark.parametrize("size,tokens", [((32, 32), (8, 8)), ((45, 70), (12, 18)), ((3, 9), (2, 4))])
def test_any_size(size, tokens):
    model = small().eval()
    x = torch.randn(2, 3, *size)
    assert model.forward_features(x).shape == (2, *tokens, 16)
    assert model(x).shape == (2, 5)


def test_zeros_are_added_around_the_image():
    model = small().eval()
    x = torch.randn(1, 3, 28, 26)
    assert torch.equal(model(x), model(pad(x, (3, 3, 2, 2))))


def test_a_window_of_224_pixels_is_four_by_four_tokens():
    with torch.device("meta"):
        model = glocal.create("mhla_deit_tiny")
        assert model.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 16, 16, 192)
    layer = model.layers[0].attention[1]
    assert (layer.num_heads, layer.head_dim, layer.blocks, layer.mixing.shape) == (3, 64, (4, 4), (16, 16))


def test_one_step_of_training_reaches_every_weight():
    model = small(drop_path=0.2).train()
    x, y = torch.randn(16, 3, 32, 32), torch.randint(5, (16,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="blocks must be two"):
        small(blocks=(4,))
    with pytest.raises(ValueError, match="patch must be"):
        small(patch=0)
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
