"""What transformers would mask, told to `glocal.hf` in few words instead of a tensor of all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.patterns import Causal, Full, Keys, Pattern, Sliding

__all__ = ["Own", "build_mask", "own"]

_ABOUT = "_glocal_about"


@dataclass(frozen=True)
class About:
    """What a mask cannot say as booleans of keys.

    Args:
        end: how many of the key slots are in use; a static cache has more.
        offset: tokens before the first key, which a sliding cache has dropped.
        window: keys of the model's own sliding window.
        padding: for each row of the batch, its padding before the first real token; empty where there is none.
    """

    end: int
    offset: int = 0
    window: int | None = None
    padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Own:
    """What the model itself lets a query see.

    Args:
        pattern: causality, padding, and the model's own window.
        causality: the same without padding.
        real: which keys are no padding, ``(B, Nk)``; None where all are.
        bias: ``(B, 1 or H, Nq, Nk)``, where the mask is one of pairs; these then say all that `pattern` would.
        end, offset, padding: as in `About`.
    """

    pattern: Pattern
    causality: Pattern
    real: Tensor | None
    bias: Tensor | None
    end: int
    offset: int
    padding: tuple[int, ...] = ()


def own(
    module: torch.nn.Module,
    query: Tensor,
    keys: int,
    mask: Tensor | None,
    is_causal: bool | None = None,
    window: bool = True,
) -> Own:
    """Read what `build_mask` has written, or a mask of the user's.

    Args:
        module: its ``is_causal`` counts unless ``is_causal`` is given.
        query: ``(B, H, Nq, D)``.
        keys: how many key slots there are, Nk.
        mask: None, booleans ``(B, Nk)``, or pairs ``(B, 1 or H, Nq, Nk)``, booleans or floats.
        is_causal: overrides the module's.
        window: whether the model's own sliding window counts.

    Raises:
        ValueError: a mask of another shape; the model's window cannot be taken away, as it is in the mask or the cache.
    """
    about: About = getattr(mask, _ABOUT, None) or About(keys)
    if not window and about.window is not None and mask is not None and (about.offset or mask.dim() == 4):
        raise ValueError(
            "own_window=False needs keys that the model's window hides: pass past_key_values=DynamicCache() to "
            "generate, and attention_mask rather than position_ids of packed sequences"
        )
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else bool(is_causal)
    size = about.window if window else None
    pattern: Pattern = Causal() if causal else Full()
    if size is not None:
        pattern = Sliding(size - 1, 0) if causal else Sliding(size, size)
    if mask is None:
        return Own(pattern, pattern, None, None, about.end, about.offset)
    if mask.dim() == 2:
        real = mask[:, : about.end].bool()
        if bool(real.all()):
            return Own(pattern, pattern, None, None, about.end, about.offset, about.padding)
        unpadded = Keys(real)
        both = unpadded if isinstance(pattern, Full) else pattern & unpadded
        return Own(both, pattern, real, None, about.end, about.offset, about.padding or _before(real))
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2 or 4 axes; it was {tuple(mask.shape)}")
    # A mask of pairs has causality, window and padding in it already, as transformers has it.
    pairs = mask[..., : about.end]
    if pairs.dtype == torch.bool:
        pairs = torch.zeros_like(pairs, dtype=query.dtype).masked_fill(~pairs, -torch.inf)
    return Own(Full(), Full(), None, pairs, about.end, about.offset, about.padding)


def build_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """What the attention function gets as its mask: None, the real keys ``(B, Nk)``, or all pairs where more is said.

    It is what transformers calls in the place of its own mask builders. Where queries are not the last keys (a static
    cache), keys were dropped (a sliding cache) or the layer has a window, the mask carries a note that `own` reads.
    """
    if hasattr(attention_mask, _ABOUT):  # generate has built it ahead for a static cache; it is of these keys already
        return attention_mask
    if cache_position is not None:  # before transformers 5.3
        q_length, q_offset = len(cache_position), cache_position[0]
        options["cache_position"] = cache_position
    assert q_length is not None
    function = options.get("mask_function")
    both_ways = function is not None and function is _named("bidirectional_mask_function")
    end = kv_length if both_ways else int(q_offset) + q_length - kv_offset
    if end > kv_length:
        raise ValueError(
            f"the queries end at position {int(q_offset) + q_length}, the keys at {kv_offset + kv_length}: "
            "the cache is too short, or attention_mask does not cover the past"
        )
    plain = function is None or function is _named("causal_mask_function") or both_ways
    if not (allow_is_causal_skip or allow_is_bidirectional_skip or plain) or _chunked(function, local_size):
        # Packed documents, an overlay, or chunks: transformers' own pairs.
        where = options if "cache_position" in options else options | {"q_length": q_length, "q_offset": q_offset}
        pairs = _named("sdpa_mask")(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            local_size=local_size,
            device=device,
            **where,
        )
        before = () if attention_mask is None else _before(attention_mask.bool())
        return _noted(pairs, About(end, kv_offset, None if _chunked(function, local_size) else local_size, before))
    real = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if real is not None and real.shape[-1] < kv_length:  # transformers takes keys beyond the mask for padding
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[-1]))
    # What was dropped may have been padding, which the mask of what is left does not say.
    padding = () if attention_mask is None or not kv_offset else _before(attention_mask.bool())
    about = About(end, kv_offset, local_size, padding)
    if about == About(kv_length):
        return None if real is None or bool(real.all()) else real
    return _noted(torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if real is None else real, about)


def _before(real: Tensor) -> tuple[int, ...]:
    """Padding before the first real token of each row; empty where no row has any."""
    count = (real.cumsum(1) == 0).sum(1).tolist()
    return tuple(count) if any(count) else ()


def _noted(mask: Tensor, about: About) -> Tensor:
    mask = mask.contiguous()  # as generate makes it, which would lose the note
    setattr(mask, _ABOUT, about)
    return mask


def _chunked(function: Any, size: int | None) -> bool:
    """Whether a local mask is one of chunks: the first token of the second chunk does not see the one before it."""
    if size is None or size < 2 or function is None:
        return False
    at = torch.tensor(size)
    return not bool(function(torch.tensor(0), torch.tensor(0), at, at - 1))


def _named(name: str) -> Any:
    from transformers import masking_utils

    return getattr(masking_utils, name, None)
