"""A model's place for attention: found, taken, and left as it was."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from glocal.hf.masks import build_mask

__all__ = ["NAME", "Forward", "Installed", "attention_modules", "crosses", "layer_number"]

Forward = Callable[..., tuple[Tensor, Any]]

NAME = "glocal-"
"""How the names of attention implementations begin that are ours."""
_number = itertools.count(1)
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_CROSS = re.compile(r"(^|[._])(encoder_?attn|encdec_?attention|cross_?att\w*)([._]|$)", re.IGNORECASE)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute attention through transformers' registry, by their path in the model, in order."""
    return {path: module for path, module in model.named_modules() if _uses_registry(type(module))}


def crosses(path: str) -> bool:
    """Whether the attention module at this path reads another sequence than its own.

    >>> crosses("decoder.layers.0.encoder_attn"), crosses("decoder.layers.0.self_attn")
    (True, False)
    """
    return bool(_CROSS.search(path))


def layer_number(path: str) -> int:
    """The number of a module's layer: the first number in its path; 0 where there is none.

    >>> layer_number("decoder.block.3.layer.1.EncDecAttention")
    3
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


def _uses_registry(kind: type[nn.Module]) -> bool:
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            code = getattr(inspect.unwrap(forward), "__code__", None)
            if code is not None and _REGISTRY in code.co_names:
                return True
    return False


class Installed:
    """An attention function in the place of a model's own, until `remove`; several may lie on each other.

    Raises:
        TypeError: the model is no transformers model, or does not use the attention registry.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers PreTrainedModel; it was {type(model).__name__}")
        able = getattr(model, "_can_set_attn_implementation", None)
        if not hasattr(model, "set_attn_implementation") or (able is not None and not able()):
            raise TypeError(
                f"{type(model).__name__} does not use transformers' attention registry; its attention is fixed"
            )
        self.model, self.name = model, f"{NAME}{next(_number)}"  # a name of its own, so that models do not meet
        self._before = [(config, dict(vars(config))) for config in _configs(model)]
        self._registries = (AttentionInterface, AttentionMaskInterface)
        # Without a mask builder of its own, transformers gives an attention function no mask at all.
        AttentionInterface.register(self.name, forward)
        AttentionMaskInterface.register(self.name, build_mask)
        try:
            model.set_attn_implementation(self.name)
            if model.config._attn_implementation != self.name:
                raise TypeError(f"{type(model).__name__} kept its attention {model.config._attn_implementation!r}")
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore configuration and registries."""
        for config, attributes in self._before:
            for key in ("_attn_implementation_internal", "_attn_implementation"):
                if key in attributes:
                    vars(config)[key] = attributes[key]
        for registry in self._registries:
            registry._global_mapping.pop(self.name, None)


def _configs(model: nn.Module) -> list[Any]:
    """All configurations in a model, each once."""
    found: dict[int, Any] = {}
    queue: list[Any] = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "sub_configs")]
    while queue:
        config = queue.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            queue += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())
