"""S101: Swin's published sizes and what multipole attention changes in them; any size, gradients everywhere."""

import pytest
import torch

import glocal
from glocal.models.vision.mano import MANO, MANOOperator
from tests.models.networks import assert_a_step_changes, assert_exports

SWIN = {"tiny": (96, (2, 2, 6, 2), 28_288_354), "small": (96, (2, 2, 18, 2), 49_606_258)}
SWIN["base"] = (128, (2, 2, 18, 2), 87_768_224)


@pytest.mark.parametrize("sample", ["conv", "average"])
@pytest.mark.parametrize("name", SWIN)
def test_parameters_are_those_of_swin_but_for_what_differs(name, sample):
    dim, depths, published = SWIN[name]
    with torch.device("meta"):
        model = glocal.create(f"mano_{name}", sample=sample)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        # No table of 13 x 13 biases for heads of 32 channels; two norms more, and two convolutions of 2 x 2.
        changed = -169 * width // 32 + 4 * width + (8 * width**2 if sample == "conv" else 0)
        published += depth * changed
    assert sum(p.numel() for p in model.parameters()) == published


def small(**options):
    torch.manual_seed(0)
    return MANO((16, 32), (1, 2), (1, 2), **({"window": 4, "num_classes": 5} | options))


def operator(**options):
    torch.manual_seed(0)
    return MANOOperator(3, 2, **({"dim": 16, "depth": 2, "num_heads": 2, "window": 2} | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (3, 9)])
def test_any_size(size):
    model = small().eval()
    x = torch.randn(2, 3, *size)
    quarter = [-(-n // 4) for n in size]
    maps = [tuple(m.shape) for m in model.forward_features(x)]
    assert maps == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 32)]
    assert model(x).shape == (2, 5) and operator()(x).shape == (2, 2, *size)


@pytest.mark.parametrize("make", [small, operator])
def test_one_step_of_training_reaches_every_weight(make):
    model = make().train()
    out = model(torch.randn(4, 3, 64, 64))
    (out - torch.randn_like(out)).square().mean().backward()
    for name, p in model.named_parameters():
        # A bias that all keys share leaves softmax as it is.
        assert p.grad is not None and ("k_proj.bias" in name or p.grad.abs().max() > 0), name
    assert_a_step_changes(model)


@pytest.mark.parametrize("make", [small, operator])
def test_it_exports(make):
    model = make().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_a_pixel_of_the_operator_sees_all_others():
    model = operator().eval()
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    model(x)[0, 0, 3, 12].backward()
    assert (x.grad.abs().sum(1) > 0).all()


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a stage"):
        MANO((16, 32), (1,), (1, 2))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="depth"):
        operator(depth=0)
    with pytest.raises(ValueError, match=r"maps \(B, 3, H, W\)"):
        operator()(torch.randn(1, 2, 8, 8))
