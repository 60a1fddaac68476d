"""Gaussian adaptive attention: features are weighted by how far they lie from the mean of an axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["GaussianAdaptiveAttention", "GaussianBlock", "importance_factor"]


class GaussianAdaptiveAttention(nn.Module):
    """A gate along one axis, ``x * w``, from learned Gaussians around the mean; no queries, no keys, no sum.

    Ioannides et al., 2024, arXiv 2401.11143. A head has a chunk of the axis; its weights are the product of its
    Gaussians at ``(x - mean - offset) / std``, made to sum to one along the chunk. A product of Gaussians is one
    Gaussian again, so the weights are the softmax of a single square, which is how they are computed: the product
    itself underflows. More than one Gaussian a head only counts for how the parameters learn.

    Args:
        num_heads: chunks of the axis, of equal size but for the last, which takes the remainder.
        num_gaussians: of each head.
        axis: which one the statistics are of, and the weights sum to one along.
        padding_value: entries of this value come back unchanged; in the statistics they are zeros that count.
        eps: added to the variance.

    Raises:
        ValueError: numbers below 1.

    >>> layer = GaussianAdaptiveAttention(num_heads=4, num_gaussians=3)
    >>> x = torch.randn(2, 10, 32)
    >>> layer(x).shape, torch.allclose(layer.weights(x).sum(-1), torch.full((2, 10), 4.0))
    (torch.Size([2, 10, 32]), True)
    """

    def __init__(
        self,
        num_heads: int = 1,
        num_gaussians: int = 1,
        *,
        axis: int = -1,
        padding_value: float | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        self.num_heads, self.num_gaussians, self.axis = num_heads, num_gaussians, axis
        self.padding_value, self.eps = padding_value, eps
        self.offsets = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        self.widths = nn.Parameter(torch.randn(num_heads, num_gaussians).exp())

    def weights(self, x: Tensor) -> Tensor:
        """The gate, of the shape and type of ``x``.

        Raises:
            ValueError: an axis that ``x`` does not have, or one shorter than the heads are many.
        """
        if x.dim() < 2 or not -x.dim() <= self.axis < x.dim():
            raise ValueError(f"x must have at least two axes, among them {self.axis}; it was {tuple(x.shape)}")
        length = x.shape[self.axis]
        size = length // self.num_heads
        if not size:
            raise ValueError(f"x must have at least {self.num_heads} entries along axis {self.axis}; it had {length}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(self.axis, -1)
        sizes = [size] * (self.num_heads - 1) + [length - size * (self.num_heads - 1)]
        chunks = [self._head(chunk, head) for head, chunk in enumerate(wide.split(sizes, -1))]
        return torch.cat(chunks, -1).movedim(-1, self.axis).to(x.dtype)

    def _head(self, x: Tensor, head: int) -> Tensor:
        counted = x if self.padding_value is None else torch.where(x != self.padding_value, x, 0.0)
        mean, variance = counted.mean(-1, keepdim=True), counted.var(-1, keepdim=True) + self.eps
        precision = self.widths[head].to(x.dtype).square().reciprocal()
        sharp = precision.sum()
        middle = mean + (self.offsets[head].to(x.dtype) * precision).sum() / sharp
        return (-sharp * (x - middle).square() / (2 * variance)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times its `weights`, for ``x`` of any shape with two axes or more."""
        out = x * self.weights(x)
        return out if self.padding_value is None else torch.where(x != self.padding_value, out, x)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_gaussians={self.num_gaussians}, axis={self.axis}"


class GaussianBlock(nn.Module):
    """Gates one after the other, each added to what it was given: a gate alone leaves about ``x / n``.

    Args:
        layers: axis, heads and Gaussians of each gate.
        options: as in `GaussianAdaptiveAttention`.

    Raises:
        ValueError: no layers.

    >>> block = GaussianBlock([(-1, 4, 3), (1, 2, 1)])
    >>> out, gates = block(torch.randn(2, 10, 32), return_weights=True)
    >>> out.shape, len(gates)
    (torch.Size([2, 10, 32]), 2)
    """

    def __init__(
        self, layers: Sequence[tuple[int, int, int]], *, padding_value: float | None = None, eps: float = 1e-8
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must be at least one (axis, heads, Gaussians); it was empty")
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(heads, gaussians, axis=axis, padding_value=padding_value, eps=eps)
            for axis, heads, gaussians in layers
        )

    def forward(self, x: Tensor, *, return_weights: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """``x`` after all gates, and with ``return_weights`` each gate's weights."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, GaussianAdaptiveAttention)
            if return_weights:
                found.append(layer.weights(x))
            x = x + layer(x)
        return (x, found) if return_weights else x


def importance_factor(weights: Tensor, axis: int = -1) -> Float[Tensor, " n"]:
    """How important the entries of an axis are: their mean weight over all else, from 0 (least) to 1 (most).

    Args:
        weights: of `GaussianAdaptiveAttention.weights`, for any number of samples.
        axis: whose entries are compared.

    Returns:
        ``(n,)``; zeros where all are alike.

    >>> importance_factor(torch.tensor([[0.1, 0.3, 0.2], [0.1, 0.5, 0.2]]))
    tensor([0.0000, 1.0000, 0.3333])
    """
    mean = weights.movedim(axis, -1).flatten(0, -2).mean(0)
    spread = mean.max() - mean.min()
    return (mean - mean.min()) / torch.where(spread > 0, spread, 1.0)
