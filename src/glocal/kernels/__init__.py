"""How attention is computed: one module a backend, each with ``why_not(problem)`` and ``run(problem)``.

``why_not`` says in a line why a backend cannot take a problem, or None; it never raises. ``run`` returns
``(out, lse)``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from glocal.kernels import cpu, dense, flex, sdpa
from glocal.kernels.problem import Problem

__all__ = ["BACKENDS", "Choice", "Problem", "choose", "run"]


class Backend(Protocol):
    """What each backend module has."""

    def why_not(self, problem: Problem) -> str | None:
        """The reason why it cannot run a problem, or None."""

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """``out (B, H, Nq, Dv)`` and ``lse (B, H, Nq)``; ``lse`` may be empty where it was not asked for."""


BACKENDS: dict[str, Backend] = {"native": cpu, "sdpa": sdpa, "flex": flex, "dense": dense}


class Choice(NamedTuple):
    """The backend that will run, and for every other one why it will not."""

    backend: str
    why: str
    others: dict[str, str]


def choose(problem: Problem, backend: str = "auto") -> Choice:
    """Pick a backend by rule: the first that can of native, sdpa, dense (CPU) or flex, sdpa, dense (GPU).

    Raises:
        ValueError: ``backend`` is unknown, or is forced and cannot run this problem.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}; it was {backend!r}")
    gpu = problem.q.device.type != "cpu"
    # On a CPU FlexAttention is a compiler to be called by name: uncompiled it is slower than the definition.
    order = ["native", "flex", "sdpa", "dense"] if gpu else ["native", "sdpa", "dense", "flex"]
    if backend != "auto":
        if (reason := BACKENDS[backend].why_not(problem)) is not None:
            raise ValueError(f"backend {backend!r} cannot run this: {reason}")
        return Choice(backend, "it was asked for", {name: "another was asked for" for name in order if name != backend})
    others: dict[str, str] = {}
    chosen = ""
    for name in order:
        if chosen:
            others[name] = f"{chosen} comes first"
        elif (reason := BACKENDS[name].why_not(problem)) is not None:
            others[name] = reason
        else:
            chosen = name
    return Choice(chosen, f"the first that can of {', '.join(order)}", others)


def run(problem: Problem, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run a problem on the backend that `choose` picks."""
    return BACKENDS[choose(problem, backend).backend].run(problem)
