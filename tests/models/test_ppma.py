"""S005: PPMA's published sizes, which levels attend by lines, any image, gradients everywhere."""

import pytest
import torch

import glocal
from glocal.models.vision.ppma import PPMA
from glocal.nn.polyline import PolylineAttention
from tests.models.networks import assert_a_step_changes, assert_exports

PUBLISHED = {"ppma_tiny": (14_335_272, 2), "ppma_small": (26_969_472, 3), "ppma_base": (54_158_524, 3)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    parameters, by_lines = PUBLISHED[name]
    with torch.device("meta"):
        model = glocal.create(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    mixers = [[block.mixer for block in level] for level in model.levels]
    assert all(isinstance(m, PolylineAttention) for level in mixers for m in level)
    assert [{m.criss_cross for m in level} for level in mixers] == [{n < by_lines} for n in range(4)]
    scaled = [level[0].gamma1 is not None for level in model.levels]
    assert scaled == ([False, False, True, True] if name == "ppma_base" else [False] * 4)
    rates = [block.drop_path.p for level in model.levels for block in level]
    assert rates[0] == 0 and rates[-1] == pytest.approx({"ppma_tiny": 0.1, "ppma_small": 0.15, "ppma_base": 0.4}[name])


def small(**options):
    torch.manual_seed(0)
    settings = dict(criss_cross=1, projected=24, num_classes=5)
    return PPMA((16, 32), (1, 2), (2, 2), (4, 3), **(settings | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (7, 9)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    half = [(n + 1) // 2 for n in size]
    quarter = [(n + 1) // 2 for n in half]
    assert [tuple(m.shape) for m in maps] == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 32)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize("criss_cross", [0, 2])
def test_one_step_of_training_reaches_every_weight(criss_cross):
    model = small(criss_cross=criss_cross, drop_path=0.2, layer_scale=(None, 1e-3)).train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    # A bias before a batch norm is taken off again, and one that all keys share leaves softmax nearly as it is.
    dead = {"stem.0.bias", "stem.3.bias", "stem.6.bias", "stem.9.bias", "down.0.0.bias", "proj.0.bias"}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert name in dead or "k_proj.bias" in name or p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_what_is_not_decayed():
    model = small()
    names = model.no_weight_decay()
    assert names <= {name for name, _ in model.named_parameters()} and len(names) == 2 * 3
    assert all(name.endswith(("decay.bias", "decay.log_rate")) for name in names)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a level"):
        PPMA((16, 32), (1,), (1, 2), (3, 3))
    with pytest.raises(ValueError, match="one entry a level"):
        small(layer_scale=(None,))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
