"""The needle and the byte task, and the lines that proofs end with."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

import pytest
import torch

from glocal.bench.bytes import bits_per_byte, library_source, train_bytes
from glocal.bench.needle import CLASSES, FILLER, READ, Needle, train_needle
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, Rope, SlidingWindowAttention
from glocal.papers.verdict import verdict

ROOT = pathlib.Path(__file__).resolve().parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", [Needle(32, 16), Needle(32, 16, causal=False), Needle(32, 4, at=10)])
def test_one_class_symbol_far_from_the_one_that_is_read(task):
    tokens, classes, at = task.batch(200, torch.Generator().manual_seed(0))
    assert bool((tokens[:, task.read] == READ).all()) and bool(((at - task.read).abs() >= task.margin).all())
    special = (tokens >= FILLER) & (tokens < READ)
    assert bool((special.sum(1) == 1).all())
    assert torch.equal(tokens[torch.arange(200), at] - FILLER, classes)
    assert len(classes.unique()) == CLASSES and len(at.unique()) > 5


def test_a_margin_without_a_place_is_refused():
    with pytest.raises(ValueError, match="margin must leave a place"):
        Needle(8, 8).batch(1, torch.Generator())


def test_the_needle_is_found_by_what_reaches_it_only():
    def full(dim):
        return Attention(dim, 4, causal=True, rope=Rope())

    def near(dim):
        return SlidingWindowAttention(dim, 4, window=4, causal=True, rope=Rope())

    task = Needle(32, 16)
    assert train_needle([full], task, dim=32, steps=400).accuracy > 0.9
    assert train_needle([near], task, dim=32, steps=100).accuracy < 0.25


def test_training_is_repeatable():
    runs = [train_needle([lambda dim: Attention(dim, 2, causal=True)], Needle(16, 8), dim=16, steps=5) for _ in "ab"]
    assert torch.equal(runs[0].head.weight, runs[1].head.weight)


def test_bytes_are_learned():
    train, held = library_source()
    assert len(train) > 1_000_000 and len(held) > 100_000 and b"def " in bytes(held.tolist())
    torch.manual_seed(0)
    model = Transformer(256, 32, [lambda dim: Attention(dim, 2, causal=True, rope=Rope())])
    before = bits_per_byte(model, length=64, pieces=16)
    train_bytes(model, length=64, batch=8, steps=60)
    assert before > 7.5 > 6 > bits_per_byte(model, length=64, pieces=16)


def test_bits_of_a_uniform_model_are_eight():
    class Uniform(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 256)

    assert bits_per_byte(Uniform(), length=32, pieces=3) == pytest.approx(8)


@pytest.mark.parametrize("holds", [True, False])
def test_proofs_end_with_a_line_that_the_table_reads(holds):
    line = script("run_proofs").LINE.match(verdict("prefix-global", "0.50: with 3 of 4", holds))
    assert line and (line["code"], line["finding"]) == ("S028", "0.50: with 3 of 4")
    assert line["verdict"] == ("holds" if holds else "does not hold at this size")


def test_every_proof_has_its_record_and_row():
    from glocal import papers

    proofs = {paper.code: paper.proof for paper in papers.all() if paper.proof}
    files = sorted((ROOT / "benchmarks" / "proofs").glob("s[0-9]*.py"))
    for file in files:
        code = file.name[:4].upper()
        assert proofs.get(code) == f"benchmarks/proofs/{file.name}", f"{file.name} is no record's proof"
    rows = re.findall(r"^\| (S\d{3}) ", (ROOT / "docs" / "proofs.md").read_text(), re.MULTILINE)
    assert rows == [file.name[:4].upper() for file in files]


def test_the_exponent_of_a_power_law():
    exponent = script("cost_curves").exponent
    assert exponent({n: 3.0 * n**1.5 for n in (1024, 4096, 8192, 32768)}) == pytest.approx(1.5)
    assert exponent({1024: 9.0, 4096: 1.0, 8192: 2.0}) == pytest.approx(1.0)  # the short one does not count
