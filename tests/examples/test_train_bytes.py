"""The training recipe: it learns, a stopped run ends like one that was not, and damage is told, not half loaded."""

import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from glocal.bench.corpus import python_source, to_ids

RECIPE = "train_bytes"
SMALL = ("--length", "128", "--tokens", "256", "--width", "64", "--layers", "1", "--save-every", "2")


def test_a_resumed_run_ends_with_the_same_weights(resumed):
    curve = resumed(*SMALL)
    assert curve[-1]["held_out"] < curve[0]["held_out"] < 8.5


def test_what_it_writes_is_a_model_of_transformers(call, tmp_path):
    result = call("--out", tmp_path, "--steps", 2, *SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    assert tokens("naïve", add_special_tokens=False).input_ids == to_ids("naïve").tolist()
    # The figure that it prints, by hand: mean over pieces of the next-byte loss.
    held, losses = python_source(held_out=True), []
    for at in torch.linspace(0, len(held) - 128, 64).long().tolist():
        ids = to_ids(held[at : at + 128])[None]
        with torch.no_grad():
            log = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log.gather(1, ids[0, 1:, None]).mean())
    bits = float(torch.stack(losses).mean()) / torch.log(torch.tensor(2.0)).item()
    assert float(re.search(r"tokens: ([\d.]+)", result.output)[1]) == pytest.approx(bits, abs=2e-4)


def test_interrupted_and_taken_up_again(script, tmp_path):
    command = [sys.executable, script.__file__, "--out", str(tmp_path), "--steps", "100000", *SMALL]
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    start = time.monotonic()
    while not (tmp_path / "checkpoint.safetensors").exists():
        assert run.poll() is None and time.monotonic() - start < 120
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from there" in said
    step = int(re.search(r"Stopped after step (\d+)", said)[1])
    again = subprocess.run([*command, "--stop-after", str(step + 1)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"Going on after step {step}" in again.stderr


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_a_damaged_checkpoint_is_told_and_left(call, script, tmp_path, damage):
    call("--out", tmp_path, "--steps", 6, "--stop-after", 1, *SMALL)
    path = tmp_path / "checkpoint.safetensors"
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, path)
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"nonsense" * 100)
    before = path.read_bytes()
    run = script.start(script._config(128, 64, 1), lr=1e-3, seed=0)
    weights = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(ValueError, match="damaged"):
        run.load(path)
    assert run.step == 0 and all(torch.equal(p, weights[name]) for name, p in run.model.named_parameters())
    result = call("--out", tmp_path, "--steps", 6, *SMALL)
    assert result.exit_code == 2 and "damaged" in result.output and path.read_bytes() == before


def test_another_run_s_checkpoint_is_refused(call, tmp_path):
    call("--out", tmp_path, "--steps", 6, "--stop-after", 1, *SMALL)
    for options, word in ((("--layers", 2), "num_hidden_layers"), (("--seed", 1), "seed")):
        small = [*SMALL]
        if options[0] in small:
            small[small.index(options[0]) + 1] = str(options[1])
            options = ()
        result = call("--out", tmp_path, "--steps", 6, *small, *options)
        assert result.exit_code == 2 and word in result.output


@pytest.mark.parametrize(
    "option,value",
    [("--steps", 0), ("--length", 127), ("--tokens", 100), ("--width", 65), ("--layers", 0)],
)
def test_bad_settings_are_refused_before_work(call, tmp_path, option, value):
    result = call("--out", tmp_path / "new", option, value)
    assert result.exit_code == 2 and option in result.output and not (tmp_path / "new").exists()


def test_pieces_depend_on_seed_and_step_only(script):
    batch = script.batch
    assert torch.equal(batch(0, 7, 256, 4), batch(0, 7, 256, 4))
    assert not torch.equal(batch(0, 7, 256, 4), batch(0, 8, 256, 4))
    assert not torch.equal(batch(0, 7, 256, 4), batch(1, 7, 256, 4))


def longest_repeat(row: bytes) -> int:
    """Length of the longest run of bytes that comes again without overlap."""
    length = 0
    for at in range(len(row)):
        while at + length + 1 <= len(row) and row.find(row[at : at + length + 1], at + length + 1) >= 0:
            length += 1
    return length


def test_about_half_of_the_pieces_are_plain_text_and_in_the_others_something_comes_again(script):
    text = bytes(python_source().tolist())
    plain, repeats = 0, []
    for step in range(20):
        for row in script.batch(1, step, 256, 4):
            piece = bytes((row - 3).tolist())
            if piece in text:
                plain += 1
            else:
                repeats.append(longest_repeat(piece))
    assert 25 <= plain <= 55 and len(repeats) == 80 - plain
    assert sorted(repeats)[len(repeats) // 10] >= 10  # a second span can fall on the first
    short = script.batch(1, 0, 64, 64)
    periodic = sum(any(torch.equal(row[p:], row[:-p]) for p in range(5, 25)) for row in short)
    assert 20 <= periodic <= 44


def test_lengths_grow(script):
    size_at = script.size_at
    sizes = [size_at(step / 1000, 2048) for step in range(1000)]
    assert sizes == sorted(sizes)
    assert [sizes.count(size) for size in (64, 256, 1024, 2048)] == pytest.approx([120, 180, 350, 350], abs=1)
    assert {size_at(step / 100, 128) for step in range(100)} == {64, 128}


def test_what_is_copied_is_counted_by_hand(script):
    class Echo(torch.nn.Module):
        """Says what came `distance` bytes before the byte that it is asked for."""

        def forward(self, input_ids):
            logits = torch.zeros(1, input_ids.shape[1], 259)
            for at in range(input_ids.shape[1] - 1):
                ahead = input_ids[0, at + 1]  # an oracle: right about the last twelve, wrong before
                logits[0, at, ahead if at >= input_ids.shape[1] - 13 else (ahead + 1) % 259] = 1
            return type("Output", (), {"logits": logits})

    assert script.copied(Echo(), 256, pieces=3, span=24) == pytest.approx(12 / 16)
