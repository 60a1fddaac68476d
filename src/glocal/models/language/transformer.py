"""A stack of blocks over tokens, with any attention in each layer; decoders decode with each layer's own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from glocal.cache import Cache
from glocal.models.registry import register
from glocal.nn import Attention, Block, Rope, SlidingWindowAttention, SwiGLU
from glocal.patterns.schedules import is_global

__all__ = ["Transformer", "zebra", "zebra_llama2_7b", "zebra_tiny"]


class Transformer(nn.Module):
    """Llama's network over any attention: embedding, blocks (RMSNorm, attention, SwiGLU), norm, output.

    Whether it is a decoder or an encoder is decided by its attention layers.

    Args:
        vocab: tokens.
        dim: channels.
        layers: one function a layer, from ``dim`` to an attention layer.
        hidden: channels of the feed-forward; ``8 / 3 dim`` to the next multiple of 32 where None.
        tied: the output uses the embedding's weights.
        eps: of the norms.

    >>> import torch
    >>> from glocal.models.language.transformer import Transformer
    >>> from glocal.nn import MixtureOfBlocksAttention
    >>> model = Transformer(100, 32, [lambda dim: MixtureOfBlocksAttention(dim, 2, block_size=4, causal=True)] * 2)
    >>> model(torch.randint(100, (1, 20))).shape
    torch.Size([1, 20, 100])
    >>> model.generate(torch.randint(100, (1, 3)), 4).shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: Sequence[Callable[[int], nn.Module]],
        *,
        hidden: int | None = None,
        tied: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = -(-8 * dim // 3 // 32) * 32 if hidden is None else hidden
        self.vocab, self.dim = vocab, dim
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            Block(dim, make(dim), SwiGLU(dim, hidden), norm=nn.RMSNorm, eps=eps) for make in layers
        )
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.apply(_init)
        if tied:
            self.head.weight = self.embed.weight

    def features(self, tokens: Tensor, *, keys: Tensor | None = None, caches: Sequence[Cache] | None = None) -> Tensor:
        """Tokens ``(B, N)`` to normalised states ``(B, N, dim)``."""
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache=None if caches is None else caches[layer], **({} if keys is None else {"keys": keys}))
        return cast(Tensor, self.norm(x))

    def forward(self, tokens: Tensor, *, keys: Tensor | None = None, caches: Sequence[Cache] | None = None) -> Tensor:
        """Tokens ``(B, N)`` to logits ``(B, N, vocab)``; ``keys (B, N)`` are true for real tokens."""
        return cast(Tensor, self.head(self.features(tokens, keys=keys, caches=caches)))

    def new_caches(self) -> list[Cache]:
        """An empty cache for each layer, of the policy that fits it."""
        return [cast(Cache, cast(Block, block).attention.new_cache()) for block in self.blocks]  # type: ignore[operator]

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, *, temperature: float = 0.0) -> Tensor:
        """``count`` more tokens after ``tokens (B, N)``, the likeliest ones, or sampled where ``temperature`` > 0."""
        caches, new = self.new_caches(), tokens
        for _ in range(count):
            logits = self(new, caches=caches)[:, -1]
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], 1)
        return tokens


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def zebra(
    vocab: int = 32000,
    dim: int = 4096,
    depth: int = 32,
    num_heads: int = 32,
    *,
    num_kv_heads: int | None = None,
    window: int = 512,
    period: int = 4,
    place: int = 0,
    hidden: int | None = None,
    theta: float = 10000.0,
    scaling: float = 1.0,
    causal: bool = True,
    tied: bool = False,
) -> Transformer:
    """Zebra: of every ``period`` layers one is global, at ``place``, the others have a sliding window.

    Song et al., 2023, arXiv 2312.08618; the block is that of Llama 2.

    >>> [type(block.attention).__name__[:7] for block in zebra(10, 32, 5, 2).blocks]
    ['Attenti', 'Sliding', 'Sliding', 'Sliding', 'Attenti']
    """
    rope = Rope(theta, scaling=scaling)

    def layer(number: int) -> Callable[[int], nn.Module]:
        if is_global(number, period, place):
            return lambda dim: Attention(dim, num_heads, num_kv_heads=num_kv_heads, causal=causal, rope=rope)
        return lambda dim: SlidingWindowAttention(
            dim, num_heads, num_kv_heads=num_kv_heads, window=window, causal=causal, rope=rope
        )

    return Transformer(vocab, dim, [layer(n) for n in range(depth)], hidden=hidden, tied=tied)


@register
def zebra_llama2_7b(**options: int) -> Transformer:
    """Zebra on the sizes of Llama-2-7B."""
    return zebra(**({"hidden": 11008} | options))  # type: ignore[arg-type]


@register
def zebra_tiny(**options: int) -> Transformer:
    """A Zebra for tests and small machines: 8 layers of 64 channels, window 16."""
    sizes = {"vocab": 256, "dim": 64, "depth": 8, "num_heads": 4, "window": 16}
    return zebra(**(sizes | options))  # type: ignore[arg-type]
