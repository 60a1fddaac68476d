"""Inf-DiT: a diffusion transformer that enlarges images of any size, block by block, in the memory of one block row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, unfold

from glocal.cache.rows import BlockRowCache
from glocal.models.registry import register
from glocal.nn import MLP, Attention, UnidirectionalBlockAttention
from glocal.shapes import Float

__all__ = ["InfDiT", "denoise", "denoising_loss", "heun", "infdit", "infdit_tiny", "noise_levels", "upscale"]

Region = tuple[slice, slice]
SIGMA_DATA = 0.5


class LowResAttention(Attention):
    """A block reads the 3 x 3 blocks of the small image around it; places are learned tables, added after the norms."""

    uses = ("noncausal-cross",)

    def __init__(self, dim: int, num_heads: int, queries: int, keys: int) -> None:
        super().__init__(dim, num_heads, qk_norm="layer", qkv_bias=True, out_bias=True)
        self.q_places = nn.Parameter(0.02 * torch.randn(num_heads, queries, self.head_dim))
        self.k_places = nn.Parameter(0.02 * torch.randn(num_heads, keys, self.head_dim))

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, at_q, at_k)
        return q + self.q_places, k + self.k_places, v


class DiTBlock(nn.Module):
    """Attention and feed-forward, each shifted and scaled by the condition; the first block reads the small image."""

    def __init__(self, dim: int, num_heads: int, size: int, keys: int, border: str, cross: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), _zero(nn.Linear(dim, 4 * dim)))
        self.attention = UnidirectionalBlockAttention(
            dim, num_heads, block_size=size, border=border, qkv_bias=True, out_bias=True
        )
        self.cross = LowResAttention(dim, num_heads, size**2, keys) if cross else None
        self.mlp = MLP(dim, 4 * dim, approximate="tanh")

    def forward(self, x: Tensor, condition: Tensor, low: Tensor, **options: Any) -> Tensor:
        """``x (B, h, w, dim)``, ``condition (B, dim)``, ``low (B, X, Y, keys, dim)`` to the shape of ``x``."""
        shift1, scale1, shift2, scale2 = self.modulation(condition)[:, None, None].chunk(4, -1)
        x = x + self.attention(self.norm(x) * (1 + scale1) + shift1, **options)
        if self.cross is not None:
            size = self.attention.block_size
            blocks = self.norm(x).unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
            read = self.cross(blocks.flatten(3, 4).flatten(0, 2), low.flatten(0, 2)).view_as(blocks)
            x = x + read.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return cast(Tensor, x + self.mlp(self.norm(x) * (1 + scale2) + shift2))


class InfDiT(nn.Module):
    """From a noisy image and the small one, what the diffusion predicts: all at once, or block by block.

    Yang et al., 2024, arXiv 2405.04312. Pixels, not latents; unidirectional block attention in every layer; the small
    image comes in enlarged, as three channels more, and by cross-attention in the first layer. Here queries and keys
    have norms of their own, where the official code uses the query's for both, and no norm has weights in the blocks.

    Args:
        dim, depth, num_heads: of the transformer.
        patch: pixels of a token's side.
        block: pixels of a block's side; images are made of whole blocks.
        scale: how much larger the image is than the small one.
        low_patch: pixels of a token's side in the small image.
        image_dim: channels of a global embedding of the small image (CLIP's), a condition beside the time; 0 for none.
        border: as in `UnidirectionalBlockAttention`.

    Raises:
        ValueError: sizes that do not divide, images that do not fit.

    >>> import torch, glocal
    >>> model = glocal.create("infdit_tiny")
    >>> x, low = torch.randn(1, 3, 16, 24), torch.randn(1, 3, 8, 12)
    >>> model(x, torch.zeros(1), low).shape
    torch.Size([1, 3, 16, 24])
    """

    def __init__(
        self,
        dim: int = 1280,
        depth: int = 28,
        num_heads: int = 16,
        *,
        patch: int = 4,
        block: int = 128,
        scale: int = 4,
        low_patch: int = 2,
        image_dim: int = 768,
        border: str = "replicate",
    ) -> None:
        super().__init__()
        if block % patch or block % (scale * low_patch):
            raise ValueError(f"block must be a multiple of patch {patch} and of {scale * low_patch}; it was {block}")
        self.patch, self.block, self.scale, self.low_patch = patch, block, scale, low_patch
        self.low_block = block // scale // low_patch
        """Tokens of a block's side in the small image."""
        self.embed = nn.Conv2d(6, dim, patch, patch)
        self.embed_low = nn.Conv2d(3, dim, low_patch, low_patch)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.image = (
            nn.Sequential(nn.Linear(image_dim, dim), nn.SiLU(), _zero(nn.Linear(dim, dim))) if image_dim else None
        )
        keys = (3 * self.low_block) ** 2
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, block // patch, keys, border, cross=not layer) for layer in range(depth)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), _zero(nn.Linear(dim, 2 * dim)))
        self.head = nn.Linear(dim, patch**2 * 3)

    def forward(
        self,
        x: Float[Tensor, "B 3 H W"],
        noise: Float[Tensor, "B"],
        low: Float[Tensor, "B 3 h w"],
        image: Float[Tensor, "B image_dim"] | None = None,
        *,
        direction: str = "lt",
        offset: tuple[int, int] = (0, 0),
    ) -> Float[Tensor, "B 3 H W"]:
        """All blocks at once.

        Args:
            x: noisy image, as the network is to see it.
            noise: its level, ``log(sigma) / 4``.
            low: the small image, ``scale`` times smaller.
            image: a global embedding of it; left out where None.
            direction: of the attention, ``"lt"`` or ``"rb"``.
            offset: of the token positions; random in training, so that larger images are not out of range.
        """
        rows, columns = self._check(x, low)
        condition = self._condition(noise, image)
        whole = (slice(0, rows), slice(0, columns))
        return self._region(x, condition, low, whole, [{} for _ in self.blocks], direction, offset)

    def pieces(
        self,
        x: Float[Tensor, "B 3 H W"],
        noise: Float[Tensor, "B"],
        low: Float[Tensor, "B 3 h w"],
        image: Float[Tensor, "B image_dim"] | None = None,
        *,
        side: int = 1,
        direction: str = "lt",
        offset: tuple[int, int] = (0, 0),
        rows: list[BlockRowCache] | None = None,
    ) -> Iterator[tuple[Region, Tensor]]:
        """The same in raster order, ``side x side`` blocks at a time: where each piece belongs, in pixels, and itself.

        ``rows``, an empty cache a layer, may be given to look at.
        """
        height, width = self._check(x, low)
        if side < 1:
            raise ValueError(f"side must be at least 1; it was {side}")
        condition = self._condition(noise, image)
        rows = [BlockRowCache(width) for _ in self.blocks] if rows is None else rows
        caches = [{"rows": one} for one in rows]
        starts = [(i, j) for i in range(0, height, side) for j in range(0, width, side)]
        for i, j in starts if direction == "lt" else reversed(starts):
            region = (slice(i, min(i + side, height)), slice(j, min(j + side, width)))
            pixels = tuple(slice(s.start * self.block, s.stop * self.block) for s in region)
            part = x[:, :, pixels[0], pixels[1]]
            yield (pixels[0], pixels[1]), self._region(part, condition, low, region, caches, direction, offset)

    def by_blocks(self, x: Tensor, noise: Tensor, low: Tensor, image: Tensor | None = None, **options: Any) -> Tensor:
        """What `forward` gives, from `pieces`, without gradients."""
        out = torch.empty_like(x)
        with torch.no_grad():
            for (vertical, horizontal), piece in self.pieces(x, noise, low, image, **options):
                out[:, :, vertical, horizontal] = piece
        return out

    def _check(self, x: Tensor, low: Tensor) -> tuple[int, int]:
        """Rows and columns of blocks."""
        if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape or any(n % self.block for n in x.shape[2:]):
            raise ValueError(f"x must be (B, 3, H, W) of whole blocks of {self.block} pixels; it was {tuple(x.shape)}")
        want = (*x.shape[:2], x.shape[2] // self.scale, x.shape[3] // self.scale)
        if tuple(low.shape) != want:
            raise ValueError(f"low must be {want}, {self.scale} times smaller than x; it was {tuple(low.shape)}")
        return x.shape[2] // self.block, x.shape[3] // self.block

    def _condition(self, noise: Tensor, image: Tensor | None) -> Tensor:
        rate = torch.exp(-math.log(10000.0) * torch.arange(128, device=noise.device) / 128).to(noise.dtype)
        angle = noise[:, None] * rate
        condition = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        if image is not None:
            if self.image is None:
                raise ValueError("image must be None: the network has image_dim 0")
            condition = condition + self.image(image)
        return cast(Tensor, condition)

    def _region(
        self,
        x: Tensor,
        condition: Tensor,
        low: Tensor,
        region: Region,
        options: list[dict[str, Any]],
        direction: str,
        offset: tuple[int, int],
    ) -> Tensor:
        """One rectangle of blocks: ``x`` is cut out already, of ``low`` only what is near is looked at."""
        x = self.embed(torch.cat([x, self._enlarged(low, region)], 1)).movedim(1, -1)
        near = self._near(low, region)
        side = self.block // self.patch
        axes = (
            torch.arange(part.start * side + o, part.stop * side + o, device=x.device)
            for part, o in zip(region, offset, strict=True)
        )
        positions = torch.cartesian_prod(*axes).view(-1, 2)
        for block, more in zip(self.blocks, options, strict=True):
            x = block(x, condition, near, positions=positions, direction=direction, **more)
        shift, scale = self.modulation(condition)[:, None, None].chunk(2, -1)
        pixels = self.head(self.norm(x) * (1 + scale) + shift).unflatten(-1, (self.patch, self.patch, 3))
        return cast(Tensor, pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))

    def _enlarged(self, low: Tensor, region: Region) -> Tensor:
        """The small image at the region, enlarged by cubic interpolation, which reads two pixels beyond."""
        side, cut, seen = self.block // self.scale, [], []
        for part, length in zip(region, low.shape[2:], strict=True):
            first, last = max(part.start * side - 2, 0), min(part.stop * side + 2, length)
            seen.append(slice(first, last))
            cut.append(slice((part.start * side - first) * self.scale, (part.stop * side - first) * self.scale))
        crop = low[:, :, seen[0], seen[1]]
        large: Tensor = interpolate(crop, scale_factor=float(self.scale), mode="bicubic")
        return large[:, :, cut[0], cut[1]]

    def _near(self, low: Tensor, region: Region) -> Tensor:
        """Tokens of the 3 x 3 small blocks around each block, ``(B, X, Y, keys, dim)``, zero outside of the image."""
        side, seen, outside = self.low_block * self.low_patch, [], []
        for part, length in zip(region, low.shape[2:], strict=True):
            first, last = max(part.start - 1, 0), min((part.stop + 1) * side, length)
            seen.append(slice(first * side, last))
            outside += [self.low_block * (part.start == 0), self.low_block * (last < (part.stop + 1) * side)]
        tokens = pad(self.embed_low(low[:, :, seen[0], seen[1]]), (*outside[2:], *outside[:2]))
        windows = unfold(tokens, 3 * self.low_block, stride=self.low_block)
        near: Tensor = windows.unflatten(1, (tokens.shape[1], -1)).permute(0, 3, 2, 1)
        return cast(Tensor, near.unflatten(1, [part.stop - part.start for part in region]))


def denoise(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """The clean image behind ``x``, noisy by ``sigma (B,)``: EDM's preconditioning of ``network(x, noise)``.

    Karras et al., 2022, arXiv 2206.00364, with data of standard deviation 0.5.

    >>> denoise(lambda x, noise: torch.zeros_like(x), torch.full((1, 3, 1, 1), 2.0), torch.tensor([0.5])).unique()
    tensor([1.])
    """
    s = sigma[:, None, None, None]
    total = s**2 + SIGMA_DATA**2
    predicted = network(x / total.sqrt(), sigma.log() / 4)
    return x * (SIGMA_DATA**2 / total) + predicted * (s * SIGMA_DATA / total.sqrt())


def denoising_loss(
    network: Callable[[Tensor, Tensor], Tensor], clean: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """EDM's training loss at ``log(sigma)`` drawn from a normal distribution of mean -1 and deviation 1.4."""
    draw = partial(torch.randn, generator=generator, dtype=clean.dtype, device=clean.device)
    sigma = (1.4 * draw(clean.shape[0]) - 1).exp()
    s = sigma[:, None, None, None]
    weight = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
    return (weight * (denoise(network, clean + s * draw(clean.shape), sigma) - clean) ** 2).mean()


def noise_levels(steps: int = 20, high: float = 40.0, low: float = 0.002, rho: float = 7.0) -> Float[Tensor, "steps1"]:
    """Noise levels of a sampler, from ``high`` to ``low``, then zero.

    >>> [round(level, 3) for level in noise_levels(4).tolist()]
    [40.0, 5.224, 0.293, 0.002, 0.0]
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2; it was {steps}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def heun(denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor) -> Tensor:
    """From noise to an image by Heun's method; ``denoiser(x, sigma)`` is called twice a step, once in the last one."""
    for now, then in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        slope = (x - denoiser(x, x.new_full(x.shape[:1], now))) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope = (slope + (ahead - denoiser(ahead, x.new_full(x.shape[:1], then))) / then) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x


@torch.no_grad()
def upscale(
    model: InfDiT,
    low: Float[Tensor, "B 3 h w"],
    image: Tensor | None = None,
    *,
    steps: int = 20,
    side: int | None = 1,
    from_low: bool = False,
    alternate: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B 3 H W"]:
    """Enlarge images by diffusion.

    Args:
        model: the network.
        low: small images, in [-1, 1].
        image: their global embedding.
        steps: of Heun's method, from noise of 40 to .002.
        side: blocks of a super-block's side; None denoises all blocks at once. The result is the same.
        from_low: start from the enlarged image with noise instead of noise alone.
        alternate: every other evaluation goes in the direction ``"rb"``.
        generator: of the noise.

    >>> import torch, glocal
    >>> from glocal.models.vision.infdit import upscale
    >>> upscale(glocal.create("infdit_tiny"), torch.zeros(1, 3, 8, 4), steps=2).shape
    torch.Size([1, 3, 16, 8])
    """
    levels, calls = noise_levels(steps), 0

    def network(x: Tensor, noise: Tensor) -> Tensor:
        nonlocal calls
        direction = "rb" if alternate and calls % 2 else "lt"
        calls += 1
        if side is None:
            return cast(Tensor, model(x, noise, low, image, direction=direction))
        return model.by_blocks(x, noise, low, image, side=side, direction=direction)

    shape = (*low.shape[:2], low.shape[2] * model.scale, low.shape[3] * model.scale)
    x = float(levels[0]) * torch.randn(shape, generator=generator, dtype=low.dtype, device=low.device)
    if from_low:
        x = x + interpolate(low, scale_factor=float(model.scale), mode="bicubic")
    return heun(partial(denoise, network), x, levels)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@register
def infdit(**options: Any) -> InfDiT:
    """The published size: 28 layers of 1280 channels, 16 heads, blocks of 128 pixels, 4 times."""
    return InfDiT(**options)


@register
def infdit_tiny(**options: Any) -> InfDiT:
    """For tests and small machines: 3 layers of 32 channels, blocks of 8 pixels, 2 times."""
    sizes = {"dim": 32, "depth": 3, "num_heads": 2, "patch": 2, "block": 8, "scale": 2, "image_dim": 12}
    return InfDiT(**(sizes | options))
