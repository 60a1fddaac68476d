"""What heads computed with, layer by layer, and any rows of the maps made from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.hf.rows import product
from glocal.inspect.store import Store, read
from glocal.kernels.common import offset_index
from glocal.patterns import Keys, Pattern, parse

__all__ = ["LayerRecord", "Record", "Tile", "block_of", "parts_of", "read_layer", "real_queries"]

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
            store.add(*parts_of(layer))
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
        return cls([read_layer(settings, tensors) for settings, tensors in layers], inputs)


def parts_of(layer: LayerRecord) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def read_layer(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerRecord:
    """A layer of what `parts_of` gave."""
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


def block_of(path: str) -> str:
    """The block that an attention module is in: up to the last number in its path, or what holds it.

    >>> block_of("encoder.layer.3.attention.self"), block_of("attention")
    ('encoder.layer.3', '')
    """
    parts = path.split(".")
    last = max((n for n, part in enumerate(parts[:-1]) if part.isdigit()), default=len(parts) - 2)
    return ".".join(parts[: last + 1])


def real_queries(where: Pattern, queries: int, cross: bool) -> Tensor | None:
    """Which queries are no padding, as the pattern's keys say where queries are the last of them."""
    masks = [] if cross else [node.real[:, 0] for node in where.walk() if isinstance(node, Keys) and not node.per_head]
    return masks[0][:, -queries:] if masks else None
