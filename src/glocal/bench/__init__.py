"""Measuring: what a pattern costs and what it keeps, on equal terms, and the report of it."""

from glocal.bench.compare import Comparison, Cost, Fidelity, Interrupted, Settings, compare

__all__ = ["Comparison", "Cost", "Fidelity", "Interrupted", "Settings", "compare"]
