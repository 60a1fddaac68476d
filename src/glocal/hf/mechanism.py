"""A mechanism of `glocal.nn` in a pretrained layer: it mixes the layer's own queries, keys and values."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from glocal import nn as layers
from glocal.hf.grid import GridAttention
from glocal.nn import Attention

__all__ = ["MECHANISMS", "Mechanism", "frame_for", "own_window"]

MECHANISMS: Mapping[str, tuple[type[Attention], dict[str, Any]]] = MappingProxyType(
    {
        "moba": (layers.MixtureOfBlocksAttention, {}),
        "h2o": (layers.HeavyHitterAttention, {}),
        "cca": (layers.CoreContextAttention, {}),  # without a rope of its own it pools rotated keys as they are
        "sf_attn": (layers.ShiftedSparseAttention, {}),
        "mswa": (layers.MultiScaleWindowAttention, {}),
        "block_sparse": (layers.BlockSparseAttention, {}),
        "grid": (GridAttention, {}),
        "aha": (layers.AllOrHereAttention, {}),
        "nats": (layers.NeuralAttentionSearch, {"detach_scorer": True}),
        "moh": (layers.MixtureOfHeadsAttention, {}),
    }
)
"""Name, layer, and the settings that a pretrained model fixes."""


@dataclass(frozen=True)
class Mechanism:
    """A mechanism by name, with the settings of its layer in `glocal.nn`.

    ``moba``, ``h2o``, ``cca``, ``sf_attn`` and ``mswa`` need no training, nor do ``block_sparse`` and ``grid``, which
    are for encoders of images; ``aha``, ``nats`` and ``moh`` have small routers that do (`glocal.hf.tune`).

    Args:
        name: one of `MECHANISMS`.
        settings: as in the layer, e.g. ``block_size`` and ``top_k``.

    Raises:
        ValueError: an unknown name.

    >>> print(Mechanism.parse("moba(block_size=64, top_k=3)"))
    moba(block_size=64, top_k=3)
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(MECHANISMS)}; it was {self.name!r}")

    @classmethod
    def parse(cls, text: str) -> Mechanism:
        """Read ``name(setting=value, ...)``; values are numbers, strings and lists, nothing is evaluated.

        Raises:
            ValueError: the text is not of that form.
        """
        name, settings = parse_call(text)
        return cls(name, settings)

    @staticmethod
    def names(text: str) -> bool:
        """Whether a text begins with a mechanism's name."""
        return text.split("(")[0].strip() in MECHANISMS

    def frame(self, module: nn.Module) -> Attention:
        """The layer for an attention module of transformers, without projections, on the module's device.

        Raises:
            ValueError: settings that the mechanism or the module's sizes refuse.
        """
        kind, fixed = MECHANISMS[self.name]
        try:
            frame = frame_for(module, kind, **{**self.settings, **fixed})
        except TypeError as error:
            raise ValueError(f"{self}: {error}") from None
        use = f"{'causal' if frame.causal else 'noncausal'}-self"
        if use not in frame.uses:
            raise ValueError(f"{self} has no {use} form, which the model needs: {frame.refuses[use]}")
        if self.name == "moh":
            # Gates near 1, as the model has been without them; not quite, so that no two heads tie.
            for router in frame.parameters():
                nn.init.normal_(router, std=0.003)
        return frame

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments of ``name(key=value, ...)``.

    >>> parse_call("h2o(heavy=8, recent=8)")
    ('h2o', {'heavy': 8, 'recent': 8})
    """
    wrong = ValueError(f"expected name(setting=value, ...), e.g. moba(block_size=64, top_k=3); it was {text!r}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise wrong
        if any(keyword.arg is None for keyword in node.keywords):
            raise wrong
        return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError):
        raise wrong from None


def frame_for(module: nn.Module, kind: type[Attention], **settings: Any) -> Attention:
    """A layer of `glocal.nn` with the sizes of an attention module of transformers, without projections."""
    config: Any = module.config
    heads = int(config.num_attention_heads)
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    parameter = next(module.parameters())
    frame = kind(
        int(config.hidden_size),
        heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        causal=bool(getattr(module, "is_causal", False)),
        project=False,
        **settings,
    )
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    return frame.to(parameter.device, dtype)


def own_window(module: nn.Module) -> int | None:
    """Keys of the sliding window that the model itself has in a layer; None where it has none."""
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):
        found: Any = module.sliding_window
    else:
        found = getattr(config, "sliding_window", None)
        types, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
        if types is not None and number is not None and types[int(number)] != "sliding_attention":
            found = None
    return int(found) if isinstance(found, int) and not isinstance(found, bool) else None
