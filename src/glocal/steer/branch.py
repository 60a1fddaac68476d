"""A second run of a model beside generate: its own inputs, its own cache, the same tokens chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glocal.steer.spans import prompt_of
from glocal.steer.steering import Steering

__all__ = ["Branch", "fuse", "lowered", "plausible"]

_IMPLAUSIBLE = 1e4  # what is taken off the logits of implausible tokens


class Branch:
    """The same model with other inputs, one step at a time; methods that are in the model do not act in it.

    Every step is a ``generate`` of one token that goes on from the branch's own cache, so that positions and masks
    are what the model's class makes them.

    Args:
        model: the model that generates.
        inputs: its arguments, with the augmented picture say; ``input_ids`` or ``inputs_embeds`` among them.
        rows: rows of the batch that generate runs, a multiple of the inputs' rows (several answers a prompt).

    Raises:
        ValueError: inputs without a prompt.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], rows: int) -> None:
        steering = self._steering = Steering.of(model)
        prompt = prompt_of(inputs)
        self._inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        self._times = rows // len(prompt)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        # Tokens that are in the cache are not read again: where they are unknown, any will do.
        self._ids = prompt.new_zeros(prompt.shape[:2], dtype=torch.long) if ids is None else ids
        self._mask = torch.ones_like(self._ids) if mask is None else mask
        self._cache: Any = None
        self._named = steering.cache_name
        self._deltas: dict[nn.Module, Any] = {m: None for m in model.modules() if hasattr(m, "rope_deltas")}

    @torch.no_grad()
    def logits(self, chosen: Tensor | None) -> Tensor:
        """Logits ``(B, V)`` of the next token, after the tokens ``(B, 1)`` that generate has chosen; None at first.

        Raises:
            ValueError: a step without the token chosen before it.
        """
        from transformers import DynamicCache, GenerationConfig

        steering = self._steering
        one = GenerationConfig(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
        with steering.pause(), self._own_positions():
            if self._cache is None:
                empty = DynamicCache(config=steering.model.config.get_text_config(decoder=True))
                output = steering.generate(**self._inputs, **{self._named: empty}, generation_config=one)
            else:
                if chosen is None:
                    raise ValueError("a branch that has begun needs the tokens chosen since")
                self._ids = torch.cat([self._ids, chosen.to(self._ids.device)], 1)
                self._mask = torch.cat([self._mask, torch.ones_like(chosen).to(self._mask)], 1)
                output = steering.speak(
                    input_ids=self._ids,
                    attention_mask=self._mask,
                    **{self._named: self._cache},
                    generation_config=one,
                )
        found: Tensor = output.logits[-1].float()
        if self._cache is None:
            self._cache = empty
            if self._times > 1:
                self._cache.batch_repeat_interleave(self._times)
                self._ids, self._mask, found = (
                    t.repeat_interleave(self._times, 0) for t in (self._ids, self._mask, found)
                )
                self._deltas = {m: _repeated(deltas, self._times) for m, deltas in self._deltas.items()}
        return found

    @contextmanager
    def _own_positions(self) -> Iterator[None]:
        """Qwen2-VL keeps in the model what its positions are ahead by: each run has its own."""
        before = {module: module.rope_deltas for module in self._deltas}
        for module, deltas in self._deltas.items():
            module.rope_deltas = deltas
        try:
            yield
        finally:
            for module, deltas in before.items():
                self._deltas[module] = module.rope_deltas
                module.rope_deltas = deltas


def _repeated(deltas: Any, times: int) -> Any:
    return deltas.repeat_interleave(times, 0) if isinstance(deltas, Tensor) else deltas


def fuse(logits: Tensor, other: Tensor, alpha: float) -> Tensor:
    """``logits + alpha * other``, both ``(B, V)``, and minus infinity where the first has it.

    >>> fuse(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]), 2.0)
    tensor([[7., 2.]])
    """
    return torch.where(logits.isneginf(), logits, logits + alpha * other)


def plausible(logits: Tensor, beta: float) -> Tensor:
    """The tokens ``(B, V)`` whose probability is at least ``beta`` times that of the likeliest; all where it is 0.

    >>> plausible(torch.tensor([[0.0, -0.5, -1.0]]), 0.5)
    tensor([[ True,  True, False]])
    """
    if beta <= 0:
        return torch.ones_like(logits, dtype=torch.bool)
    return logits >= logits.max(-1, keepdim=True).values + math.log(beta)


def lowered(fused: Tensor, logits: Tensor, beta: float) -> Tensor:
    """Fused logits ``(B, V)``, far lower where the model's own find a token implausible; see `plausible`.

    Not minus infinity: where a processor bans all that is plausible, something must be left to choose.

    >>> lowered(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -1.0]]), 0.5).tolist()
    [[1.0, -9998.0]]
    """
    return torch.where(plausible(logits, beta), fused, fused - _IMPLAUSIBLE)
