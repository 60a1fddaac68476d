"""S055: published sizes of HyenaPixel's networks, the shell against timm's, any image, gradients everywhere."""

import pytest
import torch

import glocal
from glocal.models.vision.hyenapixel import HyenaFormer
from glocal.models.vision.metaformer import MetaFormer, SepConv, Stage, attention
from glocal.nn import Attention
from glocal.nn.hyena import Hyena, HyenaPixel, PixelFilter
from tests.models.networks import assert_exports
from tests.peers import load_timm

PUBLISHED = {
    "hyenapixel_s18": (29_344_686, (HyenaPixel,) * 4),
    "hyenapixel_b36": (104_639_260, (HyenaPixel,) * 4),
    "hyenapixel_a_s18": (27_928_674, (HyenaPixel, HyenaPixel, Attention, Attention)),
    "c_hyenapixel_s18": (27_747_684, (SepConv, SepConv, HyenaPixel, HyenaPixel)),
    "hyena_s18": (28_250_424, (Hyena,) * 4),
    "hyena_b36": (102_418_114, (Hyena,) * 4),
    "hyena_a_s18": (27_171_942, (Hyena, Hyena, Attention, Attention)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    """The release counts its fixed maps of distances among them; ours are made when they are needed."""
    with torch.device("meta"):
        model = glocal.create(name)
    filters = [module for module in model.modules() if isinstance(module, PixelFilter)]
    count = sum(p.numel() for p in model.parameters()) + sum(f.distance().numel() for f in filters)
    published, kinds = PUBLISHED[name]
    assert count == published
    assert tuple(type(blocks[0].mixer) for blocks in model.stages) == kinds


@pytest.mark.parametrize("size,kernels", [(224, [111, 55, 27, 13]), (384, [191, 95, 47, 23])])
def test_kernels_reach_over_the_map_of_their_stage(size, kernels):
    with torch.device("meta"):
        model = glocal.create("hyenapixel_s18", size=size, depths=(1, 1, 1, 1))
        assert [blocks[0].mixer.filter.sizes for blocks in model.stages] == [(k, k) for k in kernels]
        x = torch.empty(1, 3, size, size)
        assert [2 * m.shape[1] - 1 for m in model.forward_features(x)] == kernels


def as_ours(name):
    """A weight of timm's MetaFormer by its name here."""
    for theirs, ours in (
        ("stem.conv.", "stem."),
        ("stem.norm.", "stem_norm."),
        ("head.norm.", "norm."),
        ("head.fc.fc1.", "head.0."),
        ("head.fc.norm.", "head.2."),
        ("head.fc.fc2.", "head.3."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    _, stage, kind, *rest = name.split(".")
    if kind == "downsample":
        return ".".join([{"norm": "norms", "conv": "down"}[rest[0]], str(int(stage) - 1), *rest[1:]])
    block, part, *rest = rest
    rest = ".".join(rest)
    for theirs, ours in (("fc1.", "0."), ("act.", "1."), ("fc2.", "2.")):
        if part == "mlp" and rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
    if part == "token_mixer":
        part = "mixer"
        for theirs, ours in (
            ("pwconv1", "fc1"),
            ("act1", "act"),
            ("dwconv", "dw"),
            ("pwconv2", "fc2"),
            ("proj", "o_proj"),
        ):
            rest = rest.replace(theirs, ours)
    if part.startswith("res_scale"):
        part, rest = part.removeprefix("res_"), ""
    return f"stages.{stage}.{block}.{part}.{rest}".rstrip(".")


def theirs_to_ours(peer, model):
    wanted, found = model.state_dict(), {}
    for name, value in peer.state_dict().items():
        ours = as_ours(name)
        if ours.endswith("mixer.qkv.weight"):
            for part, letter in zip(value.chunk(3), "qkv", strict=True):
                found[ours.replace("qkv", f"{letter}_proj")] = part
        else:  # a convolution of one pixel is a linear layer
            found[ours] = value.view_as(wanted[ours])
    model.load_state_dict(found, assign=True)


@pytest.mark.parametrize("name", ["convformer_s18", "caformer_s18"])
def test_the_shell_is_that_of_timm(name):
    with torch.device("meta"):  # weights are drawn once, below
        peer, model = getattr(load_timm("models.metaformer"), name)().eval(), glocal.create(name).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    torch.manual_seed(0)
    peer = peer.to_empty(device="cpu").double()
    with torch.no_grad():
        for key, p in peer.named_parameters():
            p.normal_(std=0.2 if p.dim() == 1 else 0.03)
            if p.dim() == 1 and not key.endswith("bias"):
                p.add_(1)
    theirs_to_ours(peer, model)
    inputs, outputs = [], []

    def keep(_, given, out):
        inputs.append(given[0])
        outputs.append(out)

    for blocks in peer.stages:
        for block in blocks.blocks:
            block.register_forward_hook(keep)
    x = torch.randn(2, 3, 64, 45).double()
    with torch.no_grad():
        wanted, ours = peer(x), [block for blocks in model.stages for block in blocks]
        for block, given, out in zip(ours, inputs, outputs, strict=True):
            if given.dim() == 4:
                given, out = given.movedim(1, -1), out.movedim(1, -1)
            else:  # attention gets tokens; one row of them has the same result
                given, out = given[:, None], out[:, None]
            assert torch.allclose(block(given), out, rtol=1e-9, atol=1e-9 * out.abs().max())
        assert torch.allclose(model(x), wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max())


def small(mixers=("hyenapixel", "hyena", "attention"), **options):
    torch.manual_seed(0)
    wide = [9 if kind == "hyena" else 8 for kind in mixers]
    dims = (16, 24, 32)[-len(mixers) :]
    return HyenaFormer(dims, (1,) * len(mixers), mixers, **(dict(size=32, features=wide, num_classes=5) | options))


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (7, 9), (3, 3)])
def test_any_size(size):
    model = small().eval()
    maps = model.forward_features(torch.randn(2, 3, *size))
    sides = [[(n - 3) // 4 + 1 for n in size]]
    for _ in range(2):
        sides.append([(n + 1) // 2 for n in sides[-1]])
    assert [tuple(m.shape) for m in maps] == [(2, *side, dim) for side, dim in zip(sides, (16, 24, 32), strict=True)]
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize("mixers", [("hyenapixel",) * 3, ("hyena",) * 3, ("sepconv", "hyenapixel", "attention")])
def test_one_step_of_training_reaches_every_weight(mixers):
    model = small(mixers, drop_path=0.2, norm=True).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 3, 32, 32).double(), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_scales_of_the_residual_are_in_the_last_stages_and_branches_are_added_to_what_they_scale():
    with torch.device("meta"):
        model = glocal.create("c_hyenapixel_s18")
    assert [blocks[0].scale1 is not None for blocks in model.stages] == [False, False, True, True]
    model = MetaFormer([Stage(32, 1, attention, scaled=True)], num_classes=0).eval()
    (block,) = model.stages[0]
    with torch.no_grad():
        block.scale1.fill_(0)
        block.scale2.fill_(0)
    x = torch.randn(1, 2, 3, 32)
    assert torch.allclose(block(x), block.mlp(block.norm2(block.mixer(block.norm1(x)))), atol=1e-6)


def test_resolution():
    """Kernels stretch with the image: their values at the same share of the map stay."""
    model = small(("hyenapixel", "attention")).eval()
    filter = model.stages[0][0].mixer.filter
    with torch.no_grad():
        before = filter().clone()
        assert filter.sizes == (15, 15)
        model.resize(92)
        assert filter.sizes == (45, 45) and torch.allclose(filter()[:, 1::3, 1::3], before, atol=1e-6)
        assert model(torch.randn(1, 3, 92, 92)).shape == (1, 5)
        other = small(("hyenapixel", "attention"), size=92).eval()
        other.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 92, 92)
        assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="reads rows"):
        small().resize(64)
    with pytest.raises(ValueError, match="at least 4 pixels; it was 2"):
        model.resize(2)


def test_it_exports():
    model = small(norm=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a stage"):
        HyenaFormer((16, 32), (1,), ("hyena", "hyena"), features=(9, 9))
    with pytest.raises(ValueError, match="one entry a stage"):
        HyenaFormer((16, 32), (1, 1), ("hyena", "hyena"))
    with pytest.raises(ValueError, match="among hyenapixel, hyena, sepconv, attention; there was lstm"):
        HyenaFormer((32,), (1,), ("lstm",), features=(8,))
    with pytest.raises(ValueError, match="size must be at least 4"):
        small(size=2)
    with pytest.raises(ValueError, match="at least one entry"):
        MetaFormer([])
    with pytest.raises(ValueError, match="multiple of 32"):
        MetaFormer([Stage(48, 1, attention)])
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 2, 32)):
        with pytest.raises(ValueError, match="images"):
            small()(torch.randn(shape))
