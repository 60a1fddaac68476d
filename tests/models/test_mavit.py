"""S021: MAViT's published sizes, any image, gradients everywhere, and what its levels are."""

import pytest
import torch

import glocal
from glocal.models.vision.mavit import MAViT
from glocal.nn import Attention, MagnitudeAwareAttention, Rope
from tests.models.networks import assert_a_step_changes, assert_exports

PUBLISHED = {"mavit_tiny": 16_449_128, "mavit_small": 27_142_568, "mavit_base": 49_792_648, "mavit_large": 97_766_088}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    with torch.device("meta"):
        model = glocal.create(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    kinds = [type(level[0].mixer) for level in model.levels]
    assert kinds == [MagnitudeAwareAttention] * 2 + [Attention] * 2


def small(**options):
    torch.manual_seed(0)
    settings = dict(linear=1, layer_scale=(1.0, 1e-6), projected=24, num_classes=5)
    return MAViT((16, 32), (1, 2), (1, 2), **(settings | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (7, 9)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    half = [(n + 1) // 2 for n in size]
    quarter = [(n + 1) // 2 for n in half]
    assert [tuple(m.shape) for m in maps] == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 32)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_one_step_of_training_reaches_every_weight():
    model = small(drop_path=0.2).train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    # A bias before a batch norm is taken off again, and one that all keys share leaves softmax as it is.
    dead = {"stem.0.bias", "stem.3.bias", "stem.6.bias", "stem.9.bias", "down.0.0.bias", "proj.0.bias"}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert name in dead or "k_proj.bias" in name or p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_the_angles_are_those_of_the_paper():
    """D / 4 wavelengths for rows and as many for columns, from 1 to 10,000 with both ends, in neighbouring channels."""
    rope = Rope(axes=2, interleaved=True, endpoint=True)
    rates = 10000 ** -torch.linspace(0, 1, 4)
    x = torch.randn(16)
    for at, part in (((3, 0), slice(0, 8)), ((0, 3), slice(8, 16))):
        turned = rope(x[None], torch.tensor([at]))[0]
        pairs = torch.view_as_complex(x[part].view(4, 2)) * torch.polar(torch.ones(4), 3 * rates)
        assert torch.allclose(turned[part], torch.view_as_real(pairs).flatten(), atol=1e-5)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a level"):
        MAViT((16, 32), (1,), (1, 2))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
