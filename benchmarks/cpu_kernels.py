"""The native CPU kernel against what else computes the same attention on this machine, runs interleaved.

    python benchmarks/cpu_kernels.py [--case NAME] [--quick] [--markdown]

Every figure is a median. A round runs a float32 matrix product, our kernel and each peer in turn, so that all see the
same machine; a peer's first call (which may compile) is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from glocal import attend
from glocal.bench.probe import resident
from glocal.bench.table import markdown_row
from glocal.kernels import native
from glocal.patterns import Causal, Pattern, Prefix, Sliding, Window

MATRIX = 1024
PATIENCE = 4.0  # seconds after which a slow peer has run often enough


@dataclass(frozen=True)
class Case:
    """A problem: ``heads`` of ``dim`` on ``grid`` (``queries`` of them, by default all), batch 1."""

    pattern: Pattern
    grid: tuple[int, ...]
    heads: int
    dim: int
    what: str = "forward"
    queries: int = 0
    floor: str = ""


CASES = {
    "sliding255": Case(Sliding(255, 0), (8192,), 8, 64, floor="50 % of matmul; 2.5x FlexAttention"),
    "sliding1023": Case(Sliding(1023, 0), (8192,), 8, 64, floor="60 % of matmul"),
    "sliding255-train": Case(Sliding(255, 0), (8192,), 8, 64, "train", floor="15x masked SDPA; backward 3.0x forward"),
    "causal": Case(Causal(), (4096,), 8, 64, floor="1.0x SDPA is_causal"),
    "window2d": Case(Window(7), (56, 56), 8, 32, floor="20 % of matmul; 12x FlexAttention"),
    "dilated2d": Case(Window(13, dilation=2), (64, 64), 8, 64, floor="15x FlexAttention"),
    "window3d": Case(Window((5, 7, 7)), (16, 28, 28), 4, 64, floor="10x FlexAttention"),
    "decode": Case(Sliding(4095, 0) | Prefix(4), (65536,), 8, 128, "decode", 1, floor="60 % of memory copy rate"),
}


def median(times: list[float]) -> float:
    return statistics.median(times)


def matmul_rate(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    a @ b
    return 2 * MATRIX**3 / (time.perf_counter() - start)


def copy_rate(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    b.copy_(a)
    return 2 * a.numel() * a.element_size() / (time.perf_counter() - start)


def predicate(pattern: Pattern) -> Callable[..., Tensor] | None:
    """The pattern as a FlexAttention ``mask_mod`` over flattened positions."""
    if isinstance(pattern, Sliding):
        left = int(pattern.left)  # type: ignore[arg-type]
        return lambda b, h, q, k: (k <= q) & (k >= q - left)
    if isinstance(pattern, Causal):
        return lambda b, h, q, k: k <= q
    return None


def grid_predicate(pattern: Window, grid: tuple[int, ...]) -> Callable[..., Tensor]:
    """A window as a ``mask_mod``, by arithmetic: with table look-ups torch 2.13 makes C++ that does not compile."""
    sizes = pattern.size if isinstance(pattern.size, tuple) else (pattern.size,) * len(grid)
    dilation = pattern.dilation
    assert isinstance(dilation, int) and all(n % dilation == 0 for n in grid)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        live = q >= 0
        for length, size in zip(reversed(grid), reversed(sizes), strict=True):
            i, j = q % length, k % length
            q, k = q // length, k // length
            centre = (i // dilation).clamp(size // 2, length // dilation - 1 - (size - 1) // 2)
            near = (j // dilation - centre <= (size - 1) // 2) & (centre - j // dilation <= size // 2)
            live = live & near & (i % dilation == j % dilation)
        return live

    assert torch.equal(pattern.mask(grid)[7], mask_mod(*[torch.tensor(7)] * 3, torch.arange(math.prod(grid))))
    return mask_mod


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object] | None:
    """Compiled FlexAttention, or None where it cannot run here."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        pattern = case.pattern
        mask_mod = grid_predicate(pattern, case.grid) if isinstance(pattern, Window) else predicate(pattern)
        if mask_mod is None:
            return None
        n = math.prod(case.grid)
        block_mask = create_block_mask(mask_mod, None, None, n, n, device="cpu")
        torch._dynamo.reset()  # another case would be compiled for dynamic shapes, which is slower or fails
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> object:
            with torch.no_grad():
                return compiled(q, k, v, block_mask=block_mask)

        run()
        return run
    except Exception as error:
        print(f"  flex left out: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return None


def natten(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object] | None:
    """NATTEN on the CPU (its FlexAttention path), where installed and the case is a window."""
    if not isinstance(case.pattern, Window) or case.what != "forward":
        return None
    try:
        import natten as library
    except ImportError:
        return None
    rank = len(case.grid)
    name = {1: "na1d", 2: "na2d", 3: "na3d"}[rank]
    last = [t.transpose(1, 2).reshape(1, *case.grid, case.heads, case.dim).contiguous() for t in (q, k, v)]
    size, dilation = case.pattern.size, case.pattern.dilation

    def run() -> object:
        with torch.no_grad():
            return getattr(library, name)(*last, kernel_size=size, dilation=dilation, backend="flex-fna")

    try:
        run()
    except Exception as error:
        print(f"  natten left out: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return None
    return run


def library(case: Case, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Callable[[], object] | None:
    """``attend`` with another backend, or None where it cannot."""
    grid_q = (case.queries,) if case.queries else case.grid
    tensors = [q.unflatten(2, grid_q), k.unflatten(2, case.grid), v.unflatten(2, case.grid)]

    def run() -> object:
        with torch.no_grad():
            return attend(*tensors, case.pattern, backend=backend)

    try:
        run()
    except Exception as error:
        print(f"  attend {backend} left out: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return None
    return run


def runs(case: Case, peers: bool) -> tuple[dict[str, Callable[[], object]], tuple[Tensor, ...]]:
    """What to time, ours first."""
    n = math.prod(case.grid)
    nq = case.queries or n
    grid_q = (case.queries,) if case.queries else case.grid
    q = torch.randn(1, case.heads, nq, case.dim)
    k, v = torch.randn(1, case.heads, n, case.dim), torch.randn(1, case.heads, n, case.dim)
    form, scale = case.pattern.boxes(grid_q, case.grid), case.dim**-0.5
    out, lse = native.forward(q, k, v, form, None, None, scale, 0.0)
    grad = torch.randn_like(out)
    found: dict[str, Callable[[], object]] = {"native": lambda: native.forward(q, k, v, form, None, None, scale, 0.0)}
    if case.what == "train":
        found["native backward"] = lambda: native.backward(grad, None, q, k, v, form, None, None, scale, 0.0, out, lse)
    if not peers:
        return found, (q, k, v)
    if case.what == "decode":
        live = case.pattern.mask(grid_q, case.grid)[0].nonzero().squeeze(1)
        few_k, few_v = k[:, :, live], v[:, :, live]
        found["sdpa on gathered keys"] = lambda: sdpa(q, few_k, few_v)
        found["full sdpa"] = lambda: sdpa(q, k, v)
    elif case.what == "train":
        mask = case.pattern.mask(case.grid)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]

        def masked() -> object:
            return torch.autograd.grad(sdpa(*leaves, attn_mask=mask), leaves, grad)

        def full() -> object:
            return torch.autograd.grad(sdpa(*leaves), leaves, grad)

        def tiles() -> object:
            return torch.autograd.grad(attend(*leaves, case.pattern, backend="sdpa"), leaves, grad)

        found["masked sdpa forward+backward"] = masked
        found["full sdpa forward+backward"] = full
        found['attend backend="sdpa" forward+backward'] = tiles
    else:
        mask = case.pattern.mask(case.grid)
        found["masked sdpa"] = lambda: sdpa(q, k, v, attn_mask=mask)
        found["full sdpa"] = lambda: sdpa(q, k, v)
        if isinstance(case.pattern, Causal):
            found["sdpa is_causal"] = lambda: sdpa(q, k, v, is_causal=True)
        for name, peer in (("flex compiled", flex), ("natten", natten)):
            if (run := peer(case, q, k, v)) is not None:
                found[name] = run
    if case.what != "train" and (run := library(case, q, k, v, "sdpa")) is not None:
        found['attend backend="sdpa"'] = run
    return found, (q, k, v)


def measure(name: str, case: Case, rounds: int, peers: bool) -> list[tuple[str, ...]]:
    """Rows of the table: what, milliseconds, live GFLOP/s, share of the machine's rate, times our time."""
    torch.manual_seed(0)
    candidates, (q, _, _) = runs(case, peers)
    grid_q = (case.queries,) if case.queries else case.grid
    live = case.pattern.count(grid_q, case.grid) * case.heads
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    big, other = torch.randn(1 << 24), torch.empty(1 << 24)
    rates: list[float] = []
    times: dict[str, list[float]] = {key: [] for key in candidates}
    peaks: dict[str, str] = {}
    for key, run in candidates.items():
        run()
        peaks[key] = peak(run)
    for _ in range(rounds):
        for key, run in candidates.items():
            if len(times[key]) > 1 and sum(times[key]) > PATIENCE:
                continue
            rates.append(copy_rate(big, other) if case.what == "decode" else matmul_rate(a, b))
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    rate = median(rates)
    ours = median(times["native"]) + (median(times["native backward"]) if case.what == "train" else 0)
    rows = []
    for key, found in times.items():
        t = median(found)
        # Backward does five products where forward does two.
        work = live * q.shape[-1] * (10 if key.split()[-1] == "backward" and case.what == "train" else 4)
        if "forward+backward" in key:
            work = live * q.shape[-1] * 14
        if case.what == "decode":
            work = live * case.dim * 2 * 4
        rows.append(
            (
                name,
                key,
                f"{t * 1e3:.2f}",
                f"{work / t / 1e9:.1f}",
                f"{work / t / rate:.1%}",
                f"{t / ours:.2f}x",
                peaks[key],
            )
        )
    rows.append((name, "copy rate" if case.what == "decode" else "matmul", "", f"{rate / 1e9:.1f}", "100%", "", ""))
    return rows


def growth() -> list[tuple[str, ...]]:
    """Time from N to 2N at a fixed window."""
    lengths = (4096, 8192, 16384, 32768, 65536)
    times: dict[int, list[float]] = {}
    problems = {n: ([torch.randn(1, 8, n, 64) for _ in range(3)], Sliding(255, 0).boxes(n, n)) for n in lengths}
    for _ in range(8):
        for n, ((q, k, v), form) in problems.items():
            start = time.perf_counter()
            native.forward(q, k, v, form, None, None, 0.125, 0.0)
            times.setdefault(n, []).append(time.perf_counter() - start)
    rows, last = [], 0.0
    for n in lengths:
        t = median(times[n][1:])
        rows.append(("growth", f"N {n}", f"{t * 1e3:.2f}", "", "", f"{t / last:.2f}x the last" if last else "", ""))
        last = t
    return rows


def peak(run: Callable[[], object]) -> str:
    """MiB that one call adds at its peak, results included, to what is resident before it; Linux only."""
    try:
        # Memory that the allocator kept from the call before would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except (OSError, AttributeError):
        return "-"
    kept = run()
    found = resident("VmHWM") - before
    del kept
    return f"{max(found, 0) / 2**20:.0f}"


def memory() -> list[tuple[str, ...]]:
    """Peak memory that forward and backward add at N 65,536, window 256, over q, k, v and their gradients."""
    n, heads, dim = 65536, 8, 64
    q, k, v = (torch.randn(1, heads, n, dim) for _ in range(3))
    form, grad = Sliding(255, 0).boxes(n, n), torch.ones(1, heads, n, dim)
    warm = Sliding(255, 0).boxes(512, 512)
    small = [t[:, :, :512] for t in (q, k, v)]
    native.forward(*small, warm, None, None, 0.125, 0.0)
    before = resident("VmRSS")
    out, lse = native.forward(q, k, v, form, None, None, 0.125, 0.0)
    kept = native.backward(grad, None, q, k, v, form, None, None, 0.125, 0.0, out, lse)
    extra = resident("VmHWM") - before
    size = 6 * q.numel() * 4
    assert kept[0].shape == q.shape
    return [
        ("memory", "peak extra", "", "", "", f"{extra / size:.2f}x of q, k, v and gradients", f"{extra / 2**20:.0f}")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*CASES, "growth", "memory"], help="one case only")
    parser.add_argument("--quick", action="store_true", help="few rounds, no peers")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each case (default 7, quick 3)")
    options = parser.parse_args()
    if (missing := native.available()) is not None:
        sys.exit(missing)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    rounds = options.rounds or (3 if options.quick else 7)
    head = ("case", "what", "ms", "GFLOP/s (GB/s)", "of machine", "over ours", "peak MiB")
    if not options.markdown:
        print(
            f"{native.isa()}, {torch.get_num_threads()} threads, float32; machine: matmul {MATRIX}, or copy for decode"
        )

    def show(rows: list[tuple[str, ...]]) -> None:
        for row in rows:
            if options.markdown:
                print(markdown_row(row), flush=True)
            else:
                print("".join(f"{cell:<31}" if i == 1 else f"{cell:<17}" for i, cell in enumerate(row)), flush=True)

    show([head, ("---",) * len(head)] if options.markdown else [head])
    for name in [options.case] if options.case else [*CASES, "growth", "memory"]:
        if name == "growth":
            show(growth())
        elif name == "memory" and not options.case:
            # In a process of its own: peak memory never goes down again.
            command = [sys.executable, __file__, "--case", "memory", "--markdown"]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            show([tuple(cell.strip() for cell in found.strip("| ").split("|"))])
        elif name == "memory":
            show(memory())
        else:
            show(measure(name, CASES[name], rounds * (5 if name == "decode" else 1), not options.quick))


if __name__ == "__main__":
    main()
