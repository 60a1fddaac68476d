"""Hyena and HyenaPixel: gated convolutions as large as their input, whose kernels a small network makes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from glocal.kernels.longconv import long_conv
from glocal.nn.sincos import sincos_grid
from glocal.shapes import Bool, Float

__all__ = ["Hyena", "HyenaPixel", "ImplicitFilter", "PixelFilter", "SequenceFilter"]

_FADES = math.log(0.01) / 1.5, math.log(0.01) / 0.3  # of the first channel and of the last


class ImplicitFilter(nn.Module):
    """A kernel that is made by a network from learned features of each of its cells, times a window.

    In eval the kernel is kept where no gradient is asked of the weights, and made anew once one of them has changed.
    What is written through ``.data`` in place goes unseen: call ``eval()`` again. Compiled and exported graphs make it
    each time.

    Args:
        z: start values of the features, ``(features, *sizes)``.
        dim: channels of the kernel.
        hidden: channels of each hidden layer, which is followed by a sine of learned rates.

    Kernels are made in float32 at least, also under autocast.
    """

    def __init__(self, z: Tensor, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.z = nn.Parameter(z)
        widths = (z.shape[0], *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False))
        self.rates = nn.ParameterList(nn.Parameter(torch.ones(width)) for width in hidden)
        self.last = nn.Linear(widths[-1], dim, bias=False)
        self._kept: tuple[list[tuple[Tensor, int]], Tensor] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the kernel."""
        return tuple(self.z.shape[1:])

    def window(self, dtype: torch.dtype) -> Tensor:
        """What the network's output is multiplied by, ``(dim, *sizes)``; a filter writes this."""
        raise NotImplementedError

    def make(self) -> Float[Tensor, "dim *sizes"]:
        """The kernel from the weights as they are."""
        dtype = torch.promote_types(self.z.dtype, torch.float32)

        def layer(module: Any, t: Tensor) -> Tensor:
            return linear(t, module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype))

        t = self.z.to(dtype).flatten(1).T  # cells, features
        for module, rate in zip(self.hidden, self.rates, strict=True):
            t = (rate.to(dtype) * layer(module, t)).sin()
        out: Tensor = layer(self.last, t).T.unflatten(1, self.sizes) * self.window(dtype)
        return out

    def forward(self) -> Float[Tensor, "dim *sizes"]:
        """The kernel, in float32 at least."""
        device = self.z.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward()
        weights = [*self.parameters(), *self.buffers()]
        if (
            self.training
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and any(t.requires_grad for t in weights))
            # Weights of torch.func are no parameters, and those of inference mode do not count their changes.
            or not all(isinstance(t, nn.Parameter) and not t.is_inference() for t in self.parameters())
        ):
            return self.make()
        if self._kept is None or not _unchanged(weights, self._kept[0]):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = [(t.detach(), t._version) for t in weights], self.make()
        return self._kept[1]

    def train(self, mode: bool = True) -> ImplicitFilter:
        """As in torch; the kernel that was kept is dropped."""
        self._kept = None
        return super().train(mode)


class PixelFilter(ImplicitFilter):
    """HyenaPixel's kernel of ``2 * side - 1`` cells each way, faded by the distance from its centre.

    Args:
        dim: channels.
        side: of the image that it covers from any of its pixels.
        features: of a cell, at first its column and row in sines and cosines; a multiple of 4.
        hidden: channels of the network; twice the features where None.
    """

    def __init__(self, dim: int, side: int, *, features: int = 32, hidden: int | None = None) -> None:
        _positive(dim=dim, side=side, hidden=hidden)
        size = 2 * side - 1
        hidden = 2 * features if hidden is None else hidden
        super().__init__(sincos_grid(size, size, features).T.unflatten(1, (size, size)), dim, (hidden, hidden))
        self.fade = nn.Parameter(torch.linspace(*_FADES, dim, device=self.z.device) / size)
        self.shift = nn.Parameter(torch.zeros(dim))
        self.register_buffer("cells", torch.tensor(size))
        self.cells: Tensor
        """The kernel's size when its weights were made: in cells of that size distances are counted."""

    def distance(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "size size"]:
        """Of each cell from the centre, in cells of the first resolution."""
        size = self.z.shape[-1]
        away = torch.arange(size, device=self.z.device, dtype=dtype) - size // 2
        return torch.hypot(away[:, None], away) * (self.cells.to(dtype) / size)

    def window(self, dtype: torch.dtype) -> Tensor:
        """``exp(-distance |fade|) + shift``."""
        fade, shift = (t.to(dtype)[:, None, None] for t in (self.fade, self.shift))
        return (-self.distance(dtype) * fade.abs()).exp() + shift

    def resize(self, side: int) -> None:
        """The same kernel in finer or coarser cells, for images of another resolution; ``z`` is a new parameter.

        Raises:
            ValueError: a side below 1.
        """
        _positive(side=side)
        size = 2 * side - 1
        z = self.z.detach()
        wide = z.to(torch.promote_types(z.dtype, torch.float32))[None]
        resized = interpolate(wide, size=(size, size), mode="bicubic", align_corners=False)[0].to(z.dtype)
        self.z, self._kept = nn.Parameter(resized, self.z.requires_grad), None


class SequenceFilter(ImplicitFilter):
    """Hyena's kernel for sequences, of ``2 * length - 1`` offsets, or of ``length`` lags where it is causal.

    Args:
        dim: channels.
        length: of the longest sequence.
        causal: lags from 0 on; else offsets to both sides.
        features: of an offset, at first its nearness and waves over the whole kernel; odd.
        hidden: channels of the network.
    """

    def __init__(self, dim: int, length: int, *, causal: bool = False, features: int = 33, hidden: int = 64) -> None:
        _positive(dim=dim, length=length, features=features, hidden=hidden)
        if features % 2 == 0:
            raise ValueError(f"features must be odd: the distance, and cosine and sine of each wave; it was {features}")
        self.causal = causal
        size, bands = length if causal else 2 * length - 1, features // 2
        at = torch.arange(size)
        # transformers can leave a linspace behind that is always made on the CPU; a device that is said stays.
        waves = torch.linspace(1e-4, bands - 1, bands, device=at.device)
        angle = 2 * math.pi / size * at * waves[:, None]
        near = 1 - self._away(size, causal)
        super().__init__(torch.cat([near[None], angle.cos(), -angle.sin()]), dim, (hidden,) * 3)

    @staticmethod
    def _away(size: int, causal: bool, **options: Any) -> Tensor:
        """From 0 at the token itself to 1 at the ends."""
        at = torch.arange(size, **options)
        return at / max(1, size - 1) if causal else (at - size // 2).abs() / max(1, size // 2)

    def window(self, dtype: torch.dtype) -> Tensor:
        """``exp(-distance |fade|)``: what is far counts least, also where it is causal."""
        size, dim = self.z.shape[-1], self.last.out_features
        fade = torch.linspace(*_FADES, dim, device=self.z.device, dtype=dtype).abs()
        return (-fade[:, None] * self._away(size, self.causal, device=self.z.device, dtype=dtype)).exp()


class _Gated(nn.Module):
    """What both have: three streams, the product of two convolved by the long kernel, and gated by the third."""

    gate: ClassVar[int]
    """Which of the streams is the gate."""

    def __init__(self, dim: int, short: nn.Module, filter: ImplicitFilter, norm: bool) -> None:
        super().__init__()
        self.dim, self.causal = dim, False
        self.in_proj, self.short, self.filter = nn.Linear(dim, 3 * dim), short, filter
        self.bias = nn.Parameter(torch.randn(dim))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, bias=False) if norm else nn.Identity() for _ in range(2))
        self.out_proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """``(B, *axes, dim)`` to the same, as many axes as the kernel has."""
        if keys is not None and (keys.dtype != torch.bool or keys.shape != x.shape[:-1]):
            raise ValueError(f"keys must be booleans {tuple(x.shape[:-1])}; it was {keys.dtype} {tuple(keys.shape)}")
        streams = self.in_proj(x)
        if keys is not None:  # padding is as what lies outside
            streams = streams * keys[..., None]
        parts = [t.movedim(1, -1) for t in self.convolve(streams.movedim(-1, 1)).chunk(3, 1)]
        gate = parts.pop(self.gate)
        t = parts[0] * parts[1]
        if keys is not None:
            t = t * keys[..., None]
        t = self.norm1(t)
        far = long_conv(t.movedim(-1, 1), self.filter(), causal=self.causal).movedim(1, -1)
        out: Tensor = self.out_proj(self.norm2(gate * (far + self.bias * t)))
        return out

    def convolve(self, streams: Tensor) -> Tensor:
        """The short convolution: ``(B, 3 dim, *axes)`` to the same."""
        out: Tensor = self.short(streams)
        return out


class HyenaPixel(_Gated):
    """HyenaPixel (Spravil et al., 2024, arXiv 2402.19305): gated, from any pixel of an image to any other.

    ``out(v * (conv(q * k) + bias * q * k))``, where q, k and v are a projection after a short depthwise convolution.
    O(C N log N) in the N pixels. Self-attention's place without causality; there is no causal form, and none with a
    context: the streams meet pixel by pixel.

    Args:
        dim: channels.
        side: of the images, or their longer side: the kernel has ``2 * side - 1`` cells each way. Larger images are
            convolved too, with what the kernel reaches; `resize` stretches it.
        features, hidden: as in `PixelFilter`.
        short: side of the short convolution.
        norm: norms of the product and of the gated result, without biases.

    Raises:
        ValueError: numbers below 1, features that are no multiple of 4, an even ``short``.

    >>> import torch
    >>> HyenaPixel(16, side=9)(torch.randn(2, 7, 9, 16)).shape
    torch.Size([2, 7, 9, 16])
    """

    gate = 2

    def __init__(
        self,
        dim: int,
        side: int,
        *,
        features: int = 32,
        hidden: int | None = None,
        short: int = 5,
        norm: bool = True,
    ) -> None:
        _positive(short=short, odd=True)
        filter = PixelFilter(dim, side, features=features, hidden=hidden)
        super().__init__(dim, nn.Conv2d(3 * dim, 3 * dim, short, padding=short // 2, groups=3 * dim), filter, norm)

    def forward(
        self, x: Float[Tensor, "B H W dim"], *, keys: Bool[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same; ``keys (B, H, W)`` are false for padding.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, H, W, {self.dim}); it was {tuple(x.shape)}")
        return self.mix(x, keys)

    def resize(self, side: int) -> None:
        """For images of another resolution: the kernel keeps its shape in finer or coarser cells."""
        assert isinstance(self.filter, PixelFilter)
        self.filter.resize(side)


class Hyena(_Gated):
    """Hyena of order two (Poli et al., 2023, arXiv 2302.10866) over sequences, to both sides or causal.

    ``out(x0 * (conv(x1 * v) + bias * x1 * v))``, where x0, x1 and v are a projection after a short depthwise
    convolution. To both sides it is the one-dimensional mixer of HyenaPixel (Spravil et al., 2024, arXiv
    2402.19305). O(C N log N). There is no form with a context: the streams meet token by token.

    Args:
        dim: channels.
        length: tokens of the longest sequence. Longer ones are convolved too, but nothing reaches further than
            ``length - 1`` tokens; in shorter ones the kernel is cut.
        causal: no token sees what comes after it.
        features, hidden: as in `SequenceFilter`.
        norm: norms of the product and of the gated result, without biases.

    Raises:
        ValueError: numbers below 1, an even number of features.

    >>> import torch
    >>> Hyena(16, length=20, causal=True)(torch.randn(2, 12, 16)).shape
    torch.Size([2, 12, 16])
    """

    gate = 0

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        causal: bool = False,
        features: int = 33,
        hidden: int = 64,
        norm: bool = False,
    ) -> None:
        filter = SequenceFilter(dim, length, causal=causal, features=features, hidden=hidden)
        short = nn.Conv1d(3 * dim, 3 * dim, 3, padding=2 if causal else 1, groups=3 * dim)
        super().__init__(dim, short, filter, norm)
        self.causal = causal

    def convolve(self, streams: Tensor) -> Tensor:
        """Without the two outputs that padding for a causal convolution leaves at the end."""
        return super().convolve(streams)[..., : streams.shape[-1]]

    def forward(
        self, x: Float[Tensor, "B *grid dim"], *, keys: Bool[Tensor, "B *grid"] | None = None
    ) -> Float[Tensor, "B *grid dim"]:
        """``(B, *grid, dim)`` to the same, a grid row by row; ``keys (B, *grid)`` are false for padding.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, *grid, {self.dim}); it was {tuple(x.shape)}")
        if keys is not None and keys.shape != x.shape[:-1]:
            raise ValueError(f"keys must be booleans {tuple(x.shape[:-1])}; it was {keys.dtype} {tuple(keys.shape)}")
        mixed = self.mix(x.flatten(1, -2), None if keys is None else keys.flatten(1))
        return mixed.view_as(x)


def _unchanged(weights: list[Tensor], before: list[tuple[Tensor, int]]) -> bool:
    """Views of the weights as they were hold their memory, so that an equal address means the same tensor."""
    return len(weights) == len(before) and all(
        now.data_ptr() == then.data_ptr() and now._version == version
        for now, (then, version) in zip(weights, before, strict=True)
    )


def _positive(*, odd: bool = False, **numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (value < 1 or (odd and value % 2 == 0)):
            raise ValueError(f"{name} must be at least 1{' and odd' if odd else ''}; it was {value}")
