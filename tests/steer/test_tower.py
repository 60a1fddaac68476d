"""Attention of vision towers: against the maps of eager attention, and that reading changes nothing."""

import pytest
import torch
import transformers as t

from glocal.steer.tower import TowerAttention, class_tokens, tower_layers, vision_tower
from tests.steer import models

SMALL = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)
TOWERS = {
    "clip": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL)), 1),
    "siglip": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL)), 0),
    "vit": (lambda: t.ViTModel(t.ViTConfig(**SMALL)), 1),
    "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(**SMALL, mlp_ratio=2)), 1),
    "dinov2_registers": (
        lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)),
        4,
    ),
}


def tower(name):
    """A tower whose attention is far from even."""
    torch.manual_seed(0)
    model = TOWERS[name][0]().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ("q_proj" in path or "k_proj" in path) and parameter.dim() > 1:
                parameter.normal_(0, 2 / 24**0.5)
    return model, torch.randn(2, 3, 32, 40 if name.startswith("dino") else 32)


def eager_maps(model, pixels):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(pixel_values=pixels, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return maps


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_rows_are_those_of_eager_attention(name):
    model, pixels = tower(name)
    leading = TOWERS[name][1]
    assert class_tokens(model) == leading and len(tower_layers(model)) == 3
    wanted, plain = eager_maps(model, pixels), model(pixel_values=pixels).last_hidden_state
    with TowerAttention(model, layers=[0, -2], rows="mean") as seen:
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, plain)
    assert list(seen.maps) == [0, 1]
    for layer, found in seen.maps.items():
        torch.testing.assert_close(found, wanted[layer][:, :, leading:, leading:].mean(2), atol=1e-6, rtol=1e-5)
    if leading:
        with TowerAttention(model, layers=range(3)) as seen:
            assert torch.equal(model(pixel_values=pixels).last_hidden_state, plain)
        for layer, found in seen.maps.items():
            torch.testing.assert_close(found, wanted[layer][:, :, 0, leading:], atol=1e-6, rtol=1e-5)
        assert seen.maps[0].std() > 0.01  # the rows say something


@torch.no_grad()
def test_many_patches_go_through_in_pieces(monkeypatch):
    model, pixels = tower("clip")
    with TowerAttention(model, rows="mean") as whole:
        model(pixel_values=pixels)
    monkeypatch.setattr("glocal.steer.tower._CHUNK", 5)
    with TowerAttention(model, rows="mean") as pieces:
        model(pixel_values=pixels)
    torch.testing.assert_close(pieces.maps[2], whole.maps[2])


@torch.no_grad()
def test_half_precision_is_widened():
    model, pixels = tower("clip")
    model, pixels = model.to(torch.bfloat16), pixels.bfloat16()
    with TowerAttention(model, layers=[0]) as seen:
        model(pixel_values=pixels)
    eager = eager_maps(model, pixels)[0][:, :, 0, 1:].float()
    exact = eager_maps(model.float(), pixels.float())[0][:, :, 0, 1:]
    assert seen.maps[0].dtype == torch.float32
    assert (seen.maps[0] - exact).abs().max() <= 2 * (eager - exact).abs().max()


@torch.no_grad()
def test_the_tower_within_a_vision_language_model():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    plain = model(**inputs).logits
    with TowerAttention(model, layers=[1]) as seen:
        assert torch.equal(model(**inputs).logits, plain)
    own = vision_tower(model)
    assert isinstance(own, t.CLIPVisionModel)
    wanted = eager_maps(own, inputs["pixel_values"])[1][:, :, 0, 1:]
    torch.testing.assert_close(seen.maps[1], wanted, atol=1e-6, rtol=1e-5)
    assert isinstance(vision_tower(t.CLIPModel(t.CLIPConfig(vision_config=SMALL))), torch.nn.Module)


def test_nothing_is_left_behind():
    model, pixels = tower("clip")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), TowerAttention(model):
        raise RuntimeError("on purpose")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with TowerAttention(model) as seen:
        model(pixel_values=pixels)
    assert not seen.maps[2].requires_grad


def test_what_is_refused():
    model, _ = tower("siglip")
    with pytest.raises(TypeError, match="no class token"):
        TowerAttention(model)
    with pytest.raises(ValueError, match="rows must be 'class' or 'mean'; it was 'sum'"):
        TowerAttention(model, rows="sum")
    with pytest.raises(ValueError, match="layers must be numbers from -3 to 2"):
        TowerAttention(model, layers=[3], rows="mean")
    for name, reason in (("blip_2", "no q_proj and k_proj"), ("qwen2_vl", "no q_proj and k_proj")):
        with pytest.raises(TypeError, match=reason):
            tower_layers(models.build(name))
    rotary = t.PixtralVisionModel(
        t.PixtralVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    with pytest.raises(TypeError, match=r"not q @ k alone \(apply_rotary_pos_emb\)"):
        tower_layers(rotary)
    with pytest.raises(TypeError, match="no vision tower"):
        vision_tower(models.build("llama"))
    layer = tower_layers(model)[0]
    states, mask = torch.randn(1, 4, 24), torch.zeros(1, 1, 4, 4)
    with TowerAttention(model, layers=[0], rows="mean"), pytest.raises(ValueError, match="without padding only"):
        layer(states, attention_mask=mask)


@torch.no_grad()
def test_projections_by_the_names_that_they_had_before(monkeypatch):
    model, pixels = tower("vit")
    with TowerAttention(model) as wanted:
        model(pixel_values=pixels)
    for module in tower_layers(model):
        module.query, module.key = module.q_proj, module.k_proj
    monkeypatch.setattr("glocal.steer.tower._MAPS", (("query", "key"),))
    with TowerAttention(model) as found:
        model(pixel_values=pixels)
    assert torch.equal(found.maps[2], wanted.maps[2])
