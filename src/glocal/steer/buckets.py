"""Attention buckets: one prompt read under several rotary bases, and the next token chosen from all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from glocal.steer.branch import Branch
from glocal.steer.hooks import Run
from glocal.steer.method import Method
from glocal.steer.waveform import TOOL_BASES

__all__ = ["AttentionBuckets", "merge_buckets", "own_base", "rotary_base"]


def merge_buckets(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of several bases in one: their mean, weighted by the softmax of each one's highest logit.

    These are raw logits, not log-probabilities: a base that is surer counts more, and so does one whose logits are all
    higher.

    Args:
        logits: ``(W, B, V)``. What one base rules out with minus infinity stays out.

    Returns:
        Merged ``(B, V)``, and the weights ``(W, B)``.

    Raises:
        ValueError: another shape.

    >>> merge_buckets(torch.tensor([[[0.0, 2.0]], [[2.0, 0.0]]]))[0]
    tensor([[1., 1.]])
    """
    if logits.dim() != 3:
        raise ValueError(f"logits must be (W, B, V); they were {tuple(logits.shape)}")
    out = logits.isneginf()
    weights = logits.amax(-1).softmax(0)
    merged = (weights[..., None] * logits.masked_fill(out, 0.0)).sum(0)
    return merged.masked_fill(out.any(0), -inf), weights


def own_base(model: Any) -> float:
    """The rotary base with which a model was made.

    Raises:
        TypeError: a model without one rotary embedding for all layers.
    """
    return _base(_rotary(model)[1])


@contextmanager
def rotary_base(model: Any, base: float) -> Iterator[None]:
    """A ``with`` block in which a model's language layers rotate by another base.

    A cache that was filled outside does not fit inside. What scales the frequencies (linear, dynamic, YaRN, LongRoPE,
    Llama 3) is applied to those of the new base, by the model's own class.

    Args:
        model: a transformers model with rotary positions.
        base: above 0; the model's own changes nothing.

    Raises:
        TypeError: a model without one rotary embedding for all layers.
        ValueError: a base out of range.

    Example::

        with rotary_base(model, 20000):
            logits = model(input_ids).logits
    """
    _check_bases([base])
    owner, rotary = _rotary(model)
    with _put(owner, _rebased(rotary, base)):
        yield


@dataclass
class AttentionBuckets(Method):
    """Several rotary bases in parallel (Chen et al., 2023, arXiv 2312.04455): what one base overlooks another sees.

    Under each base attention has its troughs at other distances. The prompt is read once for each base, each with a
    cache of its own; at each step the next token is chosen from the logits of all, merged by `merge_buckets`, and goes
    to all. Greedy decoding and sampling, any batch, padding on the left; no beams. It costs as many prefills, forwards
    and caches as there are bases, one after the other. A call of the model by itself is not changed.

    Other methods in the model act in the run of the first base only.

    Args:
        model: a transformers model whose layers share one rotary embedding: the Llama, Mistral, Qwen and Gemma types
            and models of pictures built on them. In Qwen2-VL the base turns all three axes of its positions.
        bases: at least one. The paper's are for heads of 128 and contexts to 4,096 tokens; `search_bases` finds others.

    Attributes:
        shares: of the newest ``generate``, for each step how much each base counted, ``(W, B)``.

    Raises:
        TypeError: no rotary embedding, or different ones by layer (Gemma 3), where one base is not for all.
        ValueError: no bases or some out of range; beams; a cache that holds tokens already, which are rotated by the
            model's base; ``position_ids`` with more than one token to generate.

    Example::

        with AttentionBuckets(model, bases=RAG_BASES):
            model.generate(**inputs)
    """

    _: KW_ONLY
    bases: Sequence[float] = TOOL_BASES
    shares: list[Tensor] = field(default_factory=list, init=False, repr=False)

    fuses = True
    acts_in_attention = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bases(self.bases)
        self._owner, rotary = _rotary(self.model)
        self._rotaries = [_rebased(rotary, base) for base in self.bases]
        self._branches: list[Branch] = []
        self._first = ExitStack()

    def begin(self, run: Run) -> None:
        """The model reads the prompt under the first base."""
        if not run.generating:
            return
        self._branches, self.shares = [], []
        config = run.inputs.get("generation_config") or self.model.generation_config
        cache = run.inputs.get("cache", run.inputs.get("past_key_values"))
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "the cache holds tokens already, rotated by one base: give the whole prompt and an empty cache"
            )
        tokens = run.inputs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        if run.inputs.get("position_ids") is not None and tokens != 1:
            raise ValueError("position_ids are followed for one token only: set max_new_tokens=1, or leave them out")
        self._first.enter_context(_put(self._owner, self._rotaries[0]))

    def logits(self, run: Run, logits: Tensor) -> Tensor:
        """Those of all bases, merged."""
        if not self._branches:
            self._branches = [Branch(self.model, run.inputs, len(logits)) for _ in self._rotaries[1:]]
        found = [logits]
        for branch, rotary in zip(self._branches, self._rotaries[1:], strict=True):
            with _put(self._owner, rotary):
                found.append(branch.logits(run.chosen).to(logits.device))
        merged, weights = merge_buckets(torch.stack(found))
        self.shares.append(weights)
        return merged

    def end(self, run: Run) -> None:
        """Put the model's own rotary embedding back, and drop the branches and their caches."""
        self._first.close()
        self._branches = []


def _check_bases(bases: Sequence[float]) -> None:
    wrong = [base for base in bases if isinstance(base, bool) or not 0 < base < inf]
    if wrong or not len(bases):
        raise ValueError(f"bases must be numbers above 0, at least one; they were {list(bases)}")


def _rotary(model: Any) -> tuple[nn.Module, Any]:
    """The language model's rotary embedding, and the module that holds it as ``rotary_emb``."""
    text = model.config.get_text_config(decoder=True)
    found = [
        (owner, name, module)
        for owner in model.modules()
        for name, module in owner.named_children()
        if name.startswith("rotary_emb") and getattr(module, "config", None) is text
    ]
    kind = type(model).__name__
    if not found:
        raise TypeError(f"{kind} has no rotary position embedding (rotary_emb) that its layers share")
    owner, name, rotary = found[0]
    if len(found) > 1 or name != "rotary_emb" or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        raise TypeError(f"{kind} rotates its layers by different bases: one base cannot take the place of all")
    return owner, rotary


def _base(rotary: Any) -> float:
    return float(rotary.config.rope_parameters["rope_theta"])


def _rebased(rotary: Any, base: float) -> nn.Module:
    """A rotary embedding of the same class and settings with another base; the very same where it is its own."""
    if base == _base(rotary):
        module: nn.Module = rotary
        return module
    config = copy.deepcopy(rotary.config)
    config.rope_parameters = dict(config.rope_parameters) | {"rope_theta": float(base)}
    made: nn.Module = type(rotary)(config=config)
    return made.to(rotary.inv_freq.device).train(rotary.training)


@contextmanager
def _put(owner: nn.Module, rotary: nn.Module) -> Iterator[None]:
    before = owner.rotary_emb
    owner.rotary_emb = rotary
    try:
        yield
    finally:
        owner.rotary_emb = before
