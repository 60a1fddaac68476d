"""gLocal: a linear map of an encoder's features that agrees with people on what is alike, and keeps neighbours."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.progress import shown
from glocal.steer.method import check_range

__all__ = [
    "GlocalTransform",
    "align",
    "identity_penalty",
    "neighbourhood_loss",
    "odd_one_out_loss",
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
    return _odd(pair_products(x, triplets))


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
    teacher, student = (_others(cosines(in_float(each)) / temperature) for each in (x.detach(), y))
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
        features: ``(M, C)``, one row an object; `glocal.steer.features.pooled` makes them.
        triplets: ``(T, 3)`` as for `odd_one_out_loss`.
        kind: see above.
        local_features: ``(N, C)`` of other pictures whose neighbours are to stay; the objects' own where None.
        alpha: weight of the neighbourhood loss.
        temperature: of it.
        penalty: weight of the penalty.
        held_out: triplets ``(S, 3)``; of `glocal.bench.similarity.object_folds`, so that no object is in both.
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
    check_triplets(triplets, len(features))
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
    device, x = features.device, in_float(features)
    mean, std = x.mean(), x.std(correction=0)
    if not bool(std > 0):
        raise ValueError("features must differ: all were the same number")
    others = features if local_features is None else local_features
    others_held = others if held_out_local is None else held_out_local
    for name, each in (("local_features", others), ("held_out_local", others_held)):
        _check_features(name, each, 3, features.shape[1])
    if held_out is not None:
        check_triplets(held_out, len(features), "held_out")

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
    for _ in shown(range(epochs), progress):
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


def in_float(x: Tensor) -> Tensor:
    """Features of any shape in float32, or float64 where they are."""
    return x if x.dtype == torch.float64 else x.float()


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0; it was {value}")


def pair_products(x: Tensor, triplets: Tensor) -> Tensor:
    """Dot products ``(T, 3)``: first and second, first and third, second and third."""
    _check_features("x", x, 1)
    check_triplets(triplets, len(x))
    return _products(in_float(x), triplets.to(x.device))


def _products(x: Tensor, triplets: Tensor) -> Tensor:
    a, b, c = x[triplets].unbind(1)
    return torch.stack([(a * b).sum(1), (a * c).sum(1), (b * c).sum(1)], 1)


def _odd(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


def cosines(x: Tensor) -> Tensor:
    """Cosine similarities ``(N, N)`` of features ``(N, C)``."""
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


def check_triplets(triplets: Tensor, objects: int | None = None, name: str = "triplets") -> None:
    """Refuse, with a ValueError, what are no triplets ``(T, 3)`` of different numbers below ``objects``."""
    if triplets.ndim != 2 or triplets.shape[1] != 3 or not len(triplets) or triplets.is_floating_point():
        raise ValueError(f"{name} must be whole numbers (T, 3), T at least 1; it was {tuple(triplets.shape)}")
    low, high = int(triplets.min()), int(triplets.max())
    if low < 0 or (objects is not None and high >= objects):
        last = "" if objects is None else f" to {objects - 1}"
        raise ValueError(f"{name} must be numbers of objects from 0{last}; they went from {low} to {high}")
    if bool((triplets == triplets.roll(1, 1)).any()):
        raise ValueError(f"{name} must be of three different objects; some had one twice")
