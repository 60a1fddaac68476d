"""CLIP and SigLIP as the methods for them see them: features, the class token's attention, pictures as pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.steer.tower import TowerAttention, vision_tower

__all__ = [
    "class_attention",
    "clip_kind",
    "image_features",
    "picture_side",
    "read",
    "text_features",
]

_TOWERS = ("clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "siglip_vision_model", "vit", "vit_msn")


@torch.no_grad()
def class_attention(model: Any, pixel_values: Tensor) -> Tensor:
    """How much the class token of an image encoder attends to each patch in its last layer, mean over heads.

    Read by `TowerAttention`, so that any attention implementation will do and the model runs as ever. For SigLIP it is
    the attention of its pooling head.

    Args:
        model: ``ViTModel``, ``Dinov2Model``, ``CLIPVisionModel`` or the like; of a ``CLIPModel`` the image tower.
        pixel_values: ``(B, 3, H, W)``.

    Returns:
        ``(B, rows, columns)`` in float32; what is missing from a sum of 1 goes to the tokens that are no patches.

    Raises:
        TypeError: an encoder whose scores are not plain products of queries and keys, or that has no class token.
    """
    vision: Any = vision_tower(model)
    kind = getattr(getattr(vision, "config", None), "model_type", type(vision).__name__)
    if kind not in _TOWERS or (kind == "siglip_vision_model" and not vision.use_head):
        raise TypeError(f"model must be one of {', '.join(_TOWERS)} (SigLIP with its pooling head); it was {kind}")
    if kind == "siglip_vision_model":
        weights = _pooling(vision, pixel_values)
    else:
        with TowerAttention(vision) as seen:
            vision(pixel_values=pixel_values)
        weights = next(iter(seen.maps.values())).mean(1)
    rows, columns = (side // vision.config.patch_size for side in pixel_values.shape[2:])
    # DeiT has one more token before its patches.
    found: Tensor = weights[:, -rows * columns :].float().unflatten(-1, (rows, columns))
    return found


def _pooling(vision: Any, pixel_values: Tensor) -> Tensor:
    """Attention of SigLIP's pooling head to the patches, ``(B, P)``."""
    kept: list[Tensor] = []
    hook = vision.head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        vision(pixel_values=pixel_values)
    finally:
        hook.remove()
    states = kept[0]
    probe = vision.head.probe.expand(len(states), -1, -1)
    weights: Tensor = vision.head.attention(probe, states, states, need_weights=True)[1][:, 0]
    return weights


@torch.no_grad()
def image_features(clip: Any, pixel_values: Tensor) -> Tensor:
    """CLIP's features of whole pictures ``(B, 3, H, W)``: ``(B, d)``, not scaled."""
    found = clip.get_image_features(pixel_values=pixel_values)
    features: Tensor = getattr(found, "pooler_output", found)
    return features


@torch.no_grad()
def text_features(clip: Any, processor: Callable[..., Any], texts: Sequence[str]) -> Tensor:
    """CLIP's features ``(M, d)`` of texts, of length 1.

    ``processor`` is called with ``text=``, ``padding=``, ``truncation=`` and ``return_tensors="pt"``.
    SigLIP was trained on texts padded to the full length, and reads them so.
    """
    padding = "max_length" if clip_kind(clip) == "siglip" else True
    inputs = processor(text=list(texts), padding=padding, truncation=True, return_tensors="pt")
    device = clip.logit_scale.device
    found = clip.get_text_features(
        **{name: inputs[name].to(device) for name in ("input_ids", "attention_mask") if name in inputs}
    )
    return F.normalize(getattr(found, "pooler_output", found), dim=-1)


def read(processor: Callable[..., Any], images: Sequence[Any], model: Any, *, whole: bool = False) -> Tensor:
    """Pixel values ``(B, 3, H, W)`` of pictures on a model's device in its dtype.

    Args:
        processor: a processor or image processor of transformers, or any function ``processor(images=[...],
            return_tensors="pt")`` that gives ``pixel_values`` in a mapping, or the tensor itself.
        images: PIL images.
        model: the model that will see them.
        whole: make each picture the model's square, all of it, and let the processor neither resize nor cut; else it
            does both as it is set.
    """
    reader = getattr(processor, "image_processor", processor)
    options: dict[str, Any] = {}
    if whole:
        from PIL import Image

        side = picture_side(model)
        images = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
        if hasattr(reader, "do_resize"):
            options = dict(do_resize=False, do_center_crop=False)
    pixels = reader(images=list(images), return_tensors="pt", **options)
    pixels = pixels["pixel_values"] if isinstance(pixels, Mapping) else pixels
    weight = next(vision_tower(model).parameters())
    found: Tensor = pixels.to(weight.device, weight.dtype)
    return found


def picture_side(model: Any) -> int:
    """Pixels of the square that a model sees."""
    vision: Any = vision_tower(model)
    side = vision.config.image_size
    return int(side if isinstance(side, int) else side[0])


def clip_kind(clip: Any) -> Literal["clip", "siglip"]:
    """Whether it is CLIP, with a class token, or SigLIP, with a pooling head.

    Raises:
        TypeError: neither, or a SigLIP without that head.
    """
    kind = getattr(getattr(clip, "config", None), "model_type", type(clip).__name__)
    if kind not in ("clip", "siglip"):
        raise TypeError(f"clip must be a CLIPModel or SiglipModel of transformers; it was {kind}")
    if kind == "siglip" and not clip.vision_model.use_head:
        raise TypeError("clip must have its pooling head: this SigLIP was made with vision_use_head=False")
    return "clip" if kind == "clip" else "siglip"
