"""S004: published sizes of Agent-DeiT, Agent-PVT and Agent-Swin, any image, gradients, what their blocks are."""

import pytest
import torch

import glocal
from glocal.models.vision.agent import AgentDeiT, ClassTokenAgents
from glocal.models.vision.agent_pvt import AgentPVT
from glocal.models.vision.agent_swin import AgentSwin, SwinAttention
from glocal.nn import Attention
from glocal.nn.agent import AgentAttention
from tests.models.networks import assert_a_step_changes, assert_exports

EXACT = {
    "agent_pvt_tiny": 11_570_352,
    "agent_pvt_small": 20_635_066,
    "agent_pvt_medium": 35_921_746,
    "agent_pvt_large": 48_738_180,
    "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684,
    "agent_swin_base": 88_095_096,
}
ROUNDED = {"agent_deit_tiny": 6.0e6, "agent_deit_small": 22.7e6, "agent_deit_base": 87.2e6}


def made(name):
    with torch.device("meta"):
        return glocal.create(name)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_parameters(name):
    assert count(made(name)) == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_that_the_paper_rounds(name):
    assert count(made(name)) == pytest.approx(ROUNDED[name], rel=0.01)


def test_where_the_agents_are():
    kinds = {
        name: [[type(block.attention) is AgentAttention for block in level] for level in made(name).levels]
        for name in ("agent_swin_tiny", "agent_swin_small", "agent_swin_base", "agent_pvt_tiny")
    }
    assert kinds["agent_swin_tiny"] == [[True] * 2, [True] * 2, [True] * 6, [False] * 2]
    assert kinds["agent_swin_small"] == [[True] * 2, [True] * 2, [False] * 18, [False] * 2]
    assert kinds["agent_swin_base"] == [[True] * 2, [True] * 2, [True] * 2 + [False] * 16, [False] * 2]
    assert kinds["agent_pvt_tiny"] == [[True] * 2] * 4
    agents = [[block.attention.num_agents for block in level] for level in made("agent_pvt_tiny").levels]
    assert agents == [[9] * 2, [16] * 2, [49] * 2, [49] * 2]
    shifts = [block.attention.shift for block in made("agent_swin_base").levels[2][2:]]
    assert shifts == [False, True] * 8
    mixers = [type(block.attention) for block in made("agent_deit_base").blocks]
    assert mixers == [ClassTokenAgents] * 4 + [Attention] * 8
    assert made("agent_deit_base").blocks[0].attention.inner.num_agents == 81


def deit(**options):
    torch.manual_seed(0)
    settings = dict(num_agents=4, agent_blocks=1, image=32, patch=8, num_classes=5)
    return AgentDeiT(16, 2, 2, **(settings | options))


def pvt(**options):
    torch.manual_seed(0)
    settings = dict(num_agents=(4, 9), mlp_ratios=(2, 2), reductions=(2, 1), image=32, num_classes=5)
    return AgentPVT((16, 32), (1, 2), (1, 2), **(settings | options))


def swin(**options):
    torch.manual_seed(0)
    settings = dict(num_agents=(4, 9), agent_blocks=(1, 1), window=3, image=32, num_classes=5)
    return AgentSwin(16, (1, 3), (1, 2), **(settings | options))


MODELS = pytest.mark.parametrize("make", [deit, pvt, swin], ids=["deit", "pvt", "swin"])


@MODELS
@pytest.mark.parametrize("size", [(32, 32), (45, 70), (16, 27)])
def test_any_size(make, size):
    model = make().eval()
    x = torch.randn(3, 3, *size)
    found = model(x)
    assert found.shape == (3, 5)
    assert torch.allclose(found[:1], model(x[:1]), atol=1e-5)


def test_the_maps_of_the_levels():
    x = torch.randn(2, 3, 45, 70)
    assert [tuple(m.shape) for m in pvt().forward_features(x)] == [(2, 11, 17, 16), (2, 5, 8, 32)]
    assert [tuple(m.shape) for m in swin().forward_features(x)] == [(2, 12, 18, 16), (2, 6, 9, 32)]
    assert deit().forward_features(x).shape == (2, 1 + 5 * 8, 16)


@MODELS
def test_one_step_of_training_reaches_every_weight(make):
    model = make(drop_path=0.1).train()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # A bias that all keys share leaves softmax as it is.
        assert "k_proj.bias" in name or p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


@MODELS
def test_it_exports(make):
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    assert_exports(model, x)


def test_the_class_token_by_hand():
    torch.manual_seed(0)
    layer = ClassTokenAgents(16, 2, 4, (4, 4)).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    inner, x = layer.inner, torch.randn(2, 17, 16).double()
    q, k, v = (proj(x) for proj in (inner.q_proj, inner.k_proj, inner.v_proj))
    cells = q[:, 1:].view(2, 2, 2, 2, 2, 16).mean((2, 4)).flatten(1, 2)  # 2 x 2 cells of 2 x 2 patches
    q, k, values, a = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v, cells))
    gather = torch.cat([layer.gather_class, inner.gather_bias((4, 4))], -1)
    spread = torch.cat([layer.spread_class.mT, inner.spread_bias((4, 4)).mT], 1)
    gathered = (a @ k.mT * 8**-0.5 + gather).softmax(-1) @ values
    out = ((q @ a.mT * 8**-0.5 + spread).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    out[:, 1:] += inner.local(v[:, 1:].view(2, 4, 4, 16)).flatten(1, 2)
    assert torch.allclose(layer(x, grid=(4, 4)), inner.o_proj(out), atol=1e-11)


@pytest.mark.parametrize("shift", [False, True])
def test_the_windows_are_swins(shift):
    """transformers' layer, rolled and masked, with our weights; what comes round the border does not meet."""
    modeling = pytest.importorskip("transformers.models.swin.modeling_swin")
    torch.manual_seed(0)
    layer = SwinAttention(16, 2, window=4, shift=shift, qkv_bias=True, out_bias=True).double()
    torch.nn.init.normal_(layer.bias)
    config = modeling.SwinConfig(qkv_bias=True, attn_implementation="eager")
    peer = modeling.SwinAttention(config, 16, 2, 4).double().eval()
    peer.relative_position_bias = modeling.SwinRelativePositionBias(2, (4, 4)).double()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(peer, name).load_state_dict(getattr(layer, name).state_dict())
        # Swin counts query minus key, we key minus query.
        table = layer.bias.flip(1, 2).flatten(1).T
        peer.relative_position_bias.relative_position_bias_table.copy_(table)
    x, mask = torch.randn(2, 8, 12, 16).double(), None
    rolled = x
    if shift:
        rolled = x.roll((-2, -2), (1, 2))
        part = (torch.arange(8).roll(-2) < 2)[:, None].int() * 2 + (torch.arange(12).roll(-2) < 2).int()
        part = modeling.window_partition(part[None, :, :, None], 4).view(-1, 16)
        mask = -1e9 * (part[:, :, None] != part[:, None]).double()
    windows = modeling.window_partition(rolled, 4).view(-1, 16, 16)
    theirs = peer(windows, mask)[0] if mask is not None else peer(windows)[0]
    theirs = modeling.window_reverse(theirs.view(-1, 4, 4, 16), 4, 8, 12)
    theirs = theirs.roll((2, 2), (1, 2)) if shift else theirs
    assert torch.allclose(layer(x), theirs, atol=1e-6)  # its softmax is in float32


def test_a_map_that_one_window_covers_is_not_shifted():
    torch.manual_seed(0)
    layer, x = SwinAttention(16, 2, window=7, shift=True), torch.randn(1, 7, 7, 16)
    q, k, v = (t.flatten(2, 3) for t in layer.project(x, x, None, None))
    place = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    offset = place[None] - place[:, None] + 6
    bias = layer.bias[:, offset[..., 0], offset[..., 1]]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    wanted = layer.o_proj(out.transpose(1, 2).flatten(2)).view(1, 7, 7, 16)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_bad_settings():
    with pytest.raises(ValueError, match="one entry a level"):
        AgentPVT((16, 32), (1,), (1, 2))
    with pytest.raises(ValueError, match="one entry a level"):
        AgentSwin(16, (1,), (1, 2))
    with pytest.raises(ValueError, match="at least a patch"):
        deit(image=4)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        pvt(image=4)
    for make in (deit, pvt, swin):
        with pytest.raises(ValueError, match="images"):
            make()(torch.randn(3, 32, 32))
    for make in (deit, pvt):
        with pytest.raises(ValueError, match="images"):
            make()(torch.randn(1, 3, 32, 5))
    with pytest.raises(ValueError, match="class token and patches"):
        ClassTokenAgents(16, 2, 4, (4, 4))(torch.randn(1, 16, 16), grid=(4, 4))
    with pytest.raises(ValueError, match="window must be at least 1"):
        SwinAttention(16, 2, window=0)
