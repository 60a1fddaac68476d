"""Patterns on the patches of vision transformers, against a mask of pairs that is written out."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from glocal import Full, Window
from glocal.hf import Mechanism, adapt
from glocal.hf.grid import GridAttention


def vit(kind=ViTModel, config=ViTConfig):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=24)
    model = kind(config(**sizes, patch_size=4)).eval()  # 6 x 6 patches and a class token
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model, torch.randn(2, 3, 24, 24)


def states(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state


def pairs(near: int) -> torch.Tensor:
    """The class token sees and is seen by all; patches see those at most ``near`` rows and columns away."""
    live = torch.ones(37, 37, dtype=torch.bool)
    for i in range(36):
        for j in range(36):
            live[1 + i, 1 + j] = abs(i // 6 - j // 6) <= near and abs(i % 6 - j % 6) <= near
    return live


@pytest.mark.parametrize("kind,config", [(ViTModel, ViTConfig), (CLIPVisionModel, CLIPVisionConfig)])
def test_a_window_of_patches_is_its_mask(kind, config):
    model, pixels = vit(kind, config)
    with adapt(model, "grid(where='sliding((1, 1), (1, 1))', grid=(6, 6))"):
        mine = states(model, pixels)
    full = states(model, pixels)
    from transformers import AttentionInterface

    def masked(module, query, key, value, mask, **options):
        scores = (query @ key.mT * options["scaling"]).masked_fill(~pairs(1), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("written-out", masked)
    try:
        model.set_attn_implementation("written-out")
        assert torch.allclose(mine, states(model, pixels), atol=1e-4)
    finally:
        AttentionInterface._global_mapping.pop("written-out", None)
        model.set_attn_implementation("sdpa")
    assert torch.equal(full, states(model, pixels)) and not torch.allclose(mine, full, atol=1e-2)


@pytest.mark.parametrize("where", ["full()", "window((6, 6))"])
def test_a_pattern_of_everything_is_the_model(where):
    model, pixels = vit()
    full = states(model, pixels)
    with adapt(model, str(Mechanism("grid", {"where": where, "grid": (6, 6)}))):
        assert torch.allclose(states(model, pixels), full, atol=1e-5)


def test_block_sparse_needs_no_training():
    model, pixels = vit()
    full = states(model, pixels)
    with adapt(model, "block_sparse(patches=(6, 6), special=1, mass=1.0, query_size=6, key_size=6)"):
        assert torch.allclose(states(model, pixels), full, atol=1e-5)
    with adapt(
        model, "block_sparse(patches=(6, 6), special=1, ratio=0.5, mass=0.0, query_size=6, key_size=6)"
    ) as handle:
        some = states(model, pixels)
        assert all(float(frame.last_kept.mean()) == pytest.approx(0.5) for frame in handle.frames.values())
    assert not torch.allclose(some, full, atol=1e-3)


def test_gradients_reach_the_model_in_one_softmax():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    layer = GridAttention(16, 2, where=Window((2, 2)), grid=(3, 3), special=1, project=False)
    from glocal.nn.frame import Call

    out = layer.mix(q, k, v, Call(q, q, None, None, False))
    live = torch.ones(10, 10, dtype=torch.bool)
    live[1:, 1:] = Window((2, 2)).mask((3, 3))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~live, -torch.inf)
    expected = scores.softmax(-1) @ v
    assert torch.allclose(out, expected)
    mine = torch.autograd.grad(out.sin().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))


def test_refusals():
    model, pixels = vit()
    with pytest.raises(ValueError, match="Window"):
        adapt(model, "grid(where='window((9, 9))', grid=(6, 6))")
    with pytest.raises(ValueError, match="special"):
        GridAttention(32, 4, where=Full(), grid=(6, 6), special=-1)
    with pytest.raises(ValueError, match="has 26; it was 37"), adapt(model, "grid(where='full()', grid=(5, 5))"):
        states(model, pixels)
