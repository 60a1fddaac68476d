"""S003: CAS-ViT's published sizes, any image, gradients everywhere, two classifiers, the local block by a peer."""

import pytest
import torch
from torch import nn

import glocal
from glocal.models.vision.casvit import CASViT, LocalIntegration
from tests.models.networks import assert_a_step_changes, assert_exports
from tests.peers import load_timm

PUBLISHED = {
    "casvit_xs": (3_200_700, 2_979_700),
    "casvit_s": (5_764_224, 5_507_224),
    "casvit_m": (12_421_520, 12_036_520),
    "casvit_t": (21_763_120, 21_250_120),
}


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name, distilled):
    with torch.device("meta"):
        model = glocal.create(name, distilled=distilled)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][not distilled]


def small(**options):
    torch.manual_seed(0)
    return CASViT((16, 24), (1, 2), **({"num_classes": 5} | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (7, 9)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    quarter = [(n + 3) // 4 for n in size]
    assert [tuple(m.shape) for m in maps] == [(2, *quarter, 16), (2, *((n + 1) // 2 for n in quarter), 24)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_two_classifiers_in_training_and_their_mean_after_it():
    model, x = small(), torch.randn(4, 3, 32, 32)
    both = model(x)
    assert isinstance(both, tuple) and [t.shape for t in both] == [(4, 5)] * 2
    model.eval()
    pooled = model.norm(model.forward_features(x)[-1]).mean((1, 2))
    assert torch.allclose(model(x), (model.head(pooled) + model.teacher_head(pooled)) / 2, atol=1e-6)
    assert small(distilled=False)(x).shape == (4, 5)
    assert small(num_classes=0)(x).shape == (4, 24)


def test_one_step_of_training_reaches_every_weight():
    model = small(drop_path=0.2).train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    sum(nn.functional.cross_entropy(logits, y) for logits in model(x)).backward()
    # A bias before a batch norm is taken off again.
    before_norm = ("stem.0.bias", "stem.3.bias", "down.0.0.bias", "local.0.bias", "gate.dw.bias")
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert name.endswith(before_norm) or p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_branches_are_dropped_more_and_more():
    blocks = [b for stage in CASViT((8, 8), (2, 3), drop_path=0.4).stages for b in stage]
    assert [b.drop_path.p for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_the_local_block_is_an_inverted_bottleneck_that_does_not_expand():
    layers = load_timm("layers")
    torch.manual_seed(0)
    mine = LocalIntegration(6).eval()
    nn.init.normal_(mine[1].running_mean), nn.init.uniform_(mine[1].running_var)
    plain = {"bias": True, "apply_act": False}
    theirs = nn.Sequential(
        layers.ConvNormAct(6, 6, 1, **plain),
        layers.ConvNormAct(6, 6, 3, groups=6, apply_norm=False, **plain),
        nn.GELU(),
        layers.ConvNormAct(6, 6, 1, apply_norm=False, **plain),
    ).eval()
    for number, own in ((0, mine[0]), (1, mine[2]), (3, mine[4])):
        conv = theirs[number].conv
        conv.weight.data.copy_(own.weight.view_as(conv.weight))
        conv.bias.data.copy_(own.bias)
    theirs[0].bn.load_state_dict(mine[1].state_dict())
    x = torch.randn(2, 5, 7, 6)
    assert torch.allclose(mine(x), theirs(x.movedim(-1, 1)).movedim(1, -1), atol=1e-6)


def test_it_exports():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a stage"):
        CASViT((16, 32), (1,))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(3, 32, 32))
