"""attend, merge, explain: a pattern, tensors, a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from glocal import kernels
from glocal.kernels import Problem, common
from glocal.patterns import Full, Pattern, PerHead, parse
from glocal.patterns.boxes import Grid
from glocal.scores import Score
from glocal.shapes import Float

__all__ = ["Explanation", "attend", "explain", "merge"]

Parts = Sequence[tuple[Float[Tensor, "*shape Dv"], Float[Tensor, "*shape"]]]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@overload
def attend(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k Dv"],
    where: Pattern | str = ...,
    *,
    bias: Tensor | Score | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Float[Tensor, "B H *grid_q Dv"]: ...


@overload
def attend(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k Dv"],
    where: Pattern | str = ...,
    *,
    bias: Tensor | Score | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Float[Tensor, "B H *grid_q Dv"], Float[Tensor, "B H *grid_q"]]: ...


def attend(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k Dv"],
    where: Pattern | str = Full(),  # noqa: B008, an immutable value
    *,
    bias: Tensor | Score | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H *grid_q Dv"] | tuple[Float[Tensor, "B H *grid_q Dv"], Float[Tensor, "B H *grid_q"]]:
    """Softmax attention of each query over exactly the keys that ``where`` gives it.

    Args:
        q: ``(B, H, *grid_q, D)``. One grid axis is a sequence, two an image, three a volume or a video.
        k: ``(B, Hkv, *grid_k, D)``; ``H`` is a multiple of ``Hkv``, each key head serves ``H // Hkv`` query heads.
        v: ``(B, Hkv, *grid_k, Dv)``.
        where: a pattern, or its text. With unequal grids the queries are the last positions of the keys, axis by axis.
        bias: added to the scaled scores: a tensor that broadcasts to ``(B, H, Nq, Nk)``, grids flattened, or an
            object of `glocal.scores`.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        softcap: scores become ``softcap * tanh(scores / softcap)``, before the bias.
        dropout_p: share of probabilities set to zero, the rest scaled up; apply it in training only.
        return_lse: also return the log-sum-exp of each query's scores, for `merge`.
        backend: ``"auto"``, or ``"native"``, ``"sdpa"``, ``"flex"``, ``"dense"``; `explain` tells what auto picks.

    Returns:
        ``out (B, H, *grid_q, Dv)`` in the type of ``q``, or ``(out, lse)`` with ``lse (B, H, *grid_q)`` in float32
        (float64 for float64). A query that sees no key gives zeros and ``-inf``, and gives no gradient.
        A NaN reaches only the queries that see its key (FlexAttention spreads one in ``v`` further).

    Raises:
        TypeError: a tensor is not floating point, or the types differ.
        ValueError: shapes do not fit, the pattern does not fit the grids, or the backend cannot do it.

    >>> import torch
    >>> from glocal import attend, Window
    >>> q = k = v = torch.randn(1, 4, 14, 14, 32)
    >>> attend(q, k, v, Window((7, 7))).shape
    torch.Size([1, 4, 14, 14, 32])
    """
    problem = _problem(q, k, v, where, bias, scale, softcap, dropout_p, return_lse)
    out, lse = _by_heads(problem, backend)
    out = out.unflatten(2, q.shape[2:-1]) if q.dim() != 4 else out
    if not return_lse:
        return out
    return out, lse.unflatten(2, q.shape[2:-1]) if q.dim() != 4 else lse


@overload
def merge(parts: Parts, *, return_lse: Literal[False] = ...) -> Float[Tensor, "*shape Dv"]: ...


@overload
def merge(parts: Parts, *, return_lse: Literal[True]) -> tuple[Float[Tensor, "*shape Dv"], Float[Tensor, "*shape"]]: ...


def merge(
    parts: Parts, *, return_lse: bool = False
) -> Float[Tensor, "*shape Dv"] | tuple[Float[Tensor, "*shape Dv"], Float[Tensor, "*shape"]]:
    """Join attention over disjoint sets of keys into attention over all of them, exactly.

    Args:
        parts: ``(out, lse)`` pairs as `attend` returns them with ``return_lse``: ``out (..., Dv)``, ``lse (...)``.
        return_lse: also return the joint log-sum-exp, to merge again.

    Raises:
        ValueError: no parts, or shapes that differ.

    >>> import torch
    >>> from glocal import attend, merge, Full, Prefix
    >>> q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    >>> parts = [attend(q, k, v, w, return_lse=True) for w in (Prefix(3), ~Prefix(3))]
    >>> torch.allclose(merge(parts), attend(q, k, v), atol=1e-6)
    True
    """
    if not parts:
        raise ValueError("parts of merge must be one or more (out, lse) pairs; it was empty")
    for out, lse in parts:
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"parts of merge must have out (..., Dv) and lse (...) of one shape; it had {tuple(out.shape)} and "
                f"{tuple(lse.shape)} beside {tuple(parts[0][0].shape)} and {tuple(parts[0][1].shape)}"
            )
    out, lse = common.merge(parts)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Explanation:
    """What `attend` would do: print it.

    ``live_pairs`` counts over batch and heads; ``flops`` is for the forward pass, two for each multiply-add;
    ``bytes`` is what must be moved at least: q, k, v and out once.
    """

    backend: str
    why: str
    others: dict[str, str]
    live_pairs: int
    share: float
    flops: int
    bytes: int

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.why}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.others.items()]
        lines.append(f"live pairs {self.live_pairs:,} ({self.share:.2%} of full attention)")
        lines.append(f"forward {self.flops / 1e9:.3f} GFLOP, at least {self.bytes / 2**20:.2f} MiB moved")
        return "\n".join(lines)


def explain(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k Dv"],
    where: Pattern | str = Full(),  # noqa: B008
    *,
    bias: Tensor | Score | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Which backend `attend` would use and why each other one not, with live pairs, FLOPs and bytes.

    Arguments and errors are those of `attend`.

    >>> import torch
    >>> from glocal import explain, Sliding
    >>> q = torch.randn(1, 2, 1024, 64)
    >>> explain(q, q, q, Sliding(63, 0), backend="sdpa").live_pairs
    127040
    """
    problem = _problem(q, k, v, where, bias, scale, softcap, dropout_p, return_lse)
    choice = kernels.choose(problem, backend)
    lead = problem.where.lead(problem.grid_q, problem.grid_k)
    spread = q.shape[0] * q.shape[1] // math.prod((1,) * (2 - len(lead)) + lead)
    pairs = problem.where.count(problem.grid_q, problem.grid_k) * spread
    full = q.shape[0] * q.shape[1] * problem.q.shape[2] * problem.k.shape[2]
    values = q.numel() + k.numel() + v.numel() + q.numel() // q.shape[-1] * v.shape[-1]
    flops = 2 * pairs * (q.shape[-1] + v.shape[-1])
    return Explanation(
        *choice, live_pairs=pairs, share=pairs / full if full else 0.0, flops=flops, bytes=values * q.element_size()
    )


def _by_heads(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Run heads that share a pattern together, so that a narrow head does not pay for a wide one."""
    where = problem.where
    flat = isinstance(where, PerHead) and not any(isinstance(p, PerHead) for h in where.heads for p in h.walk())
    if not flat or where.data() or problem.dropout_p or backend not in ("auto", "sdpa"):
        return kernels.run(problem, backend)
    if backend == "auto" and kernels.choose(problem).backend != "sdpa":
        return kernels.run(problem, backend)
    assert isinstance(where, PerHead)
    alike: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(where.heads):
        alike.setdefault(pattern, []).append(head)
    group = problem.q.shape[1] // problem.k.shape[1]
    outs, order = [], []
    for pattern, members in alike.items():
        heads = torch.tensor(members, device=problem.q.device)
        own = heads // group if group > 1 else heads
        part = problem._replace(
            q=problem.q[:, heads],
            k=problem.k[:, own],
            v=problem.v[:, own],
            where=pattern,
            bias=problem.bias[:, heads] if problem.bias is not None and problem.bias.shape[1] > 1 else problem.bias,
            table=problem.table[heads] if problem.table is not None and problem.table.shape[0] > 1 else problem.table,
        )
        outs.append(kernels.run(part, backend))
        order += members
    back = torch.tensor(order, device=problem.q.device).argsort()
    out = torch.cat([o for o, _ in outs], 1)[:, back]
    return out, torch.cat([lse for _, lse in outs], 1)[:, back] if problem.return_lse else outs[0][1]


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Pattern | str,
    bias: Tensor | Score | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Problem:
    """Check everything, flatten the grids, spread the bias."""
    where = parse(where) if isinstance(where, str) else where
    if not isinstance(where, Pattern):
        raise TypeError(f"where must be a pattern or its text; it was {type(where).__name__}")
    grid_q, grid_k = _check_tensors(q, k, v)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for none; it was {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1; it was {dropout_p}")
    if len(grid_q) != len(grid_k):
        raise ValueError(f"q has {len(grid_q)} grid axes {grid_q}, k has {len(grid_k)} {grid_k}; they must agree")
    if not torch.compiler.is_compiling():
        where.check(grid_q, grid_k)
        lead = where.lead(grid_q, grid_k)
        for name, got, size in zip(("heads", "batch size"), reversed(lead), reversed(q.shape[:2]), strict=False):
            if got not in (1, size):
                raise ValueError(f"where {where!r} is made for {name} {got}, q has {size}")
    tensor, table = _biases(bias, q, grid_q, grid_k)
    return Problem(
        q.flatten(2, -2) if q.dim() != 4 else q,
        k.flatten(2, -2) if k.dim() != 4 else k,
        v.flatten(2, -2) if v.dim() != 4 else v,
        where,
        grid_q,
        grid_k,
        tensor,
        table,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        0.0 if softcap is None else float(softcap),
        float(dropout_p),
        torch.randint(0, 2**62, (1,)) if dropout_p else None,
        return_lse,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> tuple[Grid, Grid]:
    for name, t, layout in (
        ("q", q, "(B, H, *grid_q, D)"),
        ("k", k, "(B, Hkv, *grid_k, D)"),
        ("v", v, "(B, Hkv, *grid_k, Dv)"),
    ):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor {layout}; it was {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16; it was {t.dtype}")
        if t.dim() < 4:
            raise ValueError(f"{name} must be {layout}, with at least one grid axis; it was {tuple(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name} is {t.dtype} on {t.device}, q is {q.dtype} on {q.device}; they must agree")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must agree but for the last axis; they were {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k has {k.shape[0]}; they must agree")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"q has head dimension {q.shape[-1]}, k has {k.shape[-1]}; they must agree and not be 0")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which must be a multiple of k's {k.shape[1]}")
    return tuple(q.shape[2:-1]), tuple(k.shape[2:-1])


def _biases(bias: Tensor | Score | None, q: Tensor, grid_q: Grid, grid_k: Grid) -> tuple[Tensor | None, Tensor | None]:
    """The bias as a tensor with four axes, or as a table over offsets."""
    if bias is None:
        return None, None
    want = (q.shape[0], q.shape[1], math.prod(grid_q), math.prod(grid_k))
    if isinstance(bias, Score):
        table = bias.table(grid_q, grid_k).flatten(1)
        if table.shape[0] not in (1, want[1]):
            raise ValueError(f"bias {type(bias).__name__} is made for {table.shape[0]} heads, q has {want[1]}")
        return None, table
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        what = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a floating point tensor or a Score (a boolean mask is a pattern); it was {what}")
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) > 4 or any(n not in (1, w) for n, w in zip(shape, want, strict=True)):
        raise ValueError(f"bias must broadcast to (B, H, Nq, Nk) = {want}; it was {tuple(bias.shape)}")
    return bias.reshape(shape), None
