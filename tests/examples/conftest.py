"""Recipes as modules, called as commands on one thread."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(request, monkeypatch):
    """The recipe that the test module names in RECIPE."""
    name = request.module.RECIPE
    about = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(about)
    monkeypatch.setitem(sys.modules, name, module)
    about.loader.exec_module(module)
    return module


@pytest.fixture
def call(script):
    app = Typer()
    app.command()(script.train)
    return lambda *options: CliRunner().invoke(app, [str(option) for option in options])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def resumed(call, tmp_path):
    """Trains six steps at once and in two parts, looks that the weights are the same, and gives the curve."""

    def run(*options):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert call("--out", whole, "--steps", 6, *options).exit_code == 0
        stopped = call("--out", parts, "--steps", 6, "--stop-after", 3, *options)
        assert stopped.exit_code == 0 and not (parts / "model.safetensors").exists()
        assert "the same command goes on" in stopped.output
        again = call("--out", parts, "--steps", 6, *options)
        assert again.exit_code == 0 and "Going on after step 3" in again.output
        one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        curve = json.loads((parts / "training.json").read_text())["curve"]
        assert [point["step"] for point in curve] == [2, 4, 6]
        return curve

    return run
