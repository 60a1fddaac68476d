"""S064: the DiNAT networks: sizes, any image, and transformers' DinatModel on equal weights."""

from __future__ import annotations

import pytest
import torch

import glocal
from glocal.models.vision.dinat import DiNAT
from glocal.nn import NeighborhoodAttention

PUBLISHED = {  # million parameters, from the configurations; the flat ones and DiNAT_s as the papers round them
    "dinat_mini": 19.98,
    "dinat_tiny": 27.90,
    "dinat_small": 50.72,
    "dinat_base": 89.77,
    "dinat_large": 200.94,
    "nat_mini": 19.98,
    "nat_tiny": 27.90,
    "nat_small": 50.72,
    "nat_base": 89.77,
    "dinat_s_tiny": 28.3,
    "dinat_s_small": 49.6,
    "dinat_s_base": 87.8,
    "dinat_s_large": 196.5,
    "dinat_isotropic_small": 22,
    "dinat_isotropic_base": 86.5,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    with torch.device("meta"):
        model = glocal.create(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(PUBLISHED[name], rel=0.01)


def dilations(name):
    with torch.device("meta"):
        model = glocal.create(name)
    return [[block.attention.dilation[0] for block in level] for level in model.levels]


def test_published_dilations():
    assert dilations("dinat_mini") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert dilations("dinat_large_384") == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert dilations("nat_tiny") == [[1] * 3, [1] * 4, [1] * 18, [1] * 5]
    assert dilations("dinat_s_tiny") == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]
    assert dilations("dinat_isotropic_small") == [[1, 2] * 6]


def test_automatic_dilations_are_the_published_ones():
    attention = NeighborhoodAttention(8, 1, 7, "auto")
    for image, want in ((224, [8, 4, 2, 1]), (384, [13, 6, 3, 1])):
        assert [attention.dilations((image // s, image // s)) for s in (4, 8, 16, 32)] == [(d, d) for d in want]


def small(**options):
    torch.manual_seed(0)
    settings = {
        "depths": (1, 2),
        "num_heads": (1, 2),
        "window": 3,
        "dilations": (1, 2),
        "mlp_ratio": 2,
        "num_classes": 5,
    }
    return DiNAT(16, **(settings | options)).eval()


@pytest.mark.parametrize("options", [{}, {"patch": 4}], ids=["convolutions", "patches"])
@pytest.mark.parametrize("size", [(48, 48), (51, 65), (45, 47)])
def test_any_size_and_gradients_everywhere(size, options):
    model = small(layer_scale=1.0, **options)
    image = torch.randn(2, 3, *size)
    levels = model.forward_features(image)
    height, width = (-(-n // 4) for n in size)
    assert [tuple(level.shape) for level in levels] == [
        (2, height, width, 16),
        (2, -(-height // 2), -(-width // 2), 32),
    ]
    out = model(image)
    assert out.shape == (2, 5)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_automatic_dilation_follows_the_map():
    fixed, auto = small(dilations=(1, 3)), small(dilations="auto")
    auto.load_state_dict(fixed.state_dict())
    square, wide = torch.randn(1, 3, 72, 72), torch.randn(1, 3, 24, 120)
    torch.testing.assert_close(auto(square), fixed(square))
    assert auto(wide).shape == (1, 5)
    with pytest.raises(ValueError, match=r"level 1 a map of 3 x 15, too small for window 3 with dilation 3.*'auto'"):
        fixed(wide)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one entry a level"):
        DiNAT(16, (1, 2), (1, 2))
    with pytest.raises(ValueError, match="dilations must be"):
        small(dilations="largest")
    with pytest.raises(ValueError, match="x must be images"):
        small()(torch.randn(3, 48, 48))
    with pytest.raises(ValueError, match=r"level 1 a map of 2 x 2, too small for window 3 with dilation 1; .*window"):
        small(dilations="auto")(torch.randn(1, 3, 16, 16))


def test_merging_is_swins():
    """The order in which Swin concatenates 2 x 2 tokens: down the columns, then across."""
    model = small(patch=4)
    seen = []
    model.down[0].norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 6, 4, 16)
    model.down[0](x)
    corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    assert torch.equal(seen[0], torch.cat(corners, -1))


def test_drop_path_grows_and_training_runs():
    model = DiNAT(16, (2, 2), (1, 2), window=3, dilations="auto", drop_path=0.3, num_classes=0)
    rates = [block.drop_path.p for level in model.levels for block in level]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 32)


# transformers' DinatModel. It needs two operators that natten has dropped: by brute force here, heads first.


def neighbors(length, kernel, dilation):
    """For each position the keys of its window and their places in the table of biases, by the definition."""
    found = []
    for i in range(length):
        members = range(i % dilation, length, dilation)
        start = min(max(i // dilation - kernel // 2, 0), len(members) - kernel)
        found.append([(members[p], p - i // dilation + kernel - 1) for p in range(start, start + kernel)])
    keys = torch.tensor([[key for key, _ in row] for row in found])
    return keys, torch.tensor([[place for _, place in row] for row in found])


def gathered(t, kernel, dilation):
    """``(B, h, H, W, D)`` to ``(B, h, H, W, kernel ** 2, D)``."""
    rows, columns = (neighbors(n, kernel, dilation)[0] for n in t.shape[2:4])
    return t[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4, 5)


def heads_first(t):
    """This version of transformers swaps axes 1 and 2 of ``(B, H, W, heads, D)``; what it means is heads first."""
    return t.permute(0, 3, 2, 1, 4)


def natten2dqkrpb(q, k, rpb, kernel, dilation):
    q, k = heads_first(q), heads_first(k)
    assert q.shape[1] == rpb.shape[0]
    y, x = (neighbors(n, kernel, dilation)[1] for n in q.shape[2:4])
    bias = rpb[:, y[:, None, :, None], x[None, :, None, :]].flatten(3)
    return (q.unsqueeze(4) * gathered(k, kernel, dilation)).sum(-1) + bias


def natten2dav(weights, v, kernel, dilation):
    return (weights.unsqueeze(-1) * gathered(heads_first(v), kernel, dilation)).sum(4)


@pytest.fixture
def peer(monkeypatch):
    functional, transformers = pytest.importorskip("natten.functional"), pytest.importorskip("transformers")
    monkeypatch.setattr(functional, "natten2dqkrpb", natten2dqkrpb, raising=False)
    monkeypatch.setattr(functional, "natten2dav", natten2dav, raising=False)
    from transformers.models.dinat import modeling_dinat

    monkeypatch.setattr(modeling_dinat, "natten2dqkrpb", natten2dqkrpb)
    monkeypatch.setattr(modeling_dinat, "natten2dav", natten2dav)
    config = transformers.DinatConfig(
        **{"embed_dim": 16, "depths": [2, 3], "num_heads": [2, 4], "kernel_size": 3, "dilations": [[1, 4], [1, 2, 1]]},
        **{"mlp_ratio": 3.0, "layer_scale_init_value": 0.5},
    )
    torch.manual_seed(0)
    model = modeling_dinat.DinatForImageClassification(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def named_as_ours(name):
    """Names of theirs to ours, the two rows of the layer scale aside."""
    for theirs, ours in (
        ("dinat.embeddings.patch_embeddings.projection.", "embed.proj."),
        ("dinat.embeddings.norm.", "embed.norm."),
        ("dinat.encoder.levels.0.downsample.reduction.", "down.0.proj."),
        ("dinat.encoder.levels.0.downsample.norm.", "down.0.norm."),
        ("dinat.encoder.levels.", "levels."),
        (".layers.", "."),
        ("dinat.layernorm.", "norm."),
        ("classifier.", "head."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.self.query", "attention.q_proj"),
        ("attention.self.key", "attention.k_proj"),
        ("attention.self.value", "attention.v_proj"),
        ("attention.self.rpb", "attention.rpb"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ):
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("size", [(48, 48), (50, 66)])
def test_equals_transformers(peer, size):
    model = DiNAT(
        16, (2, 3), (2, 4), window=3, dilations=(4, 2), mlp_ratio=3.0, layer_scale=0.5, drop_path=0.0, num_classes=2
    )
    state = {}
    for name, value in peer.state_dict().items():
        if name.endswith("layer_scale_parameters"):
            place = named_as_ours(name).removesuffix("layer_scale_parameters")
            state |= {place + "gamma1": value[0], place + "gamma2": value[1]}
        else:
            state[named_as_ours(name)] = value
    model = model.double().eval()
    model.load_state_dict(state)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    theirs = peer(image, output_hidden_states=True)
    torch.testing.assert_close(model(image), theirs.logits)
    last = model.norm(model.forward_features(image)[-1])
    torch.testing.assert_close(last, peer.dinat(image).last_hidden_state)
