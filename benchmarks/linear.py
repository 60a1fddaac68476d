"""Causal linear attention by length, beside full attention and the plain recurrence: a part of docs/performance.md.

    python benchmarks/linear.py [--longest 131072]

Eight heads of 64 in float32. Each time is the best of three turns in which all take part; memory is what tensors hold
at once beyond the inputs. The last line is the exponent of a fit of time against length from 8,192 on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from page import ROOT, put
from torch import Tensor
from torch.nn.functional import elu, scaled_dot_product_attention

from glocal import linear_attend
from glocal.bench import table
from glocal.bench.held import HeldBytes

PAGE = ROOT / "docs" / "performance.md"
SHORTEST, TURNS = 512, 3
LONGEST_FULL, LONGEST_RECURRENT = 16_384, 8_192  # beyond, they take minutes


def recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token in plain torch."""
    fq, fk = elu(q) + 1, elu(k) + 1
    kv, total, out = fk.new_zeros(*k.shape[:2], 64, 64), torch.zeros_like(fk[:, :, 0]), []
    for t in range(q.shape[2]):
        kv = kv + fk[:, :, t, :, None] * v[:, :, t, None]
        total = total + fk[:, :, t]
        num = (fq[:, :, t, None] @ kv)[:, :, 0]
        out.append(num / (fq[:, :, t] * total).sum(-1, keepdim=True))
    return torch.stack(out, 2)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attend(q, k, v, causal=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def taken(calls: dict[str, Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    best = dict.fromkeys(calls, math.inf)
    for _ in range(TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call(*inputs)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--longest", type=int, default=131_072)
    args = parser.parse_args()
    rows, fit = [], []
    length = SHORTEST
    while length <= args.longest:
        inputs = torch.randn(3, 1, 8, length, 64).unbind()
        calls: dict[str, Callable[..., Tensor]] = {"linear": linear}
        if length <= LONGEST_FULL:
            calls["full"] = full
        if length <= LONGEST_RECURRENT:
            calls["recurrence"] = recurrence
        found = taken(calls, inputs)
        with HeldBytes() as held:
            linear(*inputs)
        mine = found["linear"]
        others = [f"{found[name] / mine:.1f}x" if name in found else "-" for name in ("full", "recurrence")]
        rows.append((f"{length:,}", table.time(mine), *others, table.size(held.peak)))
        print(" | ".join(rows[-1]), flush=True)
        if length >= 8_192:
            fit.append((math.log(length), math.log(mine)))
        length *= 2
    header = ("tokens", "linear_attend", "full attention (sdpa)", "plain recurrence", "memory")
    text = table.markdown(header, rows)
    if len(fit) > 1:
        (x, y), n = map(sum, zip(*fit, strict=True)), len(fit)
        exponent = sum((a - x / n) * (b - y / n) for a, b in fit) / sum((a - x / n) ** 2 for a, _ in fit)
        said = f"Time grows as length to the power of {exponent:.2f} from 8,192 tokens on"
        print(said)
        text += f"\n\n{said}; {torch.get_num_threads()} threads."
    put(PAGE, "linear", text)


if __name__ == "__main__":
    main()
