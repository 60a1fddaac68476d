"""Is it told from near keys, and two moments of other prompts' far keys, which heads need far keys for which queries?

    python benchmarks/proofs/s051_qada.py [--sequences 128]

A model of two layers of attention on sequences that repeat (`induction_bed`): one sink, a window of 6. What is told is
compared with the weights of all keys, for every head and query that has far keys, with moments of other sequences, of
random symbols and of the sequence itself; then the loss where far keys are left out as told, by threshold, beside heads
that are fixed to read far keys by how often they need them elsewhere. Donhauser et al., 2025, arXiv 2502.09647.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from induction_bed import LENGTH, SYMBOLS, Induction, induction_bed, repeat_loss, repeats
from scipy.stats import spearmanr
from torch import Tensor

from glocal import Choose, Full, Sinks, Sliding, attend
from glocal.bench.table import markdown
from glocal.inspect import (
    FarMass,
    KeyMoments,
    LocalReport,
    adaptive_heads,
    far_mass,
    far_moments,
    intercept,
    local_report,
    record,
)
from glocal.inspect.places import Operator, Place
from glocal.papers.verdict import verdict
from glocal.patterns import Pattern

SINKS, WINDOW, TAU = 1, 6, 0.6


def told(mass: Sequence[FarMass], tau: float = TAU) -> tuple[LocalReport, float]:
    """Counts, and the rank correlation of the estimated and the true log-ratio."""
    report = local_report([each.local(tau) for each in mass], [each.local(tau, estimated=True) for each in mass], mass)
    true, estimate = (
        torch.cat([getattr(each, name)[..., each.far > 0].flatten() for each in mass]) for name in ("ratio", "estimate")
    )
    return report, float(spearmanr(true.numpy(), estimate.numpy()).statistic)


@torch.no_grad()
def loss_of_fixed(bed: Induction, ids: Tensor, again: Tensor, far: Tensor) -> float:
    """Where the heads ``far (layers, H)`` read all keys, and the others near ones."""
    names: list[str] = []

    def make(place: Place) -> Operator:
        names.append(place.name)
        gate, near = far[len(names) - 1][:, None], Sliding(WINDOW - 1, 0) | Sinks(SINKS)

        def compute(q: Tensor, k: Tensor, v: Tensor, where: Pattern, **options: Any) -> Any:
            return attend(q, k, v, where & Choose(gate.expand(-1, q.shape[2]), Full(), near), **options)

        return compute

    with intercept(bed, make):
        return float(repeat_loss(bed, ids, again))


@torch.no_grad()
def loss_of_told(bed: Induction, ids: Tensor, again: Tensor, moments: Sequence[KeyMoments], tau: float) -> float:
    with adaptive_heads(bed, moments, sinks=SINKS, window=WINDOW, tau=tau):
        return float(repeat_loss(bed, ids, again))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bed, sizes = induction_bed(), {"sinks": SINKS, "window": WINDOW}
    ids, again = repeats(arguments.sequences, torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(1)
    others = record(bed, repeats(arguments.sequences, draw)[0])
    noise = record(bed, torch.randint(SYMBOLS, (arguments.sequences, LENGTH), generator=draw))
    found = record(bed, ids)
    moments = {
        "other sequences": far_moments(others, **sizes),
        "random symbols": far_moments(noise, **sizes),
        "the sequence": None,
    }
    rows, reports = [], {}
    for name, each in moments.items():
        report, order = reports[name] = told(far_mass(found, **sizes, moments=each))
        rows.append((name, *(f"{value:.3f}" for value in report), f"{order:.3f}"))
    print(f"long rate {1 - local_rate(far_mass(found, **sizes)):.3f}")
    print(markdown(("moments of", *LocalReport._fields, "rank correlation"), rows), flush=True)

    given = moments["other sequences"]
    assert given is not None
    needs = torch.stack(
        [1 - each.local(TAU)[..., each.far > 0].double().mean((0, 2)) for each in far_mass(others, **sizes)]
    )
    rows, mass = [("all keys", "0.000", f"{repeat_loss(bed, ids, again):.3f}")], far_mass(found, **sizes, moments=given)
    for tau in (0.9, 0.6, 0.3, 0.1, 0.03):
        loss = loss_of_told(bed, ids, again, given, tau)
        rows.append((f"told, tau {tau}", f"{told(mass, tau)[0].sparsity:.3f}", f"{loss:.3f}"))
    for many in (6, 4, 2, 0):
        far = torch.zeros(8, dtype=torch.bool).index_fill(0, needs.flatten().argsort(descending=True)[:many], True)
        loss = loss_of_fixed(bed, ids, again, far.view(2, 4))
        rows.append((f"{many} heads fixed", f"{1 - many / 8:.3f}", f"{loss:.3f}"))
    print("\n" + markdown(("far keys", "sparsity", "loss at repeats"), rows))
    (report, order), (own, _) = reports["other sequences"], reports["the sequence"]
    verdict(
        "qada",
        f"with moments of other sequences {report.agreement:.3f} told rightly (commoner label {report.majority:.3f}; "
        f"far keys needed: recall {report.recall:.3f}, precision {report.precision:.3f}), rank correlation "
        f"{order:.2f}; with the sequence's own {own.agreement:.3f}; yet loss {rows[2][2]} at sparsity {rows[2][1]} by "
        f"what is told, {rows[6][2]} at {rows[6][1]} with heads fixed",
        report.agreement > report.majority and order >= 0.6 and own.agreement >= 0.95,
    )


def local_rate(mass: Sequence[FarMass]) -> float:
    """The share of heads and queries for which near keys are enough."""
    return float(torch.cat([each.local(TAU)[..., each.far > 0].flatten() for each in mass]).double().mean())


if __name__ == "__main__":
    main()
