"""What a pretrained model attends to on one input: maps and numbers of its heads, and what they matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.bench import decoder, encoder, vlm
from glocal.bench import folder as folder_of
from glocal.bench.run import Interrupted, Step, short
from glocal.bench.text import from_library
from glocal.inspect import (
    METRICS,
    Record,
    Tile,
    attribution_rollout,
    gradient_times_input,
    head_ablation,
    layer_attributions,
    measure,
    prune_order,
    pruning_curve,
    record,
    rollout,
)

__all__ = ["Inspection", "Settings", "Subject", "inspect_model"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_CELLS, _BYTES = 256, 8_000_000
"""Cells of a side of a map on the page, and bytes of all maps, at most."""


@dataclass(frozen=True)
class Settings:
    """What to inspect.

    Args:
        model: a folder of a text encoder, a causal language model or an image model; ``"bytes"`` and ``"scenes"`` are
            glocal's own language model and picture model; the encoder MiniLM where None.
        input: a text, or a path of a text or a picture; an example where None.
        tokens: a text is cut to this many.
        pruning: whether to measure what pruning costs: a run of the model for each head.
    """

    model: str | None = None
    input: str | None = None
    tokens: int = 256
    pruning: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.tokens <= 1 << 16:
            raise ValueError(f"tokens must be from 2 to {1 << 16}; it was {self.tokens}")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and what it is given.

    Args:
        name: of the model.
        kind: ``"causal"``, ``"encoder"`` or ``"image"``.
        model: of transformers.
        inputs: its arguments.
        source: where the input is from.
        labels: each token as text, or what a place in a picture is.
        grid: rows and columns of a picture's patches, which are the last tokens; None for text.
        picture: what the model sees, ``(height, width, 3)`` from 0 to 1; None for text.
        cut: how many tokens the whole text had.
    """

    name: str
    kind: str
    model: Any
    inputs: dict[str, Tensor]
    source: str
    labels: list[str]
    grid: tuple[int, int] | None = None
    picture: Tensor | None = None
    cut: int = 0

    @property
    def unit(self) -> str:
        """What `loss` counts."""
        return "bits per token" if self.kind == "causal" else "cosine distance of the embedding"

    @property
    def question(self) -> str:
        """What `objective` is."""
        return "the likeliest next token" if self.kind == "causal" else "the embedding"

    def objective(self, output: Any) -> Tensor:
        """What is attributed to the input."""
        if self.kind == "causal":
            found: Tensor = output.logits[:, -1].amax(-1).sum()
            return found
        pooled = self._pooled(output)
        return (pooled * pooled.detach()).sum()

    @torch.no_grad()
    def loss(self, whole: Tensor | None) -> tuple[float, Tensor | None]:
        """What is lost: of the text, or against the embedding of the whole model; and that embedding."""
        output = self.model(**self.inputs)
        if self.kind == "causal":
            ids = self.inputs["input_ids"]
            nats = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
            return float(nats) / math.log(2), None
        pooled = self._pooled(output).double()
        if whole is None:
            return 0.0, pooled
        return max(0.0, 1 - float(torch.nn.functional.cosine_similarity(pooled, whole, dim=-1)[0])), whole

    def _pooled(self, output: Any) -> Tensor:
        found: Tensor = output.last_hidden_state.mean(1)
        return found


@dataclass
class Inspection:
    """What was found, as far as it was measured.

    Args:
        subject: whose.
        layers: paths of the layers.
        metrics: of each head, by name, ``(layers, H)``.
        maps: of each layer, ``(H, cells, cells)``, queries by keys: means over the queries of a cell, sums over keys.
        cells: how many tokens a cell is.
        attributions: what of the input the answer rests on, by name, ``(N,)``.
        received: what each token draws, the mean over layers, heads and queries, ``(N,)``.
        pruned: share of heads without which the model ran, cheapest first, and what it lost.
        loss: of the whole model.
    """

    subject: Subject
    layers: list[str]
    metrics: dict[str, Tensor]
    maps: list[Tensor]
    cells: int
    attributions: dict[str, Tensor]
    received: Tensor
    pruned: list[tuple[float, float]] = field(default_factory=list)
    loss: float = 0.0

    @property
    def rows(self) -> list[str]:
        """What a table of an interrupted run would have."""
        return self.layers

    def to_dict(self) -> dict[str, Any]:
        """All numbers but the maps."""
        return {
            "model": self.subject.name,
            "input": self.subject.source,
            "tokens": self.subject.labels,
            "layers": self.layers,
            "metrics": {name: _plain(value) for name, value in self.metrics.items()},
            "attributions": {name: value.tolist() for name, value in self.attributions.items()},
            "received": self.received.tolist(),
            "loss": {"unit": self.subject.unit, "whole": self.loss, "pruned": self.pruned},
        }


def inspect_model(settings: Settings, step: Step = lambda what, done, total: None) -> Inspection:
    """Record, measure, attribute, and try the model without each of its heads.

    Args:
        settings: what.
        step: is told how far it is.

    Raises:
        ValueError: a model or an input that cannot be read, or that do not go together.
        Interrupted: the user stopped while pruning was tried; it holds what was measured before.
    """
    step("loading", 0, 1)
    subject = load(settings)
    step("recording attention", 0, 1)
    found = record(subject.model, subject.inputs)
    metrics = measure(found, METRICS if subject.grid is None else _of_pictures(subject, subject.grid))
    heads = sum(layer.heads for layer in found)
    result = Inspection(
        subject,
        found.names,
        metrics,
        *_maps(found, heads),
        _attributions(subject, found),
        _received(found),
    )
    if settings.pruning:
        try:
            _prune(result, step)
        except KeyboardInterrupt:
            raise Interrupted(result) from None
    return result


def _prune(result: Inspection, step: Step) -> None:
    """The loss without each head, and without more and more of them, cheapest first."""
    subject = result.subject
    result.loss, whole = subject.loss(None)
    heads = int((~result.metrics["entropy"].isnan()).sum())
    shares = sorted({round(heads * tenth / 10) for tenth in range(10)})

    def lost(what: str, total: int) -> Callable[[Any], float]:
        done = itertools.count()

        def evaluate(model: Any) -> float:
            step(what, next(done), total)
            return subject.loss(whole)[0]

        return evaluate

    cost = head_ablation(subject.model, lost("trying the model without each head", heads + 1)).change
    order = prune_order(cost)
    evaluate = lost("trying the model without more and more heads", len(shares))
    curve = pruning_curve(subject.model, order, evaluate, shares)
    result.pruned = [(count / heads, loss) for count, loss in zip(shares, curve, strict=True)]
    result.metrics["cost"] = cost


def _maps(found: Record, heads: int) -> tuple[list[Tensor], int]:
    """Maps small enough for a page, and how many tokens a cell is."""
    side = max(8, min(_CELLS, math.isqrt(_BYTES // max(1, heads))))
    size = -(-max(layer.queries for layer in found) // side)
    maps = []
    for layer in found:
        cells = -(-layer.queries // size)
        total = torch.zeros(layer.heads, cells, -(-layer.keys // size), dtype=torch.float64)
        for tile in layer.tiles():
            keys = torch.nn.functional.pad(tile.weights[0].double(), (0, -layer.keys % size))
            total.index_add_(1, tile.rows // size, keys.unflatten(-1, (-1, size)).sum(-1))
        count = torch.bincount(torch.arange(layer.queries) // size)
        maps.append((total / count[:, None]).float())
    return maps, size


def _received(found: Record) -> Tensor:
    total, count = torch.zeros(found[0].keys, dtype=torch.float64), 0
    for layer in found:
        for tile in layer.tiles():
            total += tile.weights[0].double().sum((0, 1))
        count += layer.heads * layer.queries
    return total / count


def _attributions(subject: Subject, found: Record) -> dict[str, Tensor]:
    gradient = gradient_times_input(subject.model, subject.inputs, subject.objective)[0]
    if subject.grid is not None:
        gradient = _patches(gradient, subject.grid, len(subject.labels))
    count = len(subject.labels)
    # An embedding is the mean of all states; the next token is said by the last one.
    query: Tensor | int = -1 if subject.kind == "causal" else torch.full((1, count), 1 / count)
    result = {"gradient x input": gradient.double(), "attention rollout": rollout(found, query)[0].double()}
    if subject.kind == "encoder":
        try:
            layers = layer_attributions(subject.model, subject.inputs)
        except ValueError:  # no post-norm blocks
            return result
        result["GlobEnc"] = attribution_rollout(layers, query)[0]
    return result


def _patches(pixels: Tensor, grid: tuple[int, int], tokens: int) -> Tensor:
    """Lengths of the pixels' parts in each patch; class tokens, which are no pixels, get none."""
    high, wide = (size // count for size, count in zip(pixels.shape, grid, strict=True))
    lengths = pixels.unfold(0, high, high).unfold(1, wide, wide).flatten(2).norm(dim=-1).flatten()
    return torch.nn.functional.pad(lengths, (tokens - len(lengths), 0))


def _of_pictures(subject: Subject, grid: tuple[int, int]) -> dict[str, Callable[[Tile], Tensor]]:
    """Metrics of a picture's tokens, distances in patches."""
    more = len(subject.labels) - grid[0] * grid[1]
    place = torch.cartesian_prod(*(torch.arange(float(n)) for n in grid))
    away = torch.nn.functional.pad(torch.cdist(place, place), (more, 0, more, 0))

    def distance(tile: Tile) -> Tensor:
        return (tile.weights * away[tile.rows]).sum(-1)

    def local(tile: Tile) -> Tensor:
        near = away[tile.rows] < 1.5
        near[:, :more] = False
        return (tile.weights * near).sum(-1)

    return {"distance": distance, "entropy": METRICS["entropy"], "local": local, "sink": METRICS["sink"]}


def _plain(value: Tensor) -> list[Any]:
    """Numbers for JSON, which has no NaN."""
    return [[None if math.isnan(v) else v for v in row] for row in value.tolist()]


# What is looked at.


def load(settings: Settings) -> Subject:
    """The model and its input.

    Raises:
        ValueError: as `inspect_model`.
    """
    name, given = settings.model, settings.input
    path = Path(given) if given and given.strip() and len(given) < 1024 and "\n" not in given else None
    there = path is not None and path.is_file()
    picture = path if there and path is not None and path.suffix.lower() in PICTURES else None
    if path is not None and not there and (path.suffix.lower() in (*PICTURES, ".txt") or path.is_dir()):
        raise ValueError(f"input {short(str(path))} is not a file")
    if name == vlm.SCENES or (name is not None and name != decoder.BYTES and _sees(name)):
        if given is not None and picture is None:
            raise ValueError(
                f"input must be a picture ({', '.join(PICTURES)}) for {name!r}, which reads images; it was "
                f"{short(given)}"
            )
        return _image(str(name), picture)
    if picture is not None:
        raise ValueError(f"input must be text for {name or 'the encoder MiniLM'}; it was the picture {picture.name!r}")
    text, source = _text(given, path if there else None)
    if name == decoder.BYTES or (name is not None and folder_of.kind(name) == "causal"):
        return _causal(str(name), text, source, settings.tokens)
    return _encoder(name, text, source, settings.tokens)


def _text(given: str | None, path: Path | None) -> tuple[str | None, str]:
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"input {str(path)!r} cannot be read as UTF-8 text: {error}") from None
        source = path.name
    elif given is not None:
        text, source = given, "a text of yours"
    else:
        return None, "an example"
    if not text.strip():
        raise ValueError(f"input must hold text; {source} was empty")
    return text, source


def _encoder(name: str | None, text: str | None, source: str, tokens: int) -> Subject:
    held = encoder.load(name)
    if text is None:
        text = (
            "The bank raised its rates because the river had flooded. It was the third time this year that it did so."
        )
    whole = held.tokenizer(text, verbose=False)["input_ids"]
    ids = held.tokenizer(text, truncation=True, max_length=min(tokens, held.max_tokens))["input_ids"]
    labels = [_readable(token) for token in held.tokenizer.convert_ids_to_tokens(ids)]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return Subject(held.name, "encoder", held.model, inputs, source, labels, cut=len(whole))


def _causal(name: str, text: str | None, source: str, tokens: int) -> Subject:
    held = decoder.load(name)
    if text is None:
        text = from_library(1, 400)[0]
    whole = held.ids(text)
    if held.start is not None:
        whole = [held.start, *whole]
    ids = whole[: min(tokens, held.max_tokens)]
    if len(ids) < 2:
        raise ValueError(f"input must hold at least two tokens; it had {len(ids)}")
    labels = [held.text([i]) or f"[{i}]" for i in ids]
    return Subject(held.name, "causal", held.model, {"input_ids": torch.tensor([ids])}, source, labels, cut=len(whole))


def _readable(token: str) -> str:
    """A token of a vocabulary as one reads it.

    >>> _readable("##ing"), _readable("\u0120the"), _readable("\u2581a")
    ('ing', ' the', ' a')
    """
    if token.startswith("##"):
        return token[2:]
    return token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")


def _sees(name: str) -> bool:
    """Whether a folder's model reads images."""
    import json

    config = json.loads((folder_of.check(name) / "config.json").read_text(encoding="utf-8"))
    from transformers.models.auto import modeling_auto as auto

    named = [str(each) for each in config.get("architectures") or ()]
    kinds = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return config.get("model_type") in kinds or any(each.endswith("VisionModel") for each in named)


def _image(name: str, path: Path | None) -> Subject:
    from glocal.bench.steered import example

    photo = example(0)[0] if path is None else vlm.read_picture(path)
    source = "a generated scene" if path is None else path.name
    if name == vlm.SCENES:
        held = vlm.load(name)
        model, processor = _tower(held.model), held.processor.image_processor
    else:
        model, processor = folder_of.loaded_image(folder_of.check(name))
    pixels = processor(images=[photo], return_tensors="pt")["pixel_values"]
    patch = model.config.patch_size
    high, wide = (patch, patch) if isinstance(patch, int) else tuple(patch)
    grid = (pixels.shape[-2] // high, pixels.shape[-1] // wide)
    with torch.no_grad():
        count = model(pixel_values=pixels).last_hidden_state.shape[1]
    more = count - grid[0] * grid[1]
    if more < 0:
        raise ValueError(f"model {name!r} has {count} tokens for {grid[0]} x {grid[1]} patches: it merges them")
    names = ["class token", *(f"register {n}" for n in range(1, more))][:more]
    labels = [*names, *(f"row {row + 1}, column {column + 1}" for row in range(grid[0]) for column in range(grid[1]))]
    shown = pixels[0].movedim(0, -1)
    low, top = shown.amin(), shown.amax()
    shown = (shown - low) / (top - low).clamp(min=1e-6)
    return Subject(name, "image", model, {"pixel_values": pixels}, source, labels, grid, shown)


def _tower(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__.endswith("VisionModel"):
            return module
    raise ValueError(f"{type(model).__name__} has no vision model")
