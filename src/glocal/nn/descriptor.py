"""Attention of all tokens of many frames to few: each frame's map of patches, made small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from glocal.cache import Cache, DescriptorCache
from glocal.condense import best
from glocal.nn.block_sparse import Views
from glocal.nn.frame import Attention, Call
from glocal.shapes import Bool, Float

__all__ = ["DescriptorAttention", "choose_keyframes"]

_NO_CAUSAL = "a descriptor is made of a whole frame; a stream is causal by chunks, with a DescriptorCache"


class DescriptorAttention(Attention):
    """Every token of every frame attends to the descriptors of all frames: their special tokens and their small maps.

    Each ``(h, w)`` map of patches is resized to ``(h // factor, w // factor)`` before keys and values are projected;
    special tokens stay. Of the ``keyframes`` all patches are read as well, which counts them twice. With factor 1
    and no keyframes it is full attention. FlashVGGT, 2025, arXiv 2512.01540.

    Resizing is bilinear without antialiasing: factor 2 is the mean of each 2 x 2 block, factor 3 picks the middle
    patch, and factor 4 is the mean of the middle 2 x 2 of each 4 x 4, so that other patches are not read at all.
    Where ``factor`` does not divide a side, samples are a little farther apart (37 to 9 at factor 4).

    Tokens that are left over after the last whole frame are read as they are.

    Args:
        dim, num_heads: as in `Attention`, with all its options. Rotary positions on two axes are those of `Views`.
        patches: rows and columns of a frame.
        special: tokens of a frame before its patches.
        factor: how many times smaller a side becomes.
        resize: ``"bilinear"``, ``"nearest"`` (the first patch of each block), or ``"learned"``, a depthwise
            convolution that starts as the mean of each block.

    Raises:
        ValueError: a factor below 1 or above a side, another ``resize``, a causal use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import DescriptorAttention
    >>> layer = DescriptorAttention(64, 4, patches=(8, 8), special=5, factor=4)
    >>> frames = torch.randn(1, 3 * 69, 64)
    >>> layer(frames, keyframes=[0]).shape
    torch.Size([1, 207, 64])
    >>> cache = DescriptorCache()
    >>> chunks = [layer(chunk, cache=cache) for chunk in frames.split(69, dim=1)]
    >>> cache.seen, cache.kept()[0].shape  # 64 patches of frame 0, and 3 frames of 5 + 4
    (3, torch.Size([1, 91, 64]))
    """

    uses = ("noncausal-self", "noncausal-cross")
    refuses: ClassVar[dict[str, str]] = {"causal-self": _NO_CAUSAL, "causal-cross": _NO_CAUSAL}
    no_padding: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"patches": (2, 2), "special": 2, "factor": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        patches: tuple[int, int],
        special: int = 5,
        factor: int = 4,
        resize: str = "bilinear",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.views = Views(special, patches)
        if not 1 <= factor <= min(self.views.patches):
            raise ValueError(f"factor must be from 1 to the smaller side of patches {patches}; it was {factor}")
        if resize not in ("bilinear", "nearest", "learned"):
            raise ValueError(f"resize must be 'bilinear', 'nearest' or 'learned'; it was {resize!r}")
        self.factor, self.resize = factor, resize
        if resize == "learned":
            channels = self.kv_dim
            self.shrink = nn.Conv2d(channels, channels, factor, stride=factor, groups=channels, bias=False)
            nn.init.constant_(self.shrink.weight, factor**-2)

    def positions(self, grid: tuple[int, ...], start: int, device: torch.device) -> Tensor:
        if self.rope is not None and self.rope.axes == 2:
            return self.views.positions(torch.Size(grid).numel(), device)
        return super().positions(grid, start, device)

    def descriptors(self, frames: Float[Tensor, "B n P C"]) -> Float[Tensor, "B n T C"]:
        """Frames of ``P = special + h w`` tokens to ``T = special + (h // factor) (w // factor)``."""
        if not frames.shape[1] or (self.factor == 1 and self.resize != "learned"):
            return frames
        special, maps = frames[:, :, : self.views.special], frames[:, :, self.views.special :]
        maps = maps.unflatten(2, self.views.patches)
        if self.resize == "nearest":
            return torch.cat([special, self._nearest(maps).flatten(2, 3)], 2)
        images = maps.flatten(0, 1).movedim(-1, 1)
        if self.resize == "learned":
            small = self.shrink(images)
        else:
            wide = images if images.dtype == torch.float64 else images.float()
            small = interpolate(wide, size=self._small, mode="bilinear", align_corners=False).to(images.dtype)
        return torch.cat([special, small.flatten(2).mT.unflatten(0, maps.shape[:2])], 2)

    def forward(
        self,
        x: Float[Tensor, "B N dim"],
        context: Float[Tensor, "B Nk kv_dim"] | None = None,
        *,
        keys: Bool[Tensor, "B Nk"] | None = None,
        positions: Tensor | None = None,
        cache: Cache | DescriptorCache | None = None,
        keyframes: Sequence[int] | Tensor = (),
    ) -> Float[Tensor, "B N dim"]:
        """Attend.

        Args:
            x: ``(B, N, dim)``, frame after frame.
            context: frames to attend to, ``(B, Nk, kv_dim)``; ``x`` itself where None.
            keys: refused: a frame is resized as a whole.
            positions: of the tokens of ``x`` for rotary embeddings, ``(N,)`` or ``(N, axes)``.
            cache: of a stream: ``x`` are the frames that follow. They see what is kept, and themselves.
            keyframes: numbers of frames that are read in full, for all items or ``(B, m)`` with -1 for none. In a
                stream that is frame 0.

        Raises:
            ValueError: shapes that do not fit, padding, keyframes that are not there or in a stream.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must be (B, *grid, {self.dim}), the grid a sequence of tokens; it was {tuple(x.shape)}"
            )
        cross, source, width = context is not None, x if context is None else context, self.kv_dim
        self._has_use(f"noncausal-{'cross' if cross else 'self'}")
        if keys is not None:
            raise ValueError("keys (padding) has no meaning here: a frame is resized as a whole")
        if source.dim() != 3 or source.shape[0] != x.shape[0] or source.shape[-1] != width:
            raise ValueError(f"context must be ({x.shape[0]}, Nk, {width}); it was {tuple(source.shape)}")
        chosen = self._keyframes(keyframes, x, source.shape[1] // self.views.tokens)
        start = cache.seen * self.views.tokens if isinstance(cache, DescriptorCache) else 0
        at_q = self.positions((x.shape[1],), start, x.device) if positions is None else positions
        at = at_q if not cross else self.positions((source.shape[1],), 0, x.device)
        at = at.reshape(source.shape[1], -1)
        if cache is None:
            features, at_k, real = self._read(source, at, chosen)
        elif cross or chosen.shape[1] or not isinstance(cache, DescriptorCache):
            raise ValueError("cache must be a DescriptorCache, for self-attention without keyframes")
        else:
            features, at_k, real = self._stream(source, at, cache)
        q, k, v = self.project(x, features, at_q, at_k.squeeze(-1) if at.shape[1] == 1 else at_k)
        mixed = self.mix(q, k, v, Call(x, features, real, None, cross))
        out: Tensor = self.o_proj(mixed.movedim(1, -2).flatten(-2))
        return out

    def _frames(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The whole frames among tokens ``(B, N, C)``, ``(B, n, P, C)``, and their positions, ``(n, P, axes)``."""
        count = x.shape[1] // self.views.tokens
        whole = count * self.views.tokens
        shape = (count, self.views.tokens)
        return x[:, :whole].reshape(len(x), *shape, x.shape[-1]), at[:whole].reshape(*shape, at.shape[-1])

    def _read(self, x: Tensor, at: Tensor, keyframes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What keys are made of, their positions, and which of them are real: keyframes, descriptors, what is over."""
        frames, places = self._frames(x, at)
        over = frames.shape[1] * self.views.tokens
        features = torch.cat([self.descriptors(frames).flatten(1, 2), x[:, over:]], 1)
        at = torch.cat([self._places(places).flatten(0, 1), at[over:]])
        if not keyframes.shape[1]:
            return features, at, None
        rows, index = torch.arange(len(x), device=x.device)[:, None], keyframes.clamp(min=0)
        full = frames[rows, index][:, :, self.views.special :].flatten(1, 2)
        full_at = places[index][:, :, self.views.special :].flatten(1, 2)
        real = (keyframes >= 0).repeat_interleave(self.views.tokens - self.views.special, 1)
        real = torch.cat([real, real.new_ones(features.shape[:2])], 1)
        at = torch.cat([full_at, at.expand(len(x), -1, -1)], 1).unsqueeze(1)  # (B, 1, Nk, axes): heads are alike
        return torch.cat([full, features], 1), at, None if bool(real.all()) else real

    def _stream(self, x: Tensor, at: Tensor, cache: DescriptorCache) -> tuple[Tensor, Tensor, None]:
        """As `_read`, for a chunk after those in the cache."""
        frames, places = self._frames(x, at)
        if not x.shape[1] or x.shape[1] % self.views.tokens:
            raise ValueError(f"x must be whole frames of {self.views.tokens} tokens; it had {x.shape[1]} tokens")
        first: dict[str, Tensor] = {}
        if not cache.seen and self.factor > 1:
            first = {"first": frames[:, 0, self.views.special :], "first_position": places[0, self.views.special :]}
        cache.update(self.descriptors(frames), self._places(places), **first)
        features, kept = cache.kept()
        assert kept is not None
        return features, kept, None

    def _places(self, places: Tensor) -> Tensor:
        """Positions ``(n, P, axes)`` of frames to those of their descriptors: the first patch of each block."""
        special, maps = places[:, : self.views.special], places[:, self.views.special :]
        return torch.cat([special, self._nearest(maps.unflatten(1, self.views.patches)).flatten(1, 2)], 1)

    def _nearest(self, maps: Tensor) -> Tensor:
        """``(..., h, w, C)`` to ``(..., h // factor, w // factor, C)``, as torch's nearest interpolation."""
        for axis, side, small in zip((-3, -2), self.views.patches, self._small, strict=True):
            maps = maps.index_select(axis, torch.arange(small, device=maps.device) * side // small)
        return maps

    @property
    def _small(self) -> tuple[int, int]:
        return self.views.patches[0] // self.factor, self.views.patches[1] // self.factor

    def _keyframes(self, keyframes: Sequence[int] | Tensor, x: Tensor, count: int) -> Tensor:
        """Checked, as ``(B, m)``."""
        chosen = torch.as_tensor(keyframes, dtype=torch.long, device=x.device)
        chosen = chosen.expand(len(x), -1) if chosen.dim() == 1 else chosen
        if chosen.dim() != 2 or len(chosen) != len(x):
            raise ValueError(f"keyframes must be numbers (m,) or ({len(x)}, m); it was {tuple(chosen.shape)}")
        if chosen.numel() and not bool(((chosen >= -1) & (chosen < count)).all()):
            raise ValueError(f"keyframes must be from 0 to {count - 1}, or -1 for none; it was {chosen.tolist()}")
        return chosen

    def extra_repr(self) -> str:
        return (
            f"patches={self.views.patches}, special={self.views.special}, factor={self.factor}, resize={self.resize!r}"
        )


@torch.no_grad()
def choose_keyframes(frames: Float[Tensor, "B n C"], clusters: int, *, seed: int = 0, steps: int = 10) -> Tensor:
    """Frame 0, and of each of ``clusters`` clusters of frames the one nearest to its center: k-means by Lloyd.

    Centers start at frames drawn by ``seed``, the same for every item of a batch, so that an item's keyframes do not
    depend on the others. With one cluster or none only frame 0 is chosen.

    Args:
        frames: a vector a frame, ``(B, n, C)``.
        clusters: at most ``n``.
        seed: of the first centers.
        steps: of Lloyd's iteration; it stops early where nothing changes.

    Returns:
        Numbers in order, ``(B, clusters + 1)`` or ``(B, 1)``, -1 where frames coincide.

    Raises:
        ValueError: no frames, or more clusters than frames.

    >>> import torch
    >>> frames = torch.tensor([[[0.0], [0.1], [5.0], [5.1], [5.2]]])
    >>> choose_keyframes(frames, 2).tolist()
    [[0, 3, -1]]
    """
    count = frames.shape[1]
    if not count or clusters > count:
        raise ValueError(f"clusters must be at most the {count} frames (1 or more); it was {clusters}")
    if clusters <= 1:
        return torch.zeros(len(frames), 1, dtype=torch.long, device=frames.device)
    x = frames if frames.dtype == torch.float64 else frames.float()
    start = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:clusters].to(x.device)
    centers = x[:, start]
    for _ in range(steps):
        nearest = best(-torch.cdist(x, centers), 1)  # (B, n, 1)
        member = (nearest == torch.arange(clusters, device=x.device)).to(x.dtype)
        size = member.sum(1).unsqueeze(-1)
        moved = torch.where(size > 0, member.mT @ x / size.clamp(min=1), centers)  # an empty cluster stays
        if torch.equal(moved, centers):
            break
        centers = moved
    picked = best(-torch.cdist(centers, x), 1).squeeze(-1)
    chosen = torch.zeros(x.shape[:2], device=x.device).scatter(1, picked, 1)
    chosen[:, 0] = 1
    chosen = torch.cat([chosen, chosen.new_zeros(len(x), 1)], 1)  # clusters + 1 places, even with n clusters
    return best(chosen, clusters + 1, allowed=chosen > 0)
