"""Context broadcasting: every token is given the mean of all tokens, uniform attention without scores.

Hyeon-Woo et al., 2022, arXiv 2210.08457.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glocal.condense import pool_blocks
from glocal.nn.frame import Attention
from glocal.shapes import Bool, Float

__all__ = ["ContextBroadcast", "UniformHeadAttention", "insert_broadcast"]

_POINTS = ("mlp", "attention", "before_mlp", "hidden")


class ContextBroadcast(nn.Module):
    """Half of a token, and half of the mean of all tokens: ``(x + mean(x)) / 2``. The mean is over the whole grid.

    In a network it stands last in the feed-forward, before the residual is added, where `insert_broadcast` puts it.
    The half changes what trained weights compute: tune them after.

    Args:
        form: ``"plain"`` has no weights; ``"scaled"`` is ``x + scale * mean(x)``, a learned scale a channel, 0 at
            first (which leaves a trained network as it is).
        dim: channels, for ``"scaled"`` and only there.
        causal: on a sequence, the mean of a token and of those before it. Ours.

    Raises:
        ValueError: another form, or ``dim`` missing or given where it is not needed.

    >>> x = torch.tensor([[[0.0], [2.0], [7.0]]])
    >>> ContextBroadcast()(x).flatten().tolist(), ContextBroadcast(causal=True)(x).flatten().tolist()
    ([1.5, 2.5, 5.0], [0.0, 1.5, 5.0])
    """

    def __init__(self, form: str = "plain", *, dim: int | None = None, causal: bool = False) -> None:
        super().__init__()
        if form not in ("plain", "scaled"):
            raise ValueError(f"form must be 'plain' or 'scaled'; it was {form!r}")
        if (form == "scaled") != (dim is not None):
            raise ValueError(f"dim must be given for form 'scaled', and only there; it was {dim} for {form!r}")
        self.form, self.causal = form, causal
        self.scale = None if dim is None else nn.Parameter(torch.zeros(dim))
        # What `insert_broadcast` knows of padding while a block runs.
        self.keys: Tensor | None = None

    def forward(
        self, x: Float[Tensor, "B *grid dim"], keys: Bool[Tensor, "B *grid"] | None = None
    ) -> Float[Tensor, "B *grid dim"]:
        """Give every token the mean.

        Args:
            x: ``(B, *grid, dim)``.
            keys: booleans ``(B, *grid)``, true for what is no padding; padding is not in the mean. Where nothing is
                real, the mean is 0.

        Raises:
            ValueError: ``x`` without a grid, a causal mean of more than a sequence, or ``keys`` that do not fit.
        """
        if x.dim() < 3 or (self.causal and x.dim() != 3):
            raise ValueError(
                f"x must be {'(B, N, dim)' if self.causal else '(B, *grid, dim)'}; it was {tuple(x.shape)}"
            )
        keys = self.keys if keys is None else keys
        if keys is not None and (keys.dtype != torch.bool or keys.shape != x.shape[:-1]):
            raise ValueError(f"keys must be booleans {tuple(x.shape[:-1])}; it was {keys.dtype} {tuple(keys.shape)}")
        flat = x.flatten(1, -2)
        real = None if keys is None else keys.flatten(1)
        mean = _running_mean(flat, real) if self.causal else pool_blocks(flat, max(1, flat.shape[1]), real=real)
        out = (flat + mean) / 2 if self.scale is None else flat + self.scale * mean
        return out.view(x.shape)

    def extra_repr(self) -> str:
        return f"{self.form!r}, causal={self.causal}"


class UniformHeadAttention(Attention):
    """Attention some of whose heads weigh everything that a query sees alike; the paper's other way to a mean.

    The projections of those heads' queries and keys are kept, and change nothing, so that weights can be exchanged
    with `Attention`.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        uniform_heads: how many of the first heads are uniform.

    Raises:
        ValueError: a number of heads that there is not, or what `Attention` refuses.

    >>> from glocal.inspect import layer_call
    >>> layer_call(UniformHeadAttention(8, 2), torch.randn(1, 4, 8)).weights[0, 0, 0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, dim: int, num_heads: int, *, uniform_heads: int = 1, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if not 0 <= uniform_heads <= num_heads:
            raise ValueError(f"uniform_heads must be from 0 to num_heads {num_heads}; it was {uniform_heads}")
        self.uniform_heads = uniform_heads

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context, at_q, at_k)
        # After the norms, whose bias would make something of zeros.
        uniform, other = q.tensor_split([self.uniform_heads], 1)
        return torch.cat([torch.zeros_like(uniform), other], 1), k, v


def insert_broadcast(
    model: nn.Module, form: str = "plain", *, point: str = "mlp", causal: bool | None = None
) -> list[ContextBroadcast]:
    """Put a `ContextBroadcast` into every transformer block of a model, in place.

    Blocks are modules with ``attention`` (or ``attn``), ``norm2`` and ``mlp``: `glocal.nn.Block`, and those of timm's
    vision transformers. Names of weights stay; ``"scaled"`` adds its own. Padding that a block is told of as
    ``keys`` stays out of the mean.

    Args:
        model: the module that has the blocks, or is one.
        form: as in `ContextBroadcast`.
        point: ``"mlp"``, the last of the feed-forward; for study also ``"attention"``, the last of the attention
            branch, ``"before_mlp"``, and ``"hidden"``, after the first layer, ``fc1``, of the feed-forward.
        causal: as in `ContextBroadcast`; what a block's attention says of itself where None. Such a model decodes
            without a cache only.

    Returns:
        The broadcasts, block by block.

    Raises:
        ValueError: another form or point, no blocks, a feed-forward without ``fc1`` for ``"hidden"``, or a model that
            has broadcasts already.

    >>> from glocal.nn import MLP, Block
    >>> block = Block(8, Attention(8, 2), MLP(8, 16))
    >>> insert_broadcast(block)
    [ContextBroadcast('plain', causal=False)]
    >>> block.mlp(torch.randn(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """
    if point not in _POINTS:
        raise ValueError(f"point must be one of {', '.join(_POINTS)}; it was {point!r}")
    blocks = [m for m in model.modules() if _attention(m) and all(_part(m, name) for name in ("norm2", "mlp"))]
    if not blocks:
        raise ValueError("model must have blocks with attention (or attn), norm2 and mlp; it has none")
    if any(isinstance(m, ContextBroadcast) for m in model.modules()):
        raise ValueError("model has broadcasts already")
    if point == "hidden" and not all(_part(block.get_submodule("mlp"), "fc1") for block in blocks):
        raise ValueError("point 'hidden' needs feed-forwards whose first layer is fc1; this model has others")
    made = []
    for block in blocks:
        attention, mlp = _attention(block), block.get_submodule("mlp")
        assert attention is not None
        host = {"attention": attention, "hidden": _part(mlp, "fc1")}.get(point) or mlp
        like = next(block.get_submodule("norm2").parameters())
        dim = len(host.get_parameter("weight") if point == "hidden" else like)
        ahead = bool(getattr(attention, "causal", False)) if causal is None else causal
        broadcast = ContextBroadcast(form, dim=dim if form == "scaled" else None, causal=ahead)
        host.broadcast = broadcast.to(like.device, like.dtype)
        if point == "before_mlp":
            host.register_forward_pre_hook(_first)
        else:
            host.register_forward_hook(_last)
        block.register_forward_pre_hook(_tell, with_kwargs=True)
        block.register_forward_hook(_forget, always_call=True)
        made.append(broadcast)
    return made


# Hooks know nothing of their own: they are right in copies of a model.


def _first(host: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return host.get_submodule("broadcast")(given[0]), *given[1:]


def _last(host: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
    found: Tensor = host.get_submodule("broadcast")(out)
    return found


def _tell(block: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options.get("cache") is not None:
        raise ValueError("cache must be None: a ContextBroadcast does not keep the mean of earlier tokens")
    if options.get("keys") is not None:
        _own(block).keys = options["keys"]


def _forget(block: nn.Module, given: tuple[Any, ...], out: Any) -> None:
    broadcast = _own(block)
    if broadcast.keys is not None:
        broadcast.keys = None


def _own(block: nn.Module) -> ContextBroadcast:
    return next(m for m in block.modules() if isinstance(m, ContextBroadcast))


def _part(module: nn.Module, name: str) -> nn.Module | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _attention(module: nn.Module) -> nn.Module | None:
    return _part(module, "attention") or _part(module, "attn")


def _running_mean(x: Tensor, real: Tensor | None) -> Tensor:
    """Mean of each token and of those before it, ``(B, N, dim)``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if real is None:
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    else:
        wide, count = wide.masked_fill(~real[..., None], 0), real.cumsum(1).clamp(min=1)[..., None]
    return (wide.cumsum(1) / count).to(x.dtype)
