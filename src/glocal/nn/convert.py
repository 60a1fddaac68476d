"""Layers made from others, with their settings and weights, and layers put in the place of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from glocal.nn.frame import Attention

__all__ = ["made_from", "plain", "replace_layers", "settings_of"]

A = TypeVar("A", bound=Attention)

_KEPT = (
    *("num_kv_heads", "head_dim", "kv_dim"),
    *("causal", "qk_norm", "rope", "scale", "softcap", "dropout", "backend"),
)


def settings_of(layer: Attention) -> dict[str, Any]:
    """The options of `Attention` that a layer has.

    >>> from glocal.nn import Attention
    >>> layer = Attention(32, 4, num_kv_heads=2, causal=True)
    >>> Attention(32, 4, **settings_of(layer)).load_state_dict(layer.state_dict())
    <All keys matched successfully>
    """
    weights = layer.state_dict()
    kept = {name: getattr(layer, name) for name in _KEPT}
    kept |= {"qkv_bias": "q_proj.bias" in weights, "out_bias": "o_proj.bias" in weights}
    return kept | {"gate": layer.g_proj is not None, "lepe": None if layer.lepe is None else layer.lepe.kernel_size[0]}


def made_from(kind: type[A], layer: Attention, **options: Any) -> A:
    """A layer with the settings and the weights of another; what only the new one has is as it starts.

    Args:
        kind: of the new layer.
        layer: which stays as it is.
        options: of the new layer; those of ``layer`` where not given.

    Returns:
        In the same mode, on the same device and in the same dtype.
    """
    made = kind(layer.dim, layer.num_heads, **(settings_of(layer) | options))
    first = next(layer.parameters())
    made.to(first.device, first.dtype)
    own = made.state_dict()
    made.load_state_dict(own | {name: t for name, t in layer.state_dict().items() if name in own})
    return made.train(layer.training)


def plain(layer: Attention) -> Attention:
    """The layer, if it is plain attention.

    Raises:
        ValueError: a mechanism instead of plain attention, which would be lost.
    """
    if type(layer) is not Attention:
        raise ValueError(f"layer must be plain Attention; it was {type(layer).__name__}")
    return layer


def replace_layers(
    model: nn.Module,
    make: Callable[[str, Any], nn.Module | None],
    kind: type[nn.Module] | tuple[type[nn.Module], ...] = Attention,
) -> list[str]:
    """Exchange layers of a model, in place.

    Args:
        model: holds the layers.
        make: given a layer's name and the layer, what comes in its place; None keeps it, as cross-attention is kept.
        kind: of the layers.

    Returns:
        The names of those that were exchanged.

    Raises:
        ValueError: the model has no layer of that kind, or is one itself.

    >>> from glocal.nn import MLP, Attention, Block, DeltaConv
    >>> block = Block(8, Attention(8, 2), MLP(8, 8))
    >>> replace_layers(block, lambda name, layer: DeltaConv(layer.dim, 3)), type(block.attention).__name__
    (['attention'], 'DeltaConv')
    """
    there = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
    if not there or there[0][1] is model:
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"model must contain layers of kind {wanted}; it was a {type(model).__name__} without")
    made = {name: new for name, layer in there if (new := make(name, layer)) is not None}
    for name, new in made.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return list(made)
