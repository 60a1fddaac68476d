"""Tiny models of many architectures with random weights, and what to feed them."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from glocal.hf.install import attention_modules, crosses

SIZES: dict[str, Any] = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37
)
GROUPED = dict(SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=None)
VISION = dict(image_size=16, patch_size=4, num_channels=3)

# Class of the model, class of the configuration, its settings.
TABLE: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, dict(GROUPED, sliding_window=None)),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, dict(GROUPED, sliding_window=5, query_pre_attn_scalar=8)),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, dict(GROUPED, sliding_window=5, query_pre_attn_scalar=8)),
    "llama4": (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        dict(
            GROUPED,
            intermediate_size_mlp=37,
            attention_chunk_size=5,
            moe_layers=[],
            layer_types=["chunked_attention", "full_attention"],
        ),
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=None),
    ),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, dict(SIZES, bos_token_id=None, eos_token_id=None)),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, dict(SIZES, max_position_embeddings=64)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, dict(SIZES, max_position_embeddings=64)),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig,
        dict(
            SIZES, local_attention=8, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
            bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
        ),
    ),
    "vit": (hf.ViTModel, hf.ViTConfig, SIZES | VISION),
    "clip_vision": (hf.CLIPVisionModel, hf.CLIPVisionConfig, SIZES | VISION),
    "clip_text": (hf.CLIPTextModel, hf.CLIPTextConfig, dict(SIZES, max_position_embeddings=64, eos_token_id=98)),
    "clip": (
        hf.CLIPModel,
        hf.CLIPConfig,
        dict(
            text_config=dict(SIZES, max_position_embeddings=64, eos_token_id=98),
            vision_config=SIZES | VISION,
            projection_dim=16,
        ),
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        dict(
            vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, num_mel_bins=8,
            max_source_positions=20, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        ),
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        dict(
            vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=None,
            decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=16,
        ),
    ),
}  # fmt: skip

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "llama4", "gpt2", "gpt_neox")
ENCODERS = ("bert", "roberta", "modernbert")
VISIONS = ("vit", "clip_vision")
TOKENS = (*DECODERS, *ENCODERS, "clip_text", "clip", "t5")
"""Those that take a mask of padding."""


def build(name: str, implementation: str | None = None, seed: int = 0, **more: Any) -> hf.PreTrainedModel:
    """A model in evaluation, its weights large enough that attention is far from even."""
    kind, config_kind, settings = TABLE[name]
    config = config_kind(**{**settings, **more})
    # Gemma 2 caps its scores, which sdpa cannot.
    config._attn_implementation = implementation or ("eager" if name == "gemma2" else "sdpa")
    torch.manual_seed(seed)
    model = kind(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def ids(batch: int = 3, length: int = 21, seed: int = 1) -> Tensor:
    """Tokens that are no special ones."""
    return torch.randint(3, 98, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, pad: int, left: bool) -> Tensor:
    """Row ``r`` has ``r * pad`` tokens of padding."""
    at, size = torch.arange(length), pad * torch.arange(batch)[:, None]
    return ((at >= size) if left else (at < length - size)).long()


def inputs(name: str, batch: int = 3, length: int = 21, pad: int | None = None, left: bool = False) -> dict[str, Any]:
    """What the model takes; with ``pad`` also a mask."""
    generator = torch.Generator().manual_seed(2)
    if name in VISIONS:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name == "whisper":
        features = torch.randn(batch, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids(batch, 11)}
    found: dict[str, Any] = {"input_ids": ids(batch, length)}
    if pad is not None:
        found["attention_mask"] = padding(batch, length, pad, left)
    if name == "clip":
        found["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    if name == "t5":
        found["decoder_input_ids"] = ids(batch, 13, seed=3)
    return found


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits, or the last states of a model without a head."""
    with torch.no_grad():
        out = model(**batch)
    if hasattr(out, "logits_per_text"):
        return torch.cat([out.text_embeds, out.image_embeds, out.logits_per_text], -1)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def real_only(name: str, out: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Outputs of real tokens; padding gets what nobody reads."""
    mask = batch.get("attention_mask")
    if mask is None or name in ("clip", "t5"):  # these give no output at the padded tokens
        return out
    return out[mask.bool()]


def own_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Self-attention modules by path."""
    return {path: module for path, module in attention_modules(model).items() if not crosses(path)}
