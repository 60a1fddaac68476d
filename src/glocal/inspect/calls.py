"""What the heads of a model compute with, layer by layer: queries, keys, values and weights of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn import Attention, Call
from glocal.patterns import Keys
from glocal.shapes import Bool, Float

__all__ = ["HeadCall", "layer_call", "record_heads"]


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One layer's attention, grids flattened. Made by `record_heads` or `layer_call`; for inputs that are short."""

    name: str
    """The layer's path in the model."""
    q: Float[Tensor, "B H N D"]
    """Queries, after norms and rotation."""
    k: Float[Tensor, "B Hkv M D"]
    v: Float[Tensor, "B Hkv M E"]
    weights: Float[Tensor, "B H N M"]
    """After the softmax."""
    live: Bool[Tensor, "B H N M"]
    """Which keys a query sees."""
    real: Bool[Tensor, "B N"]
    """Which queries are no padding."""
    scale: float


@torch.no_grad()
def layer_call(
    layer: Attention,
    x: Float[Tensor, "B *grid_q dim"],
    context: Float[Tensor, "B *grid_k kv_dim"] | None = None,
    *,
    keys: Bool[Tensor, "B *grid_k"] | None = None,
    name: str = "",
) -> HeadCall:
    """What a layer of `glocal.nn` computes with that is softmax under a pattern.

    Args:
        layer: whose ``mix`` is that of `Attention`.
        x: ``(B, *grid_q, dim)``.
        context: what it attends to, ``(B, *grid_k, kv_dim)``; ``x`` where None.
        keys: which keys are no padding, ``(B, *grid_k)``.
        name: of the result.

    Raises:
        ValueError: a layer with another ``mix``.

    >>> layer_call(Attention(8, 2, causal=True), torch.randn(1, 5, 8)).weights.shape
    torch.Size([1, 2, 5, 5])
    """
    if type(layer).mix is not Attention.mix:
        raise ValueError(f"layer must be softmax under a pattern; {type(layer).__name__} mixes in another way")
    kv = x if context is None else context
    grids = tuple(x.shape[1:-1]), tuple(kv.shape[1:-1])
    ahead = grids[1][0] - grids[0][0] if len(grids[0]) == 1 else 0
    at_k = layer.positions(grids[1], 0, x.device)
    at_q = layer.positions(grids[0], ahead, x.device)
    q, k, v = layer.project(x, kv, at_q, at_k)
    real = None if keys is None else keys.flatten(1)
    call = Call(x, kv, real, None, context is not None, (at_q, at_k))
    where, count = layer.where(q, k, call), torch.Size(grids[1]).numel()
    # Attention to unit vectors instead of values gives the probabilities themselves.
    units = torch.eye(count, dtype=q.dtype, device=q.device).view(*grids[1], count).expand(*k.shape[:-1], count)
    weights = layer.attend(q, k, units, where, call, dropout_p=0.0).flatten(2, -2)
    live = (where if real is None else where & Keys(real)).mask(*grids).to(q.device).expand(weights.shape)
    mine = live.new_ones(len(x), weights.shape[2]) if real is None or context is not None else real
    q, k, v = (t.flatten(2, -2) for t in (q, k, v))
    return HeadCall(name, q, k, v, weights, live, mine, layer.scale)


@torch.no_grad()
def record_heads(model: nn.Module, *inputs: Any, **options: Any) -> list[HeadCall]:
    """What each layer computes with, in the order in which they run, in one call of the model.

    Args:
        model: of transformers, or with layers of `glocal.nn` that are softmax under a pattern; layers of other kinds
            are left out. It is called as ``model(*inputs, **options)``, and left as it was.

    Raises:
        TypeError: a model of transformers whose attention is fixed.
        ValueError: no such layer ran.

    >>> from glocal.nn import MLP, Block
    >>> [call.name for call in record_heads(Block(8, Attention(8, 2), MLP(8, 8)), torch.randn(1, 5, 8))]
    ['attention']
    """
    found: list[HeadCall] = []

    def hook(name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def look(layer: Attention, given: tuple[Any, ...], more: dict[str, Any]) -> None:
            x, context, *_ = *given, *(more[key] for key in ("x", "context") if key in more), None
            if more.get("cache") is None:
                found.append(layer_call(layer, x, context, keys=more.get("keys"), name=name))

        return look

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Attention) and type(m).mix is Attention.mix]
    hooks = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers]
    remove = None if layers else _install(model, found)
    try:
        model(*inputs, **options)
    finally:
        for handle in hooks:
            handle.remove()
        if remove is not None:
            remove()
    if not found:
        raise ValueError("model must call layers of softmax attention; it called none")
    return found


def _install(model: nn.Module, found: list[HeadCall]) -> Callable[[], None]:
    """Put an attention function that keeps what it is given into a model of transformers; what takes it out."""
    # Here, because transformers is an extra.
    from glocal.hf.attention import refuse
    from glocal.hf.install import Installed, attention_modules
    from glocal.hf.masks import own
    from glocal.hf.rows import Rows, probabilities, product

    names = {id(module): path for path, module in attention_modules(model).items()}

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        refuse(options)
        mine = own(module, query, key.shape[2], mask, options.get("is_causal"))
        count, ends = query.shape[2], slice(mine.end)
        rows = Rows.of(mine, query, key, torch.arange(count, device=query.device), options)
        scores = rows.scores()
        weights, live = probabilities(scores), ~scores.isneginf()
        real = live.any(-1).any(1) if mask is None or mask.dim() != 2 else mask[:, -count:].bool()
        value = value[:, :, ends]
        name = names.get(id(module), "")
        found.append(HeadCall(name, query, key[:, :, ends], value, weights, live, real, rows.scale))
        return product(weights.to(value.dtype), value).transpose(1, 2).contiguous(), None

    return Installed(model, forward).remove
