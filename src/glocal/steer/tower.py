"""What a vision tower looks at: its class token's attention, or the mean of all tokens', read while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from glocal.hf.install import attention_modules
from glocal.steer.method import layer_range

__all__ = ["TowerAttention", "class_tokens", "tower_layers", "vision_tower"]

_TOWERS = ("vision_tower", "vision_model", "visual")
_MAPS = (("q_proj", "k_proj"), ("query", "key"))  # the latter in ViT and its like before transformers 5.24
_MORE = ("rotary", "rope", "_norm", "relative", "bias")  # what scores of more than queries and keys are made of
_CHUNK = 256  # rows of queries at a time


def vision_tower(model: nn.Module) -> nn.Module:
    """The image encoder of a vision-language model or of CLIP; an image encoder is its own.

    Raises:
        TypeError: there is none.
    """
    module: nn.Module
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in _TOWERS:
            return module
    if getattr(model, "main_input_name", None) == "pixel_values":
        return model
    raise TypeError(f"{type(model).__name__} has no vision tower ({', '.join(_TOWERS)}) and is no image encoder")


def class_tokens(model: nn.Module) -> int:
    """How many tokens stand before the patches: class token and registers; 0 where the tower has no class token."""
    tower = vision_tower(model)
    own = any(path.rsplit(".", 1)[-1] in ("class_embedding", "cls_token") for path, _ in tower.named_parameters())
    return 1 + int(getattr(getattr(tower, "config", None), "num_register_tokens", None) or 0) if own else 0


def tower_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules of the vision tower, in the order of its layers.

    Raises:
        TypeError: no tower, or one whose scores are not the plain products of ``q_proj`` and ``k_proj``: CLIP, SigLIP,
            ViT and DINOv2 are.
    """
    tower = vision_tower(model)
    found = list(attention_modules(tower).values())
    name = type(tower).__name__
    if not found:
        raise TypeError(f"{name} has no attention that uses transformers' registry")
    for module in found:
        if not _maps(module) or _width(module) is None:
            raise TypeError(f"{name}'s attention cannot be read: {type(module).__name__} has no q_proj and k_proj")
        names = inspect.unwrap(type(module).forward).__code__.co_names
        more = [each for each in names if any(part in each for part in _MORE)]
        if more:
            raise TypeError(f"{name}'s attention cannot be read: its scores are not q @ k alone ({', '.join(more)})")
    return found


class TowerAttention:
    """Reads attention of chosen layers whenever the vision tower runs in its ``with`` block; outputs stay as they are.

    The rows are computed anew from the layer's queries and keys, in float32 at least, so that any attention
    implementation will do and no map of all tokens is kept.

    Args:
        model: a vision-language model, CLIP, or an image encoder alone.
        layers: numbers in the tower, negative ones from the end.
        rows: ``class`` for the class token's row, ``mean`` for the mean over the patches' rows: how much each patch is
            looked at.

    Attributes:
        maps: of the tower's newest run, for each layer ``(pictures, H, P)``: attention to the patches. What is missing
            from a sum of 1 goes to the class token and registers.

    Raises:
        TypeError: as `tower_layers`; ``rows="class"`` of a tower without a class token.
        ValueError: layers that are not there, another word for ``rows``; in use, pictures with padding between patches.

    >>> from transformers import CLIPVisionConfig, CLIPVisionModel
    >>> tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    ...     num_attention_heads=2, image_size=8, patch_size=4))
    >>> with TowerAttention(tower, layers=[0, -1]) as seen:
    ...     _ = tower(pixel_values=torch.zeros(1, 3, 8, 8))
    >>> sorted(seen.maps), seen.maps[0].shape
    ([0, 1], torch.Size([1, 2, 4]))
    """

    def __init__(
        self, model: nn.Module, *, layers: Iterable[int] = (-1,), rows: Literal["class", "mean"] = "class"
    ) -> None:
        if rows not in ("class", "mean"):
            raise ValueError(f"rows must be 'class' or 'mean'; it was {rows!r}")
        modules = tower_layers(model)
        self.leading = class_tokens(model)
        if rows == "class" and not self.leading:
            name = type(vision_tower(model)).__name__
            raise TypeError(f"{name} has no class token whose attention could be read; rows='mean' reads all patches'")
        self.mean = rows == "mean"
        self.maps: dict[int, Tensor] = {}
        self._modules = {n: modules[n] for n in sorted(layer_range(layers, len(modules)))}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for number, module in self._modules.items():
            kept: dict[str, Tensor] = {}
            for name, part in zip(("query", "key"), _maps(module), strict=True):
                self._hooks.append(module.get_submodule(part).register_forward_hook(_keeper(kept, name)))
            self._hooks.append(module.register_forward_hook(self._reader(number, kept), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _reader(self, number: int, kept: dict[str, Tensor]) -> Any:
        def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            if mask is not None:
                raise ValueError("the tower masks patches: its attention is read of pictures without padding only")
            width = _width(module)
            query, key = (_heads(kept.pop(name), width) for name in ("query", "key"))
            # The class token's row, or those of all patches.
            wanted = query[:, :, self.leading :] if self.mean else query[:, :, :1]
            scale = getattr(module, "scale", getattr(module, "scaling", None))
            scale = width**-0.5 if scale is None else scale
            total = key.new_zeros(key.shape[:3])
            for some in wanted.split(_CHUNK, 2):
                total += (some @ key.mT * scale).softmax(-1).sum(2)
            self.maps[number] = total[..., self.leading :] / wanted.shape[2]

        return read


def _maps(module: nn.Module) -> tuple[str, ...]:
    """The names of what makes queries and keys; empty where there is no such pair."""
    return next((names for names in _MAPS if all(hasattr(module, name) for name in names)), ())


def _width(module: Any) -> Any:
    return getattr(module, "head_dim", getattr(module, "attention_head_size", None))


def _keeper(kept: dict[str, Tensor], name: str) -> Any:
    def keep(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        kept[name] = output.detach()

    return keep


def _heads(states: Tensor, width: int) -> Tensor:
    """``(B, N, H * D)`` to ``(B, H, N, D)`` in float32 or wider."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    found: Tensor = wide.unflatten(-1, (-1, width)).transpose(1, 2)
    return found
