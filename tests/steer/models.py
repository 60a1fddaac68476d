"""Small models of random weights, one of each class that steering is for, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

IMAGE, VOCAB, SIDE = 3, 99, 32
_TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_VISION = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
)
_QUERIES = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    encoder_hidden_size=24,
)


def _llava() -> Any:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_VISION),
        text_config=t.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
    )
    return t.LlavaForConditionalGeneration(config)


def _next() -> Any:
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**_VISION),
        text_config=t.MistralConfig(**_TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return t.LlavaNextForConditionalGeneration(config)


def _onevision() -> Any:
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**_VISION),
        text_config=t.Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return t.LlavaOnevisionForConditionalGeneration(config)


def _qwen(kind: str) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = _TEXT | dict(rope_parameters=rope)
    if kind == "qwen2_vl":
        vision = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, patch_size=8, mlp_ratio=2)
        config = t.Qwen2VLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=4, vision_end_token_id=5
        )
        return t.Qwen2VLForConditionalGeneration(config)
    vision = dict(
        depth=2,
        hidden_size=16,
        out_hidden_size=32,
        num_heads=2,
        patch_size=8,
        intermediate_size=24,
        fullatt_block_indexes=[1],
        window_size=32,
    )
    config = t.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=4, vision_end_token_id=5
    )
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _blip(kind: str) -> Any:
    vision = _VISION
    text = t.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    if kind == "blip_2":
        config = t.Blip2Config(
            vision_config=vision,
            qformer_config=_QUERIES,
            text_config=text.to_dict(),
            num_query_tokens=9,
            image_token_index=IMAGE,
        )
        return t.Blip2ForConditionalGeneration(config)
    config = t.InstructBlipConfig(
        vision_config=vision,
        qformer_config=_QUERIES,
        text_config=text.to_dict(),
        num_query_tokens=9,
        image_token_index=IMAGE,
    )
    return t.InstructBlipForConditionalGeneration(config)


def _paligemma() -> Any:
    text = _TEXT | dict(head_dim=8, model_type="gemma")
    vision = _VISION | dict(model_type="siglip_vision_model", projection_dim=32, vision_use_head=False)
    config = t.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32)
    return t.PaliGemmaForConditionalGeneration(config)


def _gemma() -> Any:
    text = _TEXT | dict(head_dim=8, sliding_window=16, model_type="gemma3_text")
    vision = _VISION | dict(model_type="siglip_vision_model", vision_use_head=False)
    config = t.Gemma3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=4)
    return t.Gemma3ForConditionalGeneration(config)


VISION = {
    "llava": _llava,
    "llava_next": _next,
    "llava_onevision": _onevision,
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "blip_2": lambda: _blip("blip_2"),
    "instructblip": lambda: _blip("instructblip"),
    "paligemma": _paligemma,
    "gemma3": _gemma,
}
TEXT = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_TEXT)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_TEXT)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_TEXT, sliding_window=None)),
}


def build(name: str, seed: int = 0) -> Any:
    """A model of either list; the weights are large enough for attention to differ between keys."""
    torch.manual_seed(seed)
    model = (VISION | TEXT)[name]().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def inputs(name: str, model: Any, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Prompts with one picture each, the second one shorter and padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    tokens, pixels = _pixels(name, model, batch, draw)
    rows = []
    for n in range(batch):
        text = torch.randint(10, VOCAB, (7 - 2 * (n % 2),), generator=draw)
        image = torch.full((tokens,), IMAGE)
        if name.startswith("qwen2_"):
            image = torch.cat([torch.tensor([4]), image, torch.tensor([5])])
        rows.append(torch.cat([torch.tensor([1]), image[: 0 if name in TEXT else None], text]))
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    found = {"input_ids": ids, "attention_mask": (ids != 0).long()} | pixels
    if name == "instructblip":
        found |= {"qformer_input_ids": torch.randint(10, VOCAB, (batch, 4), generator=draw)}
        found |= {"qformer_attention_mask": torch.ones(batch, 4, dtype=torch.long)}
    if name in ("paligemma", "gemma3"):
        found["token_type_ids"] = ((ids == IMAGE) if name == "gemma3" else torch.zeros_like(ids)).long()
    if name.startswith("qwen2_"):
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    return found


def _pixels(name: str, model: Any, batch: int, draw: torch.Generator) -> tuple[int, dict[str, Tensor]]:
    """How many tokens a picture has, and its pixels as the class wants them."""
    if name in TEXT:
        return 0, {}
    if name.startswith("qwen2_"):
        grid = torch.tensor([[1, 6, 8]] * batch)
        patches = torch.randn(batch * 48, 3 * 2 * 8 * 8, generator=draw)
        return 12, {"pixel_values": patches, "image_grid_thw": grid}
    if name in ("llava_next", "llava_onevision"):
        sizes = torch.tensor([[40, 64]] * batch)
        pixels = torch.randn(batch, 5, 3, SIDE, SIDE, generator=draw)
        found = model.get_image_features(pixels, sizes)
        features = getattr(found, "pooler_output", found)
        return len(features[0]), {"pixel_values": pixels, "image_sizes": sizes}
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=draw)
    return {"blip_2": 9, "instructblip": 9, "gemma3": 4}.get(name, 16), {"pixel_values": pixels}
