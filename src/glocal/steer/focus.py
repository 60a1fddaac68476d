"""Directions that make the queries of chosen heads find what is relevant, how strongly, and an oracle beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.hf.rows import Rows
from glocal.progress import shown
from glocal.steer.contextual import FocusSample, check_sample, mass, read_rows, real_tokens, sinks
from glocal.steer.hooks import Run, Site
from glocal.steer.method import Method, check_range, layer_range
from glocal.steer.spans import PADDING, prompt_of
from glocal.steer.steering import language_layers

__all__ = ["Directions", "FocusDirections", "FocusOracle", "focus_oracle", "train_directions"]

Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Directions:
    """What is added to queries, after rotation.

    Args:
        query: for each layer ``(H, D)``, one vector a query head.
        history: the loss of each epoch of the training.
    """

    query: Mapping[int, Tensor]
    history: tuple[float, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write them as safetensors, ``layers.3.query`` and the like."""
        from safetensors.torch import save_file

        weights = {f"layers.{layer}.query": each.detach().contiguous() for layer, each in self.query.items()}
        save_file(weights, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str | Path, model: Any) -> Directions:
        """Read what `save` has written, for this model.

        Directions of keys (``layers.3.key``) are left out: one vector added to all keys moves all scores of a row
        alike, and the softmax takes it away.

        Raises:
            ValueError: no such file, damage, or directions of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} cannot be loaded: {error}") from None
        query = {}
        for name, each in found.items():
            parts = name.split(".")
            if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit() or parts[2] not in ("query", "key"):
                raise ValueError(f"{str(path)!r} holds no directions: {name}")
            if parts[2] == "query":
                query[int(parts[1])] = each
        try:
            _check_directions(query, model)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} does not fit this model: {error}") from None
        return cls(query)


def train_directions(
    model: Any,
    samples: Iterable[FocusSample],
    *,
    layers: Iterable[int] | None = None,
    epochs: int = 10,
    lr: float = 1e-3,
    noise: float = 0.01,
    cached: bool = True,
    progress: bool = False,
    seed: int = 0,
) -> Directions:
    """Learn, for every head, the vector that added to its queries moves attention to what is relevant.

    The loss of a layer is minus the attention to ``gold``, the mean over heads and rows, at queries and keys of the
    model as it is: layers do not see each other's directions. AdamW, a sample a step. Equal seeds give equal vectors.

    Args:
        model: a transformers model with a causal language model in it; its weights stay as they are.
        samples: prompts with their answers.
        layers: which to train; all where None.
        epochs: times through the samples.
        lr: learning rate.
        noise: standard deviation of the vectors at first.
        cached: keep queries and keys of all samples in memory; otherwise the model runs again for each step.
        progress: show a bar, by rich.
        seed: of the vectors at first.

    Raises:
        TypeError: a model without a causal language model.
        ValueError: no samples, masks of other shapes, settings out of range.
        FloatingPointError: the loss is not finite.
    """
    check_range("epochs", epochs, 1)
    check_range("noise", noise, 0)
    if not 0 < lr < torch.inf:
        raise ValueError(f"lr must be above 0; it was {lr}")
    shapes = _shapes(model)
    numbers = sorted(shapes if layers is None else layer_range(layers, len(shapes)))
    given = list(samples)
    if not given:
        raise ValueError("samples must hold at least one; there was none")
    places = [check_sample(sample) for sample in given]
    device, draw = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    shifts = {n: (torch.randn(shapes[n], generator=draw) * noise).to(device).requires_grad_() for n in numbers}
    optimizer = torch.optim.AdamW(shifts.values(), lr=lr)
    kept: dict[int, dict[int, Rows]] = {}
    history = [0.0] * epochs
    for step in shown(range(epochs * len(given)), progress):
        epoch, which = divmod(step, len(given))
        sample, at = given[which], places[which]
        read = kept[which] if which in kept else read_rows(model, sample.inputs, numbers, at)
        if cached:
            kept[which] = read
        with torch.enable_grad():
            losses = []
            for n in numbers:
                weights = read[n].weights(shifts[n][:, None].to(read[n].key.device))
                losses.append(-mass(weights, sample.gold, sample.rows[:, at]).mean().to(device))
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("the loss is not finite: the model's queries or keys are not, or lr is too high")
        optimizer.step()
        history[epoch] += float(loss.detach()) / len(numbers) / len(given)
    return Directions({n: shift.detach() for n, shift in shifts.items()}, tuple(history))


@dataclass
class FocusDirections(Method):
    """Adds a direction to the queries of chosen heads (Zhu et al., 2025, arXiv 2503.23306): attention goes to what is
    relevant, wherever it stands.

    ``q + alpha * d``, after rotation, at every position of prompt and answer; what is cached stays as it is, and the
    fused kernels are kept. A negative ``alpha`` moves attention away from what is relevant, a large one overshoots.

    Args:
        model: a transformers model with a causal language model in it.
        directions: `train_directions` makes them, `Directions.load` reads them.
        heads: layers and heads, such as `HeadScores.top` gives; all heads that have a direction where empty.
        alpha: how strongly; 0 changes nothing.
        sink: instead of ``alpha``, how much attention the first two tokens are to get at the prompt's last row, the
            mean over the chosen heads: ``alpha`` is then found by bisection, for each prompt by itself, on the queries
            and keys of one more prefill without steering.
        bounds: between which values that ``alpha`` is looked for; where none gives ``sink``, the nearer end is taken.

    Attributes:
        strength: of the newest run, the ``alpha`` of each prompt that ``sink`` has led to, ``(B,)``.

    Raises:
        TypeError: as in `Method`.
        ValueError: directions of another shape, heads that are not there or have no direction, settings out of range,
            or ``layers``, which ``heads`` says.

    Example::

        found = train_directions(model, samples)
        with FocusDirections(model, directions=found, heads=contextual_scores(model, samples).top(20)):
            model.generate(**inputs)
    """

    _: KW_ONLY
    directions: Directions = field(repr=False)
    heads: Heads = ()
    alpha: float = 0.2
    sink: float | None = None
    bounds: tuple[float, float] = (-0.5, 1.0)
    strength: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layers is not None:
            raise ValueError("layers are said by heads, pairs of a layer and a head; layers must be None")
        _check_directions(self.directions.query, self.model)
        shapes = _shapes(self.model)
        given = self.heads or [(layer, head) for layer in self.directions.query for head in range(shapes[layer][0])]
        self._chosen = _chosen(given, shapes)
        without = sorted(set(self._chosen) - set(self.directions.query))
        if without:
            raise ValueError(f"heads are of layer {without[0]}, which has no direction")
        self._shifts = {
            layer: self.directions.query[layer] * mask[:, None].to(self.directions.query[layer])
            for layer, mask in self._chosen.items()
        }
        check_range("alpha", self.alpha, -torch.inf)
        if self.sink is not None:
            check_range("sink", self.sink, 0, 1)
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be two rising numbers; they were {self.bounds}")
        self.layers = sorted(self._chosen)
        super().__post_init__()

    def begin(self, run: Run) -> None:
        """Find the strength, where it follows from the attention to the first tokens."""
        self.strength = None
        if self.sink is not None:
            self.strength = self._bisected(run, self.sink)

    def query(self, site: Site, query: Tensor) -> Tensor:
        """Chosen heads' queries, moved."""
        shift = self._shifts[site.layer].to(query.device)[:, None]
        if self.strength is not None:
            each = site.repeated(self.strength).to(query.device)
            return query + (each.to(shift.dtype)[:, None, None, None] * shift).to(query.dtype)
        return query + (self.alpha * shift).to(query.dtype) if self.alpha else query

    def _bisected(self, run: Run, target: float) -> Tensor:
        prompt = prompt_of(run.inputs)
        inputs = run.inputs
        if run.spans is not None and inputs.get("attention_mask") is None:
            inputs = inputs | {"attention_mask": (run.spans.kinds != PADDING).long()}
        first = sinks(inputs)
        last = real_tokens(inputs).cumsum(1).argmax(1)  # the last that is no padding
        at, rows = last.unique(return_inverse=True)
        read = read_rows(self.model, inputs, self.numbers, at)
        count = sum(int(mask.sum()) for mask in self._chosen.values())

        def gap(alpha: Tensor) -> Tensor:
            found = torch.zeros(len(prompt))
            for layer, mine in read.items():
                shift = self._shifts[layer].detach().to(mine.query.device, torch.float32)[:, None]
                moved = mine.weights(alpha.to(shift.device)[:, None, None, None] * shift)
                each = mass(moved, first, F.one_hot(rows, len(at)))
                found += (each * self._chosen[layer].to(each)).sum(1).cpu()
            return found / count - target

        low, high = (torch.full((len(prompt),), bound) for bound in self.bounds)
        below, above = gap(low), gap(high)
        nearer = torch.where(below.abs() <= above.abs(), low, high)
        between = below.sign() != above.sign()
        for _ in range(24):
            middle = (low + high) / 2
            left = gap(middle).sign() == below.sign()
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return torch.where(between, (low + high) / 2, nearer)


def focus_oracle(weights: Tensor, gold: Tensor, tau: float) -> Tensor:
    """Weights ``(..., N)`` whose sum over gold keys is ``pi ** tau`` where it was ``pi``; the others share the rest.

    Rows without attention to gold keys stay as they are.

    Args:
        weights: rows that sum to 1.
        gold: booleans that broadcast to them.
        tau: 0 gives all to gold keys, 1 changes nothing, more takes from them.

    >>> focus_oracle(torch.tensor([0.25, 0.75]), torch.tensor([True, False]), 0.5)
    tensor([0.5000, 0.5000])
    """
    share = (weights * gold).sum(-1, keepdim=True)
    rest = (weights * ~gold).sum(-1, keepdim=True)
    wanted = share**tau
    factor = torch.where(gold, wanted / share, (1 - wanted) / rest)
    return torch.where((share > 0) & (weights > 0), weights * factor, weights)


@dataclass
class FocusOracle(Method):
    """Gives known relevant keys more attention, to see what could be won (Zhu et al., 2025): a diagnosis.

    Args:
        model: a transformers model with a causal language model in it.
        gold: booleans ``(B, N)`` over the prompt.
        tau: as in `focus_oracle`; 1 changes nothing.
        heads: layers and heads; all where empty.

    Raises:
        ValueError: a mask of another shape than the prompt, heads that are not there, a negative ``tau``.
    """

    _: KW_ONLY
    gold: Tensor = field(repr=False)
    tau: float = 0.5
    heads: Heads = ()

    def __post_init__(self) -> None:
        check_range("tau", self.tau, 0)
        shapes = _shapes(self.model)
        every = [(layer, head) for layer, (heads, _) in shapes.items() for head in range(heads)]
        self._chosen = _chosen(self.heads or every, shapes)
        if self.layers is not None:
            raise ValueError("layers are said by heads, pairs of a layer and a head; layers must be None")
        self.layers = sorted(self._chosen)
        super().__post_init__()

    def begin(self, run: Run) -> None:
        """See that the mask is of this prompt."""
        shape = tuple(prompt_of(run.inputs).shape[:2])
        if tuple(self.gold.shape) != shape or self.gold.dtype != torch.bool:
            raise ValueError(f"gold must be booleans {shape}; it was {self.gold.dtype} {tuple(self.gold.shape)}")

    def edits(self, site: Site) -> bool:
        """Everywhere, but for the neutral setting."""
        return self.tau != 1

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Chosen heads' weights, moved."""
        gold = site.over_keys(self.gold).to(weights.device)
        moved = focus_oracle(weights, gold[:, None, None], self.tau)
        return torch.where(self._chosen[site.layer].to(weights.device)[:, None, None], moved, weights)


def _shapes(model: Any) -> dict[int, tuple[int, int]]:
    """Query heads and their size, by layer."""
    found = {}
    for layer, module in enumerate(language_layers(model).values()):
        config: Any = getattr(module, "config", None) or model.config.get_text_config(decoder=True)
        heads = int(config.num_attention_heads)
        size = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
        found[layer] = (heads, int(size))
    return found


def _check_directions(query: Mapping[int, Tensor], model: Any) -> None:
    shapes = _shapes(model)
    if not query:
        raise ValueError("directions must be of one layer at least; there are none")
    for layer, each in query.items():
        if layer not in shapes:
            raise ValueError(f"directions are of layer {layer}, the model's go to {len(shapes) - 1}")
        if tuple(each.shape) != shapes[layer] or not each.is_floating_point():
            raise ValueError(
                f"directions of layer {layer} must be numbers {shapes[layer]}, heads and their size; they were "
                f"{each.dtype} {tuple(each.shape)}"
            )


def _chosen(given: Heads, shapes: Mapping[int, tuple[int, int]]) -> dict[int, Tensor]:
    """Booleans ``(H,)`` for each layer of which a head is chosen; negative numbers count from the end."""
    found: dict[int, Tensor] = {}
    count = len(shapes)
    for layer, head in given:
        if not -count <= layer < count or not -shapes[layer % count][0] <= head < shapes[layer % count][0]:
            raise ValueError(
                f"heads must be layers to {count - 1} and heads to {shapes[0][0] - 1}; one was {layer, head}"
            )
        mask = found.setdefault(layer % count, torch.zeros(shapes[layer % count][0], dtype=torch.bool))
        mask[head] = True
    return found
