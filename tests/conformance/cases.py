"""One list of cases for every peer, in words of the papers, and what the tests do with them.

A case says what a query sees three times over: as our pattern, in the settings of those peers that can say it, and
through `visible`, a loop in plain Python written from the papers' wording and not from our code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import glocal
from glocal import Block, Causal, Full, Pattern, Sliding, Strided, Window

BACKENDS = ("dense", "sdpa", "flex", "native")
_MAY_REFUSE = ("flex", "native")  # the definition and the torch kernel must run every case


@dataclass(frozen=True, eq=False)
class Case:
    """``window`` are natten's arguments; ``reach`` is ``(left, right)``, -1 for no limit; ``block`` and ``step`` sizes.

    ``queries`` is the grid of the queries where they are fewer than the keys: the last ones.
    """

    name: str
    grid: tuple[int, ...]
    pattern: Pattern
    window: dict | None = None
    reach: tuple[int, int] | None = None
    block: tuple[int, ...] | None = None
    step: tuple[int, ...] | None = None
    causal: bool = False
    queries: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def grid_q(self) -> tuple[int, ...]:
        return self.queries or self.grid


def _window(name, grid, kernel_size, dilation=1, stride=1, is_causal=False) -> Case:
    settings = dict(kernel_size=kernel_size, dilation=dilation, stride=stride, is_causal=is_causal)
    return Case(name, grid, Window(kernel_size, dilation, stride, is_causal), window=settings)


CASES = [
    _window("1d odd window on a prime length", (13,), 5),
    _window("1d even window", (12,), 4),
    _window("1d window as large as the axis", (7,), 7),
    _window("1d dilation that does not divide", (17,), 4, dilation=3),
    _window("1d largest dilation", (11,), 2, dilation=5),
    _window("1d stride", (19,), 6, stride=4),
    _window("1d stride equal to size on a length that it does not divide", (14,), 4, stride=4),
    _window("1d causal", (11,), 4, is_causal=True),
    _window("1d causal with dilation and stride", (23,), 5, dilation=2, stride=3, is_causal=True),
    _window("2d square window, grid not square", (6, 11), (3, 3)),
    _window("2d even and odd", (7, 5), (4, 3)),
    _window("2d dilation per axis", (7, 9), (3, 2), dilation=(2, 4)),
    _window("2d stride and dilation", (9, 8), (4, 3), dilation=(2, 1), stride=(3, 2)),
    _window("2d one causal axis", (5, 8), (3, 4), is_causal=(False, True)),
    _window("2d both causal, strided", (7, 6), (5, 3), stride=(2, 3), is_causal=(True, True)),
    _window("3d odd sizes, one causal axis", (6, 7, 5), (3, 4, 2), is_causal=(True, False, False)),
    _window(
        "3d everything", (5, 4, 6), (2, 4, 3), dilation=(2, 1, 2), stride=(2, 3, 1), is_causal=(False, True, False)
    ),
    Case("full", (11,), Full(), reach=(-1, -1)),
    Case("full cross", (7,), Full(), reach=(-1, -1), queries=(3,)),
    Case("causal", (13,), Causal(), reach=(-1, 0)),
    Case("causal, last queries", (13,), Causal(), reach=(-1, 0), queries=(5,)),
    Case("causal, more queries than keys", (4,), Causal(), reach=(-1, 0), queries=(7,)),
    Case("sliding causal", (12,), Sliding(4, 0), reach=(4, 0)),
    Case("sliding causal, one query", (12,), Sliding(4, 0), reach=(4, 0), queries=(1,)),
    Case("sliding only itself", (5,), Sliding(0, 0), reach=(0, 0)),
    Case("sliding both ways", (15,), Sliding(3, 3), reach=(3, 3)),
    Case("sliding uneven", (13,), Sliding(1, 5), reach=(1, 5)),
    Case("sliding wider than the axis", (5,), Sliding(9, 9), reach=(9, 9)),
    Case("sliding cross", (12,), Sliding(4, 2), reach=(4, 2), queries=(7,)),
    Case("limit on the left only", (11,), ~Causal() | Sliding(2, 0), reach=(2, -1)),
    Case("limit on the right only", (11,), Causal() | Sliding(0, 2), reach=(-1, 2)),
    Case("chunks, causal inside", (13,), Block(4) & Causal(), block=(4,), causal=True),
    Case("chunks", (13,), Block(4), block=(4,)),
    Case("2d blocks, the last ones short", (7, 5), Block((3, 2)), block=(3, 2)),
    Case("2d grid attention", (6, 9), Strided((2, 3)), step=(2, 3)),
    Case("2d grid attention, step that does not divide", (5, 7), Strided((2, 3)), step=(2, 3)),
    Case("3d blocks", (4, 3, 5), Block((2, 3, 2)), block=(2, 3, 2)),
]


def having(setting: str) -> list[Case]:
    """The cases that a peer with this setting can take."""
    return [case for case in CASES if getattr(case, setting) is not None]


def _nearest(i: int, length: int, k: int, d: int, s: int, causal: bool) -> set[int]:
    """Keys of query ``i`` on one axis, after Hassani et al. (2022, 2209.15001; 2025, 2504.16922).

    The query's dilation group are the positions that agree with it modulo ``d``. Groups of ``s`` neighbours follow
    their leader: the middle one (the right one of two), the last on a causal axis. The window is the run of ``k``
    members whose middle is nearest to the leader; a causal one are the ``k`` up to the leader that are not after ``i``.
    """
    members = [j for j in range(length) if j % d == i % d]
    place = members.index(i)
    group = [p for p in range(place - place % s, place - place % s + s)]
    leader = min(group[-1] if causal else group[s // 2], len(members) - 1)
    if causal:
        return {members[p] for p in range(len(members)) if leader - k < p <= place}
    runs = [members[p : p + k] for p in range(len(members) - k + 1)]
    return set(min(runs, key=lambda run: abs(members.index(run[0]) + k // 2 - leader)))


def _axes(value, rank: int) -> tuple:
    return value if isinstance(value, tuple) else (value,) * rank


def visible(case: Case) -> Tensor:
    """``(Nq, Nk)`` booleans by loops over coordinates."""
    rank = len(case.grid)
    rows = []
    for query in itertools.product(*map(range, case.grid_q)):
        # Unequal lengths are aligned at the bottom right: the queries are the last positions.
        query = tuple(i + n - m for i, n, m in zip(query, case.grid, case.grid_q, strict=True))
        row = []
        for key in itertools.product(*map(range, case.grid)):
            pairs = list(zip(query, key, strict=True))
            if case.window:
                names = ("kernel_size", "dilation", "stride", "is_causal")
                each = list(zip(*(_axes(case.window[n], rank) for n in names), strict=True))
                sees = all(j in _nearest(i, n, *e) for (i, j), n, e in zip(pairs, case.grid, each, strict=True))
            elif case.reach:
                (i, j), (left, right) = pairs[0], case.reach
                sees = (left < 0 or i - j <= left) and (right < 0 or j - i <= right)
            elif case.block:
                sees = all(i // b == j // b for (i, j), b in zip(pairs, case.block, strict=True))
            else:
                sees = all((i - j) % s == 0 for (i, j), s in zip(pairs, case.step, strict=True))
            row.append(sees and (not case.causal or key <= query))
        rows.append(row)
    return torch.tensor(rows)


def inputs(
    grid_q, grid_k=None, *, batch=1, heads=2, kv_heads=None, dim=8, seed=0, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``q``, ``k``, ``v``."""
    generator = torch.Generator().manual_seed(seed)
    grids = (heads, *grid_q), *[(kv_heads or heads, *(grid_k or grid_q))] * 2
    return tuple(torch.randn(batch, *shape, dim, generator=generator, dtype=dtype) for shape in grids)


def seen_by(peer: Callable[[Tensor, Tensor, Tensor], Tensor], keys: int, dim: int) -> Tensor:
    """What a peer's queries see on a sequence: equal scores and one-hot values lay its weights bare."""
    zero = torch.zeros(1, 1, keys, dim)
    return peer(zero, zero, torch.eye(keys, dim)[None, None])[0, 0, :, :keys] > 0


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, where: Pattern, **settings):
    """`glocal.attend` on a backend; a skip with the reason where an optional backend cannot run it."""
    try:
        glocal.explain(q, k, v, where, backend=backend, **settings)
    except ValueError as error:
        if backend not in _MAY_REFUSE or "cannot run this" not in str(error):
            raise
        pytest.skip(str(error))
    return glocal.attend(q, k, v, where, backend=backend, **settings)


def check(
    backend: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    where: Pattern,
    expected: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    atol: float | None = None,
    **settings,
) -> None:
    """Values of `attend` against ``expected(q, k, v)``, and gradients: FlexAttention has none on a CPU."""
    grad = backend != "flex"
    ours, theirs = ([t.clone().requires_grad_(grad) for t in tensors] for _ in range(2))
    got, want = run(backend, *ours, where, **settings), expected(*theirs)
    assert got.shape == want.shape
    tolerance = dict(rtol=0, atol=atol or (1e-11 if got.dtype == torch.float64 else 1e-5))
    torch.testing.assert_close(got, want, **tolerance)
    if grad:
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
        for mine, other in zip(
            torch.autograd.grad((got * weight).sum(), ours),
            torch.autograd.grad((want * weight).sum(), theirs),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, **tolerance)


def flat(expected: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of flattened sequences, applied to grids."""

    def on_grids(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return expected(q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2)).unflatten(2, q.shape[2:-1])

    return on_grids
