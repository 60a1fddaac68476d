"""The recipe of distillation: a stop changes nothing, what it writes is the student, and what it prints is so."""

import json
import re

import pytest
import torch
from torch.nn.functional import mse_loss

from glocal.nn import Attention, DeltaConv

RECIPE = "distil_attention"
SMALL = ("--teacher-steps", 3, "--batch", 4, "--width", 16, "--layers", 2, "--save-every", 2)


def test_a_resumed_run_ends_with_the_same_weights(resumed):
    curve = resumed(*SMALL)
    assert set(curve[0]) == {"step", "loss", "seconds", "held_out", "teacher", "features"}
    # The new layers start as nothing, and learn; the teacher stays as it is.
    assert curve[-1]["held_out"] < curve[0]["held_out"] and curve[0]["teacher"] == curve[-1]["teacher"]


def test_a_teacher_that_was_stopped_goes_on(call, script, tmp_path, monkeypatch):
    whole = call("--out", tmp_path / "whole", "--steps", 1, *SMALL)
    noised, seen = script.noised, []

    def interrupted(*given):
        seen.append(1)
        if len(seen) == 3:  # two steps, and the figures after them
            raise KeyboardInterrupt
        return noised(*given)

    monkeypatch.setattr(script, "noised", interrupted)
    stopped = call("--out", tmp_path / "parts", "--steps", 1, *SMALL)
    assert stopped.exit_code == 130 and not (tmp_path / "parts" / "model.safetensors").exists()
    again = call("--out", tmp_path / "parts", "--steps", 1, *SMALL)
    assert whole.exit_code == again.exit_code == 0 and "teacher goes on after step 2" in again.output
    one, other = (script.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_it_writes_is_the_student_and_what_it_prints_is_its_error(call, script, tmp_path):
    result = call("--out", tmp_path, "--steps", 4, *SMALL)
    assert result.exit_code == 0
    model, about = script.load(tmp_path), json.loads((tmp_path / "training.json").read_text())
    kinds = [type(block.attention) for block in model.blocks]
    assert kinds == [DeltaConv, DeltaConv]
    kernels = [block.attention.convs[0].kernel_size[0] for block in model.blocks]
    assert kernels == [about["attention"][f"blocks.{n}.attention"]["kernel"] for n in range(2)]
    x, time, noise = script.pieces(0, 0, 256, held_out=True)
    with torch.no_grad():
        mine = float(mse_loss(model(x, time), noise))
    found = re.search(r"digits:\s+([\d.]+)\s+with\s+convolutions,\s+([\d.]+)\s+with\s+attention", result.output)
    assert float(found[1]) == pytest.approx(mine, abs=1e-4) and about["held_out"] == pytest.approx(mine, abs=1e-4)
    # All but the new layers is the teacher's.
    run = script.start(16, 2, seed=0)
    run.load(tmp_path / "teacher" / "checkpoint.safetensors")
    assert isinstance(run.model.blocks[0].attention, Attention)
    assert float(found[2]) == pytest.approx(script.noise_error(run.model), abs=1e-4)
    theirs = run.model.state_dict()
    rest = [name for name in model.state_dict() if ".attention." not in name]
    assert rest and all(torch.equal(model.state_dict()[name], theirs[name]) for name in rest)


def test_another_run_s_checkpoint_is_refused(call, tmp_path):
    call("--out", tmp_path, "--steps", 4, "--stop-after", 1, *SMALL)
    assert (result := call("--out", tmp_path, "--steps", 4, *SMALL, "--seed", 1)).exit_code == 2
    assert "seed" in result.output
    assert (result := call("--out", tmp_path, "--steps", 4, *SMALL, "--teacher-steps", 5)).exit_code == 2
    assert "teacher_steps 3" in result.output


@pytest.mark.parametrize(
    "option,value",
    [("--steps", 0), ("--teacher-steps", 0), ("--batch", 0), ("--layers", 0), ("--width", 24), ("--lr", 0)],
)
def test_bad_settings_are_refused_before_work(call, tmp_path, option, value):
    result = call("--out", tmp_path / "new", option, value)
    assert result.exit_code == 2 and option in result.output and not (tmp_path / "new").exists()


def test_pieces_depend_on_seed_and_step_only(script):
    pieces = script.pieces
    assert all(torch.equal(a, b) for a, b in zip(pieces(0, 7, 4), pieces(0, 7, 4), strict=True))
    assert not torch.equal(pieces(0, 7, 4)[0], pieces(0, 8, 4)[0])
    assert not torch.equal(pieces(0, 7, 4)[0], pieces(1, 7, 4)[0])
