"""An attention layer made from another one: its settings and its weights."""

from __future__ import annotations

from typing import Any, TypeVar

from glocal.nn.frame import Attention

__all__ = ["made_from", "plain", "settings_of"]

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
