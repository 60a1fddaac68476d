"""Swap the attention of a transformers model for a pattern, for as long as a ``with`` block lasts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.patterns import Causal, Full, Keys, Pattern, parse

__all__ = ["Pick", "attention", "installed", "own_pattern", "picker", "swapped"]

Pick = Callable[[nn.Module], Pattern]
Forward = Callable[..., tuple[Tensor, None]]
AnyModel = TypeVar("AnyModel", bound=nn.Module)

_number = itertools.count(1)

# Arguments of attention that change the result and that a pattern cannot express: never dropped in silence.
_REFUSED = {
    "s_aux": "learned attention sinks",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "sequences packed for flash-attention",
    "output_attentions": "returning attention weights (use the eager implementation for that)",
}


@contextmanager
def swapped(
    model: AnyModel,
    where: Pattern | str | Sequence[Pattern | str] | Callable[[nn.Module], Pattern | str],
    *,
    backend: str = "auto",
) -> Iterator[AnyModel]:
    """Run a pretrained model with another attention pattern; afterwards it is as it was.

    The swap goes through transformers' attention registry. The pattern *replaces* a window of the model's own
    (Mistral, ModernBERT); padding, causality, and any mask that says more than these (packed documents, a mask with
    four axes) stay, intersected with it. Queries whose keys are all hidden get zeros.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``.
        where: a pattern or its text for all layers; a list of them, one a layer; or a function of the attention
            module that gives one.
        backend: as in `glocal.attend`.

    Raises:
        TypeError: the model is no transformers model, or does not use the attention registry.
        ValueError: the pattern does not parse or fit, or the model asks of attention what no pattern expresses.

    Example::

        with swapped(model, "sliding(64, 64) | tokens([0])"):
            embeddings = model(**batch).last_hidden_state
    """
    pick = picker(model, where)

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return attention(module, query, key, value, mask, where=pick(module), backend=backend, **options)

    with installed(model, forward):
        yield model


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    where: Pattern,
    backend: str = "auto",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, computed by `attend`.

    Args:
        module: the layer; its ``is_causal`` counts unless ``is_causal`` is given.
        query: ``(B, H, Nq, D)``; ``key`` and ``value`` are ``(B, Hkv, Nk, D)``.
        key: see ``query``.
        value: see ``query``.
        attention_mask: None, booleans ``(B, Nk)`` that mark real keys, booleans ``(B, 1 or H, Nq, Nk)``, or floats of
            that shape that are added to the scores.
        where: which pairs exist, besides what the mask and causality leave.
        backend: as in `attend`.
        dropout: share of probabilities dropped.
        scaling: multiplies the scores.
        is_causal: overrides the module's.
        position_bias: added to the scores.
        softcap: as in `attend`.
        **options: anything else that transformers passes on.

    Returns:
        ``(B, Nq, H, Dv)``, and None for the weights, which are never built.
    """
    refuse(options)
    own, bias = own_pattern(module, query, attention_mask, is_causal)
    bias = bias if position_bias is None else position_bias if bias is None else bias + position_bias
    pattern = own if isinstance(where, Full) else where if isinstance(own, Full) else where & own
    out = attend(
        query,
        key,
        value,
        pattern,
        bias=None if bias is None else bias.to(query.dtype),
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def refuse(options: dict[str, Any]) -> None:
    """Raise a ValueError where attention is asked for what would be lost in silence."""
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"glocal.hf does not support {what} ({name})")


def own_pattern(
    module: nn.Module, query: Tensor, mask: Tensor | None, is_causal: bool | None = None
) -> tuple[Pattern, Tensor | None]:
    """What the model itself lets a query see, padding and causality, and a bias where the mask is one of pairs."""
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else bool(is_causal)
    if mask is None:
        return (Causal() if causal else Full()), None
    if mask.dim() == 2:
        keys = Keys(mask.bool())
        return (Causal() & keys if causal else keys), None
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2 or 4 axes; it was {tuple(mask.shape)}")
    # A mask of pairs has causality in it already, as transformers has it.
    if mask.dtype != torch.bool:
        return Full(), mask
    return Full(), torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)


def picker(model: nn.Module, where: Any) -> Pick:
    """The pattern of each attention module, checked as far as it can be before the model runs."""
    if isinstance(where, str | Pattern):
        one = _pattern(where)
        return lambda module: one
    if callable(where):
        return lambda module: _pattern(where(module))
    if not isinstance(where, Sequence):
        raise TypeError(f"where must be a pattern, text, a list of them or a function; it was {type(where).__name__}")
    several: list[Pattern] = [_pattern(w) for w in where]
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", len(several))
    if len(several) != layers:
        raise ValueError(f"where lists {len(several)} patterns, the model has {layers} layers")

    def of_layer(module: nn.Module) -> Pattern:
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise ValueError(f"where is a list, but {type(module).__name__} does not know its layer; give a function")
        return several[int(index)]

    return of_layer


def _pattern(where: Any) -> Pattern:
    if isinstance(where, str):
        return parse(where)
    if not isinstance(where, Pattern):
        raise TypeError(f"where must give patterns or their text; it gave {type(where).__name__}")
    return where


@contextmanager
def installed(model: nn.Module, forward: Forward) -> Iterator[None]:
    """Have a model use ``forward`` as its attention function; restore configuration and registries at the end."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel; it was {type(model).__name__}")
    able = getattr(model, "_can_set_attn_implementation", None)
    if not hasattr(model, "set_attn_implementation") or (able is not None and not able()):
        raise TypeError(f"{type(model).__name__} does not use transformers' attention registry; its attention is fixed")
    name = f"glocal-{next(_number)}"  # a name of its own, so that swaps nest and models do not meet
    before = [(config, dict(vars(config))) for config in _configs(model)]
    # Without a mask builder of its own, transformers gives an attention function no mask at all.
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, _build_mask)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise TypeError(f"{type(model).__name__} kept its attention {model.config._attn_implementation!r}")
        yield
    finally:
        for config, attributes in before:
            for key in ("_attn_implementation_internal", "_attn_implementation"):
                if key in attributes:
                    vars(config)[key] = attributes[key]
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(name, None)


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


def _build_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """What `attention` gets as its mask: None, the real keys ``(B, Nk)``, or all pairs where there is more to say."""
    if cache_position is not None:  # transformers 4
        q_length, q_offset = len(cache_position), cache_position[0]
        options["cache_position"] = cache_position
    assert q_length is not None
    if int(q_offset) + q_length != kv_offset + kv_length and options.get("mask_function") is not _bidirectional():
        raise ValueError(
            f"glocal.hf needs the queries to be the last positions of the keys; they end at "
            f"{int(q_offset) + q_length}, the keys at {kv_offset + kv_length} (a static cache? use a DynamicCache)"
        )
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        # Packed documents or an overlay: transformers forbids itself to skip the mask exactly there.
        return _all_pairs(batch_size, kv_length, kv_offset, q_length, q_offset, attention_mask, options)
    if attention_mask is None:
        return None
    real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if real.shape[-1] < kv_length:  # transformers takes keys beyond the mask for padding
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[-1]))
    return None if bool(real.all()) else real


def _bidirectional() -> Any:
    from transformers import masking_utils

    return getattr(masking_utils, "bidirectional_mask_function", None)


def _all_pairs(
    batch: int, keys: int, kv_offset: int, queries: int, q_offset: Any, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    where = options if "cache_position" in options else options | {"q_length": queries, "q_offset": q_offset}
    pairs = sdpa_mask(
        batch_size=batch,
        kv_length=keys,
        kv_offset=kv_offset,
        attention_mask=mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **where,
    )
    assert isinstance(pairs, Tensor)
    return pairs
