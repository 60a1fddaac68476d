"""Retrofits: only what is given learns, towards full attention or the next token, and nothing else changes."""

import copy
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import typer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from glocal.bench.corpus import VOCAB
from glocal.hf import adapt, load_causal, readapt
from glocal.hf.tuning import PENALTIES, final_states, full_states, tune

ROOT = Path(__file__).resolve().parents[2]
LEARNED = ["aha(window=3)", "nats(window=2)", "moh(shared_heads=1, top_k=1)"]


def llama(dim=32, heads=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def ids(rows=2, length=24, seed=0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def states(model, batch):
    return final_states(model(**batch, output_hidden_states=True)).detach()


def flags(model):
    return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("where", LEARNED)
def test_only_the_routers_move_and_can_be_read_again(where, tmp_path):
    model, batch = llama(), ids()
    model.lm_head.weight.requires_grad_(False)
    before, found = copy.deepcopy(model.state_dict()), flags(model)
    with adapt(model, where) as handle:
        routers = [p.detach().clone() for p in handle.parameters()]
        history = tune(handle, [batch], steps=3)
        assert [set(parts) for parts in history] == [{"loss", "labels", "penalty"}] * 3
        assert all(not torch.equal(p, q) for p, q in zip(handle.parameters(), routers, strict=True))
        assert all(p.grad is None for p in [*handle.parameters(), *model.parameters()])
        assert flags(model) == found
        tuned = model(input_ids=batch).logits
        handle.save(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with readapt(model, tmp_path):
        assert torch.equal(model(input_ids=batch).logits, tuned)


def test_equal_seeds_learn_the_same():
    def learned(seed):
        torch.manual_seed(1)
        with adapt(llama(), "nats(window=2)") as handle:
            state = torch.random.get_rng_state()
            history = tune(handle, [ids()], steps=4, seed=seed)
            assert torch.equal(torch.random.get_rng_state(), state)  # nor does it change what is drawn elsewhere
            return history, torch.cat([p.detach().flatten() for p in handle.parameters()])

    (first, one), (second, two), (_, other) = learned(0), learned(0), learned(1)
    assert first == second and torch.equal(one, two) and not torch.equal(one, other)


def test_the_penalty_is_the_mechanism_own_and_holds_down():
    shares = {}
    for weight in (0.0, 10.0):
        with adapt(llama(), "aha(window=3)") as handle:
            tune(handle, [ids()], steps=30, lr=3e-2, weight=weight)
            handle.model(input_ids=ids())
            shares[weight] = float(torch.stack([frame.gate_rate() for frame in handle.frames.values()]).mean())
    assert shares[10.0] < 0.1 < 0.3 < shares[0.0]


def test_penalties_by_hand():
    model, batch = llama(), ids()
    for where in LEARNED:
        with adapt(model, where) as handle:
            (parts,) = tune(handle, [batch], steps=1, weight=2.0, labels=3.0)
            assert parts["loss"] == pytest.approx(3 * parts["labels"] + 2 * parts["penalty"], rel=1e-5)
            (zero,) = tune(handle, [batch], steps=1, weight=0.0)
            assert set(zero) == {"loss", "labels"}
            (own,) = tune(handle, [batch], steps=1, weight=1.0, penalty=lambda: torch.tensor(7.0))
            assert own["penalty"] == 7
    assert set(PENALTIES) == {"aha", "moh", "nats"}


def test_a_repeated_batch_is_learned():
    model, batch = llama(), ids(4, 32)
    with adapt(model, "aha(window=1)") as handle:
        history = tune(handle, [batch], steps=60, lr=3e-2, labels=0.0, teacher=1.0, weight=0.0)
        assert all(set(parts) == {"loss", "teacher"} for parts in history)
    assert history[-1]["teacher"] < 0.3 * history[0]["teacher"]


def test_the_teacher_is_the_model_itself():
    model, batch = llama(), {"input_ids": ids()}
    plain = states(model, batch)
    with adapt(model, "sliding(2, 0)"), adapt(model, "aha(window=1)", layers=[0]) as handle:
        adapted = states(model, batch)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        model.train()
        assert torch.allclose(full_states(model, batch), plain, atol=1e-5)
        assert all(module.training for module in model.modules())
        (parts,) = tune(handle, [batch], steps=1, labels=0.0, teacher=1.0, weight=0.0)
    distance = ((adapted - plain).square().sum() / plain.square().sum()).item()
    assert parts["teacher"] == pytest.approx(distance, rel=1e-4)
    assert torch.equal(states(model.eval(), batch), plain)


def test_padding_does_not_count_for_the_teacher():
    model, batch = llama(), ids()
    padded = {"input_ids": torch.cat([batch, ids(2, 6, seed=5)], 1), "attention_mask": torch.ones(2, 30).long()}
    padded["attention_mask"][:, 24:] = 0
    found = []
    for inputs in ({"input_ids": batch}, padded):
        torch.manual_seed(3)
        with adapt(model, "aha(window=2)") as handle:
            found += tune(handle, [inputs], steps=1, labels=0.0, teacher=1.0)
    assert found[0]["teacher"] == pytest.approx(found[1]["teacher"], rel=1e-4)
    assert found[0]["penalty"] == pytest.approx(found[1]["penalty"], rel=1e-5)


def test_a_model_without_a_head_learns_from_the_teacher():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertModel(BertConfig(vocab_size=VOCAB, **sizes)).eval()
    with adapt(model, "aha(window=2)") as handle:
        with pytest.raises(ValueError, match="no loss"):
            tune(handle, [{"input_ids": ids()}], steps=1)
        history = tune(handle, [{"input_ids": ids()}], steps=2, labels=0.0, teacher=1.0)
    assert len(history) == 2 and all(parts["teacher"] > 0 for parts in history)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_what_was_learned_and_restores_the_rest(error):
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].train()
    found = flags(model)

    def stop(step, parts):
        if step == 2:
            raise error

    with adapt(model, "aha(window=3)") as handle:
        before = torch.cat([p.detach().flatten() for p in handle.parameters()])
        own = [p.requires_grad for p in handle.parameters()]
        with pytest.raises(error):
            tune(handle, [ids()], steps=5, progress=stop)
        assert flags(model) == found and [p.requires_grad for p in handle.parameters()] == own
        learned = torch.cat([p.detach().flatten() for p in handle.parameters()])
        assert not torch.equal(before, learned) and learned.isfinite().all()
        assert all(p.grad is None for p in handle.parameters())


def test_an_interrupted_teacher_leaves_the_adaptation(monkeypatch):
    model = llama()
    with adapt(model, "aha(window=3)") as handle:
        monkeypatch.setattr("glocal.hf.tuning.final_states", lambda out: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tune(handle, [ids()], steps=2, teacher=1.0)
        handle.model(input_ids=ids())
        assert all(frame.gates is not None for frame in handle.frames.values())
    assert model.config._attn_implementation == "sdpa"


def test_adapters_of_low_rank_on_a_frozen_model(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = llama(), ids()
    plain = model(input_ids=batch).logits
    before = copy.deepcopy(model.state_dict())
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    learned = [p for p in lora.parameters() if p.requires_grad]
    assert len(learned) == 16
    for where in ("sf_attn(group_size=8)", "cca(group_size=4, window=4)"):
        with adapt(model, where) as handle:
            with pytest.raises(ValueError, match="peft"):
                tune(handle, [batch], steps=1)
            with pytest.raises(ValueError, match="teacher"):
                tune(handle, [batch], steps=1, parameters=learned, teacher=1.0)
            history = tune(handle, [batch], steps=20, lr=1e-2, parameters=learned)
            assert history[-1]["labels"] < history[0]["labels"] - 0.02
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora" not in name}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    full = model(input_ids=batch).logits
    assert not torch.allclose(full, plain, atol=1e-3)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(again(input_ids=batch).logits, full, atol=1e-6)


def test_bad_arguments():
    model, batch = llama(), [ids()]
    with pytest.raises(TypeError, match="target"):
        tune("aha", batch, steps=1)
    with pytest.raises(ValueError, match="nothing of its own"):
        tune(model, batch, steps=1)
    handle = adapt(model, "aha(window=3)")
    for name, value in [("steps", 0), ("steps", 1.5), ("lr", 0.0), ("labels", -1.0), ("teacher", -1.0), ("weight", -1)]:
        with pytest.raises(ValueError, match=name):
            tune(handle, batch, **{"steps": 1, name: value})
    with pytest.raises(ValueError, match="no loss"):
        tune(handle, batch, steps=1, labels=0.0, weight=0.0)
    with pytest.raises(ValueError, match="weight"):
        tune(handle, batch, steps=1, penalty=lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match="used up"):
        tune(handle, iter(batch), steps=2)
    with pytest.raises(FloatingPointError, match="step 1"):
        tune(handle, batch, steps=1, weight=1.0, penalty=lambda: torch.tensor(torch.nan))
    handle.restore()
    with pytest.raises(ValueError, match="restored"):
        tune(handle, batch, steps=1)
    with adapt(model, {0: "aha(window=3)", 1: "nats(window=2)"}) as both:
        with pytest.raises(ValueError, match="several"):
            tune(both, batch, steps=1)
        assert tune(both, batch, steps=1, penalty=lambda: torch.zeros(()), weight=0.0)
    with adapt(model, "full()"), pytest.raises(ValueError, match="weight"):
        tune(model, batch, steps=1, parameters=model.parameters(), weight=1.0)


# The example.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("model")
    llama(64, heads=8).save_pretrained(at)
    return at


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "examples" / "retrofit.py"))


@pytest.fixture
def call(script):
    app = typer.Typer()
    app.command()(script["retrofit"])
    return lambda *options: CliRunner().invoke(app, [str(option) for option in options])


@pytest.mark.parametrize("name", ["aha", "moh", "nats", "cca", "sf_attn"])
def test_the_example(name, folder, call, script, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    run = call(name, "--out", out, "--steps", 2, "--length", 64, "--pieces", 2, "--model", folder)
    assert run.exit_code == 0, run.output
    about = json.loads((out / "retrofit.json").read_text())
    assert about["steps"] == 2 and about["learned"] > 0
    rows = {row["attention"].split(", ")[-1]: row for row in about["rows"]}
    assert rows["full"]["cost"] is None and 0 < rows["tuned"]["cost"] <= 1
    assert rows["tuned"]["bits_per_byte"] != rows["untrained"]["bits_per_byte"]
    model = load_causal(folder)
    if name in ("moh", "cca", "sf_attn"):
        import peft

        model = peft.PeftModel.from_pretrained(model, out).base_model.model
    with readapt(model, out):
        losses = list(script["held_out"](model, 64, 2))
    assert sum(losses) / 2 / math.log(2) == pytest.approx(rows["tuned"]["bits_per_byte"], abs=1e-4)


def test_the_example_refuses(call, folder, tmp_path):
    for options, named in [
        (("--steps", 0), "--steps"),
        (("--length", 65), "--length"),
        (("--model", tmp_path / "none"), "none"),
        (("--model", tmp_path), "config.json"),
    ]:
        run = call("aha", "--out", tmp_path / "out", "--model", folder, *options)
        assert run.exit_code == 2 and named in run.output
    llama(heads=2).save_pretrained(tmp_path / "two")
    run = call("moh", "--out", tmp_path / "out", "--model", tmp_path / "two")
    assert run.exit_code == 2 and "shared_heads" in run.output


def test_the_example_keeps_what_was_learned_when_stopped(call, script, folder, tmp_path, monkeypatch):
    def stopped(*args, progress, **options):
        progress(1, {"labels": 5.0})
        raise KeyboardInterrupt

    monkeypatch.setitem(script["retrofit"].__globals__, "tune", stopped)
    run = call("aha", "--out", tmp_path, "--length", 64, "--pieces", 1, "--model", folder)
    assert run.exit_code == 0 and "after step 1" in run.output
    assert json.loads((tmp_path / "retrofit.json").read_text())["steps"] == 1
    assert (tmp_path / "glocal.safetensors").exists()
