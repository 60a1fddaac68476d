"""The places of one model at which methods act: put in with the first method, taken out with the last."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glocal.hf.attention import attention, refuse
from glocal.hf.cache import STACK
from glocal.hf.install import Installed, attention_modules, crosses
from glocal.hf.masks import Own, own
from glocal.hf.rows import Rows, probabilities, product
from glocal.patterns import Full
from glocal.steer.hooks import Hooks, Run, Site
from glocal.steer.spans import SpanMap, prompt_of

__all__ = ["Steering", "language_layers", "speaker"]

_KEY = "_glocal_steering"
_BUDGET = 1 << 22  # scores held at a time


def language_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The causal self-attention modules of a model's language part, by path, in the order of its layers.

    Raises:
        TypeError: no transformers model, or none with a causal language model in it.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a transformers PreTrainedModel; it was {type(model).__name__}")
    text = config.get_text_config(decoder=True)
    # PaliGemma's text model says that it is not causal: its masks are, but for the prompt.
    decoder = not config.is_encoder_decoder and getattr(model, "can_generate", lambda: False)()
    found = {
        path: module
        for path, module in attention_modules(model).items()
        if not crosses(path)
        and getattr(module, "layer_idx", None) is not None
        and (decoder or getattr(module, "is_causal", False))
        and getattr(module, "config", text) is text
    }
    if not found:
        raise TypeError(f"{type(model).__name__} has no causal language model whose attention can be steered")
    return found


def speaker(model: Any) -> Any:
    """The part of a model that takes embeddings, gives logits and generates: most often the model itself.

    BLIP-2 and InstructBLIP let their language model generate by itself.
    """
    inner = getattr(model, "language_model", None)
    return inner if hasattr(inner, "generate") else model


class Steering:
    """What is in a model now; use the methods, not this."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.methods: list[Hooks] = []
        self.run: Run | None = None
        self.paused = False
        self._alone: Hooks | None = None
        layers = language_layers(model)
        self.modules = {id(m): n for n, m in enumerate(layers.values())}
        self._language = _smallest(model, layers)
        self._speaker = speaker(model)
        self.generate: Callable[..., Any] = getattr(model, "generate", _cannot)
        # Renamed in transformers 5.
        names = inspect.signature(self._speaker.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.speak: Callable[..., Any] = getattr(self._speaker, "generate", _cannot)
        self._installed: Installed | None = None
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, model: nn.Module) -> Steering:
        """The model's own, made where there is none."""
        return vars(model).get(_KEY) or cls(model)

    def push(self, method: Hooks) -> None:
        """Put a method in.

        Raises:
            ValueError: it is in already, or cannot be together with what is.
        """
        if any(method is other for other in self.methods):
            raise ValueError(f"{type(method).__name__} is in its with block already")
        if method.fuses and any(other.fuses for other in self.methods):
            raise ValueError("only one method at a time can fuse a second branch into the logits")
        if method.acts_in_attention and vars(self.model).get(STACK):
            raise ValueError("the model's attention is adapted (glocal.hf.adapt); restore it before steering attention")
        if method.acts_in_attention and self._installed is None:
            self._installed = Installed(self._language, self._attention)
        if not self._hooks:
            self._put_hooks()
        self.methods.append(method)
        vars(self.model)[_KEY] = self

    def pop(self, method: Hooks) -> None:
        """Take a method out; with the last, all hooks go."""
        self.methods = [other for other in self.methods if other is not method]
        if self._installed is not None and not any(other.acts_in_attention for other in self.methods):
            self._installed.remove()
            self._installed = None
        if not self.methods:
            for hook in self._hooks:
                hook.remove()
            self._hooks, self.run = [], None
            vars(self.model).pop("generate", None)
            vars(self.model).pop(_KEY, None)

    @property
    def _acting(self) -> list[Hooks]:
        return self.methods if self._alone is None else [self._alone]

    @contextmanager
    def only(self, method: Hooks) -> Iterator[None]:
        """Run the model with this method and no other, from inside one of them or from outside."""
        before = self.run, self.paused, self._alone
        self.push(method)
        self.run, self.paused, self._alone = None, False, method
        try:
            yield
        finally:
            self.run, self.paused, self._alone = before
            self.pop(method)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Run the model as it is without the methods, from inside one of them."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _put_hooks(self) -> None:
        model = self.model
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._speaker.register_forward_hook(self._after, with_kwargs=True),
        ]
        for module in model.modules():
            attention = getattr(module, "self_attn", None)
            number = self.modules.get(id(attention))
            if number is not None:
                hook = partial(self._residual, number)
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if hasattr(model, "generate"):
            vars(model)["generate"] = self._generate

    # What runs.

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate, with the methods' state of this call."""
        given = _named(self.generate, args, kwargs)
        config = given.get("generation_config") or self.model.generation_config
        beams = given.get("num_beams") or getattr(config, "num_beams", None) or 1
        fixed = [type(method).__name__ for method in self._acting if method.fuses or not method.beams]
        if fixed and beams > 1:
            raise ValueError(f"{fixed[0]} cannot follow beams; num_beams must be 1, it was {beams}")
        fusing = [type(method).__name__ for method in self._acting if method.fuses]
        guessing = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if given.get(name) is not None]
        if fusing and guessing:
            raise ValueError(f"{fusing[0]} fuses one token at a time; leave out {guessing[0]}, which checks several")
        run = self._new(given, generating=True)
        begun: list[Hooks] = []
        try:
            for method in self._acting:
                begun.append(method)
                method.begin(run)
            self.run = run
            return self.generate(**run.inputs)
        finally:
            self.run = None
            for method in begun:
                method.end(run)

    def _new(self, inputs: Mapping[str, Any], generating: bool) -> Run:
        length = prompt_of(inputs).shape[1]
        spans = next((method.spans for method in self._acting if method.spans is not None), None)
        if spans is None and inputs.get("input_ids") is not None:
            spans = SpanMap.read(self.model, inputs)
        return Run(dict(inputs), length, spans, generating)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model by itself is a run of its own."""
        if self.paused or (self.run is not None and self.run.generating):
            return
        inputs = kwargs | ({"input_ids": args[0]} if args else {})
        cache = inputs.get("cache", inputs.get("past_key_values"))
        if cache is not None and cache.get_seq_length() > 0 and self.run is not None:
            return  # goes on with an earlier call's cache
        run = self._new(inputs, generating=False)
        for method in self._acting:
            method.begin(run)
        self.run = run

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = self.run
        if self.paused or run is None or not run.generating or output is None:
            return
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and cache.get_seq_length() < run.prompt:
            return  # a prompt that is read in chunks, and not the last of them
        if run.step:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            run.chosen = ids[:, -1:]
        logits = output.logits[:, -1].float()
        changed = logits
        for method in self._acting:
            changed = method.logits(run, changed)
        run.step += 1
        if changed is not logits:
            output.logits = torch.cat([output.logits[:, :-1], changed[:, None].to(output.logits.dtype)], 1)

    def _residual(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.paused or self.run is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        changed = states
        for method in self._acting:
            if layer in method.numbers:
                changed = method.residual(layer, self.run, changed)
        if changed is states:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        layer = self.modules.get(id(module))
        if layer is None or self.paused or self.run is None:
            return attention(module, query, key, value, mask, where=Full(), **options)
        refuse(options)
        mine = own(module, query, key.shape[2], mask, options.get("is_causal"))
        keys, count = mine.end, query.shape[2]
        first_row = mine.offset + keys - count
        rows = torch.arange(first_row, first_row + count, device=query.device)
        prefill = first_row < self.run.prompt
        site = Site(layer, module, self.run, rows, mine.offset, keys, len(query), prefill)
        acting = [method for method in self._acting if method.acts_in_attention and layer in method.numbers]
        for method in acting:
            query = method.query(site, query)
        needs: list[tuple[Hooks, Tensor]] = []
        for method in acting:
            if method.edits(site):
                wanted = method.rows(site)
                needs.append((method, torch.arange(count, device=query.device) if wanted is None else wanted))
        chosen = torch.cat([wanted for _, wanted in needs]).unique() if needs else rows[:0]
        if len(chosen) < count:
            out, _ = attention(module, query, key, value, mask, where=Full(), **options)
        if not len(chosen):
            return out, None
        if options.get("dropout"):
            raise ValueError("attention is steered at inference: call model.eval() first")
        size = max(1, _BUDGET // max(1, len(query) * query.shape[1] * keys))
        edited = torch.cat(
            [_edited(site, some, needs, query, key, value, mine, options) for some in chosen.split(size)], 1
        )
        return (edited if len(chosen) == count else out.index_copy(1, chosen, edited)), None


def _cannot(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("the model has no generate")


def _smallest(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """The innermost transformers model that holds all these modules: a vision tower keeps its own attention."""
    from transformers import PreTrainedModel

    found, paths = model, list(layers)
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and all(layer.startswith(f"{path}.") for layer in paths):
            found = module
    return found


def _named(generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a generate by name."""
    bound = inspect.signature(generate).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    if named.get("inputs") is not None:
        named["input_ids"] = named.pop("inputs")
    return named


def _edited(
    site: Site,
    some: Tensor,
    needs: list[tuple[Hooks, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mine: Own,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention of the query rows ``some (R,)``, through scores and weights that methods see; ``(B, R, H, Dv)``."""
    within = [(method, torch.isin(some, wanted).nonzero()[:, 0]) for method, wanted in needs]

    def through(name: str, tensor: Tensor) -> Tensor:
        for method, at in within:
            if len(at):
                part = replace(site, rows=site.rows[some[at]])
                every = len(at) == len(some)
                changed = getattr(method, name)(part, tensor if every else tensor[:, :, at])
                tensor = changed if every else tensor.index_copy(2, at, changed)
        return tensor

    scores = through("scores", Rows.of(mine, query, key, some, options).scores())
    weights = through("weights", probabilities(scores))
    return product(weights.to(value.dtype), value[:, :, : site.keys]).transpose(1, 2)
