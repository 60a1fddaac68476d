"""ABS: crops of a picture where attention looks, from its pixels and from CLIP's own states, matched with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.steer.clip import class_attention, clip_kind, image_features, picture_side, read
from glocal.steer.tower import class_tokens

__all__ = ["ABS", "feature_crops"]

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ABS:
    """Attention-based selection for zero-shot CLIP (Cai et al., 2025, arXiv 2505.13233).

    Crops sharpen the match of a picture with fine descriptions, if they are of the right thing and do not lose sight
    of the rest. Here they are where a guide's class token looks: raw crops of the pixels, and crops of the states
    before CLIP's last block, which have seen the whole picture; the last block sees them beside the whole picture's
    class token. Nothing is learned. A picture costs ``raw_crops`` forwards of CLIP, ``feature_crops`` of its last
    block, and one of the guide. Every picture draws with the same seed, so that its result does not depend on others.

    The guide and CLIP see the same part of a picture, so that a patch of one is where it is for the other; the
    authors' code gives the guide the whole picture and CLIP its middle square, and so misses on oblong pictures.

    SigLIP has no class token: nothing goes beside its feature crops, its pooling head reads them as it reads the
    whole picture, and as its own guide it gives that head's attention.

    Args:
        top: how many patches, those with most attention, can be centres of crops; all where None.
        temperature: of the softmax over their attention by which centres are drawn; the lower, the fewer.
        match_temperature: divides the similarities of crops and texts, also within their softmax.
        raw_crops, feature_crops: how many; 0 for none.
        raw_scale: least and greatest side of a raw crop, as shares of the picture's; width and height are drawn alone.
        feature_scale: the same for feature crops, as shares of the grid. A side of ``s`` patches is ``s // 2`` to
            either side of the centre, so one more where ``s`` is even, as the authors' code has it.
        square: how a picture becomes the models' square: ``stretch`` all of it, or ``crop`` its middle.
        seed: of the draws.
        batch: how many pictures or crops CLIP sees at a time.

    Raises:
        ValueError: a setting out of range.

    Example::

        guide, reader = AutoModel.from_pretrained("facebook/dino-vitb16"), AutoImageProcessor.from_pretrained(...)
        texts = [text_features(clip, processor, descriptions[name]) for name in names]
        logits = ABS().logits(clip, photos, texts, processor=processor, guide=guide, guide_processor=reader)

    >>> texts = F.normalize(torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [-1.0, 1.0]]]), dim=-1)
    >>> ABS().match(torch.tensor([[[0.9, 0.1]]]), texts).argmax(-1)
    tensor([0])
    """

    top: int | None = 20
    temperature: float = 0.03
    match_temperature: float = 0.03
    raw_crops: int = 50
    feature_crops: int = 50
    raw_scale: tuple[float, float] = (0.6, 0.9)
    feature_scale: tuple[float, float] = (0.6, 0.9)
    square: Literal["stretch", "crop"] = "stretch"
    seed: int = 1
    batch: int = 64

    def __post_init__(self) -> None:
        for name in ("temperature", "match_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0; it was {getattr(self, name)}")
        for name in ("raw_scale", "feature_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be two shares, 0 < least <= greatest <= 1; it was {(low, high)}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be at least 1, or None for all patches; it was {self.top}")
        if min(self.raw_crops, self.feature_crops) < 0 or not self.raw_crops + self.feature_crops:
            counts = (self.raw_crops, self.feature_crops)
            raise ValueError(f"raw_crops and feature_crops must not be below 0, nor both 0; they were {counts}")
        if self.square not in ("stretch", "crop"):
            raise ValueError(f"square must be 'stretch' or 'crop'; it was {self.square!r}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1; it was {self.batch}")

    def logits(
        self,
        clip: Any,
        images: Sequence[Any],
        text_features: Tensor | Sequence[Tensor],
        *,
        processor: Callable[..., Any],
        guide: Any = None,
        guide_processor: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Of ``K`` classes for each picture: `match` of its `features`.

        Args:
            clip, images, processor, guide, guide_processor: as for `features`.
            text_features: ``(K, M, d)``, ``M`` descriptions a class, or ``K`` tensors ``(M_k, d)``.

        Returns:
            ``(B, K)`` in float32.

        Raises:
            TypeError, ValueError: as for `features` and `match`.
        """
        clip_kind(clip)
        found = self.features(clip, images, processor=processor, guide=guide, guide_processor=guide_processor)
        return self.match(found, text_features)

    def match(self, features: Tensor, text_features: Tensor | Sequence[Tensor]) -> Tensor:
        """Soft matching: ``softmax(s) * s`` summed over crops and a class's descriptions, ``s`` cosine / temperature.

        The softmax is over all descriptions of all classes. A class with more descriptions than others counts for more.

        Args:
            features: of crops, ``(B, n, d)``; scaled to length 1 here.
            text_features: ``(K, M, d)``, or ``K`` tensors ``(M_k, d)``; the same.

        Returns:
            ``(B, K)`` in float32.

        Raises:
            ValueError: shapes that do not fit.
        """
        classes = [each.to(features.device) for each in text_features]
        width = features.shape[-1]
        if features.ndim != 3 or not classes or any(t.ndim != 2 or t.shape[-1] != width for t in classes):
            shapes = [tuple(t.shape) for t in classes[:3]]
            raise ValueError(
                f"features must be (B, n, d), here {tuple(features.shape)}, and text_features (K, M, d) or K tensors "
                f"(M_k, d) of the same d; of the first classes it was {shapes}"
            )
        texts = F.normalize(torch.cat(classes).float(), dim=-1)
        alike = F.normalize(features.float(), dim=-1) @ texts.T / self.match_temperature
        each = (alike.softmax(-1) * alike).sum(1)
        owner = torch.repeat_interleave(torch.tensor([len(t) for t in classes], device=each.device))
        return each.new_zeros(len(each), len(classes)).index_add(1, owner, each)

    @torch.no_grad()
    def features(
        self,
        clip: Any,
        images: Sequence[Any],
        *,
        processor: Callable[..., Any],
        guide: Any = None,
        guide_processor: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Features of the crops of pictures, raw ones first.

        Args:
            clip: a ``CLIPModel`` or ``SiglipModel`` of transformers.
            images: ``B`` PIL images.
            processor: CLIP's; see `read`.
            guide: an image encoder of transformers with a class token, such as DINO's ``ViTModel`` or a
                ``Dinov2Model``; CLIP's own tower where None.
            guide_processor: the guide's; needed with a guide, whose pixels are scaled in its own way.

        Returns:
            ``(B, raw_crops + feature_crops, d)`` of length 1, in CLIP's dtype.

        Raises:
            TypeError: a model of another kind.
            ValueError: no pictures, a guide without its processor, fewer patches than ``top``.
        """
        clip_kind(clip)
        if not images or not all(hasattr(image, "convert") for image in images):
            raise ValueError("images must be PIL images, at least one")
        if (guide is None) != (guide_processor is None):
            raise ValueError("guide and guide_processor go together: a guide's pixels are scaled in its own way")
        looker, looker_reads = (clip, processor) if guide is None else (guide, guide_processor)
        assert looker_reads is not None
        found = []
        for image in images:
            image = image.convert("RGB")
            seen = image.crop(self.seen(image.size))
            attention = class_attention(looker, read(looker_reads, [seen], looker, whole=True))[0]
            draw = torch.Generator().manual_seed(self.seed)
            raw = self.raw_boxes(attention, image.size, draw)
            parts = [image.crop(box) for box in raw]
            kept = [
                image_features(clip, read(processor, parts[at : at + self.batch], clip))
                for at in range(0, len(parts), self.batch)
            ]
            if self.feature_crops:
                hidden = _before_last(clip, read(processor, [seen], clip, whole=True))[0]
                boxes = self.grid_boxes(attention, picture_side(clip) // clip.vision_model.config.patch_size, draw)
                kept += [
                    feature_crops(clip, hidden, boxes[at : at + self.batch]) for at in range(0, len(boxes), self.batch)
                ]
            found.append(torch.cat(kept))
        return F.normalize(torch.stack(found), dim=-1)

    def seen(self, size: tuple[int, int]) -> Box:
        """The part of a picture of ``size`` (width, height) that the models see: left, top, right, bottom."""
        width, height = size
        if self.square == "stretch":
            return 0, 0, width, height
        side = min(size)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def centres(self, attention: Tensor, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Rows and columns of patches, drawn by their attention ``(rows, columns)``."""
        flat = attention.detach().double().cpu().flatten()
        top = len(flat) if self.top is None else self.top
        if top > len(flat):
            raise ValueError(f"top must be at most the guide's {len(flat)} patches; it was {top}")
        values, places = flat.topk(top)
        chosen = torch.multinomial((values / self.temperature).softmax(0), count, replacement=True, generator=generator)
        columns = attention.shape[1]
        return [(int(place) // columns, int(place) % columns) for place in places[chosen]]

    def raw_boxes(self, attention: Tensor, size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        """``raw_crops`` boxes in a picture of ``size`` (width, height), clipped where they reach over its edges."""
        if not self.raw_crops:
            return []
        left, top, right, bottom = self.seen(size)
        rows, columns = attention.shape
        centres = self.centres(attention, self.raw_crops, generator)
        sides = [_uniform(side, self.raw_scale, self.raw_crops, generator) for side in size]
        boxes = []
        for (row, column), width, height in zip(centres, *sides, strict=True):
            x = int(left + (column + 0.5) * (right - left) / columns) - width // 2
            y = int(top + (row + 0.5) * (bottom - top) / rows) - height // 2
            boxes.append((max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])))
        return boxes

    def grid_boxes(self, attention: Tensor, grid: int, generator: torch.Generator) -> list[Box]:
        """``feature_crops`` boxes in CLIP's grid of ``grid`` x ``grid`` patches, clipped; left, top, right, bottom."""
        if not self.feature_crops:
            return []
        rows, columns = attention.shape
        centres = self.centres(attention, self.feature_crops, generator)
        sides = _uniform(grid, self.feature_scale, self.feature_crops, generator)
        boxes = []
        for (row, column), side in zip(centres, sides, strict=True):
            y, x, half = int((row + 0.5) * grid / rows), int((column + 0.5) * grid / columns), side // 2
            boxes.append((max(x - half, 0), max(y - half, 0), min(x + half + 1, grid), min(y + half + 1, grid)))
        return boxes


def _uniform(side: int, scale: tuple[float, float], count: int, generator: torch.Generator) -> list[int]:
    low, high = (max(1, int(share * side)) for share in scale)
    found: list[int] = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return found


@torch.no_grad()
def feature_crops(clip: Any, hidden: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Features of parts of a picture that have seen the whole of it.

    Each part of the states before CLIP's last block is enlarged to the whole grid by bicubic interpolation; with the
    picture's own class token before it, it runs through the last block, the norm and the projection.

    Args:
        clip: a ``CLIPModel`` or ``SiglipModel``.
        hidden: what enters the last block, ``(1 + g * g, C)``; without the class token for SigLIP.
        boxes: ``n`` of them in patches: left, top, right, bottom.

    Returns:
        ``(n, d)``, not scaled.

    Raises:
        TypeError: a model of another kind.
        ValueError: patches that form no square, or a box that is not in it.
    """
    clip_kind(clip)
    own = class_tokens(clip)
    vision = clip.vision_model
    side = round((len(hidden) - own) ** 0.5)
    if side * side != len(hidden) - own:
        raise ValueError(f"hidden must be ({own} + g * g, C); it was {tuple(hidden.shape)}")
    for box in boxes:
        if not (0 <= box[0] < box[2] <= side and 0 <= box[1] < box[3] <= side):
            raise ValueError(f"boxes must be left, top, right, bottom in {side} x {side} patches; one was {tuple(box)}")
    grid = hidden[own:].T.reshape(1, -1, side, side).float()  # bicubic weights in half precision would shift the states
    parts = [
        F.interpolate(grid[..., top:bottom, left:right], (side, side), mode="bicubic", align_corners=False)
        for left, top, right, bottom in boxes
    ]
    states = torch.cat(parts).flatten(2).mT.to(hidden.dtype)
    states = torch.cat([hidden[:own].expand(len(boxes), -1, -1), states], 1)
    states = vision.encoder.layers[-1](states, None)
    states = states[0] if isinstance(states, tuple) else states
    found: Tensor
    if own:
        found = clip.visual_projection(vision.post_layernorm(states[:, 0]))
    else:
        found = vision.head(vision.post_layernorm(states))
    return found


def _before_last(clip: Any, pixel_values: Tensor) -> Tensor:
    """What enters the last block, ``(B, N, C)``."""
    kept: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    hook = clip.vision_model.encoder.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        clip.vision_model(pixel_values=pixel_values)
    finally:
        hook.remove()
    return kept[0]
