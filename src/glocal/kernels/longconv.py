"""Depthwise convolutions with kernels as large as their input, by Fourier transform in O(C N log N)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fast_length", "long_conv"]


def long_conv(x: Tensor, kernel: Tensor, *, causal: bool = False) -> Tensor:
    """Each channel convolved with a kernel of its own, zeros around the input, the output as large as the input.

    Centred, ``out[n] = sum_d kernel[K // 2 + d] x[n - d]`` with ``d`` from ``-(K // 2)`` to ``K // 2`` on every axis.
    Causal, ``out[n] = sum_d kernel[d] x[n - d]`` with ``d`` from 0 to ``K - 1``. This is convolution as mathematics
    has it: torch's ``conv1d`` and ``conv2d`` apply the flipped kernel. Kernels may be longer than what any output
    sees of them; that part is cut off. Transforms are in float32 at least.

    Args:
        x: ``(*lead, C, *grid)``.
        kernel: ``(C, *sizes)``, a size for each axis of the grid, odd where it is centred.
        causal: outputs see nothing after them; on one axis only.

    Returns:
        ``(*lead, C, *grid)`` in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, an even centred kernel, causal on more than one axis.

    >>> x, kernel = torch.tensor([[1.0, 0, 0, 2]]), torch.tensor([[1.0, 2, 3]])
    >>> long_conv(x, kernel).round().int().tolist()
    [[2, 3, 2, 4]]
    >>> long_conv(x, kernel, causal=True).round().int().tolist()
    [[1, 2, 3, 2]]
    """
    axes = kernel.dim() - 1
    grid, sizes = tuple(x.shape[x.dim() - axes :]), tuple(kernel.shape[1:])
    if axes < 1 or x.dim() < kernel.dim() or x.shape[-axes - 1] != kernel.shape[0] or not all((*grid, *sizes)):
        raise ValueError(
            "x must be (*lead, C, *grid) and kernel (C, *sizes) with as many sizes as the grid has axes, none of them "
            f"0; they were {tuple(x.shape)} and {tuple(kernel.shape)}"
        )
    if not x.is_floating_point() or not kernel.is_floating_point():
        raise ValueError(f"x and kernel must be floating point; they were {x.dtype} and {kernel.dtype}")
    if causal and axes > 1:
        raise ValueError(f"causal needs a kernel (C, size) for one axis; it was {tuple(kernel.shape)}")
    if not causal and not all(size % 2 for size in sizes):
        raise ValueError(f"the sizes of a centred kernel must be odd; they were {sizes}")

    starts = []
    for axis, (n, size) in enumerate(zip(grid, sizes, strict=True), 1):
        seen = min(size if causal else size // 2, n if causal else n - 1)
        kernel = kernel.narrow(axis, 0, seen) if causal else kernel.narrow(axis, size // 2 - seen, 2 * seen + 1)
        starts.append(0 if causal else seen)
    # Products of spectra are circular: with this much room the wrap stays outside of what is kept.
    room = [fast_length(n + size - 1 - start) for n, size, start in zip(grid, kernel.shape[1:], starts, strict=True)]
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    dims = tuple(range(-axes, 0))
    spectrum = torch.fft.rfftn(x.to(dtype), room, dims) * torch.fft.rfftn(kernel.to(dtype), room, dims)
    out: Tensor = torch.fft.irfftn(spectrum, room, dims)
    for axis, start, n in zip(dims, starts, grid, strict=True):
        out = out.narrow(axis, start, n)
    return out.to(x.dtype)


def fast_length(n: int) -> int:
    """The least length from ``n`` on whose only prime factors are 2, 3 and 5: transforms of it are cheap.

    >>> [fast_length(n) for n in (1, 7, 13, 111, 6271)]
    [1, 8, 15, 120, 6400]
    """
    best, fives = 1 << max(0, n - 1).bit_length(), 1
    while fives < best:
        threes = fives
        while threes < best:
            best = min(best, threes << max(0, -(-n // threes) - 1).bit_length())
            threes *= 3
        fives *= 5
    return best
