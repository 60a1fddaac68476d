"""What ways of steering do to hallucination in the shipped vision-language model: the tables of docs/steering.md.

    python benchmarks/steering.py [--report report.html]

The job of ``glocal steer --evaluate`` at its defaults, once on scenes that are hard to see and once on clear ones; on
one core, some ten minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from page import ROOT, put

from glocal.bench.steered import Settings, evaluate
from glocal.bench.steered_report import pictured, render
from glocal.bench.steered_table import headline, tables
from glocal.bench.table import markdown
from glocal.bench.vlm import load

PAGE = ROOT / "docs" / "steering.md"
SEEN = {"hard": Settings(noise=40.0, opacity=0.5), "clear": Settings(noise=0.0, opacity=1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, help="write the page of the hard scenes here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vlm = load()
    for name, settings in SEEN.items():
        result = evaluate(vlm, settings, lambda what, done, total: print(what, file=sys.stderr, flush=True))
        found = [f"**{table.title}**\n\n{markdown(table.header, table.rows)}" for table in tables(result) if table.rows]
        put(PAGE, name, "\n\n".join([headline(result), *found]))
        if args.report and name == "hard":
            args.report.write_text(render(result, pictured(vlm, result)), encoding="utf-8")


if __name__ == "__main__":
    main()
