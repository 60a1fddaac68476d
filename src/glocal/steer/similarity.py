"""gLocal: a linear map of an encoder's features that agrees with people on what is alike, and keeps neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.steer.method import check_range

__all__ = [
    "GlocalTransform",
    "align",
    "identity_penalty",
    "neighbourhood_loss",
    "neighbourhood_overlap",
    "object_folds",
    "odd_one_out_accuracy",
    "odd_one_out_loss",
    "pooled",
    "representational_similarity",
]


class GlocalTransform(nn.Module):
    """``(x - mean) / std @ weight + bias``, as `align` fits it (Muttenthaler et al., 2023, arXiv 2306.04507).

    The weight begins as ``scale`` times the identity, the bias as ``scale``. ``mean`` and ``std`` are the two numbers
    by which the features it was fitted to were centred and scaled; they are saved with the weights, under the names
    ``weight``, ``bias``, ``mean`` and ``std`` of the state dict.

    Args:
        dim: ``C``, of the features.
        bias: whether there is one.
        scale: of the weight and the bias at first.

    Raises:
        ValueError: a dim below 1, a scale that is not above 0.

    >>> GlocalTransform(3, scale=2.0)(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [2.0, 4.0, 6.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, *, bias: bool = False, scale: float = 1e-3) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; it was {dim}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be above 0; it was {scale}")
        self.weight = nn.Parameter(torch.eye(dim) * scale)
        self.bias = nn.Parameter(torch.full((dim,), scale)) if bias else None
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.history: list[dict[str, float]] = []
        """The losses of each epoch, where `align` fitted it."""

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(..., C)`` to ``(..., C)`` of the same dtype; computed in the weight's.

        Raises:
            ValueError: features of another size.
        """
        if x.shape[-1] != len(self.weight):
            raise ValueError(f"x must have {len(self.weight)} features; its shape was {tuple(x.shape)}")
        return self._mapped((x.to(self.weight.dtype) - self.mean) / self.std).to(x.dtype)

    def _mapped(self, standard: Tensor) -> Tensor:
        found = standard @ self.weight
        return found if self.bias is None else found + self.bias


def odd_one_out_loss(x: Tensor, triplets: Tensor) -> Tensor:
    """Cross-entropy of choosing the pair that people chose, by dot products.

    Args:
        x: ``(M, C)``, one row an object.
        triplets: ``(T, 3)`` numbers of objects; the first two are the pair most alike, the third the odd one out.

    Raises:
        ValueError: triplets that are none.

    >>> odd_one_out_loss(torch.zeros(3, 2), torch.tensor([[0, 1, 2]]))  # log 3
    tensor(1.0986)
    """
    return _odd(_pairs(x, triplets))


def neighbourhood_loss(x: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """How far the neighbours of each row of ``y`` are from those that it has in ``x``: a cross-entropy.

    For each row a softmax over the cosines to all other rows, divided by the temperature; those of ``x`` are the
    teacher's, without a gradient. The least value is the teacher's entropy.

    Args:
        x: ``(B, C)``.
        y: ``(B, D)``.
        temperature: above 0; the lower, the fewer neighbours count.

    Raises:
        ValueError: fewer than three rows, or of different numbers; a temperature that is none.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"x and y must be (B, C) and (B, D), B at least 3; they were {tuple(x.shape)}, {tuple(y.shape)}"
        )
    _positive("temperature", temperature)
    teacher, student = (_others(_cosines(_float(each)) / temperature) for each in (x.detach(), y))
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()


def identity_penalty(weight: Tensor) -> Tensor:
    """Squared distance of a square matrix ``(C, C)`` from the nearest multiple of the identity; 0 for any of those.

    >>> identity_penalty(torch.tensor([[3.0, 1.0], [0.0, 1.0]]))
    tensor(3.)
    """
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight must be (C, C); it was {tuple(weight.shape)}")
    return (weight - torch.diag_embed(weight.diagonal().mean().expand(len(weight)))).square().sum()


def align(
    features: Tensor,
    triplets: Tensor,
    *,
    kind: Literal["glocal", "global", "naive"] = "glocal",
    local_features: Tensor | None = None,
    alpha: float = 0.25,
    temperature: float = 0.1,
    penalty: float = 1.0,
    held_out: Tensor | None = None,
    held_out_local: Tensor | None = None,
    optimizer: Literal["sgd", "adam"] = "sgd",
    lr: float = 1e-3,
    epochs: int = 100,
    least_epochs: int = 20,
    patience: int = 15,
    batch: int = 256,
    local_batch: int = 1024,
    ramp: int = 5,
    clip: float = 1.0,
    bias: bool = False,
    scale: float = 1e-3,
    standardise_local: bool = False,
    progress: bool = False,
    seed: int = 0,
) -> GlocalTransform:
    """Fit a `GlocalTransform` to judgments of which of three objects is the odd one out.

    The loss is ``(1 - alpha) * odd_one_out_loss + alpha * neighbourhood_loss + penalty * identity_penalty``. Kind
    ``global`` leaves the neighbours out (``alpha`` of 0), ``naive`` also holds down the norm of the weight instead of
    its distance from the identity. Features are centred and scaled by two numbers, those of the whole matrix.

    With ``held_out`` triplets training stops once the plain sum of both losses on what is held out has not fallen for
    some epochs, and the weights of its lowest point are kept. Equal seeds give equal weights.

    Args:
        features: ``(M, C)``, one row an object; `pooled` makes them.
        triplets: ``(T, 3)`` as for `odd_one_out_loss`.
        kind: see above.
        local_features: ``(N, C)`` of other pictures whose neighbours are to stay; the objects' own where None.
        alpha: weight of the neighbourhood loss.
        temperature: of it.
        penalty: weight of the penalty.
        held_out: triplets ``(S, 3)``; of `object_folds`, so that no object is in both.
        held_out_local: features ``(K, C)``; the training ones where None.
        optimizer: SGD with a momentum of 0.9, or Adam.
        lr: learning rate; over the first ``ramp`` epochs it rises from a third of it.
        epochs: at most.
        least_epochs: before it stops.
        patience: epochs without improvement.
        batch: triplets a step.
        local_batch: pictures a step, drawn anew; all where there are no more.
        ramp: epochs.
        clip: greatest norm of the gradient.
        bias: learn one.
        scale: of the weights at first.
        standardise_local: centre and scale the local features too in the loss; the authors do not.
        progress: show a bar, by rich.
        seed: of what is drawn.

    Returns:
        The transform, on the features' device, in float32 (float64 where they are); its ``history`` holds ``odd``,
        ``local`` and ``held_out`` of each epoch.

    Raises:
        ValueError: features or triplets of other shapes or values, settings out of range.
        FloatingPointError: the loss is not finite.

    Example::

        train, test = object_folds(triplets)[0]
        transform = align(pooled(encoder, batches), train, local_features=others, held_out=test)
        odd_one_out_accuracy(transform(features), test)
    """
    _check_features("features", features, 2)
    _check_triplets(triplets, len(features))
    if kind not in ("glocal", "global", "naive"):
        raise ValueError(f"kind must be 'glocal', 'global' or 'naive'; it was {kind!r}")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be 'sgd' or 'adam'; it was {optimizer!r}")
    check_range("alpha", alpha, 0, 1)
    check_range("penalty", penalty, 0)
    for name, value in {"temperature": temperature, "lr": lr, "clip": clip}.items():
        _positive(name, value)
    counts = dict(epochs=epochs, patience=patience, batch=batch, ramp=ramp)
    for name, count, least in [*((*each, 1) for each in counts.items()), ("local_batch", local_batch, 3)]:
        if count < least:
            raise ValueError(f"{name} must be at least {least}; it was {count}")
    device, x = features.device, _float(features)
    mean, std = x.mean(), x.std(correction=0)
    if not bool(std > 0):
        raise ValueError("features must differ: all were the same number")
    others = features if local_features is None else local_features
    others_held = others if held_out_local is None else held_out_local
    for name, each in (("local_features", others), ("held_out_local", others_held)):
        _check_features(name, each, 3, features.shape[1])
    if held_out is not None:
        _check_triplets(held_out, len(features), "held_out")

    transform = GlocalTransform(features.shape[1], bias=bias, scale=scale).to(device, x.dtype)
    transform.mean.copy_(mean)
    transform.std.copy_(std)
    x, triplets = (x - mean) / std, triplets.to(device)
    others, others_held = (each.to(device, x.dtype) for each in (others, others_held))
    if standardise_local:
        others, others_held = (others - mean) / std, (others_held - mean) / std
    alpha = alpha if kind == "glocal" else 0.0

    def local(pictures: Tensor) -> Tensor:
        return neighbourhood_loss(pictures, transform._mapped(pictures), temperature) if alpha else x.new_zeros(())

    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    made = kinds[optimizer](transform.parameters(), lr=lr, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    schedule = torch.optim.lr_scheduler.LinearLR(made, 1 / 3, total_iters=ramp)
    draw = torch.Generator().manual_seed(seed)
    best, since = (math.inf, transform.state_dict()), 0
    for _ in _shown(epochs, progress):
        sums = {"odd": 0.0, "local": 0.0}
        order = torch.randperm(len(triplets), generator=draw).to(device)
        for chosen in order.split(batch):
            some = others
            if alpha and len(others) > local_batch:
                some = others[torch.randperm(len(others), generator=draw)[:local_batch].to(device)]
            odd, near = _odd(_products(transform._mapped(x), triplets[chosen])), local(some)
            held = identity_penalty(transform.weight) if kind != "naive" else torch.linalg.matrix_norm(transform.weight)
            loss = (1 - alpha) * odd + alpha * near + penalty * held
            if not math.isfinite(float(loss.detach())):
                raise FloatingPointError(f"the loss is not finite: lower lr {lr} or penalty {penalty}")
            made.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(transform.parameters(), clip)
            made.step()
            sums["odd"] += float(odd.detach()) * len(chosen) / len(triplets)
            sums["local"] += float(near.detach()) * len(chosen) / len(triplets)
        schedule.step()
        if held_out is not None:
            with torch.no_grad():
                sums["held_out"] = float(odd_one_out_loss(transform._mapped(x), held_out) + local(others_held))
        transform.history.append(sums)
        if held_out is not None:
            since += 1
            if sums["held_out"] < best[0]:
                best, since = (sums["held_out"], {k: v.clone() for k, v in transform.state_dict().items()}), 0
            if since >= patience and len(transform.history) >= least_epochs:
                break
    transform.load_state_dict(best[1])
    for p in transform.parameters():
        p.grad = None
    return transform


def object_folds(triplets: Tensor, folds: int = 4, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Splits of triplets ``(T, 3)`` by objects: to train, and to test, each time with other objects held out.

    The objects are dealt into ``folds``. What is held out are the triplets of one fold's objects only, to train are
    those without any of them; a triplet with objects of both is in neither. The authors use the first split.

    Raises:
        ValueError: triplets that are none; folds below 2.
    """
    _check_triplets(triplets)
    if folds < 2:
        raise ValueError(f"folds must be at least 2; it was {folds}")
    objects, places = triplets.unique(return_inverse=True)
    order = torch.randperm(len(objects), generator=torch.Generator().manual_seed(seed)).to(triplets.device)
    fold = (order % folds)[places]
    return [(triplets[(fold != n).all(1)], triplets[(fold == n).all(1)]) for n in range(folds)]


@torch.no_grad()
def odd_one_out_accuracy(x: Tensor, triplets: Tensor) -> float:
    """Share of triplets whose first two have the greatest dot product; ties are wrong. As for `odd_one_out_loss`.

    For cosines give rows of length 1.
    """
    scores = _pairs(x, triplets)
    return float((scores[:, 0] > scores[:, 1:].amax(1)).double().mean())


@torch.no_grad()
def neighbourhood_overlap(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Share of the ``k`` nearest neighbours by cosine that rows have in common in ``x (M, C)`` and ``y (M, D)``.

    Raises:
        ValueError: rows of different numbers, or not more than ``k`` of them.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not 0 < k < len(x):
        raise ValueError(
            f"x and y must be (M, C) and (M, D), M above k = {k} > 0; they were {tuple(x.shape)}, {tuple(y.shape)}"
        )
    near = [_cosines(_float(each)).fill_diagonal_(-math.inf).topk(k, dim=1).indices for each in (x, y)]
    return float((near[0][:, :, None] == near[1][:, None, :].to(x.device)).any(2).double().mean())


@torch.no_grad()
def representational_similarity(
    x: Tensor, y: Tensor, *, similarity: Literal["correlation", "cosine", "dot", "given"] = "correlation"
) -> float:
    """Spearman's rank correlation of what is alike in two sets of features: representational similarity analysis.

    Args:
        x: ``(M, C)``.
        y: ``(M, D)``, of the same objects.
        similarity: of two rows; ``given`` where both are matrices ``(M, M)`` of similarities already, of which the
            upper triangles count.

    Raises:
        ValueError: rows of different numbers, or fewer than three; another similarity.
    """
    if similarity not in ("correlation", "cosine", "dot", "given"):
        raise ValueError(f"similarity must be 'correlation', 'cosine', 'dot' or 'given'; it was {similarity!r}")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"x and y must be (M, C) and (M, D), M at least 3; they were {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if similarity == "given" and not (x.shape == y.shape == (len(x), len(x))):
        raise ValueError(f"given similarities must be (M, M); they were {tuple(x.shape)} and {tuple(y.shape)}")
    ranks = []
    for each in (x.double(), y.double().to(x.device)):
        if similarity == "correlation":
            each = each - each.mean(1, keepdim=True)
        if similarity != "given":
            each = each @ each.T if similarity == "dot" else _cosines(each)
        values = each[torch.triu(torch.ones_like(each, dtype=torch.bool), 1)]
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count.double() - 1) / 2)[place]  # ties share their mean rank
        ranks.append(rank - rank.mean())
    return float(F.cosine_similarity(ranks[0], ranks[1], dim=0))


@torch.no_grad()
def pooled(
    model: Any,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    how: Literal["auto", "pooler", "first", "mean"] = "auto",
    progress: bool = False,
) -> Tensor:
    """One feature vector of an encoder for each input.

    Args:
        model: an encoder of transformers: ``CLIPVisionModel``, ``ViTModel``, ``BertModel`` and the like.
        batches: the model's arguments, or its main one: pixel values, token numbers.
        how: ``pooler``, the model's own pooling; ``first``, the final state of the first token; ``mean``, of all
            tokens that ``attention_mask`` does not hide; ``auto`` is ``pooler`` where the model has it, else ``mean``.
        progress: show a bar, by rich.

    Returns:
        ``(N, C)`` in float32, on the model's device.

    Raises:
        TypeError: a model that gives no final states ``(B, T, C)``, such as a ``CLIPModel``: take its image tower.
        ValueError: no batches; ``pooler`` of a model without.
    """
    if how not in ("auto", "pooler", "first", "mean"):
        raise ValueError(f"how must be 'auto', 'pooler', 'first' or 'mean'; it was {how!r}")
    device, found = next(model.parameters()).device, []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in _shown(batches, progress):
            given = {model.main_input_name: batch} if isinstance(batch, Tensor) else batch
            inputs = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in given.items()}
            found.append(_pool(model(**inputs), inputs.get("attention_mask"), how, type(model).__name__).float())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not found:
        raise ValueError("batches must hold at least one; there was none")
    return torch.cat(found)


def _pool(out: Any, real: Tensor | None, how: str, name: str) -> Tensor:
    states, pooler = getattr(out, "last_hidden_state", None), getattr(out, "pooler_output", None)
    if how == "pooler" and pooler is None:
        raise ValueError(f"how must not be 'pooler': this {name} has none")
    if pooler is not None and how in ("auto", "pooler"):
        found: Tensor = pooler
        return found
    if states is None or states.ndim != 3:
        raise TypeError(f"model must be an encoder with final states (B, T, C); {name} gave none")
    wide: Tensor = states
    if how == "first":
        return wide[:, 0]
    if real is None:
        return wide.mean(1)
    return (wide * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def _shown(steps: int | Iterable[Any], progress: bool) -> Iterator[Any]:
    """The steps, with a bar where it is asked for."""
    items = range(steps) if isinstance(steps, int) else steps
    bar: Any = nullcontext()
    if progress:
        from rich.progress import Progress

        bar = Progress(transient=True)
    with bar:
        yield from bar.track(items) if progress else items


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0; it was {value}")


def _pairs(x: Tensor, triplets: Tensor) -> Tensor:
    """Dot products ``(T, 3)``: first and second, first and third, second and third."""
    _check_features("x", x, 1)
    _check_triplets(triplets, len(x))
    return _products(_float(x), triplets.to(x.device))


def _products(x: Tensor, triplets: Tensor) -> Tensor:
    a, b, c = x[triplets].unbind(1)
    return torch.stack([(a * b).sum(1), (a * c).sum(1), (b * c).sum(1)], 1)


def _odd(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


def _cosines(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=1)
    return x @ x.T


def _others(scores: Tensor) -> Tensor:
    """``(B, B)`` without the diagonal: ``(B, B - 1)``."""
    count = len(scores)
    return scores.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)


def _check_features(name: str, x: Tensor, least: int, dim: int | None = None) -> None:
    if x.ndim != 2 or len(x) < least or (dim is not None and x.shape[1] != dim) or not x.is_floating_point():
        want = "C" if dim is None else dim
        raise ValueError(f"{name} must be numbers (N, {want}), N at least {least}; it was {x.dtype} {tuple(x.shape)}")


def _check_triplets(triplets: Tensor, objects: int | None = None, name: str = "triplets") -> None:
    if triplets.ndim != 2 or triplets.shape[1] != 3 or not len(triplets) or triplets.is_floating_point():
        raise ValueError(f"{name} must be whole numbers (T, 3), T at least 1; it was {tuple(triplets.shape)}")
    low, high = int(triplets.min()), int(triplets.max())
    if low < 0 or (objects is not None and high >= objects):
        last = "" if objects is None else f" to {objects - 1}"
        raise ValueError(f"{name} must be numbers of objects from 0{last}; they went from {low} to {high}")
    if bool((triplets == triplets.roll(1, 1)).any()):
        raise ValueError(f"{name} must be of three different objects; some had one twice")
