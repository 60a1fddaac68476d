"""Running a model and keeping what its attention computes with, in memory or on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.inspect.places import Operator, Place, intercept
from glocal.inspect.recording import LayerRecord, Record, block_of, parts_of, read_layer, real_queries
from glocal.inspect.store import Store
from glocal.nn.modes import evaluating
from glocal.patterns import Full, Pattern, parse
from glocal.scores import Score

__all__ = ["KEEP", "record"]

KEEP = ("attention", "values", "outputs", "residual", "norms")
"""What can be kept of a layer."""


@torch.no_grad()
def record(
    model: nn.Module,
    inputs: Any,
    *,
    keep: Iterable[str] = ("attention",),
    layers: Iterable[int] | None = None,
    limit: int = 1 << 31,
    folder: str | Path | None = None,
    **options: Any,
) -> Record:
    """Run a model once and keep what its attention computes with, layer by layer.

    Attention maps are not kept: queries, keys and the log-sum-exp of the scores are, from which `LayerRecord.weights`
    and `LayerRecord.tiles` make any rows of the map, exactly, under whatever backend computed it. A record of N tokens
    takes memory as N, not N x N.

    Args:
        model: of transformers, plain or adapted (`glocal.hf.adapt`), or with layers of `glocal.nn` that are softmax
            under a pattern; layers of other kinds are left out. It runs in evaluation mode and is left as it was.
        inputs: a mapping of its arguments, as a tokenizer gives it, a tensor, or a tuple.
        keep: of `KEEP`. ``"attention"``: queries, keys and log-sum-exps. ``"values"``. ``"outputs"``: of each head,
            before heads are joined. ``"residual"``: the stream before and after each block. ``"norms"``: lengths of all
            of these vectors, without the vectors.
        layers: numbers of the layers to keep, in the order in which they run, negative ones from the end (which must
            then run once each); all where None.
        limit: bytes of memory that the record may take; what goes beyond it is written to a temporary folder, which
            goes with the record.
        folder: write everything there, at once and layer by layer; what is there already must be an older record,
            which is overwritten.
        **options: further arguments of the model.

    Returns:
        A sequence of `LayerRecord`.

    Raises:
        TypeError: a model of transformers whose attention is fixed.
        ValueError: a model without softmax attention or one that calls none; an input without tokens, or of another
            kind than the model reads; something to keep that there is not.

    >>> from glocal.nn import Attention
    >>> layer = Attention(8, 2, causal=True)
    >>> found = record(layer, torch.randn(1, 5, 8))
    >>> found[0].weights().sum(-1).allclose(torch.ones(1, 2, 5))
    True
    """
    keep = tuple(keep)
    for name in keep:
        if name not in KEEP:
            raise ValueError(f"keep must be of {', '.join(KEEP)}; it had {name!r}")
    given, named = _arguments(model, inputs)
    recorder = _Recorder(keep, limit, None if folder is None else Path(folder), named)
    try:
        with evaluating(model), ExitStack() as stack:
            places = stack.enter_context(intercept(model, recorder.operator))
            recorder.choose(places, layers)
            if "residual" in keep or "norms" in keep:
                recorder.watch_blocks(model, places, stack)
            model(*given, **(named if isinstance(inputs, Mapping) else {}), **options)
    except BaseException:
        recorder.discard()
        raise
    return recorder.result()


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional ones, and tensors by name; checked."""
    given: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    wanted = getattr(model, "main_input_name", None)
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not given and not named:
        raise ValueError("inputs must hold what the model reads; it was empty")
    for name, value in [*((wanted or "inputs", value) for value in given[:1]), *named.items()]:
        if not isinstance(value, Tensor):
            continue
        if not value.numel():
            raise ValueError(f"{name} must hold at least one token; it was {tuple(value.shape)}")
        if name == "input_ids" and value.is_floating_point():
            raise ValueError(
                f"{type(model).__name__} reads token ids, integers (B, N); it was given {value.dtype} "
                f"{tuple(value.shape)}, as of an image"
            )
        if name == "pixel_values" and not value.is_floating_point():
            raise ValueError(
                f"{type(model).__name__} reads images, floats (B, channels, height, width); it was given {value.dtype} "
                f"{tuple(value.shape)}, as of a text"
            )
    if wanted in ("input_ids", "pixel_values") and named and wanted not in named and "inputs_embeds" not in named:
        raise ValueError(f"{type(model).__name__} reads {wanted}; it was given {', '.join(named)}")
    if not named and wanted and isinstance(given[0], Tensor):
        return given, {wanted: given[0]}
    return given, named


class _Recorder:
    """Keeps what the layers compute with as they run."""

    def __init__(self, keep: tuple[str, ...], limit: int, folder: Path | None, named: Mapping[str, Any]) -> None:
        self.keep, self.limit, self.held = keep, limit, 0
        self.inputs = {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}
        self.temporary: Any = None
        self.store = None if folder is None else Store(folder)
        self.layers: list[LayerRecord] = []
        self.wanted: set[str] | None = None
        self.entered: dict[str, Tensor] = {}
        self.blocks: dict[str, list[str]] = {}
        self.open: dict[str, LayerRecord] = {}

    def choose(self, places: Sequence[Place], layers: Iterable[int] | None) -> None:
        if layers is None:
            return
        chosen = list(layers)
        for n in chosen:
            if not -len(places) <= n < len(places):
                raise ValueError(f"layers must be numbers of the {len(places)} layers; one was {n}")
        self.wanted = {places[n].name for n in chosen}

    def operator(self, place: Place) -> Operator:
        def compute(q: Tensor, k: Tensor, v: Tensor, where: Pattern | str = Full(), **options: Any) -> Any:  # noqa: B008
            asked = options.pop("return_lse", False)
            out, lse = attend(q, k, v, where, return_lse=True, **options)
            if self.wanted is None or place.name in self.wanted:
                self.add(place, q, k, v, parse(where) if isinstance(where, str) else where, options, out, lse)
            return (out, lse) if asked else out

        return compute

    def add(
        self,
        place: Place,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        where: Pattern,
        options: Mapping[str, Any],
        out: Tensor,
        lse: Tensor,
    ) -> None:
        grid_q, grid_k = tuple(q.shape[2:-1]), tuple(k.shape[2:-1])
        q, k, v, out = (t.flatten(2, -2) for t in (q, k, v, out))
        kept = {"q": q, "k": k, "lse": lse.flatten(2), "v": v, "outputs": out}
        names = {"q": "attention", "k": "attention", "lse": "attention", "v": "values", "outputs": "outputs"}
        tensors = {name: tensor for name, tensor in kept.items() if names[name] in self.keep}
        if "norms" in self.keep:
            tensors |= {f"norm_{name}": kept[name].float().norm(dim=-1) for name in ("q", "k", "v", "outputs")}
        bias = options.get("bias")
        if isinstance(bias, Score):
            tensors["table"] = bias.table(grid_q, grid_k)
        elif bias is not None:
            tensors["bias"] = _compact(bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)))
        scale = options.get("scale")
        layer = LayerRecord(
            place.name,
            grid_q,
            grid_k,
            where,
            q.shape[-1] ** -0.5 if scale is None else scale,
            options.get("softcap") or 0.0,
            place.cross,
            real_queries(where, q.shape[2], place.cross),
            self._tokens(k.shape[2], place.cross),
            q.shape[1],
            {name: tensor.detach() for name, tensor in tensors.items()},
        )
        if self.blocks:
            self.open[place.name] = layer  # its block ends later
        else:
            self._keep(layer)

    def watch_blocks(self, model: nn.Module, places: Sequence[Place], stack: ExitStack) -> None:
        """Keep the stream before and after the blocks that hold the layers."""
        for place in places:
            self.blocks.setdefault(block_of(place.name), []).append(place.name)
        for path, names in self.blocks.items():
            block = model.get_submodule(path)

            def enter(module: nn.Module, given: tuple[Any, ...], more: dict[str, Any], path: str = path) -> None:
                states = given[0] if given else more.get("hidden_states", more.get("x"))
                if isinstance(states, Tensor) and states.is_floating_point():
                    self.entered[path] = states.detach()

            def leave(module: nn.Module, given: Any, out: Any, path: str = path, names: list[str] = names) -> None:
                states = out[0] if isinstance(out, (tuple, list)) else out
                stream = {"entering": self.entered.pop(path, None), "leaving": states}
                for name in names:
                    layer = self.open.pop(name, None)
                    if layer is not None:
                        found = {n: t.detach().flatten(1, -2) for n, t in stream.items() if isinstance(t, Tensor)}
                        more = found if "residual" in self.keep else {}
                        if "norms" in self.keep:
                            more = more | {f"norm_{n}": t.float().norm(dim=-1) for n, t in found.items()}
                        self._keep(replace(layer, tensors=dict(layer.tensors) | more))

            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)

    def _keep(self, layer: LayerRecord) -> None:
        settings, tensors = parts_of(layer)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.store is None and self.held + size > self.limit:
            self.temporary = tempfile.TemporaryDirectory(prefix="glocal-record-")
            self.store = Store(Path(self.temporary.name))
        if self.store is None:
            self.held += size
            self.layers.append(layer)
        else:
            self.layers.append(read_layer(settings, self.store.add(settings, tensors)))

    def _tokens(self, keys: int, cross: bool) -> Tensor | None:
        ids = self.inputs.get("input_ids")
        return ids if ids is not None and ids.dim() == 2 and ids.shape[1] == keys else None

    def discard(self) -> None:
        """After an exception."""
        if self.temporary is not None:
            self.temporary.cleanup()

    def result(self) -> Record:
        if not self.layers:
            self.discard()
            raise ValueError("model must call layers of softmax attention; it called none")
        if self.store is not None and self.temporary is None:
            self.store.close(self.inputs)
        found = Record(self.layers, self.inputs)
        found._holds = self.temporary
        return found


def _compact(tensor: Tensor) -> Tensor:
    """Without the copies along axes that were only expanded."""
    for axis, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor
