"""Put another attention into a pretrained model: a pattern or a mechanism, for all layers or for some."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.hf.attention import attention, refuse
from glocal.hf.cache import STACK, PolicyCache, PolicyLayer
from glocal.hf.install import Installed, attention_modules, crosses, layer_number
from glocal.hf.masks import own
from glocal.hf.mechanism import Mechanism, own_window
from glocal.nn import Attention
from glocal.nn.frame import Call
from glocal.patterns import Causal, Full, Pattern, parse

__all__ = ["Adapted", "Where", "adapt", "readapt"]

Where = Pattern | Mechanism | str
_FILE, _WEIGHTS, _VERSION = "glocal.json", "glocal.safetensors", 1
_SAMPLE = 64  # tokens on which a pattern is tried


def adapt(
    model: nn.Module,
    where: Where | Sequence[Where] | Mapping[int | str, Where] | Callable[[nn.Module], Where] = "full()",
    *,
    layers: Iterable[int] | str | None = None,
    own_window: bool = True,
    backend: str = "auto",
) -> Adapted:
    """Put another attention into a pretrained model of transformers, in place, until it is restored.

    Any model whose attention goes through transformers' attention registry: Llama, Mistral, Qwen, Gemma, GPT-2,
    GPT-NeoX, BERT, RoBERTa, ViT, CLIP, Whisper, T5 and most others. What the model itself lets a query see stays and
    is intersected with the pattern: causality, padding, packed sequences, and its own sliding window. Queries whose
    keys are all hidden get zeros. Training, ``generate``, dynamic and static caches work as before.

    Cross-attention is left alone unless ``layers`` (as text) or a mapping names it.

    Args:
        model: a ``PreTrainedModel``.
        where: a pattern (with `PerHead` one for each head), a `Mechanism`, or the text of either; a list of them, one
            a layer; a mapping from layer numbers or module paths; or a function of the attention module.
        layers: numbers of the layers to adapt, negative ones from the end; or a regular expression that is searched
            in the paths of the attention modules; all where None.
        own_window: False takes the model's own sliding windows away.
        backend: as in `glocal.attend`.

    Returns:
        A handle: as a context manager it restores the model on exit, otherwise at `Adapted.restore`.

    Raises:
        TypeError: no transformers model, or its attention is fixed.
        ValueError: a pattern or mechanism does not parse or fit, selects nothing, or contradicts causality; at run
            time, the model asks of attention what cannot be had.

    Example::

        with adapt(model, "sliding(255, 0) | sinks(4)"):
            model.generate(**batch)
        handle = adapt(model, "moba(block_size=64, top_k=3)", layers=range(4, 24))
        model.generate(**batch, past_key_values=handle.cache())
        handle.restore()
    """
    return Adapted(model, where, layers=layers, own_window=own_window, backend=backend)


class Adapted:
    """A model with another attention; see `adapt`.

    Attributes:
        model: the model.
        where: what each adapted attention module runs, by its path.
        frames: the mechanisms' layers by path, with the parameters that can be tuned.
    """

    def __init__(
        self,
        model: nn.Module,
        where: Any,
        *,
        layers: Iterable[int] | str | None = None,
        own_window: bool = True,
        backend: str = "auto",
    ) -> None:
        self.model, self.own_window, self.backend = model, own_window, backend
        self.where: dict[str, Pattern | Mechanism] = {}
        self.frames: dict[str, Attention] = {}
        self.operator: Callable[[nn.Module], Callable[..., Any]] = _plain
        self._installed: Installed | None = None
        self._inputs: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        # Installing refuses what is no transformers model, so it comes first; a wrong pattern takes it back.
        self._installed = Installed(model, self._forward)
        modules = attention_modules(model)
        try:
            self._stack().append(self)
            for path, chosen in _resolve(modules, where, layers).items():
                self._place(path, modules[path], chosen)
            if not self.where:
                raise ValueError(
                    f"layers {layers!r} selects no attention module; there are {', '.join(modules) or 'none'}"
                )
        except BaseException:
            self.restore()
            raise
        self._by_id = {id(modules[path]): path for path in self.where}

    def _place(self, path: str, module: nn.Module, chosen: Pattern | Mechanism) -> None:
        if isinstance(chosen, Mechanism):
            if crosses(path):
                raise ValueError(f"{path} is cross-attention, which {chosen} has not")
            if self.own_window and own_window(module) is not None:
                raise ValueError(
                    f"{path} has a sliding window of its own, which {chosen} cannot keep: choose other layers, "
                    "or give own_window=False"
                )
            frame = chosen.frame(module)
            self.frames[path] = frame
            if any(True for _ in frame.parameters()) or chosen.name in ("aha", "nats", "moh"):
                self._hooks.append(module.register_forward_pre_hook(self._see_input, with_kwargs=True))
        elif not crosses(path):
            _check(chosen, path, module)
        self.where[path] = chosen

    def _see_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs[id(module)] = args[0] if args else kwargs["hidden_states"]

    def _stack(self) -> list[Adapted]:
        stack: list[Adapted] = vars(self.model).setdefault(STACK, [])
        return stack

    # What runs.

    def _forward(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        handle, chosen = self._chosen(module)
        layer = PolicyLayer.of(key)
        frame = None if handle is None else handle.frames.get(handle._by_id[id(module)])
        if layer is None and frame is None:
            assert not isinstance(chosen, Mechanism)
            keep, backend = (True, "auto") if handle is None else (handle.own_window, handle.backend)
            settings: dict[str, Any] = {"where": chosen, "own_window": keep, "backend": backend}
            operator = self.operator(module)
            return attention(module, query, key, value, mask, operator=operator, **settings, **options)
        states = None if handle is None else handle._inputs.pop(id(module), None)
        return (handle or self)._mix(
            module, query, key, value, mask, layer, frame, chosen, states, adapted=handle is not None, **options
        )

    def _chosen(self, module: nn.Module) -> tuple[Adapted | None, Pattern | Mechanism]:
        """The newest adaptation that has this module, up to this one."""
        stack = self._stack()
        for handle in reversed(stack[: stack.index(self) + 1]):
            path = handle._by_id.get(id(module))
            if path is not None:
                return handle, handle.where[path]
        return None, Full()

    def _mix(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layer: PolicyLayer | None,
        frame: Attention | None,
        chosen: Pattern | Mechanism,
        states: Tensor | None,
        *,
        adapted: bool = True,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """A mechanism's layer, or a cache with a policy."""
        refuse(options)
        if position_bias is not None:
            raise ValueError(f"{type(module).__name__} adds a bias of positions, which mechanisms and caches have not")
        keys = key.shape[2] + (0 if layer is None else layer.seen)
        mine = own(module, query, keys, mask, is_causal, self.own_window or not adapted)
        if mine.bias is not None:
            raise ValueError("a mask of pairs (packed sequences) cannot be combined with a mechanism or a cache policy")
        mixer = frame if layer is None else layer.frame
        assert mixer is not None
        if frame is not None and type(mixer) is not type(frame):
            raise ValueError(f"this layer runs {chosen}, the cache another policy: pass past_key_values=handle.cache()")
        causal = bool(getattr(module, "is_causal", False)) if is_causal is None else bool(is_causal)
        if mixer.causal != causal:
            raise ValueError(
                f"{type(module).__name__} is {'' if causal else 'not '}causal by an argument at run time, "
                "which mechanisms cannot follow: give it a pattern"
            )
        mixer.scale = mixer.head_dim**-0.5 if scaling is None else scaling
        mixer.softcap, mixer.dropout, mixer.backend = softcap, dropout, self.backend
        mixer.train(module.training)
        x = query.new_empty(query.shape[0], query.shape[2], 0) if states is None else states
        call = Call(x, x, mine.real, None, False)
        if layer is not None:
            out = layer.attend(query, key, value, call, chosen if isinstance(chosen, Pattern) else Full())
        else:
            key, value = key[:, :, : mine.end], value[:, :, : mine.end]
            short = query.shape[2] != key.shape[2]
            if short and not mixer.new_cache().complete:
                raise ValueError(
                    f"{chosen} cannot decode with a cache that knows its past tokens only by their keys; pass "
                    "past_key_values=handle.cache(), with the handle that adapt gave"
                )
            out = mixer.mix(query, key, value, call)
        return out.transpose(1, 2).contiguous(), None

    # What users call.

    def cache(self) -> PolicyCache:
        """A fresh cache for ``generate(past_key_values=...)``: each mechanism's own, a full one for other layers.

        Raises:
            ValueError: the model is no decoder.
        """
        paths = {path: self.frames.get(path) for path in attention_modules(self.model) if not crosses(path)}
        return PolicyCache(self.model, paths)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What mechanisms have to learn; the model's own parameters are not among them."""
        for frame in self.frames.values():
            yield from frame.parameters()

    def restore(self) -> None:
        """Leave the model as it was. Adaptations that lie on this one must be restored first.

        Raises:
            RuntimeError: a newer adaptation is in place.
        """
        stack = vars(self.model).get(STACK, [])
        if self in stack:
            if stack[-1] is not self:
                raise RuntimeError("a newer adaptation of this model is in place: restore that one first")
            stack.pop()
        if not stack:
            vars(self.model).pop(STACK, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inputs = [], {}
        if self._installed is not None:
            self._installed.remove()
            self._installed = None

    def __enter__(self) -> Adapted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def save(self, folder: str | Path) -> None:
        """Write ``glocal.json``, and ``glocal.safetensors`` where mechanisms have parameters, beside a model's weights.

        Raises:
            ValueError: a pattern holds tensors, which text cannot say.
        """
        folder = Path(folder)
        entries = {}
        for path, chosen in self.where.items():
            entries[path] = str(chosen) if isinstance(chosen, Mechanism) else _as_text(chosen, path)
        data = {"version": _VERSION, "own_window": self.own_window, "backend": self.backend, "layers": entries}
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{path}.{name}": value.detach().contiguous()
            for path, frame in self.frames.items()
            for name, value in frame.state_dict().items()
        }
        if weights:
            from safetensors.torch import save_file

            save_file(weights, folder / _WEIGHTS)
        (folder / _FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        lines = [f"  {path}: {chosen}" for path, chosen in self.where.items()]
        return "\n".join([f"Adapted({type(self.model).__name__})", *lines])


def readapt(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt a model as `Adapted.save` has written it beside the weights.

    Raises:
        ValueError: the files are missing, damaged, or of another model; nothing is changed then.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']} is not {_VERSION}")
        layers, own_window, backend = dict(data["layers"]), bool(data["own_window"]), str(data["backend"])
    except OSError as error:
        raise ValueError(f"{str(folder / _FILE)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(folder / _FILE)!r} is no adaptation of glocal: {error}") from None
    missing = [path for path in layers if path not in attention_modules(model)]
    if missing:
        raise ValueError(f"{str(folder / _FILE)!r} is of another model: this one has no {missing[0]}")
    try:
        handle = adapt(model, layers, own_window=own_window, backend=backend)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(folder / _FILE)!r} does not fit this model: {error}") from None
    try:
        _load_weights(handle, folder / _WEIGHTS)
    except BaseException:
        handle.restore()
        raise
    return handle


def _plain(module: nn.Module) -> Callable[..., Any]:
    """What computes a module's attention, where nobody looks into it."""
    return attend


def _load_weights(handle: Adapted, path: Path) -> None:
    expected = {f"{at}.{name}": t for at, f in handle.frames.items() for name, t in f.state_dict().items()}
    if not expected:
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be loaded: {error}") from None
    wrong = [n for n, t in expected.items() if n not in found or found[n].shape != t.shape] + sorted(
        set(found) - set(expected)
    )
    if wrong:
        raise ValueError(f"{str(path)!r} does not fit this model and {_FILE}: {wrong[0]}")
    with torch.no_grad():
        for name, t in expected.items():
            t.copy_(found[name])


def _resolve(
    modules: dict[str, nn.Module], where: Any, layers: Iterable[int] | str | None
) -> dict[str, Pattern | Mechanism]:
    """What each selected module runs."""
    if isinstance(where, Mapping):
        if layers is not None:
            raise ValueError("layers cannot be given beside a mapping of layers to patterns")
        return _from_mapping(modules, where)
    if isinstance(layers, str):
        try:
            expression = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers {layers!r} is no regular expression: {error}") from None
        chosen = [path for path in modules if expression.search(path)]
    else:
        if layers is not None and not isinstance(layers, Iterable):
            raise TypeError(f"layers must be numbers or a regular expression; it was {layers!r}")
        own = [path for path in modules if not crosses(path)]
        numbers = None if layers is None else list(layers)
        count = max((layer_number(path) for path in own), default=-1) + 1
        for n in numbers or ():
            if isinstance(n, bool) or not isinstance(n, int) or not -count <= n < count:
                raise ValueError(f"layers must be numbers from {-count} to {count - 1}; one was {n!r}")
        wanted = None if numbers is None else {n % count for n in numbers}
        chosen = [path for path in own if wanted is None or layer_number(path) in wanted]
    if isinstance(where, str | Pattern | Mechanism):
        one = _read(where)
        return {path: one for path in chosen}
    if isinstance(where, Sequence):
        several = [_read(w) for w in where]
        numbers = sorted({layer_number(path) for path in chosen})
        if len(several) != len(numbers):
            raise ValueError(f"where lists {len(several)} patterns, {len(numbers)} layers are to be adapted")
        return {path: several[numbers.index(layer_number(path))] for path in chosen}
    if callable(where):
        return {path: _read(where(modules[path])) for path in chosen}
    raise TypeError(
        "where must be a pattern, a Mechanism, their text, a list or mapping of them or a function; "
        f"it was {type(where).__name__}"
    )


def _from_mapping(modules: dict[str, nn.Module], where: Mapping[int | str, Any]) -> dict[str, Pattern | Mechanism]:
    found: dict[str, Pattern | Mechanism] = {}
    for key, value in where.items():
        if isinstance(key, str):
            paths = [key] if key in modules else []
        else:
            paths = [path for path in modules if layer_number(path) == key and not crosses(path)]
        if not paths:
            raise ValueError(f"where names {key!r}; the attention modules are {', '.join(modules) or 'none'}")
        found.update({path: _read(value) for path in paths})
    return {path: found[path] for path in modules if path in found}


def _read(where: Any) -> Pattern | Mechanism:
    if isinstance(where, str):
        return Mechanism.parse(where) if Mechanism.names(where) else parse(where)
    if not isinstance(where, Pattern | Mechanism):
        raise TypeError(f"where must give patterns, mechanisms or their text; it gave {type(where).__name__}")
    return where


def _check(pattern: Pattern, path: str, module: nn.Module) -> None:
    """As much as can be known before the model runs."""
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    try:
        pattern.check((_SAMPLE,), (_SAMPLE,))
        lead = pattern.lead((_SAMPLE,), (_SAMPLE,))
        seen = (pattern & Causal() if getattr(module, "is_causal", False) else pattern).count(_SAMPLE)
    except ValueError:
        return  # made for another length: it is checked where it runs
    if heads is not None and lead[-1:] not in ((), (1,), (heads,)):
        raise ValueError(f"{pattern} is made for {lead[-1]} heads; {path} has {heads}")
    if not seen:
        raise ValueError(f"{pattern} contradicts {path}: no query would see any key")


def _as_text(pattern: Pattern, path: str) -> str:
    text = repr(pattern)
    try:
        parse(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the pattern of {path} cannot be saved as text: {error}") from None
    return text
