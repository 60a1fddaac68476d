"""FIT: transformer layers inside groups of tokens, interleaved with layers on a few latents of all groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, silu

from glocal.cache import Cache
from glocal.models.registry import register
from glocal.nn import MLP, Attention, Block
from glocal.nn.latents import GroupCausalAttention, LatentCrossAttention
from glocal.nn.sincos import sincos, sincos_grid
from glocal.shapes import Float

__all__ = [
    "FIT",
    "FITAR",
    "FITDenoiser",
    "FITImage",
    "FITState",
    "fit_640",
    "fit_1280",
    "fit_6400",
    "fit_ar_tiny",
    "fit_denoiser_64",
    "fit_denoiser_tiny",
    "fit_tiny",
    "format_layers",
    "group_image",
    "parse_layers",
    "ungroup_image",
]

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


class _Stage(nn.Module):
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
        self.stages = _stages(
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
        for stage in cast("Sequence[_Stage]", self.stages):
            x = stage.inside(x)
            latents = stage.gather(latents, x, condition)
            x = stage.spread(x, latents)
        return self.norm(x[:, :, before:]), self.latent_norm(latents)

    def features(self, x: Tensor, **options: Any) -> Tensor:
        """What the last layers give: latents if they are global, tokens if they are local, with all groups joined."""
        states, latents = self(x, **options)
        return cast(Tensor, latents if self.stages_of[-1][1] else states).flatten(1, 2)


def _stages(
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
    return nn.ModuleList(
        _Stage(
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


def group_image(
    image: Float[Tensor, "B C H W"], group: tuple[int, int], patch: int
) -> Float[Tensor, "B groups tokens values"]:
    """An image cut into sub-images of ``group`` patches (rows, columns), each of these into its patches.

    Raises:
        ValueError: the image is no multiple of a sub-image.

    >>> group_image(torch.arange(16.0).view(1, 1, 4, 4), (2, 1), 1)[0, :, :, 0].int().tolist()[:2]
    [[0, 4], [1, 5]]
    """
    rows, columns = group[0] * patch, group[1] * patch
    if image.dim() != 4 or image.shape[2] % rows or image.shape[3] % columns:
        raise ValueError(
            f"image must be (B, C, H, W), H a multiple of {rows}, W of {columns}; it was {tuple(image.shape)}"
        )
    cut = image.unflatten(3, (-1, group[1], patch)).unflatten(2, (-1, group[0], patch))
    # B C (group row, row, pixel row) (group column, column, pixel column)
    cut = cut.permute(0, 2, 5, 3, 6, 4, 7, 1)
    out: Tensor = cut.flatten(5).flatten(3, 4).flatten(1, 2)
    return out


def ungroup_image(
    x: Float[Tensor, "B groups tokens values"], size: tuple[int, int], group: tuple[int, int], patch: int
) -> Float[Tensor, "B C H W"]:
    """The image of `group_image`, ``(B, C, *size)``.

    >>> image = torch.randn(1, 3, 8, 8)
    >>> torch.equal(ungroup_image(group_image(image, (2, 2), 2), (8, 8), (2, 2), 2), image)
    True
    """
    rows, columns = size[0] // (group[0] * patch), size[1] // (group[1] * patch)
    cut = x.unflatten(3, (patch, patch, -1)).unflatten(2, group).unflatten(1, (rows, columns))
    out: Tensor = cut.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)
    return out


class FITImage(nn.Module):
    """A `FIT` over an image, and a classifier on the mean of what its last layers give.

    Args:
        layers: the layer string.
        size: height and width in pixels.
        group: rows and columns of patches in a group.
        patch: pixels a side.
        latents: of a group.
        num_classes: outputs; the mean itself where 0.
        options: of `FIT`.

    >>> import torch, glocal
    >>> glocal.create("fit_tiny", num_classes=5)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        layers: str,
        size: int | tuple[int, int],
        *,
        group: tuple[int, int],
        patch: int,
        channels: int = 3,
        num_classes: int = 1000,
        latents: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.group, self.patch = group, patch
        groups, tokens = _counts(self.size, group, patch)
        values = channels * patch**2
        self.fit = FIT(layers, values, groups=groups, tokens=tokens, latents=latents, **options)
        width = self.fit.latent_dim if self.fit.stages_of[-1][1] else self.fit.dim
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N dim"]:
        """States of all tokens, or of all latents, ``(B, N, dim)``."""
        return self.fit.features(group_image(image, self.group, self.patch))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images ``(B, C, H, W)`` to logits."""
        return cast(Tensor, self.head(self.features(image).mean(1)))


def _counts(size: tuple[int, int], group: tuple[int, int], patch: int) -> tuple[int, int]:
    rows, columns = group[0] * patch, group[1] * patch
    if size[0] % rows or size[1] % columns:
        raise ValueError(f"size must be a multiple of a group's {(rows, columns)} pixels; it was {size}")
    return size[0] // rows * (size[1] // columns), group[0] * group[1]


class FITDenoiser(nn.Module):
    """A `FIT` that predicts an image, or its noise, from a noisy one, the time and a class.

    The latents read two condition tokens in every stage. Latents of an earlier call can be given to the next one
    (self-conditioning, Jabri et al., 2022, arXiv 2212.11972): added through an MLP and a norm that starts at 0.

    Args:
        layers: the layer string; it ends with local layers.
        size, group, patch, channels, latents: as in `FITImage`.
        num_classes: number of class labels; 0 for none.
        options: of `FIT`.

    Raises:
        ValueError: a layer string that ends with global layers.

    >>> import torch, glocal
    >>> model = glocal.create("fit_denoiser_tiny")
    >>> noisy, time = torch.randn(2, 3, 32, 32), torch.rand(2)
    >>> prediction, latents = model(noisy, time, torch.tensor([3, 7]))
    >>> model(noisy, time, torch.tensor([3, 7]), latents=latents)[0].shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        layers: str,
        size: int | tuple[int, int],
        *,
        group: tuple[int, int],
        patch: int,
        channels: int = 3,
        num_classes: int = 0,
        latents: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.group, self.patch = group, patch
        groups, tokens = _counts(self.size, group, patch)
        values = channels * patch**2
        self.fit = FIT(layers, values, groups=groups, tokens=tokens, latents=latents, condition=True, **options)
        if self.fit.stages_of[-1][1]:
            raise ValueError(f"layers must end with local layers, which pixels are read from; it was {layers!r}")
        width = self.fit.latent_dim
        self.time1, self.time2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.again, self.again_norm = MLP(width, 4 * width), nn.LayerNorm(width, eps=1e-6)
        nn.init.zeros_(self.again_norm.weight)
        self.head = nn.Linear(self.fit.dim, values)

    def conditions(self, time: Tensor, label: Tensor | None) -> Tensor:
        """The condition tokens, ``(B, 1 or 2, latent_dim)``: time in 0 to 1, then the class."""
        if (label is None) != (self.label is None):
            raise ValueError("label must be given if, and only if, the model has classes")
        embedded = normalize(sincos(1000 * time, self.fit.latent_dim).to(self.time1.weight), dim=-1)
        tokens = [self.time2(silu(self.time1(embedded)))]
        if label is not None and self.label is not None:
            tokens.append(self.label(label))
        return torch.stack(tokens, 1)

    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        time: Tensor,
        label: Tensor | None = None,
        *,
        latents: Float[Tensor, "B t m latent_dim"] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B t m latent_dim"]]:
        """Predict.

        Args:
            image: ``(B, C, H, W)``, noisy.
            time: ``(B,)``, 0 to 1.
            label: classes ``(B,)``.
            latents: those returned by an earlier call; a first call, or training without them, has none.

        Returns:
            The prediction, of the image's shape, and the latents for another call.
        """
        again = None if latents is None else self.again_norm(latents + self.again(latents))
        x = group_image(image, self.group, self.patch)
        x, latents = self.fit(x, condition=self.conditions(time, label), added=again)
        return ungroup_image(self.head(x), self.size, self.group, self.patch), latents


class FITState:
    """What decoding with `FITAR` keeps: the current group, and of earlier ones only latents."""

    def __init__(self, stages: Sequence[_Stage]) -> None:
        self.group, self.place = 0, 0
        self.across = [_caches(stage.across) for stage in stages]
        """For each stage, the cache of each global layer."""
        self.before: list[Tensor | None] = [None] * len(stages)
        """For each stage, the latents of the group before, ``(B, 1, m, latent_dim)``."""
        self.begin(stages)

    def begin(self, stages: Sequence[_Stage]) -> None:
        """Forget the tokens of the current group."""
        self.local = [_caches(stage.local) for stage in stages]
        self.held: list[list[Tensor]] = [[] for _ in stages]


def _caches(blocks: nn.ModuleList) -> list[Cache]:
    return [cast(Attention, block.attention).new_cache() for block in blocks]


class FITAR(nn.Module):
    """A `FIT` that predicts a sequence token by token.

    Local layers are causal inside a group. The latents of a group see the whole group, and of the others those before
    it; so a token reads the latents of the group before its own, and the first group reads zeros.

    Args:
        vocab: tokens.
        layers: the layer string; it ends with local layers.
        groups, tokens, latents, dim, latent_dim, num_heads, latent_heads, cross_mlp, backend: as in `FIT`.

    Raises:
        ValueError: a layer string that ends with global layers, or what `FIT` refuses.

    >>> import torch, glocal
    >>> model = glocal.create("fit_ar_tiny")
    >>> model(torch.randint(256, (2, 64))).shape, model.generate(1, 20).shape
    (torch.Size([2, 64, 256]), torch.Size([1, 20]))
    """

    def __init__(
        self,
        vocab: int,
        layers: str,
        *,
        groups: int,
        tokens: int,
        latents: int,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        cross_mlp: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.stages_of = parse_layers(layers)
        if self.stages_of[-1][1]:
            raise ValueError(f"layers must end with local layers, which logits are read from; it was {layers!r}")
        self.groups, self.tokens = groups, tokens
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.latents = nn.Parameter(0.02 * torch.randn(groups, latents, latent_dim))
        self.stages = _stages(
            self.stages_of, dim, latent_dim, num_heads, latent_heads, latents, False, cross_mlp, backend
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Float[Tensor, "B N vocab"]:
        """Logits for each token from those before it, all at once; ``N`` is ``groups * tokens``.

        Raises:
            ValueError: another length.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.groups * self.tokens:
            raise ValueError(f"tokens must be (B, {self.groups * self.tokens}); it was {tuple(tokens.shape)}")
        x = pad(self.embed(tokens)[:, :-1], (0, 0, 1, 0))  # nothing comes before the first token
        x = x.unflatten(1, (self.groups, self.tokens)) + self.position
        latents = self.latents.expand(x.shape[0], -1, -1, -1)
        for stage in cast("Sequence[_Stage]", self.stages):
            x = stage.inside(x)
            latents = stage.gather(latents, x)
            x = stage.spread(x, pad(latents[:, :-1], (0, 0, 0, 0, 1, 0)))
        return self._logits(x.flatten(1, 2))

    def _logits(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x) @ self.embed.weight.mT)

    def new_state(self) -> FITState:
        """The state before the first token."""
        return FITState(cast("Sequence[_Stage]", self.stages))

    def step(self, last: Tensor | None, state: FITState, *, batch: int = 1) -> Float[Tensor, "B vocab"]:
        """Logits for the next token.

        Args:
            last: the token before, ``(B,)``; None for the first step.
            state: of `new_state`; it moves on by one token.
            batch: sequences, where ``last`` is None.

        Raises:
            ValueError: the sequence is complete, or ``last`` is missing or too early.
        """
        if state.group == self.groups:
            raise ValueError(f"the sequence is complete: it has {self.groups * self.tokens} tokens")
        if (last is None) != (state.group == state.place == 0):
            raise ValueError("last must be None for the first token, and the token before for every other one")
        stages = cast("Sequence[_Stage]", self.stages)
        x = self.position.new_zeros(batch, self.position.shape[1]) if last is None else self.embed(last)
        x = (x + self.position[state.place])[:, None, None]
        for number, stage in enumerate(stages):
            x = stage.inside(x, state.local[number])
            state.held[number].append(x)
            before = state.before[number]
            if before is None:
                before = torch.zeros_like(self.latents[:1]).expand(x.shape[0], -1, -1, -1)
            x = stage.spread(x, before)
        state.place += 1
        if state.place == self.tokens:
            self._close(state, stages)
        return self._logits(x[:, 0, 0])

    def _close(self, state: FITState, stages: Sequence[_Stage]) -> None:
        """The group is complete: its latents read it and the latents before, for the next group to read."""
        latents = self.latents[state.group].expand(state.held[0][0].shape[0], 1, -1, -1)
        for number, stage in enumerate(stages):
            latents = stage.gather(latents, torch.cat(state.held[number], 2), caches=state.across[number])
            state.before[number] = latents
        state.group, state.place = state.group + 1, 0
        state.begin(stages)

    @torch.no_grad()
    def generate(self, batch: int, count: int | None = None, *, temperature: float = 1.0) -> Tensor:
        """Sequences sampled from the start, the likeliest tokens where ``temperature`` is 0; complete where None."""
        state, last, out = self.new_state(), None, []
        for _ in range(self.groups * self.tokens if count is None else count):
            logits = self.step(last, state, batch=batch)
            if temperature > 0:
                last = torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)
            else:
                last = logits.argmax(-1)
            out.append(last)
        return torch.stack(out, 1)


_BASE: dict[str, Any] = {"dim": 512, "latent_dim": 768, "num_heads": 8, "latent_heads": 12}
_TINY: dict[str, Any] = {"dim": 32, "latent_dim": 64, "num_heads": 2, "latent_heads": 4}


@register
def fit_tiny(**options: Any) -> FITImage:
    """32 x 32 pixels: 16 groups of 16 patches of 2 x 2."""
    settings = {"layers": "(1)2(1)", "size": 32, "group": (4, 4), "patch": 2, "latents": 4, **_TINY}
    return FITImage(**(settings | options))


def _encoder(size: int, options: dict[str, Any]) -> FITImage:
    settings = {"layers": "(2)4(2)4(2)4", "size": size, "group": (10, 10), "patch": 16, "latents": 16, **_BASE}
    return FITImage(**(settings | {"grid": (10, 10)} | options))


@register
def fit_640(**options: Any) -> FITImage:
    """640 x 640 pixels: 16 groups of 100 patches of 16 x 16, 16 latents a group."""
    return _encoder(640, options)


@register
def fit_1280(**options: Any) -> FITImage:
    """1,280 x 1,280 pixels: 64 groups of 100 patches of 16 x 16, 16 latents a group."""
    return _encoder(1280, options)


@register
def fit_6400(**options: Any) -> FITImage:
    """6,400 x 6,400 pixels, 160,000 patches of 16 x 16 in 1,600 groups, 4 latents a group."""
    return _encoder(6400, {"latents": 4} | options)


@register
def fit_denoiser_tiny(**options: Any) -> FITDenoiser:
    """A denoiser of 32 x 32 pixels and 10 classes for tests and small machines."""
    settings = {"layers": "(1)2(1)", "size": 32, "group": (4, 4), "patch": 2, "latents": 4, "num_classes": 10, **_TINY}
    return FITDenoiser(**(settings | options))


@register
def fit_denoiser_64(**options: Any) -> FITDenoiser:
    """A denoiser of 64 x 64 pixels and 1,000 classes: 16 groups of 64 patches of 2 x 2."""
    settings: dict[str, Any] = {
        "layers": "(2)4(2)4(2)",
        "size": 64,
        "group": (8, 8),
        "patch": 2,
        "latents": 16,
        "num_classes": 1000,
    }
    return FITDenoiser(**(settings | _BASE | {"grid": (8, 8), "cross_mlp": True} | options))


@register
def fit_ar_tiny(**options: Any) -> FITAR:
    """An autoregressive model of 64 bytes in 8 groups, for tests and small machines."""
    settings = {"vocab": 256, "layers": "(1)1(1)1(1)", "groups": 8, "tokens": 8, "latents": 2, **_TINY}
    return FITAR(**(settings | options))
