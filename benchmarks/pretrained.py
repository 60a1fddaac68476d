"""What patterns, cache policies and retrofits give and cost on the shipped language model: docs/pretrained.md.

    python benchmarks/pretrained.py [compare] [prefill] [retrofits] [peers]

Runs the parts named, all where none is, one after the other, and puts their tables into the page; the others stay.
Give it a quiet machine: half an hour on two cores. ``peers`` needs the environment of `make cache-peers`, whose Python
is given by ``--peers-python``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from page import ROOT, put

from glocal.bench.causal import Settings, compare
from glocal.bench.causal_table import headline, tables
from glocal.bench.table import markdown

PAGE = ROOT / "docs" / "pretrained.md"


def compared() -> str:
    """The job of ``glocal compare bytes``."""
    seen = ""

    def step(what: str, done: int, total: int) -> None:
        nonlocal seen
        if what != seen:
            print(what, file=sys.stderr, flush=True)
            seen = what

    result = compare(Settings(model="bytes"), step)
    parts = [headline(result)]
    for table in tables(result):
        parts.append(f"**{table.title}**\n\n{markdown(table.header, table.rows)}")
    return "\n\n".join(parts)


def prefilled() -> str:
    """benchmarks/prefill.py."""
    return _output([sys.executable, ROOT / "benchmarks" / "prefill.py"])


def retrofitted() -> str:
    """examples/retrofit.py, every recipe."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("aha", "nats", "moh", "cca", "sf_attn"):
            out = Path(folder) / name
            _output([sys.executable, ROOT / "examples" / "retrofit.py", name, "--out", out])
            about = json.loads((out / "retrofit.json").read_text())
            for n, row in enumerate(about["rows"]):
                cost = "" if row["cost"] is None else f"{row['cost']:.1%} {about['counts']}"
                first = (f"{about['steps']} steps, {about['seconds']:.0f} s, {about['learned']:,} learned") * (n == 0)
                rows.append((name * (n == 0), row["attention"], f"{row['bits_per_byte']:.4f}", cost, first))
    return markdown(("retrofit", "attention", "bits per byte", "cost", "training"), rows)


def peers(python: str) -> str:
    """benchmarks/cache_peers.py, in its own environment."""
    return _output([python, ROOT / "benchmarks" / "cache_peers.py"])


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help="compare, prefill, retrofits, peers; all where none is given")
    parser.add_argument("--peers-python", default=sys.executable, help="Python of an environment with kvpress")
    args = parser.parse_args()
    jobs: dict[str, Callable[[], str]] = {
        "compare": compared,
        "prefill": prefilled,
        "retrofits": retrofitted,
        "peers": lambda: peers(args.peers_python),
    }
    unknown = set(args.parts) - set(jobs)
    if unknown:
        parser.error(f"no part is called {' or '.join(sorted(unknown))}; they are {', '.join(jobs)}")
    for name, job in jobs.items():
        if not args.parts or name in args.parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            put(PAGE, name, job())


if __name__ == "__main__":
    main()
