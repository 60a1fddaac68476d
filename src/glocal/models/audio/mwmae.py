"""Masked autoencoders of spectrograms whose decoder heads look at several scales (MW-MAE), and the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP, Attention, Block, MultiWindowAttention
from glocal.nn.multiwindow import divisor_windows
from glocal.nn.sincos import sincos, sincos_grid
from glocal.shapes import Float

__all__ = [
    "Masked",
    "SpectrogramMAE",
    "log_mel",
    "mae_base",
    "mae_huge",
    "mae_large",
    "mae_medium",
    "mae_small",
    "mae_tiny",
    "mel_filters",
    "mwmae_base",
    "mwmae_huge",
    "mwmae_large",
    "mwmae_medium",
    "mwmae_small",
    "mwmae_tiny",
]


def mel_filters(bins: int, frequencies: int, rate: int, low: float, high: float) -> Float[Tensor, "frequencies bins"]:
    """Triangles of height 1, equally wide on the mel scale ``2595 log10(1 + f / 700)``.

    Args:
        bins: triangles between ``low`` and ``high`` hertz.
        frequencies: of the spectrum, from 0 to half of ``rate``.

    >>> mel_filters(80, 257, 16000, 50.0, 8000.0).shape
    torch.Size([257, 80])
    """
    ends = 2595 * torch.log10(1 + torch.tensor([low, high], dtype=torch.float64) / 700)
    mel = torch.linspace(float(ends[0]), float(ends[1]), bins + 2, dtype=torch.float64)
    corner = 700 * (10 ** (mel / 2595) - 1)
    at = torch.linspace(0, rate / 2, frequencies, dtype=torch.float64)[:, None]
    left, middle, right = corner[:-2], corner[1:-1], corner[2:]
    rise, fall = (at - left) / (middle - left), (right - at) / (right - middle)
    return torch.minimum(rise, fall).clamp(min=0).to(torch.get_default_dtype())


def log_mel(
    wave: Float[Tensor, "*lead samples"],
    rate: int = 16000,
    *,
    bins: int = 80,
    window: float = 0.025,
    hop: float = 0.01,
    low: float = 50.0,
    high: float = 8000.0,
    standardize: bool = True,
) -> Float[Tensor, "*lead frames bins"]:
    """The logarithm of the mel spectrum of a sound, one frame every ``hop`` seconds.

    Args:
        wave: ``(..., samples)``.
        rate: samples a second.
        bins: mel bands between ``low`` and ``high`` hertz.
        window: seconds of a Hann window.
        standardize: each clip to mean 0 and deviation 1, as the model was trained.

    Returns:
        ``(..., samples // (hop * rate), bins)``; two seconds are 200 frames.

    Raises:
        ValueError: ``high`` is above half of the rate, or the sound is shorter than a window.

    >>> log_mel(torch.sin(torch.arange(32000) / 16000 * 440 * 6.2832)).shape
    torch.Size([200, 80])
    """
    size, step = round(window * rate), round(hop * rate)
    if not 0 <= low < high <= rate / 2:
        raise ValueError(f"low and high must rise within 0 and {rate / 2}; they were {low} and {high}")
    if wave.shape[-1] < size:
        raise ValueError(f"wave must have at least {size} samples, a window; it had {wave.shape[-1]}")
    points = 1 << (size - 1).bit_length()
    shape = torch.hann_window(size, dtype=wave.dtype, device=wave.device)
    flat = wave.reshape(-1, wave.shape[-1])
    spectrum = torch.stft(flat, points, step, size, shape, return_complex=True).abs().square()
    spectrum = spectrum[..., : wave.shape[-1] // step].mT  # without the last frame, half of which is padding
    filters = mel_filters(bins, points // 2 + 1, rate, low, high).to(spectrum)
    out = torch.log(spectrum @ filters + torch.finfo(spectrum.dtype).eps)
    if standardize:
        out = (out - out.mean((-2, -1), keepdim=True)) / (out.std((-2, -1), keepdim=True) + 1e-8)
    return out.unflatten(0, wave.shape[:-1]) if wave.dim() > 1 else out[0]


class Masked(NamedTuple):
    """What pretraining gives."""

    loss: Tensor
    """Mean squared error of the patches that were hidden."""
    prediction: Tensor
    """All patches, ``(B, N, patch values)``."""
    hidden: Tensor
    """Which were hidden, booleans ``(B, N)``."""


class SpectrogramMAE(nn.Module):
    """A masked autoencoder: the encoder sees a fifth of the patches, a small decoder fills in the others.

    Yadav et al., 2023, arXiv 2306.00561. Patches are numbered in time, those of one time step after each other, and
    the decoder's windows count patches in this order.

    Args:
        dim, depth, num_heads: of the encoder, a pre-norm ViT.
        frames, bins: of the spectrogram that it is trained on.
        patch: frames and bins of a patch.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        windows: of the decoder's heads, 0 for a global head; those of `divisor_windows` where None.
        shift: every other decoder block has shifted windows.
        mask_ratio: share of the patches that are hidden, in whole percents.
        class_token: a token before the patches, as in MAE; for global windows only.

    Raises:
        ValueError: sizes that do not divide, or a class token that would move the windows.

    >>> import torch, glocal
    >>> model = glocal.create("mwmae_tiny", depth=2)
    >>> spectrogram = torch.randn(2, 200, 80)
    >>> model(spectrogram).hidden.sum(1).tolist(), model.features(spectrogram).shape
    ([200, 200], torch.Size([2, 50, 960]))
    """

    position: Tensor
    decoder_position: Tensor

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        frames: int = 200,
        bins: int = 80,
        patch: tuple[int, int] = (4, 16),
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        windows: Sequence[int] | None = None,
        shift: bool = False,
        mask_ratio: float = 0.8,
        class_token: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size, step in (("frames", frames, patch[0]), ("bins", bins, patch[1])):
            if size < 1 or step < 1 or size % step:
                raise ValueError(f"{name} must be a multiple of the patch's {step}; it was {size}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and less than 1; it was {mask_ratio}")
        self.frames, self.bins, self.patch, self.mask_ratio = frames, bins, patch, mask_ratio
        self.grid = frames // patch[0], bins // patch[1]
        count, values = self.grid[0] * self.grid[1], patch[0] * patch[1]
        windows = divisor_windows(count, decoder_heads) if windows is None else tuple(windows)
        if class_token and any(windows):
            raise ValueError("class_token would move the windows by one token; give windows that are all 0")
        self.embed = nn.Linear(values, dim)
        self.cls = nn.Parameter(torch.zeros(dim)) if class_token else None
        self.register_buffer("position", sincos_grid(*self.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, num_heads, qkv_bias=True, out_bias=True, backend=backend), MLP(dim, 4 * dim))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
        first = int(class_token)
        decoder_position = sincos(torch.arange(count), decoder_dim)
        self.register_buffer(
            "decoder_position", torch.cat([torch.zeros(first, decoder_dim), decoder_position]), persistent=False
        )
        self.decoder = nn.ModuleList(
            Block(
                decoder_dim,
                MultiWindowAttention(
                    decoder_dim,
                    decoder_heads,
                    windows=windows,
                    shift=shift and number % 2 == 1,
                    qkv_bias=True,
                    out_bias=True,
                    backend=backend,
                ),
                MLP(decoder_dim, 4 * decoder_dim),
            )
            for number in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, values)
        self.apply(_init)
        for token in (self.mask_token, *(() if self.cls is None else (self.cls,))):
            nn.init.normal_(token, std=0.02)

    def patches(self, spectrogram: Float[Tensor, "B T bins"]) -> Float[Tensor, "B N values"]:
        """A spectrogram ``(B, T, bins)`` as patches in time order, ``(B, T / 4 * bins / 16, 64)``."""
        frames, bins = self.patch
        if spectrogram.dim() != 3 or spectrogram.shape[1] % frames or spectrogram.shape[2] != self.bins:
            raise ValueError(
                f"spectrogram must be (B, T, {self.bins}) with T a multiple of {frames}; it was "
                f"{tuple(spectrogram.shape)}"
            )
        split: Tensor = spectrogram.unflatten(2, (-1, bins)).unflatten(1, (-1, frames))
        return split.transpose(2, 3).flatten(3).flatten(1, 2)

    def encode(self, x: Tensor) -> Tensor:
        """Embedded patches ``(B, n, dim)`` to normalised states, the class token's first if there is one."""
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x))

    def forward(self, spectrogram: Float[Tensor, "B T bins"], *, noise: Tensor | None = None) -> Masked:
        """Hide patches and predict them.

        Args:
            spectrogram: ``(B, frames, bins)``, as of `log_mel`.
            noise: ``(B, N)``; the patches of the lowest are seen. Drawn at random where None.

        Raises:
            ValueError: another size than the model was made for.
        """
        target = self.patches(spectrogram)
        batch, count = target.shape[:2]
        if count != self.grid[0] * self.grid[1]:
            raise ValueError(f"spectrogram must have {self.frames} frames; it had {spectrogram.shape[1]}")
        noise = torch.rand(batch, count, device=target.device) if noise is None else noise
        if tuple(noise.shape) != (batch, count):
            raise ValueError(f"noise must be {(batch, count)}; it was {tuple(noise.shape)}")
        kept = count * (100 - round(100 * self.mask_ratio)) // 100
        seen = noise.argsort(1)[:, :kept, None]
        x = self.embed(target) + self.position
        states = self.decoder_embed(self.encode(x.gather(1, seen.expand(-1, -1, x.shape[-1]))))
        first = states.shape[1] - kept
        full = self.mask_token.expand(batch, count, -1).to(states.dtype)
        full = full.scatter(1, seen.expand(-1, -1, states.shape[-1]), states[:, first:])
        hidden = torch.ones_like(noise, dtype=torch.bool).scatter(1, seen.squeeze(-1), False)
        prediction = self.decode(torch.cat([states[:, :first], full], 1))[:, first:]
        error = (prediction - target).square().mean(-1)
        return Masked((error * hidden).sum() / hidden.sum().clamp(min=1), prediction, hidden)

    def decode(self, x: Tensor) -> Tensor:
        """Tokens in order, ``(B, N, decoder_dim)``, to the values of each one's patch."""
        x = x + self.decoder_position
        for block in self.decoder:
            x = block(x)
        return cast(Tensor, self.head(self.decoder_norm(x)))

    def features(self, spectrogram: Float[Tensor, "B T bins"]) -> Float[Tensor, "B T/4 grid*dim"]:
        """A vector for every time step, of all its patches; longer sounds are encoded piece by piece.

        Args:
            spectrogram: ``(B, T, bins)``, ``T`` a multiple of the patch's frames. Their mean over time describes
                the whole sound.

        Returns:
            ``(B, T / 4, bins / 16 * dim)``.
        """
        parts = []
        for piece in spectrogram.split(self.frames, 1):
            patches = self.patches(piece)
            x = self.encode(self.embed(patches) + self.position[: patches.shape[1]])
            parts.append(x[:, -patches.shape[1] :].unflatten(1, (-1, self.grid[1])).flatten(2))
        return torch.cat(parts, 1)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _mwmae(size: str, options: dict[str, Any]) -> SpectrogramMAE:
    return SpectrogramMAE(**(dict(zip(("dim", "depth", "num_heads"), _SIZES[size], strict=True)) | options))


def _mae(size: str, options: dict[str, Any]) -> SpectrogramMAE:
    heads = options.get("decoder_heads", 8)
    return _mwmae(size, {"windows": (0,) * heads, "class_token": True} | options)


@register
def mwmae_tiny(**options: Any) -> SpectrogramMAE:
    """MW-MAE with an encoder of 12 layers, 192 channels."""
    return _mwmae("tiny", options)


@register
def mwmae_small(**options: Any) -> SpectrogramMAE:
    """MW-MAE with an encoder of 12 layers, 384 channels."""
    return _mwmae("small", options)


@register
def mwmae_medium(**options: Any) -> SpectrogramMAE:
    """MW-MAE with an encoder of 12 layers, 512 channels."""
    return _mwmae("medium", options)


@register
def mwmae_base(**options: Any) -> SpectrogramMAE:
    """MW-MAE with an encoder of 12 layers, 768 channels."""
    return _mwmae("base", options)


@register
def mwmae_large(**options: Any) -> SpectrogramMAE:
    """MW-MAE with an encoder of 24 layers, 1,024 channels."""
    return _mwmae("large", options)


@register
def mwmae_huge(**options: Any) -> SpectrogramMAE:
    """MW-MAE with an encoder of 32 layers, 1,280 channels."""
    return _mwmae("huge", options)


@register
def mae_tiny(**options: Any) -> SpectrogramMAE:
    """The same as `mwmae_tiny` with a class token and a decoder of global heads."""
    return _mae("tiny", options)


@register
def mae_small(**options: Any) -> SpectrogramMAE:
    """The same as `mwmae_small` with a class token and a decoder of global heads."""
    return _mae("small", options)


@register
def mae_medium(**options: Any) -> SpectrogramMAE:
    """The same as `mwmae_medium` with a class token and a decoder of global heads."""
    return _mae("medium", options)


@register
def mae_base(**options: Any) -> SpectrogramMAE:
    """The same as `mwmae_base` with a class token and a decoder of global heads."""
    return _mae("base", options)


@register
def mae_large(**options: Any) -> SpectrogramMAE:
    """The same as `mwmae_large` with a class token and a decoder of global heads."""
    return _mae("large", options)


@register
def mae_huge(**options: Any) -> SpectrogramMAE:
    """The same as `mwmae_huge` with a class token and a decoder of global heads."""
    return _mae("huge", options)
