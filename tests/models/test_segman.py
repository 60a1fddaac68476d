"""S019: SegMAN's published sizes, the decoder's geometry, any image, gradients everywhere, export."""

import pytest
import torch
from torch.nn.functional import interpolate

import glocal
from glocal.models.vision.pyramid import Level, PyramidBlock
from glocal.models.vision.segman import MMSCopE, SegMAN, SegMANEncoder
from glocal.nn.lass import LASS
from tests.models.networks import assert_a_step_changes

ENCODERS = {"tiny": 3_506_014, "small": 25_507_582, "base": 45_020_682, "large": 80_985_272}
WHOLE = {"tiny": 6.4, "small": 29.4, "base": 51.8}


def count(name):
    with torch.device("meta"):
        model = glocal.create(name)
    return sum(p.numel() for p in model.parameters()), model


@pytest.mark.parametrize("size", ENCODERS)
def test_parameters(size):
    found, model = count(f"segman_encoder_{size}")
    assert found == ENCODERS[size]
    assert [level[0].mixer.full for level in model.levels] == [None, None, None, (7, 7)]
    assert {type(block.mixer) for level in model.levels for block in level} == {LASS}


@pytest.mark.parametrize("size", WHOLE)
def test_parameters_with_the_decoder(size):
    assert round(count(f"segman_{size}")[0] / 1e6, 1) == WHOLE[size]


def test_parameters_of_the_large_decoder():
    """Published are 92.6 million; the description, which fits the other three, gives 0.3 less."""
    assert 92.2e6 < count("segman_large")[0] < 92.6e6


def encoder(**options):
    torch.manual_seed(0)
    settings = dict(projected=24, num_classes=5, full=(2, 2), layer_scale=1e-2)
    return SegMANEncoder((8, 8, 16, 16), (1, 1, 2, 1), (1, 2, 2, 4), (5, 3, 3, 3), (2, 2, 3, 3), **(settings | options))


def segman():
    return SegMAN(encoder(), 5, dim=8, width=12, dropout=0.0)


@pytest.mark.parametrize("size", [(64, 64), (45, 70), (33, 129)])
def test_any_image(size):
    model = encoder().eval()
    sides, shapes = size, []
    for n in range(5):
        sides = [(s + 1) // 2 for s in sides]
        shapes += [(2, *sides)] if n else []
    maps = model.forward_features(torch.randn(2, 3, *size))
    assert [tuple(m.shape[:3]) for m in maps] == shapes
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_logits_have_the_images_size(size):
    assert segman().eval()(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def trained(model, x, y):
    """Names of weights without a gradient after one step."""
    model.train()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert_a_step_changes(model)
    return dead


def learns(name):
    """A bias that all keys share leaves softmax as it is, and one before a batch norm is taken off again."""
    return name != "proj.0.bias" and not name.endswith(("k_proj.bias", "mixer.conv.bias"))


def test_one_step_of_training_reaches_every_weight():
    x = torch.randn(4, 3, 64, 64)
    assert [n for n in trained(encoder(drop_path=0.1), x, torch.randint(5, (4,))) if learns(n)] == []
    assert [n for n in trained(segman(), x, torch.randint(5, (4, 64, 64))) if learns(n)] == []


def test_the_scales_of_the_decoder_show_the_same_places():
    """A mark at the end of one 32nd of the image is at that place of each scale, and at most one further."""
    torch.manual_seed(0)
    decoder = MMSCopE((4, 4, 4), 3, dim=4, width=4).eval()
    maps = [torch.zeros(1, 16 // s, 24 // s, 4) for s in (1, 2, 4)]
    seen = []
    decoder.context.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for mark in (0.0, 3.0):
        maps[0][0, 11, 15] = mark
        decoder(maps)
    change = (seen[1] - seen[0]).abs()
    assert change.shape == (1, 4, 6, 12)
    one, two, four = (part[0].sum(-1).nonzero().tolist() for part in change.split(4, -1))
    assert one == [[2, 3]]
    for places in (two, four):  # convolutions of 3 and of 5, that begin one before
        assert places == [[2, 3], [2, 4], [3, 3], [3, 4]]


def test_the_decoder_by_its_parts():
    decoder = MMSCopE((4, 6, 8), 3, dim=4, width=5).eval()
    c2, c3, c4 = maps = [torch.randn(2, 8 // s, 12 // s, c) for s, c in ((1, 4), (2, 6), (4, 8))]

    def up(t):
        return interpolate(t.movedim(-1, 1), (8, 12), mode="bilinear", align_corners=False)

    p2, p3, p4 = (up(proj(c)) for proj, c in zip(decoder.proj, (c2, c3, c4), strict=True))
    x = decoder.join(torch.cat([p2, p3, p4], 1))
    one = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    two = decoder.by_two(x).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    assert one.shape == (2, 64, 2, 3) and two.shape == (2, 32, 2, 3)
    parts = [fold(t) for fold, t in zip(decoder.fold, (one, two, decoder.by_four(x)), strict=True)]
    g = up(decoder.context(torch.cat(parts, 1).movedim(1, -1)))
    back = decoder.back(g)
    whole = decoder.whole(x.mean((2, 3), keepdim=True)).repeat(1, 1, 8, 12)
    mixed = torch.cat([decoder.local(x), whole, g, p2 + back, p3 + back, p4 + back], 1)
    torch.testing.assert_close(decoder(maps), decoder.head(decoder.mix(mixed)))


def test_a_scale_has_a_shift():
    level = Level(8, 1, 2.0, lambda _: torch.nn.Identity(), 0.5, scale_bias=True)
    block = PyramidBlock(level, 0, positions=2).eval()
    x = torch.randn(1, 3, 3, 8)
    torch.nn.init.normal_(block.beta1)
    torch.nn.init.normal_(block.beta2)
    y = x + block.positions[0](x)
    y = y + 0.5 * block.norm1(y) + block.beta1
    y = y + block.positions[1](y)
    torch.testing.assert_close(block(x), y + 0.5 * block.mlp(block.norm2(y)) + block.beta2)
    assert "beta1" not in dict(PyramidBlock(level._replace(scale_bias=False), 0).named_parameters())


@pytest.mark.parametrize("make", [encoder, segman])
def test_it_exports(make):
    model, x = make().eval(), torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="one entry a level"):
        SegMANEncoder((8, 16), (1,), (1, 2), (3, 3), (2, 2))
    with pytest.raises(ValueError, match="dims must be the channels of three levels"):
        MMSCopE((4, 4), 3, dim=4, width=4)
    with pytest.raises(ValueError, match=r"multiples of 32; it was \(1, 3, 64, 60\)"):
        segman()(torch.randn(1, 3, 64, 60))
    decoder = MMSCopE((4, 4, 4), 3, dim=4, width=4)
    with pytest.raises(ValueError, match="multiples of 4, half of those"):
        decoder([torch.randn(1, n, n, 4) for n in (6, 3, 1)])
    with pytest.raises(ValueError, match="multiples of 4, half of those"):
        decoder([torch.randn(1, n, n, 4) for n in (8, 4, 4)])
    with pytest.raises(ValueError, match="maps must be three"):
        decoder([torch.randn(1, 8, 8, 4)])
