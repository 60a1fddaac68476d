"""Rotary position embedding, on one axis or several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["Rope"]


@dataclass(frozen=True)
class Rope:
    """Rotates pairs of channels by angles proportional to the position. Call it on queries and on keys.

    Su et al., 2021, arXiv 2104.09864. The layout is that of Llama: channel ``c`` pairs with ``c + half``.

    Args:
        theta: base of the wavelengths.
        axes: positions have this many coordinates; each has an equal share of the channels (2 for images).
        scaling: positions are divided by this (linear interpolation).
        interleaved: channel ``2 c`` pairs with ``2 c + 1`` instead.
        endpoint: the slowest pair turns by ``1 / theta`` a position, as in RMT, instead of a little faster.

    Raises:
        ValueError: a head dimension that is no multiple of ``2 axes``.

    >>> import torch
    >>> from glocal.nn import Rope
    >>> rope, q, k = Rope(), torch.randn(8), torch.randn(8)
    >>> a, b = (rope(torch.stack([q, k]), torch.tensor(at)) for at in ([5, 2], [15, 12]))
    >>> torch.allclose(a[0] @ a[1], b[0] @ b[1], atol=1e-4)  # only the distance counts
    True
    """

    theta: float = 10000.0
    axes: int = 1
    scaling: float = 1.0
    interleaved: bool = False
    endpoint: bool = False

    def __call__(self, x: Float[Tensor, "*lead N D"], position: Tensor) -> Float[Tensor, "*lead N D"]:
        """Rotate ``x (..., N, D)`` to ``position (N,)``, or ``(N, axes)``; leading dimensions broadcast."""
        if x.shape[-1] % (2 * self.axes):
            raise ValueError(
                f"head_dim must be a multiple of {2 * self.axes} for {self.axes} axes; it was {x.shape[-1]}"
            )
        if self.axes == 1:
            position = position.unsqueeze(-1)
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        share = x.shape[-1] // self.axes
        steps = torch.arange(0, share, 2, device=x.device, dtype=wide)
        rate = self.theta ** -(steps / (max(share - 2, 1) if self.endpoint else share))
        parts = []
        for axis, part in enumerate(x.to(wide).split(share, -1)):
            angle = (position[..., axis, None].to(wide) / self.scaling) * rate
            cos, sin = angle.cos(), angle.sin()
            a, b = (part[..., ::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
            turned = (a * cos - b * sin, b * cos + a * sin)
            parts.append(torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1))
        return torch.cat(parts, -1).to(x.dtype)
