"""Run the proofs of all systems, or of some, and write what they found to docs/proofs.md.

    python benchmarks/run_proofs.py [--jobs 1] [s114 s027 ...]

Each proof is a script of its own in benchmarks/proofs; its last line names the system, the figures and a verdict. The
table is written after every proof, so that an interrupted run loses nothing; proofs that were not run keep their rows.
Some proofs measure time: give them a quiet machine and one job.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "proofs.md"
LINE = re.compile(r"^(?P<code>S\d{3}) (?P<key>[\w-]+): (?P<finding>.*): (?P<verdict>holds|does not hold at this size)$")
ROW = re.compile(r"^\| (?P<code>S\d{3}) ")
HEAD = """# Small proofs

What the papers claim, tried in minutes on one processor core. `make proofs` runs them all and writes this table; one
alone is run by its file: `python benchmarks/proofs/s114_moba.py`. A claim that does not show at this size says so.

| system | found | verdict | minutes | proof |
| --- | --- | --- | --- | --- |
"""


def read() -> dict[str, str]:
    """The rows of the table as it stands, by code."""
    if not TABLE.exists():
        return {}
    return {found["code"]: line for line in TABLE.read_text().splitlines() if (found := ROW.match(line))}


def run(script: Path) -> tuple[str, str, str]:
    """Run one proof and give its code, its row and its output."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    found = LINE.match(last)
    if done.returncode or not found:
        raise RuntimeError(f"{script.name} ended with code {done.returncode} and the line {last!r}")
    minutes, link = (time.monotonic() - start) / 60, f"[{script.name}](../{script.relative_to(ROOT)})"
    cells = f"{found['code']} {found['key']}", found["finding"], found["verdict"], f"{minutes:.1f}", link
    return found["code"], f"| {' | '.join(cells)} |", done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="beginnings of file names, such as s114; all where none is given")
    parser.add_argument("--jobs", type=int, default=1, help="proofs that run side by side")
    args = parser.parse_args()
    scripts = sorted((ROOT / "benchmarks" / "proofs").glob("s[0-9]*.py"))
    chosen = [s for s in scripts if not args.only or any(s.name.startswith(name.lower()) for name in args.only)]
    if not chosen:
        parser.error(f"no proof begins with {' or '.join(args.only)}")
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(run, script): script for script in chosen}
        for number, ended in enumerate(as_completed(runs), 1):
            print(f"\n[{number}/{len(chosen)}] {runs[ended].name}")
            try:
                code, row, output = ended.result()
            except RuntimeError as error:
                failed.append(str(error))
                print(error, flush=True)
                continue
            print(output, end="", flush=True)
            rows = read() | {code: row}  # as the table is now: another run may have written to it
            TABLE.write_text(HEAD + "\n".join(rows[code] for code in sorted(rows)) + "\n")
    print(f"\nThe table is in {TABLE.relative_to(ROOT)}.")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
