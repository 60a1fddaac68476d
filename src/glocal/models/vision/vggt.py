"""VGGT's aggregator: tokens of many views, mixed inside each frame and over all frames in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.cache import DescriptorCache
from glocal.models.registry import register
from glocal.nn import MLP, Attention, Block, BlockSparseAttention, DescriptorAttention, Rope, choose_keyframes
from glocal.nn.block_sparse import Views
from glocal.shapes import Float

__all__ = [
    "VGGTAggregator",
    "vggt_aggregator",
    "vggt_aggregator_flash",
    "vggt_aggregator_sparse",
    "vggt_aggregator_tiny",
]

_GLOBAL = {"full": Attention, "sparse": BlockSparseAttention, "flash": DescriptorAttention}


class VGGTAggregator(nn.Module):
    """Pairs of a frame block, inside each view, and a global block, over all views; the heads that read it are apart.

    A view is one camera token, registers, and its patches; frame 0 has a camera token and registers of its own,
    which makes it the reference. Other frames are a set: their order does not count. VGGT (Wang et al., 2025, arXiv
    2503.11651); block-sparse global attention, arXiv 2509.07120; descriptors (FlashVGGT), arXiv 2512.01540.

    Patches are embedded by one convolution, where VGGT has a whole DINOv2. No weight depends on the picture's size
    nor, but for ``resize="learned"``, on the kind of global attention: weights move from one to the other as they are.

    Args:
        image_size: height and width, multiples of ``patch``; one number for squares.
        patch: side of a patch.
        dim, num_heads: of all blocks.
        depth: pairs of blocks.
        registers: register tokens of a view, besides its camera token.
        attention: the global layer: ``"full"``, ``"sparse"`` (`glocal.nn.BlockSparseAttention`) or ``"flash"``
            (`glocal.nn.DescriptorAttention`).
        keyframe_every: of "flash": one keyframe for so many frames, chosen by k-means, and frame 0; 10 in training.
            At factor 1, where nothing is made small, there are none, and it is VGGT.
        layer_scale: start of the learned scale of every branch.
        options: of the global layer, for example ``mass`` or ``factor``.

    Raises:
        ValueError: sizes that do not divide, an attention that is not there, or options that its layer refuses.

    >>> import torch, glocal
    >>> model = glocal.create("vggt_aggregator_tiny", attention="flash", factor=2)
    >>> frames = torch.randn(1, 4, 3, 32, 48)
    >>> model(frames).shape  # 4 views of 1 camera token, 4 registers and 4 x 6 patches, frame and global features
    torch.Size([1, 4, 29, 64])
    >>> cache = model.new_cache()
    >>> [model(chunk, cache=cache).shape[1] for chunk in frames.split(2, dim=1)]
    [2, 2]
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 518,
        patch: int = 14,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        *,
        registers: int = 4,
        attention: str = "full",
        keyframe_every: int = 200,
        layer_scale: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"image_size must be multiples of patch {patch}; it was {height} x {width}")
        if attention not in _GLOBAL:
            raise ValueError(f"attention must be 'full', 'sparse' or 'flash'; it was {attention!r}")
        for name, value in (("depth", depth), ("keyframe_every", keyframe_every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        self.image_size, self.dim, self.attention, self.keyframe_every = (height, width), dim, attention, keyframe_every
        self.views = Views(1 + registers, (height // patch, width // patch))
        self.patch_embed = nn.Conv2d(3, dim, patch, stride=patch)
        # The first of the two is for frame 0.
        self.camera_token = nn.Parameter(torch.randn(2, 1, dim) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(2, registers, dim) * 1e-6)
        frame: dict[str, Any] = {
            "qkv_bias": True,
            "out_bias": True,
            "qk_norm": "layer",
            "rope": Rope(100.0, axes=2),
        }
        if attention != "full":
            options = {"patches": self.views.patches, "special": self.views.special} | options

        def block(layer: Attention) -> Block:
            return Block(dim, layer, MLP(dim, 4 * dim), eps=1e-5, layer_scale=layer_scale)

        self.frame_blocks = nn.ModuleList(block(Attention(dim, num_heads, **frame)) for _ in range(depth))
        self.global_blocks = nn.ModuleList(
            block(_GLOBAL[attention](dim, num_heads, **(frame | options))) for _ in range(depth)
        )

    def tokens(self, frames: Float[Tensor, "B n 3 H W"], *, first: bool = True) -> Float[Tensor, "B n P dim"]:
        """Pictures to tokens, before any block; ``first`` says that the first of them is frame 0."""
        if frames.dim() != 5 or tuple(frames.shape[2:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(f"frames must be (B, n, 3, {height}, {width}); it was {tuple(frames.shape)}")
        batch, count = frames.shape[:2]
        patches = self.patch_embed(frames.flatten(0, 1)).flatten(2).mT.unflatten(0, (batch, count))
        kind = torch.ones(count, dtype=torch.long, device=frames.device)
        kind[:1] = 0 if first else 1
        special = torch.cat([self.camera_token, self.register_token], 1)[kind]
        return torch.cat([special.expand(batch, -1, -1, -1).to(patches.dtype), patches], 2)

    def features(
        self, frames: Float[Tensor, "B n 3 H W"], *, cache: Sequence[DescriptorCache] | None = None
    ) -> list[Float[Tensor, "B n P channels"]]:
        """What every pair of blocks gives: frame and global features side by side, ``(B, n, P, 2 dim)``.

        Args:
            frames: normalised pictures, ``(B, n, 3, H, W)``.
            cache: of `new_cache`: the frames follow those in it.

        Raises:
            ValueError: frames of another size, or a cache where the global layers keep none.
        """
        if cache is not None and (self.attention != "flash" or len(cache) != len(self.global_blocks)):
            raise ValueError("cache is for attention='flash', one for each global block: see new_cache")
        x = self.tokens(frames, first=cache is None or not cache[0].seen)
        shape, count = x.shape, x.shape[1]
        inside = self.views.positions(self.views.tokens, x.device)
        across = inside.repeat(count, 1)
        options: dict[str, Any] = {}
        layer = cast(Block, self.global_blocks[0]).attention
        if cache is None and isinstance(layer, DescriptorAttention) and layer.factor > 1:
            options["keyframes"] = choose_keyframes(x.mean(2), count // self.keyframe_every)
        out = []
        for number, (frame, over) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            if cache is not None:
                options["cache"] = cache[number]
            local = frame(x.flatten(0, 1), positions=inside).view(shape)
            x = over(local.flatten(1, 2), positions=across, **options).view(shape)
            out.append(torch.cat([local, x], -1))
        return out

    def forward(
        self, frames: Float[Tensor, "B n 3 H W"], *, cache: Sequence[DescriptorCache] | None = None
    ) -> Float[Tensor, "B n P channels"]:
        """The last of `features`, ``(B, n, P, 2 dim)``; token 0 of a view is its camera."""
        return self.features(frames, cache=cache)[-1]

    def new_cache(self, keep_every: int = 1) -> list[DescriptorCache]:
        """For a stream of chunks: an empty cache for each global block."""
        return [DescriptorCache(keep_every) for _ in self.global_blocks]


@register
def vggt_aggregator(**options: Any) -> VGGTAggregator:
    """The aggregator of VGGT-1B, with full global attention; its DINOv2 is replaced by a convolution."""
    return VGGTAggregator(**options)


@register
def vggt_aggregator_sparse(**options: Any) -> VGGTAggregator:
    """VGGT-1B with block-sparse global attention, for weights of full attention."""
    return VGGTAggregator(**({"attention": "sparse"} | options))


@register
def vggt_aggregator_flash(**options: Any) -> VGGTAggregator:
    """FlashVGGT: global attention to descriptors, factor 4."""
    return VGGTAggregator(**({"attention": "flash"} | options))


@register
def vggt_aggregator_tiny(**options: Any) -> VGGTAggregator:
    """A small one for tests: 32 x 48 pictures in patches of 8, 2 pairs of blocks of 32 channels."""
    sizes: dict[str, Any] = {"image_size": (32, 48), "patch": 8, "dim": 32, "depth": 2, "num_heads": 4}
    return VGGTAggregator(**(sizes | options))
