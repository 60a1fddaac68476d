"""S104: TiC in our reading: any image, the same parameters, stages that get smaller, gradients everywhere."""

import pytest
import torch

import glocal
from glocal.models.vision.tic import TiC
from tests.models.networks import assert_a_step_changes, assert_exports


def small(**options):
    torch.manual_seed(0)
    return TiC((8, 16), (2, 2), **({"kernel": 3, "num_classes": 5} | options))


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (45, 70), (4, 9)])
def test_any_size(size, pooling):
    model = small(pooling=pooling).eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    half = [(n // 4 + 1) // 2 for n in size]
    assert [tuple(m.shape) for m in maps] == [(2, *half, 16)] * 2
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_the_named_network():
    with torch.device("meta"):
        model = glocal.create("tic_ref")
    assert [layer.shift for layer in model.stages[2]] == [0, 4] * 3
    assert [stage[-1].conv.out_channels for stage in model.stages] == [128, 256, 512, 512]
    # A stem, 12 layers of two to three matrices, a classifier: counted by hand.
    dims, depths, count = (64, 128, 256, 512), (2, 2, 6, 2), 3 * 16 * 64 + 64 + 513 * 1000
    for dim, then, depth in zip(dims, (*dims[1:], 512), depths, strict=True):
        count += depth * 3 * (dim * dim + dim) + (depth - 1) * 9 * dim * dim + 9 * dim * then
    assert sum(p.numel() for p in model.parameters()) == count


def test_what_passes_keeps_its_size():
    """There are no norms, so that twelve layers of a default start would leave nothing."""
    torch.manual_seed(0)
    model = TiC((16, 16), (6, 6), kernel=3, num_classes=5).eval()
    last = model.forward_features(torch.randn(4, 3, 64, 64))[-1]
    assert 0.03 < last.std() < 30


def test_one_step_of_training_reaches_every_weight():
    model = small().train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a stage"):
        TiC((16, 32), (1,))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(1, 3, 3, 32))
