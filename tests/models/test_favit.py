"""S002: FaViT's published sizes, images of any size from 29, gradients everywhere."""

import pytest
import torch

import glocal
from glocal.models.vision.favit import FaViT
from tests.models.networks import assert_a_step_changes, assert_exports

PUBLISHED = {"favit_b0": 3_427_704, "favit_b1": 12_958_568, "favit_b2": 24_919_896, "favit_b3": 48_746_440}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    with torch.device("meta"):
        model = glocal.create(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def small(**options):
    torch.manual_seed(0)
    return FaViT((16, 32), (1, 2), (1, 2), (2, 2), (4, 1), **({"num_classes": 5} | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (13, 90)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    quarter = [(n + 3) // 4 for n in size]
    assert [tuple(m.shape) for m in maps] == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 32)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_the_smallest_image_of_a_published_network():
    model = glocal.create("favit_b0", depths=(1, 1, 1, 1), num_classes=5).eval()
    assert model(torch.randn(1, 3, 29, 29)).shape == (1, 5)
    with pytest.raises(ValueError, match="8 places a side"):
        model(torch.randn(1, 3, 28, 29))


def test_one_step_of_training_reaches_every_weight():
    model = small(drop_path=0.2, fusion="flat").train()
    x, y = torch.randn(8, 3, 64, 64), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_the_start():
    model = glocal.create("favit_b0")
    conv = model.stages[2][0].mlp.dw  # 9 weights a channel, each channel for itself
    assert conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.embed[3][0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    assert model.stages[3][0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="depths must have one entry a stage"):
        FaViT((16, 32), (1,))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
