"""ConvBERT: BERT's encoder with half of the attention heads replaced by convolutions, and its sizes."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from glocal.models.registry import register
from glocal.nn import GroupedLinear, SpanConvAttention

__all__ = [
    "ConvBERT",
    "convbert_base",
    "convbert_medium_small",
    "convbert_small",
    "convbert_tiny",
    "from_transformers",
]


class Embeddings(nn.Module):
    """BERT's sum of the embeddings of words, positions and token types, normalised."""

    def __init__(self, vocab: int, dim: int, *, max_length: int, token_types: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(vocab, dim), nn.Embedding(max_length, dim)
        self.token_type = nn.Embedding(token_types, dim)
        self.norm, self.drop = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)

    def forward(self, tokens: Tensor, types: Tensor | None = None) -> Tensor:
        """Tokens ``(B, N)`` and their types, 0 where None, to ``(B, N, dim)``."""
        if tokens.dim() != 2 or tokens.shape[1] > self.position.num_embeddings:
            raise ValueError(
                f"tokens must be (B, N) with N at most max_length {self.position.num_embeddings}; it was "
                f"{tuple(tokens.shape)}"
            )
        if types is not None and types.shape != tokens.shape:
            raise ValueError(f"types must be {tuple(tokens.shape)}, as tokens; it was {tuple(types.shape)}")
        at = torch.arange(tokens.shape[1], device=tokens.device)
        kind = self.token_type(torch.zeros_like(at) if types is None else types)
        return cast(Tensor, self.drop(self.norm(self.word(tokens) + self.position(at) + kind)))


class EncoderBlock(nn.Module):
    """BERT's block, norms after the residuals, around any attention; the feed-forward may be in groups."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int, *, groups: int, dropout: float, eps: float) -> None:
        super().__init__()
        linear = nn.Linear if groups == 1 else partial(GroupedLinear, groups=groups)
        self.attention, self.fc1, self.fc2 = attention, linear(dim, hidden), linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """``(B, N, dim)`` to the same; options go to the attention."""
        x = self.norm1(x + self.drop(self.attention(x, **options)))
        return cast(Tensor, self.norm2(x + self.drop(self.fc2(gelu(self.fc1(x))))))


class ConvBERT(nn.Module):
    """ConvBERT's encoder, `SpanConvAttention` in BERT's blocks. Jiang et al., 2020, arXiv 2008.02496.

    Args:
        vocab: tokens.
        dim, depth, num_heads, hidden: channels, layers, heads of both kinds, channels of the feed-forward, ``4 dim``
            where None.
        embed_dim: channels of the embeddings, which are projected where they are not ``dim``.
        groups: of the feed-forward's linear layers.
        kernel_size, mask_conv: as in `SpanConvAttention`.
        max_length, token_types: rows of the embeddings of positions and token types.
        dropout: in training, of the embeddings, of the attending half's probabilities and of both branches of a layer.
        eps: of the norms.
        backend: as in `glocal.attend`.

    Raises:
        ValueError: what `SpanConvAttention` or `GroupedLinear` refuse.

    >>> import torch
    >>> from glocal.models.language.convbert import ConvBERT
    >>> model = ConvBERT(100, 32, depth=2, num_heads=4, embed_dim=16, groups=2)
    >>> model(torch.randint(100, (1, 20))).shape
    torch.Size([1, 20, 32])
    """

    def __init__(
        self,
        vocab: int = 30522,
        dim: int = 768,
        *,
        depth: int = 12,
        num_heads: int = 12,
        embed_dim: int | None = None,
        hidden: int | None = None,
        groups: int = 1,
        kernel_size: int = 9,
        mask_conv: bool = True,
        max_length: int = 512,
        token_types: int = 2,
        dropout: float = 0.1,
        eps: float = 1e-12,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.vocab, self.dim = vocab, dim
        embed_dim, hidden = dim if embed_dim is None else embed_dim, 4 * dim if hidden is None else hidden
        self.embeddings = Embeddings(
            vocab, embed_dim, max_length=max_length, token_types=token_types, dropout=dropout, eps=eps
        )
        self.project = nn.Identity() if embed_dim == dim else nn.Linear(embed_dim, dim)
        settings: dict[str, Any] = {"kernel_size": kernel_size, "mask_conv": mask_conv}
        settings |= {"dropout": dropout, "backend": backend}
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim,
                SpanConvAttention(dim, num_heads, **settings),
                hidden,
                groups=groups,
                dropout=dropout,
                eps=eps,
            )
            for _ in range(depth)
        )
        self.apply(init_bert)

    def forward(self, tokens: Tensor, *, keys: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Tokens ``(B, N)`` to states ``(B, N, dim)``.

        Args:
            tokens: ``(B, N)``, N at most ``max_length``.
            keys: ``(B, N)``, true for real tokens.
            types: token types ``(B, N)``; 0 where None.
        """
        x = self.project(self.embeddings(tokens, types))
        for block in self.blocks:
            x = block(x, keys=keys)
        return cast(Tensor, x)


def init_bert(module: nn.Module) -> None:
    """BERT's start of linear layers and embeddings, for `torch.nn.Module.apply`; other weights are left alone."""
    if isinstance(module, (nn.Linear, nn.Embedding, GroupedLinear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Linear, GroupedLinear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


_NAMES = (
    (r"^embeddings\.word_embeddings", "embeddings.word"),
    (r"^embeddings\.position_embeddings", "embeddings.position"),
    (r"^embeddings\.token_type_embeddings", "embeddings.token_type"),
    (r"^embeddings\.LayerNorm", "embeddings.norm"),
    (r"^embeddings_project", "project"),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.self\.query", "attention.q_proj"),
    (r"attention\.self\.key_conv_attn_layer\.bias", "attention.pointwise.bias"),
    (r"attention\.self\.key_conv_attn_layer", "attention"),
    (r"attention\.self\.key", "attention.k_proj"),
    (r"attention\.self\.value", "attention.v_proj"),
    (r"attention\.self\.conv_kernel_layer", "attention.kernel_proj"),
    (r"attention\.self\.conv_out_layer", "attention.conv_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "fc1"),
    (r"output\.dense", "fc2"),
    (r"output\.LayerNorm", "norm2"),
)


def from_transformers(model: nn.Module, *, mask_conv: bool = False) -> ConvBERT:
    """The encoder of a ConvBERT of transformers, with its weights.

    Args:
        model: a ``ConvBertModel``, or a model that has one as ``convbert``. It stays as it is.
        mask_conv: False computes what transformers does, also near padding; True is what `SpanConvAttention` has.

    Returns:
        On the same device, in the same dtype and mode.

    Raises:
        ValueError: a model of another kind, with another ratio of heads, or with another activation.

    >>> import transformers
    >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    >>> peer = transformers.ConvBertModel(transformers.ConvBertConfig(vocab_size=100, **sizes)).eval()
    >>> tokens = torch.randint(100, (1, 12))
    >>> torch.allclose(from_transformers(peer)(tokens), peer(tokens).last_hidden_state, atol=1e-5)
    True
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "convbert":
        raise ValueError(f"model must be a ConvBERT of transformers; it was {type(model).__name__}")
    if config.head_ratio != 2 or config.hidden_act != "gelu":
        raise ValueError(
            f"model must have head_ratio 2 and hidden_act 'gelu'; it had {config.head_ratio} and {config.hidden_act!r}"
        )
    own = ConvBERT(
        config.vocab_size,
        config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        embed_dim=config.embedding_size,
        hidden=config.intermediate_size,
        groups=config.num_groups,
        kernel_size=config.conv_kernel_size,
        mask_conv=mask_conv,
        max_length=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        dropout=config.hidden_dropout_prob,
        eps=config.layer_norm_eps,
    )
    for block in own.blocks:
        cast(SpanConvAttention, block.attention).dropout = config.attention_probs_dropout_prob
    state = {}
    for name, value in getattr(model, "convbert", model).state_dict().items():
        if "pointwise" in name or name.endswith("key_conv_attn_layer.bias"):  # a convolution of one tap
            value = value.squeeze(-1)
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        state[name] = value
    first = next(iter(state.values()))
    own.to(first.device, first.dtype).load_state_dict(state)
    return own.train(model.training)


@register
def convbert_base(**options: Any) -> ConvBERT:
    """ConvBERT base: 105,680,520 parameters, 106M in the paper."""
    return ConvBERT(**options)


@register
def convbert_medium_small(**options: Any) -> ConvBERT:
    """ConvBERT medium-small, a grouped feed-forward: 17,475,888 parameters, 17M in the paper."""
    sizes: dict[str, Any] = {"dim": 384, "num_heads": 8, "embed_dim": 128, "groups": 2}
    return ConvBERT(**(sizes | options))


@register
def convbert_small(**options: Any) -> ConvBERT:
    """ConvBERT small: 13,143,768 parameters; the paper says 14M, which is nearest with the generator of 0.6M."""
    return ConvBERT(**({"dim": 256, "num_heads": 4, "embed_dim": 128} | options))


@register
def convbert_tiny(**options: Any) -> ConvBERT:
    """A ConvBERT for tests and small machines: 2 layers of 64 channels, kernels of 5."""
    sizes: dict[str, Any] = {"vocab": 256, "dim": 64, "depth": 2, "num_heads": 4, "embed_dim": 32}
    return ConvBERT(**(sizes | {"kernel_size": 5, "max_length": 128, "dropout": 0.0} | options))
