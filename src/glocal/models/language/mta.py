"""Multi-token attention in Llama's network: every few layers convolve scores and weights, all mix heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from glocal.models.language.transformer import Transformer
from glocal.models.registry import register
from glocal.nn import MultiTokenAttention, Rope
from glocal.patterns.schedules import is_global

__all__ = ["mta", "mta_1b", "mta_300m", "mta_tiny"]


def mta(
    vocab: int = 128256,
    dim: int = 1024,
    depth: int = 20,
    num_heads: int = 16,
    *,
    period: int = 4,
    place: int = 2,
    hidden: int | None = None,
    theta: float = 100000.0,
    tied: bool = True,
    **options: Any,
) -> Transformer:
    """MTA: of every ``period`` layers the one at ``place`` convolves; all mix heads, with norm and gate a head.

    Golovneva et al., 2025, arXiv 2504.00927, the released configurations; the block is that of Llama.

    Args:
        vocab, dim, depth, tied: as in `Transformer`.
        num_heads: of each layer.
        period, place: which layers convolve scores and weights: 2, 6, 10 and so on.
        hidden: of the feed-forward; ``8 / 3 dim`` to the next multiple of 256 where None.
        theta: base of the rotary positions.
        options: of `MultiTokenAttention`, for all layers; ``convolve`` for those that do.

    >>> model = mta(10, 32, 4, 2, query_kernel=3, key_kernel=5)
    >>> [block.attention.score_kernel is not None for block in model.blocks]
    [False, False, True, False]
    """
    hidden = -(-8 * dim // 3 // 256) * 256 if hidden is None else hidden
    convolve = options.pop("convolve", ("scores", "weights"))
    settings: dict[str, Any] = {"causal": True, "rope": Rope(theta)} | options

    def layer(number: int) -> Callable[[int], nn.Module]:
        own = convolve if is_global(number, period, place) else ()
        return lambda dim: MultiTokenAttention(dim, num_heads, convolve=own, **settings)

    return Transformer(vocab, dim, [layer(n) for n in range(depth)], hidden=hidden, tied=tied)


@register
def mta_300m(**options: Any) -> Transformer:
    """MTA of 300M with the tokens of Llama 3: 388,300,628 parameters, 131,334,144 of them the embedding's."""
    return mta(**options)


@register
def mta_1b(**options: Any) -> Transformer:
    """MTA of 1B with the tokens of Llama 3: 1,495,925,144 parameters, 262,668,288 of them the embedding's."""
    return mta(**({"dim": 2048, "depth": 24} | options))


@register
def mta_tiny(**options: Any) -> Transformer:
    """An MTA for tests and small machines: 4 layers of 64 channels and 4 heads, kernels of 3 x 5."""
    sizes: dict[str, Any] = {"vocab": 256, "dim": 64, "depth": 4, "num_heads": 4, "hidden": 192}
    return mta(**(sizes | {"query_kernel": 3, "key_kernel": 5} | options))
