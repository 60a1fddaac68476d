"""Recorded rows against eager attention; entropy against scipy."""

import pytest
import scipy.stats
import torch

from glocal.steer.record import RecordRows, attention_entropy
from glocal.steer.spans import SpanMap
from tests.steer import models

GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])
FULL = dict(output_attentions=True, return_dict_in_generate=True)


def hooks(model):
    return [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()]


@pytest.mark.parametrize("name", [*models.VISION, *models.TEXT])
def test_rows_are_those_of_eager_attention(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    before = hooks(model)
    with RecordRows(model) as record:
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain) and hooks(model) == before
    model.set_attn_implementation("eager")
    output = model.generate(**inputs, **GREEDY, **FULL)
    assert torch.equal(output.sequences, plain)
    prompt = inputs["input_ids"].shape[1]
    assert len(record.steps) == len(output.attentions) == 20
    for step, maps in enumerate(output.attentions):
        assert sorted(record.steps[step]) == [0, 1, 2]
        for layer, each in enumerate(maps):
            wanted = torch.zeros(2, prompt + step)
            wanted[:, prompt + step - each.shape[-1] :] = each[:, :, -1].mean(1)  # a sliding cache has fewer keys
            assert torch.allclose(record.steps[step][layer], wanted[:, :prompt], atol=1e-6)
    for row in range(2):
        at = (inputs["input_ids"][row] == models.IMAGE).nonzero()[:, 0]
        found = record.images(row)
        assert len(found) == (0 if name in models.TEXT else 1)
        if found:
            assert found[0].shape == (20, 3, len(at))
            assert torch.equal(found[0][7, 1], record.steps[7][1][row, at])
            known = () if "blip" in name else (len(at),)
            assert tuple(g.index.numel() for g in record.grids(row)[0][:1]) == known or "next" in name or "one" in name


def test_the_newest_run_alone_and_calls_of_the_model():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    with RecordRows(model, layers=[-1]) as record:
        model.generate(**inputs, **GREEDY)
        first = record.prompt(1)[0]
        model(**inputs)
        assert record.prompt(1).shape == (1, 1, 24) and torch.allclose(record.prompt(1)[0], first)
        assert list(record.steps[0]) == [2]
        with pytest.raises(IndexError, match="mine"):
            raise IndexError("mine")
    assert record.prompt(0)[0, 0].sum() == pytest.approx(1.0)  # kept after the block
    assert record.grids(0)[0][0].shape == (4, 4)


def test_other_caches_and_several_answers():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    with RecordRows(model) as record:
        model.generate(**inputs, **GREEDY)
        wanted = [record.prompt(row) for row in range(2)]
        for more in (dict(cache_implementation="static"), dict(prefill_chunk_size=5), dict(use_cache=False)):
            model.generate(**inputs, **GREEDY, **more)
            for row in range(2):
                assert torch.allclose(record.prompt(row), wanted[row], atol=1e-5), more
        torch.manual_seed(0)
        model.generate(**inputs, **GREEDY | dict(do_sample=True, num_return_sequences=3))
        for row in range(6):
            assert torch.allclose(record.prompt(row)[0], wanted[row // 3][0], atol=1e-6)
            assert record.images(row)[0].shape == (20, 3, 16) and len(record.grids(row)) == 1


def test_low_precision():
    model = models.build("llava").bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in models.inputs("llava", model).items()}
    with RecordRows(model) as record:
        model.generate(**inputs, **GREEDY)
    assert record.prompt(0).dtype == torch.float32 and record.prompt(0)[0, 0].sum() == pytest.approx(1.0, abs=1e-5)


def test_what_is_refused():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    plain = model.generate(**inputs, **GREEDY)
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        RecordRows(model).images(0)
    with RecordRows(model), pytest.raises(ValueError, match="num_beams must be 1, it was 2"):
        model.generate(**inputs, **GREEDY, num_beams=2)
    right = inputs | {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    with RecordRows(model), pytest.raises(ValueError, match="pad on the left"):
        model.generate(**right, **GREEDY)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = dict(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with RecordRows(model) as record:
        model.generate(**given, **GREEDY)
        with pytest.raises(ValueError, match="pass spans="):
            record.images(0)
    with RecordRows(model, spans=SpanMap.read(model, inputs)) as record:
        model.generate(**given, **GREEDY)
    assert record.images(0)[0].shape == (20, 3, 16)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def test_entropy_as_scipy_has_it():
    weights = torch.rand(3, 4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[0, 0, :5] = 0
    wanted = scipy.stats.entropy(weights.numpy(), axis=-1)  # scales to a sum of 1 as well
    assert torch.allclose(attention_entropy(weights), torch.from_numpy(wanted))
    assert attention_entropy(torch.zeros(5)) == 0
