"""FIT: transformer layers inside groups of tokens, interleaved with layers on a few latents of all groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.cache import Cache
from glocal.nn import MLP, Attention, Block
from glocal.nn.latents import GroupCausalAttention, LatentCrossAttention
from glocal.nn.sincos import sincos_grid
from glocal.shapes import Float

__all__ = ["FIT", "Stage", "Stages", "format_layers", "make_stages", "parse_layers"]

Stages = tuple[tuple[int, int], ...]


def parse_layers(text: str) -> Stages:
    """The stages ``(local layers, global layers)`` of a layer string.

    Raises:
        ValueError: the string is not of the form ``(a)b(a)b...``, or a stage but the last has no global layers.

    >>> parse_layers("(2)4(2)4(2)")
    ((2, 4), (2, 4), (2, 0))
    """
    compact = text.replace(" ", "")
    if not re.fullmatch(r"(\(\d+\)\d+)*\(\d+\)\d*", compact):
        raise ValueError(f"layers must be like '(2)4(2)4(2)', local layers in parentheses; it was {text!r}")
    stages = tuple((int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", compact))
    if any(b == 0 for _, b in stages[:-1]):
        raise ValueError(f"layers must have global layers in every stage but the last; it was {text!r}")
    return stages


def format_layers(stages: Stages) -> str:
    """The layer string of stages.

    >>> format_layers(((2, 4), (2, 4), (2, 0)))
    '(2)4(2)4(2)'
    """
    return "".join(f"({a}){b or ''}" for a, b in stages)


class Stage(nn.Module):
    """Local layers, latents that read the tokens, global layers, and tokens that read the latents."""

    def __init__(
        self,
        local: int,
        across: int,
        last: bool,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        *,
        causal_group: int | None,
        condition: bool,
        cross_mlp: bool,
        backend: str,
    ) -> None:
        super().__init__()
        both: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "backend": backend}

        def cross(width: int, other: int) -> LatentCrossAttention:
            hidden = 4 * width if cross_mlp else None
            return LatentCrossAttention(width, other, min(num_heads, latent_heads), hidden=hidden, backend=backend)

        def globally() -> Attention:
            if causal_group is None:
                return Attention(latent_dim, latent_heads, **both)
            return GroupCausalAttention(latent_dim, latent_heads, group=causal_group, **both)

        causal = causal_group is not None
        self.local = nn.ModuleList(
            Block(dim, Attention(dim, num_heads, causal=causal, **both), MLP(dim, 4 * dim)) for _ in range(local)
        )
        self.read = cross(latent_dim, dim) if across else None
        self.condition = cross(latent_dim, latent_dim) if across and condition else None
        self.across = nn.ModuleList(
            Block(latent_dim, globally(), MLP(latent_dim, 4 * latent_dim)) for _ in range(across)
        )
        self.write = None if last else cross(dim, latent_dim)

    def inside(self, x: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Local layers on ``x (..., n, dim)``, each group by itself."""
        flat = x.flatten(0, -3)
        for number, block in enumerate(self.local):
            flat = block(flat, cache=None if caches is None else caches[number])
        return flat.view(x.shape)

    def gather(
        self, latents: Tensor, x: Tensor, condition: Tensor | None = None, caches: Sequence[Cache] | None = None
    ) -> Tensor:
        """``latents (B, t, m, latent_dim)`` after reading their groups ``x (B, t, n, dim)`` and each other."""
        if self.read is None:
            return latents
        batch, groups, slots, _ = latents.shape
        flat = self.read(latents.flatten(0, 1), x.flatten(0, 1)).view(batch, groups * slots, -1)
        if self.condition is not None and condition is not None:
            flat = self.condition(flat, condition)
        for number, block in enumerate(self.across):
            flat = block(flat, cache=None if caches is None else caches[number])
        return cast(Tensor, flat.view(batch, groups, slots, -1))

    def spread(self, x: Tensor, latents: Tensor) -> Tensor:
        """``x (B, t, n, dim)`` after reading its groups' ``latents (B, t, m, latent_dim)``."""
        if self.write is None:
            return x
        return cast(Tensor, self.write(x.flatten(0, 1), latents.flatten(0, 1)).view(x.shape))


class FIT(nn.Module):
    """Far-reaching interleaved transformer, as an encoder of groups of tokens.

    Chen and Li, 2023, arXiv 2305.12689. Stage by stage: local layers inside each group of ``n`` tokens; the group's
    ``m`` latents read it; global layers on the latents of all ``t`` groups; the group reads its latents. With ``n``
    near the cube root of ``N = t n`` this costs ``N ** (4 / 3)``.

    Args:
        layers: local and global layers of each stage, as ``"(2)4(2)4(2)"``.
        channels: of the input.
        groups, tokens, latents: ``t`` groups of ``n`` tokens and ``m`` latents.
        dim, latent_dim: channels of tokens and of latents.
        num_heads, latent_heads: of local and of global layers; cross-attention has the lesser number.
        grid: rows and columns of a group, for fixed sine positions instead of learned ones.
        extra_channels: of tokens to be put before each group (its index, one-hot, say); none where None.
        condition: global layers also read condition tokens ``(B, c, latent_dim)`` in every stage.
        cross_mlp: cross-attention is followed by a feed-forward.
        backend: as in `glocal.attend`.

    Raises:
        ValueError: a layer string that is none, widths that heads do not divide, a grid that is no group.

    >>> import torch
    >>> from glocal.models.vision.fit import FIT
    >>> model = FIT("(1)2(1)", 3, groups=4, tokens=16, latents=2, dim=32, latent_dim=64, num_heads=2, latent_heads=4)
    >>> x, latents = model(torch.randn(2, 4, 16, 3))
    >>> x.shape, latents.shape
    (torch.Size([2, 4, 16, 32]), torch.Size([2, 4, 2, 64]))
    """

    def __init__(
        self,
        layers: str,
        channels: int,
        *,
        groups: int,
        tokens: int,
        latents: int,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        grid: tuple[int, int] | None = None,
        extra_channels: int | None = None,
        condition: bool = False,
        cross_mlp: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.stages_of = parse_layers(layers)
        for name, value in (("groups", groups), ("tokens", tokens), ("latents", latents)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if grid is not None and grid[0] * grid[1] != tokens:
            raise ValueError(f"grid must hold the {tokens} tokens of a group; it was {grid}")
        self.groups, self.tokens, self.dim, self.latent_dim = groups, tokens, dim, latent_dim
        self.stem, self.stem_norm = nn.Linear(channels, dim), nn.LayerNorm(dim, eps=1e-6)
        if grid is None:
            self.position: Tensor = nn.Parameter(0.02 * torch.randn(tokens, dim))
        else:
            self.register_buffer("position", sincos_grid(*grid, dim), persistent=False)
        self.latents = nn.Parameter(0.02 * torch.randn(groups, latents, latent_dim))
        self.extra = None if extra_channels is None else nn.Linear(extra_channels, dim)
        self.extra_norm = None if extra_channels is None else nn.LayerNorm(dim, eps=1e-6)
        self.stages = make_stages(
            self.stages_of, dim, latent_dim, num_heads, latent_heads, None, condition, cross_mlp, backend
        )
        self.norm, self.latent_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(latent_dim, eps=1e-6)

    @property
    def layers(self) -> str:
        """The layer string."""
        return format_layers(self.stages_of)

    def forward(
        self,
        x: Float[Tensor, "B t n channels"],
        *,
        extra: Float[Tensor, "B t e extra_channels"] | None = None,
        condition: Float[Tensor, "B c latent_dim"] | None = None,
        added: Float[Tensor, "B t m latent_dim"] | None = None,
    ) -> tuple[Float[Tensor, "B t n dim"], Float[Tensor, "B t m latent_dim"]]:
        """Encode groups.

        Args:
            x: ``(B, t, n, channels)``.
            extra: tokens to put before those of each group, ``(B, t, e, extra_channels)``.
            condition: tokens that the latents read, ``(B, c, latent_dim)``.
            added: what to add to the first latents, ``(B, t, m, latent_dim)``.

        Returns:
            The normalised states of tokens, ``(B, t, n, dim)``, and of latents, ``(B, t, m, latent_dim)``.
        """
        if x.dim() != 4 or x.shape[1:] != (self.groups, self.tokens, self.stem.in_features):
            raise ValueError(
                f"x must be (B, {self.groups}, {self.tokens}, {self.stem.in_features}); it was {tuple(x.shape)}"
            )
        if (extra is None) != (self.extra is None):
            raise ValueError("extra tokens must be given if, and only if, extra_channels says so")
        x = self.stem_norm(self.stem(x)) + self.position
        before = 0
        if extra is not None and self.extra is not None and self.extra_norm is not None:
            x, before = torch.cat([self.extra_norm(self.extra(extra)), x], 2), extra.shape[2]
        latents = self.latents.expand(x.shape[0], -1, -1, -1)
        latents = latents if added is None else latents + added
        for stage in cast("Sequence[Stage]", self.stages):
            x = stage.inside(x)
            latents = stage.gather(latents, x, condition)
            x = stage.spread(x, latents)
        return self.norm(x[:, :, before:]), self.latent_norm(latents)

    def features(self, x: Tensor, **options: Any) -> Tensor:
        """What the last layers give: latents if they are global, tokens if they are local, with all groups joined."""
        states, latents = self(x, **options)
        return cast(Tensor, latents if self.stages_of[-1][1] else states).flatten(1, 2)


def make_stages(
    stages: Stages,
    dim: int,
    latent_dim: int,
    num_heads: int,
    latent_heads: int,
    causal_group: int | None,
    condition: bool,
    cross_mlp: bool,
    backend: str,
) -> nn.ModuleList:
    """The stages of a network; with ``causal_group`` latents a group, causal inside groups and from group to group."""
    return nn.ModuleList(
        Stage(
            local,
            across,
            number == len(stages) - 1,
            dim,
            latent_dim,
            num_heads,
            latent_heads,
            causal_group=causal_group,
            condition=condition,
            cross_mlp=cross_mlp,
            backend=backend,
        )
        for number, (local, across) in enumerate(stages)
    )
