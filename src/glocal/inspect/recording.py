"""What the heads of a model compute with, kept so that attention can be looked at at any length."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.hf.rows import product
from glocal.inspect.modes import evaluating
from glocal.inspect.places import Operator, Place, intercept
from glocal.inspect.store import Store, read
from glocal.kernels.common import offset_index
from glocal.patterns import Full, Keys, Pattern, parse
from glocal.scores import Score

__all__ = ["KEEP", "LayerRecord", "Record", "Tile", "record"]

KEEP = ("attention", "values", "outputs", "residual", "norms")
"""What can be kept of a layer."""

_AT_ONCE = 1 << 22
"""Weights that are held at a time."""


@dataclass(frozen=True, eq=False)
class Tile:
    """Some rows of a layer's attention, of all heads. Made by `LayerRecord.tiles`.

    Args:
        layer: which they are of.
        rows: places of the queries, ``(R,)``, the grid flattened.
        weights: after the softmax, ``(B, H, R, Nk)``, in float32 or wider.
        live: which keys a query sees, booleans that broadcast to that.
    """

    layer: LayerRecord
    rows: Tensor
    weights: Tensor
    live: Tensor

    @property
    def at(self) -> Tensor:
        """Places of the queries among the keys of a sequence, ``(R,)``: they are the last ones."""
        return self.rows + (self.weights.shape[-1] - self.layer.queries if len(self.layer.grid_k) == 1 else 0)

    @property
    def asks(self) -> Tensor:
        """Which queries are no padding and see a key, booleans ``(B, H, R)``."""
        seen = self.live.any(-1).expand(self.weights.shape[:-1])
        real = self.layer.real
        return seen if real is None else seen & real[:, None, self.rows]


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One layer's attention in one call. Made by `record`.

    Tensors are ``q (B, H, Nq, D)`` and ``k (B, Hkv, Nk, D)`` after norms and rotation, ``lse (B, H, Nq)``, ``v (B, Hkv,
    Nk, Dv)``, ``outputs (B, H, Nq, Dv)`` before heads are joined, ``entering`` and ``leaving (B, N, C)``, the residual
    stream before and after the block, and their norms, ``norm_q (B, H, Nq)`` and so on; grids are flattened. Each is
    there if it was asked for, and read from the disk at each use where it lies there.

    Args:
        name: the path of its module in the model.
        grid_q, grid_k: of queries and keys.
        where: what a query sees.
        scale: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 where they do not.
        cross: whether keys come from another sequence.
        real: which queries are no padding, ``(B, Nq)``; None where all are.
        tokens: what the keys are, ``(B, Nk)``, where the model was given ids.
    """

    name: str
    grid_q: tuple[int, ...]
    grid_k: tuple[int, ...]
    where: Pattern
    scale: float
    softcap: float = 0.0
    cross: bool = False
    real: Tensor | None = None
    tokens: Tensor | None = None
    heads: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def queries(self) -> int:
        """How many."""
        return math.prod(self.grid_q)

    @property
    def keys(self) -> int:
        """How many."""
        return math.prod(self.grid_k)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name == "tensors":
            raise AttributeError(name)
        try:
            return self.tensors[name]
        except KeyError:
            raise AttributeError(
                f"the record of {self.name!r} does not hold {name}: it holds {', '.join(self.tensors)}; "
                "say what to keep in record(..., keep=...)"
            ) from None

    def scores(self, rows: Tensor) -> Tensor:
        """Before the softmax, ``(B, H, R, Nk)`` in float32 or wider, minus infinity where a key is not seen.

        Args:
            rows: places of the queries, ``(R,)``.
        """
        q, k = self.q[:, :, rows], self.k
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = product(q.to(wide), k.to(wide).mT) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if "bias" in self.tensors:
            bias = self.tensors["bias"]
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., rows, :])
        if "table" in self.tensors:
            at = torch.arange(self.keys, device=rows.device)
            scores = scores + self.tensors["table"].flatten(1)[:, offset_index(rows, at, self.grid_q, self.grid_k)]
        return scores.masked_fill(~self.where.rows(rows, self.grid_q, self.grid_k), -torch.inf)

    def weights(self, rows: Tensor | None = None) -> Tensor:
        """After the softmax, ``(B, H, R, Nk)`` in float32 or wider; zeros where a query sees nothing.

        Args:
            rows: places of the queries, ``(R,)``; all of them where None, for inputs that are short.
        """
        rows = torch.arange(self.queries, device=self.q.device) if rows is None else rows
        lse = self.lse[:, :, rows, None]
        return (self.scores(rows) - lse.masked_fill(lse.isneginf(), 0)).exp()

    def tiles(self, at_once: int = _AT_ONCE) -> Iterator[Tile]:
        """All rows, a few at a time.

        Args:
            at_once: weights that are held at a time, at most, or one row.
        """
        held = replace(
            self, tensors={n: self.tensors[n] for n in ("q", "k", "lse", "bias", "table") if n in self.tensors}
        )
        batch, heads = self.q.shape[:2]
        for rows in torch.arange(self.queries, device=self.q.device).split(
            max(1, at_once // (batch * heads * self.keys))
        ):
            yield Tile(held, rows, held.weights(rows), self.where.rows(rows, self.grid_q, self.grid_k))


class Record(Sequence[LayerRecord]):
    """What `record` kept: the layers that ran, in order, and what the model was given.

    Args:
        layers: of which it consists.
        inputs: the model's tensors by name.
    """

    def __init__(self, layers: Sequence[LayerRecord], inputs: Mapping[str, Tensor] = {}) -> None:
        self.layers, self.inputs = list(layers), dict(inputs)
        self._holds: Any = None  # a temporary folder, which goes with the record

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, at: Any) -> Any:
        return self.layers[at]

    def __repr__(self) -> str:
        return f"Record of {len(self)} layers: {', '.join(layer.name for layer in self.layers)}"

    @property
    def names(self) -> list[str]:
        """Paths of the layers' modules."""
        return [layer.name for layer in self.layers]

    def save(self, folder: str | Path) -> None:
        """Write it, layer by layer; the index comes last, so that what was cut short is known for that.

        Args:
            folder: is made where it is not there.

        Raises:
            ValueError: something else lies there, or a pattern that is a function of the user's cannot be written.
        """
        store = Store(Path(folder))
        for layer in self.layers:
            store.add(*_parts(layer))
        store.close(self.inputs)

    @classmethod
    def load(cls, folder: str | Path) -> Record:
        """Read what `save` or `record` wrote; tensors stay on the disk until they are used.

        Args:
            folder: of the record.

        Raises:
            ValueError: it is no record, or was cut short or damaged: the message says which file.
        """
        layers, inputs = read(Path(folder))
        return cls([_layer(settings, tensors) for settings, tensors in layers], inputs)


def _parts(layer: LayerRecord) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is written of a layer: settings, and tensors."""
    data: list[Tensor] = []
    settings = {
        "name": layer.name,
        "grid_q": layer.grid_q,
        "grid_k": layer.grid_k,
        "where": layer.where.spec(data),
        "scale": layer.scale,
        "softcap": layer.softcap,
        "cross": layer.cross,
        "heads": layer.heads,
    }
    tensors = dict(layer.tensors) | {f"where.{n}": each for n, each in enumerate(data)}
    for name in ("real", "tokens"):
        if getattr(layer, name) is not None:
            tensors[f"of.{name}"] = getattr(layer, name)
    return settings, tensors


def _layer(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerRecord:
    data = [tensors[name] for name in sorted((n for n in tensors if n.startswith("where.")), key=lambda n: int(n[6:]))]
    return LayerRecord(
        settings["name"],
        tuple(settings["grid_q"]),
        tuple(settings["grid_k"]),
        parse(settings["where"], data),
        settings["scale"],
        settings["softcap"],
        settings["cross"],
        tensors.get("of.real"),
        tensors.get("of.tokens"),
        settings["heads"],
        tensors,
    )


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
            _real(where, q.shape[2], place.cross),
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
        settings, tensors = _parts(layer)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.store is None and self.held + size > self.limit:
            self.temporary = tempfile.TemporaryDirectory(prefix="glocal-record-")
            self.store = Store(Path(self.temporary.name))
        if self.store is None:
            self.held += size
            self.layers.append(layer)
        else:
            self.layers.append(_layer(settings, self.store.add(settings, tensors)))

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


def block_of(path: str) -> str:
    """The block that an attention module is in: up to the last number in its path, or what holds it.

    >>> block_of("encoder.layer.3.attention.self"), block_of("attention")
    ('encoder.layer.3', '')
    """
    parts = path.split(".")
    last = max((n for n, part in enumerate(parts[:-1]) if part.isdigit()), default=len(parts) - 2)
    return ".".join(parts[: last + 1])


def _real(where: Pattern, queries: int, cross: bool) -> Tensor | None:
    """Which queries are no padding, as the pattern's keys say where queries are the last of them."""
    masks = [] if cross else [node.real[:, 0] for node in where.walk() if isinstance(node, Keys) and not node.per_head]
    return masks[0][:, -queries:] if masks else None


def _compact(tensor: Tensor) -> Tensor:
    """Without the copies along axes that were only expanded."""
    for axis, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor
