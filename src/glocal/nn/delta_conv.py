"""Delta convolution: gated convolutions at several scales and a mean, in the place of a map's self-attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from glocal.nn.conv import Depthwise
from glocal.shapes import Float

__all__ = ["DeltaConv"]


class DeltaConv(nn.Module):
    """What a diffusion model's self-attention is distilled into: a part near each token, and one that all share.

    Half the channels are convolved at each scale, ``a | b``, and gated, ``a * b * factor`` (``a * sigmoid(b)``); the
    scales are resized to the map and projected. Beside them goes a projection of the map's mean. Time and memory grow
    with the tokens. Kernels are fixed, so that there is no cross form, and the mean is over the whole map, so that
    there is no causal one. The output is zero at first: a residual block then passes its input on. Dong et al., 2025,
    arXiv 2504.21292; `glocal.inspect.locality` says which kernel fits, `glocal.models.distillation` trains it.

    Args:
        dim: channels, a multiple of 4.
        kernel_size: side of the convolutions, odd: 3 to 11 by the level for Stable Diffusion 1.5, 13 for PixArt.
        scales: of the maps that are convolved, each above 0 and at most 1. Sizes are rounded down, to 1 at least.
        gate: ``"simple"`` or ``"sigmoid"``.
        factor: of the simple gate; ``sqrt(dim / 4)`` where None, which makes products larger.
        conv_bias: whether the convolutions have biases.
        grid: rows and columns of tokens that are given as a sequence, ``(B, rows * columns, dim)``.

    Raises:
        ValueError: settings out of range, an input that is no map of ``dim`` channels.

    >>> DeltaConv(16, 5)(torch.randn(2, 9, 7, 16)).shape
    torch.Size([2, 9, 7, 16])
    >>> DeltaConv(16, 5, grid=(9, 7))(torch.randn(2, 63, 16)).shape
    torch.Size([2, 63, 16])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 13,
        *,
        scales: Sequence[float] = (1.0, 0.5),
        gate: str = "simple",
        factor: float | None = None,
        conv_bias: bool = True,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a multiple of 4; it was {dim}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; it was {kernel_size}")
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"scales must be numbers above 0 and at most 1; they were {tuple(scales)}")
        if gate not in ("simple", "sigmoid"):
            raise ValueError(f"gate must be 'simple' or 'sigmoid'; it was {gate!r}")
        if gate == "sigmoid" and factor is not None:
            raise ValueError("factor is of the simple gate; gate was 'sigmoid'")
        self.dim, self.scales, self.gate, self.grid = dim, tuple(scales), gate, grid
        self.factor = (dim / 4) ** 0.5 if factor is None else factor
        self.down_proj = nn.Linear(dim, dim // 2)
        self.convs = nn.ModuleList(Depthwise(dim // 2, kernel_size, bias=conv_bias) for _ in scales)
        self.o_proj = nn.Linear(dim // 4 * len(self.scales), dim)
        self.mean_proj = nn.Linear(dim, dim)
        # Products of two convolutions times the factor are large: the rest of a trained network would not stand them.
        for p in (*self.o_proj.parameters(), *self.mean_proj.parameters()):
            nn.init.zeros_(p)

    def forward(self, x: Float[Tensor, "B *grid dim"]) -> Float[Tensor, "B *grid dim"]:
        """``(B, H, W, dim)`` to the same, or ``(B, N, dim)`` where there is a ``grid`` of N tokens."""
        sequence = x.dim() == 3 and self.grid is not None
        if self.grid is not None and sequence:
            if x.shape[1] != self.grid[0] * self.grid[1]:
                raise ValueError(f"x must have the tokens of grid {self.grid}; it was {tuple(x.shape)}")
            x = x.unflatten(1, self.grid)
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, H, W, {self.dim}); it was {tuple(x.shape)}")
        inner = self.down_proj(x)
        found = [self._near(inner, conv, scale) for conv, scale in zip(self.convs, self.scales, strict=True)]
        out: Tensor = self.o_proj(torch.cat(found, -1)) + self.mean_proj(x.mean((1, 2), keepdim=True))
        return out.flatten(1, 2) if sequence else out

    def _near(self, inner: Tensor, conv: nn.Module, scale: float) -> Tensor:
        """Gated convolutions of ``inner (B, H, W, dim / 2)`` at one scale, half as many channels."""
        rows, columns = inner.shape[1:3]
        if scale < 1:
            size = (max(1, int(rows * scale)), max(1, int(columns * scale)))
            inner = adaptive_avg_pool2d(inner.movedim(-1, 1), size).movedim(1, -1)
        a, b = conv(inner).chunk(2, -1)
        out: Tensor = a * (b * self.factor) if self.gate == "simple" else a * b.sigmoid()
        if scale < 1:
            out = interpolate(out.movedim(-1, 1), (rows, columns), mode="bilinear").movedim(1, -1)
        return out
