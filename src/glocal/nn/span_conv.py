"""Mixed attention: half of the heads attend, the others are convolutions whose kernels are made of a span of tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.nn.frame import Attention, Call
from glocal.shapes import Float

__all__ = ["SpanConvAttention", "dynamic_conv"]


def dynamic_conv(v: Float[Tensor, "B H N D"], weights: Float[Tensor, "B H N K"]) -> Float[Tensor, "B H N D"]:
    """A convolution along tokens with a kernel of its own for every token and head; zeros beyond the ends.

    ``out[n] = sum_j weights[n, j] v[n + j - (K - 1) / 2]``, in O(N K D). Wu et al., 2019, arXiv 1901.10430.

    Args:
        v: ``(B, H, N, D)``.
        weights: ``(B, H, N, K)``, K odd.

    Returns:
        ``(B, H, N, D)``.

    Raises:
        ValueError: shapes that do not fit each other, an even K.

    >>> v = torch.arange(1.0, 5).view(1, 1, 4, 1)
    >>> dynamic_conv(v, torch.ones(1, 1, 4, 3)).flatten().tolist()
    [3.0, 6.0, 9.0, 7.0]
    """
    if v.dim() != 4 or weights.shape[:-1] != v.shape[:-1] or weights.shape[-1] % 2 == 0:
        raise ValueError(
            "v and weights must be (B, H, N, D) and (B, H, N, K) with an odd K; they were "
            f"{tuple(v.shape)} and {tuple(weights.shape)}"
        )
    count, side = v.shape[2], weights.shape[-1]
    wide, out = pad(v, (0, 0, side // 2, side // 2)), torch.zeros_like(v)
    for j, weight in enumerate(weights.unbind(-1)):
        out = out + weight.unsqueeze(-1) * wide[:, :, j : j + count]
    return out


class SpanConvAttention(Attention):
    """Half of the heads attend; each of the others is a convolution whose kernel depends on a span around the token.

    A kernel is the softmax over taps of a projection of the query times the span, which is a fixed convolution of the
    input. Head ``h`` of both halves uses query ``h``, as projected, before norms and rotary positions. Windows look to
    both sides, so that there is neither a causal nor a cross form. The attending half is softmax attention like any
    other: it costs O(N^2), the convolving one O(N K). Jiang et al., 2020, arXiv 2008.02496, with the ratio of 2 that
    their code has.

    Args:
        dim: channels.
        num_heads: heads of both halves together, even. The layer's ``num_heads`` is that of the attending half.
        kernel_size: taps of both convolutions, odd.
        mask_conv: padding is treated as beyond the end by the convolutions too. False is as in the paper's code, where
            tokens near the end see what is written in the padding.
        options: as in `Attention`, for the attending half, with biases by default.

    Raises:
        ValueError: sizes that do not fit, an input that is no sequence, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import SpanConvAttention
    >>> layer = SpanConvAttention(64, 8, kernel_size=5)
    >>> layer(torch.randn(2, 20, 64)).shape, layer.num_heads
    (torch.Size([2, 20, 64]), 4)
    """

    uses = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "the windows of its convolutions look ahead",
        "noncausal-cross": "kernels, made of queries, convolve values of the same tokens",
        "causal-cross": "the windows of its convolutions look ahead",
    }
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 4, "kernel_size": 5}

    def __init__(
        self, dim: int, num_heads: int, *, kernel_size: int = 9, mask_conv: bool = True, **options: Any
    ) -> None:
        if num_heads < 2 or num_heads % 2 or dim % num_heads:
            raise ValueError(
                f"num_heads must be even, as half of them convolve, and divide dim {dim}; it was {num_heads}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; it was {kernel_size}")
        for name in ("head_dim", "lepe"):
            if options.get(name) is not None:
                raise ValueError(f"{name} must be None, as heads of both kinds share dim; it was {options[name]}")
        if not options.get("project", True):
            raise ValueError("project must be True for SpanConvAttention, whose kernels are made of projected queries")
        settings: dict[str, Any] = {"qkv_bias": True, "out_bias": True} | options | {"head_dim": dim // num_heads}
        super().__init__(dim, num_heads // 2, **settings)
        self.kernel_size, self.mask_conv = kernel_size, mask_conv
        inner, bias = dim // 2, settings["qkv_bias"]
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.pointwise = nn.Linear(dim, inner, bias=bias)
        self.kernel_proj = nn.Linear(inner, num_heads // 2 * kernel_size, bias=bias)
        self.conv_proj = nn.Linear(dim, inner, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=settings["out_bias"])
        if self.g_proj is not None:
            self.g_proj = nn.Linear(dim, dim, bias=bias)
        nn.init.trunc_normal_(self.depthwise.weight, std=1 / kernel_size)

    def combine(self, mixed: Tensor, call: Call) -> Tensor:
        x = call.x
        if x.dim() != 3:
            raise ValueError(f"x must be a sequence (B, N, {self.dim}); it was {tuple(x.shape)}")
        real = call.real if self.mask_conv else None
        return torch.cat([super().combine(mixed, call), self.convolve(x, real)], 1)

    def convolve(self, x: Float[Tensor, "B N dim"], real: Tensor | None = None) -> Float[Tensor, "B H N D"]:
        """The convolving half of the heads; ``real (B, N)`` are the tokens that are no padding."""
        v = self.heads(self.conv_proj(x), self.num_heads)
        if real is not None:
            v = v.masked_fill(~real[:, None, :, None], 0)
        return dynamic_conv(v, self.kernels(x, real))

    def kernels(self, x: Float[Tensor, "B N dim"], real: Tensor | None = None) -> Float[Tensor, "B H N K"]:
        """The kernel of each token and head, its taps summing to 1."""
        inside = x if real is None else x.masked_fill(~real[..., None], 0)
        span = self.pointwise(self.depthwise(inside.mT).mT)
        logits = self.heads(self.kernel_proj(span * self.q_proj(x)), self.num_heads)
        return logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, mask_conv={self.mask_conv}"
