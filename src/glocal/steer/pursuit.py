"""Simultaneous orthogonal matching pursuit: many vectors as sums of the same few atoms of a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Pursuit", "lens", "pursuit", "read_atoms"]

_BUDGET = 1 << 24  # products held at a time


class Pursuit(NamedTuple):
    """What a pursuit found; the leading axes are those of its input.

    Args:
        atoms: rows of the dictionary in the order found, ``(..., k)`` in int64.
        explained: share of the variance that the atoms up to each explain, ``(..., k)``, from 0 to 1.
        weights: norm of each atom's coefficients, ``(..., k)``.
        coefficients: ``(..., n, k)``, of atoms of length 1 where the dictionary was normalised.
        residual: what is not explained, ``(..., n, C)``.
    """

    atoms: Tensor
    explained: Tensor
    weights: Tensor
    coefficients: Tensor
    residual: Tensor


def pursuit(
    x: Tensor,
    dictionary: Tensor,
    steps: int,
    *,
    center: bool = True,
    normalise: bool = True,
    score: Literal["sum", "std"] = "sum",
) -> Pursuit:
    """Explain vectors by few atoms, the same for all of them (Tropp, Gilbert and Strauss, 2006).

    Each step takes the atom that the residuals of all vectors agree with most, and fits the vectors anew on all atoms
    taken. As Basile et al., 2025, arXiv 2510.21518, have it for what attention heads write.

    Atoms are made orthogonal to those before them, twice, rather than normal equations solved: correlated atoms are
    common among the rows of an unembedding. An atom that those before it span takes no part.

    Args:
        x: ``(..., n, C)``: n vectors; leading axes, such as heads, do not meet.
        dictionary: ``(K, C)``, an atom a row.
        steps: atoms to take, at most K.
        center: whether the mean of the n vectors is taken off first: what is constant is then not explained. Not for
            a single vector, of which nothing would be left.
        normalise: whether atoms have length 1; else long ones are preferred.
        score: of an atom, over the n residuals: the sum of the absolute products, or their standard deviation.

    Returns:
        A `Pursuit`, in float32 or the wider type of the inputs.

    Raises:
        ValueError: shapes that do not fit, steps out of range, one vector and ``center``, or an unknown score.

    >>> found = pursuit(torch.tensor([[3.0, 0.0, 4.0]]), torch.eye(3), 2, center=False)
    >>> found.atoms, found.explained
    (tensor([2, 0]), tensor([0.6400, 1.0000]))
    """
    if x.dim() < 2 or dictionary.dim() != 2 or x.shape[-1] != dictionary.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(dictionary.shape)}"
        raise ValueError(f"x must be (..., n, C) and dictionary (K, C) of the same C; they were {shapes}")
    if not 1 <= steps <= len(dictionary):
        raise ValueError(f"steps must be from 1 to the {len(dictionary)} atoms; it was {steps}")
    if score not in ("sum", "std"):
        raise ValueError(f"score must be 'sum' or 'std'; it was {score!r}")
    if x.shape[-2] < 2 and (center or score == "std"):
        raise ValueError("center and score='std' need at least two vectors; x has one: pass center=False, score='sum'")
    dtype = torch.promote_types(torch.promote_types(x.dtype, dictionary.dtype), torch.float32)
    lead = x.shape[:-2]
    states = x.detach().to(dtype).reshape(-1, *x.shape[-2:])
    atoms = dictionary.detach().to(states)
    if normalise:
        atoms = atoms / atoms.norm(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    whole = states.norm(dim=(1, 2))
    if center:
        states = states - states.mean(1, keepdim=True)
    found = [_one(part, atoms, steps, score, float(size)) for part, size in zip(states, whole, strict=True)]
    return Pursuit(*(torch.stack(each).reshape(*lead, *each[0].shape) for each in zip(*found, strict=True)))


def _one(
    states: Tensor, atoms: Tensor, steps: int, score: str, size: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pursue ``states (n, C)``, of norm ``size`` before they were centred."""
    rounding = torch.finfo(states.dtype).eps * states.shape[1] ** 0.5
    total = states.norm()
    if total <= rounding * size:  # a constant: what is left is rounding
        states, total = torch.zeros_like(states), total.new_zeros(())
    residual = states
    basis = states.new_zeros(steps, states.shape[1])
    mix = torch.eye(steps, dtype=states.dtype, device=states.device)  # atoms = mix @ basis
    used = torch.zeros(len(atoms), dtype=torch.bool, device=states.device)
    chosen, explained = [], []
    for step in range(steps):
        best = _scores(residual, atoms, score).masked_fill(used, -torch.inf).argmax()
        used[best] = True
        atom, taken = atoms[best], basis[:step]
        rest = atom - (taken @ atom) @ taken
        rest = rest - (taken @ rest) @ taken
        length = rest.norm()
        if length > rounding * atom.norm():
            basis[step] = rest / length
            mix[step, :step], mix[step, step] = taken @ atom, length
            residual = residual - torch.outer(residual @ basis[step], basis[step])
        chosen.append(best)
        share = 1 - (residual.norm() / total) ** 2 if total > 0 else total
        explained.append(share.clamp(0, 1))
    coefficients = torch.linalg.solve_triangular(mix.mT, basis @ states.mT, upper=True).mT
    return torch.stack(chosen), torch.stack(explained), coefficients.norm(dim=0), coefficients, residual


def _scores(residual: Tensor, atoms: Tensor, score: str) -> Tensor:
    """How much residuals ``(n, C)`` agree with each atom, ``(K,)``; a piece of the dictionary at a time."""
    found = []
    for some in atoms.split(max(1, _BUDGET // len(residual))):
        products = residual @ some.mT
        found.append(products.abs().sum(0) if score == "sum" else products.std(0))
    return torch.cat(found)


def lens(x: Tensor, dictionary: Tensor, *, normalise: bool = True) -> Tensor:
    """The logit lens: how strongly vectors ``(..., n, C)`` point along their best atom, the mean over n, ``(...)``.

    What `pursuit` is compared with: each vector by itself, one atom, and no fit.

    >>> lens(torch.tensor([[3.0, 0.0], [0.0, -5.0]]), torch.eye(2))
    tensor(4.)
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, dictionary.dtype), torch.float32)
    atoms = dictionary.detach().to(x.device, dtype)
    if normalise:
        atoms = atoms / atoms.norm(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    flat = x.detach().to(dtype).reshape(-1, x.shape[-1])
    best = [(part @ atoms.mT).abs().amax(1) for part in flat.split(max(1, _BUDGET // len(atoms)))]
    return torch.cat(best).reshape(x.shape[:-1]).mean(-1)


def read_atoms(found: Pursuit, names: Sequence[str] | Callable[[int], str]) -> list[tuple[str, float, float]]:
    """A pursuit of one head in words: each atom's name, the share explained so far, and its weight.

    Args:
        found: without leading axes.
        names: of the dictionary's rows, or what gives a row's name, such as
            ``tokenizer.convert_ids_to_tokens``.

    Raises:
        ValueError: a pursuit of several heads.

    >>> read_atoms(pursuit(torch.tensor([[0.0, 0.0, 4.0]]), torch.eye(3), 1, center=False), ["May", "June", "July"])
    [('July', 1.0, 4.0)]
    """
    if found.atoms.dim() != 1:
        raise ValueError(f"found must be of one head; its leading axes were {tuple(found.atoms.shape[:-1])}")
    name = names if callable(names) else names.__getitem__
    return [
        (name(int(atom)), float(share), float(weight))
        for atom, share, weight in zip(found.atoms, found.explained, found.weights, strict=True)
    ]
