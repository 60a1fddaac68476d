"""VAR: redistribution against plain loops, sinks against planted ones, a steered model against an edited eager one."""

import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from glocal.steer.sinks import VAR, find_sink_dims, redistributed, sink_scores
from glocal.steer.spans import SpanMap
from tests.steer import models

GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])


def loops(weights, image, sinks, removed, rho, share):
    """Row by row, as the section has it, in NumPy."""
    out = weights.copy()
    batch, heads, rows, keys = weights.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                a = weights[b, h, i]
                v = sum(a[j] for j in range(keys) if image[b, j])
                u = sum(a[j] for j in range(keys) if image[b, j] and sinks[b, j])
                if v < share or v == 0 or v == u or (v - u) / v < rho:
                    continue
                budget = removed * sum(a[j] for j in range(keys) if sinks[b, j])
                for j in range(keys):
                    if sinks[b, j]:
                        out[b, h, i, j] = (1 - removed) * a[j]
                    elif image[b, j]:
                        out[b, h, i, j] = a[j] + budget * a[j] / (v - u)
    return out


def maps(seed=0):
    """Weights ``(2, 3, 5, 12)``, image keys 2 to 8 and 3 to 10, a sink of text and two of the image in each."""
    draw = torch.Generator().manual_seed(seed)
    weights = (2 * torch.randn(2, 3, 5, 12, generator=draw, dtype=torch.double)).softmax(-1)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 2:8], image[1, 3:10] = True, True
    sinks = torch.zeros_like(image)
    sinks[0, [0, 3, 7]], sinks[1, [1, 4, 8]] = True, True
    return weights, image, sinks


@pytest.mark.parametrize("removed, rho, share", [(0.6, 0.8, 0.2), (0.6, 0.5, 0.2), (1.0, 0.02, 0.0), (0.3, 0.9, 0.6)])
def test_redistribution_equals_plain_loops(removed, rho, share):
    weights, image, sinks = maps()
    found = redistributed(weights, image, sinks, removed=removed, rho=rho, share=share)
    wanted = loops(weights.numpy(), image.numpy(), sinks.numpy(), removed, rho, share)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)
    changed = (found != weights).any(-1)
    assert changed.any() and (share == 0.0 or not changed.all())  # some rows pass, some do not
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), weights.sum(-1), atol=1e-12, rtol=0)


def test_rows_sum_to_one_in_single_precision():
    weights, image, sinks = maps()
    found = redistributed(weights.float(), image, sinks, rho=0.0, share=0.0)
    assert (found.sum(-1) - 1).abs().max() < 1e-6 and (found >= 0).all()


def test_nothing_removed_and_no_sinks_leave_every_bit():
    weights, image, sinks = maps()
    weights = weights.float()
    assert torch.equal(redistributed(weights, image, sinks, removed=0.0, rho=0.0, share=0.0), weights)
    assert torch.equal(redistributed(weights, image, torch.zeros_like(sinks), rho=0.0, share=0.0), weights)
    nothing_seen = weights.masked_fill(image[:, None, None], 0.0)  # the ratio has no value there
    assert torch.equal(redistributed(nothing_seen, image, sinks, rho=0.0, share=0.0), nothing_seen)
    only_sinks = weights.masked_fill((image & ~sinks)[:, None, None], 0.0)
    assert torch.equal(redistributed(only_sinks, image, sinks, rho=0.0, share=0.0), only_sinks)


def test_all_removed_leaves_sinks_nothing_and_ratios_as_they_were():
    weights, image, sinks = maps()
    found = redistributed(weights, image, sinks, removed=1.0, rho=0.0, share=0.0)
    assert (found.masked_select(sinks[:, None, None].expand_as(found)) == 0).all()
    for row in range(2):
        at = image[row] & ~sinks[row]
        before, after = weights[row][..., at], found[row][..., at]
        torch.testing.assert_close(after / after.sum(-1, keepdim=True), before / before.sum(-1, keepdim=True))
        text = ~image[row] & ~sinks[row]
        assert torch.equal(found[row][..., text], weights[row][..., text])


def test_sink_scores_are_those_of_an_rms_norm():
    states = torch.randn(2, 7, 48) * 3
    norm = LlamaRMSNorm(48, eps=1e-6)
    wanted = norm(states)[..., [5, 40]].abs().max(-1).values
    torch.testing.assert_close(sink_scores(states, [40, 5]), wanted)
    half = states.bfloat16()
    assert sink_scores(half, [5]).dtype == torch.float32
    torch.testing.assert_close(sink_scores(half, [5]), sink_scores(half.double(), [5]).float())


def test_planted_massive_activations_are_found():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 40, 4096, generator=draw)
    wanted = torch.zeros(2, 40, dtype=torch.bool)
    for row, token in ((0, 0), (0, 17), (1, 33)):
        wanted[row, token] = True
        states[row, token, [1415, 2533]] = 30.0 * torch.tensor([1.0, -1.0])
    assert torch.equal(sink_scores(states, [1415, 2533]) > 20, wanted)


class Planted:
    """The small LLaVA with massive activations in dimension 7 of its first token and of two image tokens."""

    def __init__(self, tokens=(2, 9)):
        self.model = models.build("llava")
        with torch.no_grad():
            self.model.get_input_embeddings().weight[1, 7] = 1000.0
        self.inputs = models.inputs("llava", self.model)
        self.tokens = list(tokens)
        self.model.model.multi_modal_projector.register_forward_hook(self.plant)
        pad = int((self.inputs["attention_mask"][1] == 0).sum())
        self.wanted = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        for row, first in ((0, 0), (1, pad)):
            self.wanted[row, [first, *(first + 1 + token for token in self.tokens)]] = True

    def plant(self, module, args, output):
        output = output.clone()
        output[:, self.tokens, 7] = 1000.0
        return output


def test_dimensions_and_sinks_of_a_model_are_found():
    bed = Planted()
    plain = bed.model(**bed.inputs).logits
    assert find_sink_dims(bed.model, bed.inputs, tau=4.0) == (7,)
    assert torch.equal(bed.model(**bed.inputs).logits, plain)
    with VAR(bed.model, layers=range(3), tau=4.0, rho=0.0, share=0.0) as method:
        steered = bed.model(**bed.inputs).logits
    assert method.found == (7,) and sorted(method.flags) == [0, 1, 2]
    for flags in method.flags.values():
        assert torch.equal(flags & (bed.inputs["attention_mask"] > 0), bed.wanted)
    given = [row.nonzero()[:, 0] for row in bed.wanted]
    settings = dict(layers=range(3), rho=0.0, share=0.0)
    for sinks in (given, bed.wanted):
        with VAR(bed.model, sinks=sinks, **settings):
            assert torch.equal(bed.model(**bed.inputs).logits, steered)
    with VAR(bed.model, dims=[7], tau=4.0, **settings):
        assert torch.equal(bed.model(**bed.inputs).logits, steered)
    assert not torch.equal(steered, plain)
    # The stream of no layer, of any token, stands out so in another dimension.
    with VAR(bed.model, dims=[8], tau=4.0, **settings):
        torch.testing.assert_close(bed.model(**bed.inputs).logits, plain, atol=1e-4, rtol=1e-4)


def test_a_steered_model_is_eager_attention_with_plain_loops():
    bed = Planted()
    model, inputs = bed.model, bed.inputs
    image = inputs["input_ids"] == models.IMAGE
    after = image.cumsum(1).numpy() == image.sum(1, keepdim=True).numpy()
    rows = after & ~image.numpy()

    def edited(module, query, key, value, mask, scaling, **kwargs):
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        weights = (query @ key.mT * scaling + mask).softmax(-1)
        if module.layer_idx in (0, 1):
            looped = loops(weights.double().numpy(), image.numpy(), bed.wanted.numpy(), 0.6, 0.5, 0.2)
            looped = np.where(rows[:, None, :, None], looped, weights.numpy())
            assert (looped != weights.numpy()).any()
            weights = torch.from_numpy(looped).float()
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", edited)
    AttentionMaskInterface.register("by_hand", eager_mask)
    with torch.no_grad():
        with VAR(model, layers=[0, 1], tau=4.0, rho=0.5):
            found = model(**inputs).logits
        before = model.model.language_model.config._attn_implementation
        model.model.language_model.set_attn_implementation("by_hand")
        wanted = model(**inputs).logits
        model.model.language_model.set_attn_implementation(before)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", models.VISION)
def test_twenty_tokens_on_every_model(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    settings = dict(layers=range(3), rho=0.0, share=0.0)
    spans = SpanMap.read(model, inputs)
    sinks = [spans.positions(row, "image")[:2] for row in range(2)]
    with VAR(model, sinks=sinks, removed=0.0, **settings):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with VAR(model, dims=[3, 5], tau=1.5, removed=0.9, **settings) as method:
        found = model.generate(**inputs, **GREEDY)
    assert found.shape == plain.shape
    assert all(flags.shape == inputs["input_ids"].shape for flags in method.flags.values())
    with VAR(model, sinks=sinks, removed=1.0, **settings):
        prompt = model(**inputs).logits[:, -1]
    assert not torch.equal(prompt, model(**inputs).logits[:, -1])
    with pytest.raises(RuntimeError, match="on purpose"), VAR(model, sinks=sinks, **settings):
        model.generate(**inputs, **GREEDY, logits_processor=[_fails])
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def _fails(ids, scores):
    raise RuntimeError("on purpose")


def test_decode_only_chooses_the_first_token_as_ever():
    bed = Planted()
    settings = dict(layers=range(3), tau=4.0, dims=[7], rho=0.0, share=0.0, removed=1.0)
    asked = GREEDY | dict(max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    plain = bed.model.generate(**bed.inputs, **asked).logits
    with VAR(bed.model, **settings):
        both = bed.model.generate(**bed.inputs, **asked).logits
    with VAR(bed.model, decode_only=True, **settings):
        decode = bed.model.generate(**bed.inputs, **asked).logits
    torch.testing.assert_close(decode[0], plain[0])
    assert not torch.allclose(decode[1], plain[1], atol=1e-4) and not torch.allclose(both[0], plain[0], atol=1e-4)


def test_a_cache_that_goes_on_and_a_prompt_in_pieces():
    bed = Planted()
    one = {name: value[:1] for name, value in bed.inputs.items()}
    with VAR(bed.model, layers=range(3), tau=4.0, rho=0.0, share=0.0) as method:
        wanted = bed.model.generate(**one, **GREEDY)
        flags = method.flags[1]
        assert torch.equal(bed.model.generate(**one, **GREEDY, cache_implementation="static"), wanted)
        several = bed.model.generate(**one, **GREEDY, num_beams=2, num_return_sequences=2)
        assert torch.equal(method.flags[1][:1], flags) and len(several) == 2
    # A sink that a later piece brings is one from then on.
    with VAR(bed.model, layers=range(3), tau=4.0, dims=[7], rho=0.0, share=0.0) as method:
        pieces = bed.model.generate(**one, **GREEDY, prefill_chunk_size=20)
        assert torch.equal(method.flags[1], flags) and torch.equal(pieces, wanted)


def test_half_precision():
    bed = Planted()
    model = bed.model.bfloat16()
    inputs = bed.inputs | {"pixel_values": bed.inputs["pixel_values"].bfloat16()}
    with VAR(model, layers=range(3), tau=4.0, rho=0.0, share=0.0) as method:
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and method.found == (7,)


def test_what_is_refused():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    with pytest.raises(ValueError, match="the model has 3: pass layers="):
        VAR(model)
    with pytest.raises(ValueError, match=r"tau must be from 0 to 5\.66.*it was 20"):
        VAR(model, layers=[1])
    with pytest.raises(ValueError, match=r"tau must be from 0 to 5\.66"):
        find_sink_dims(model, inputs)
    for name, value in (("removed", 1.5), ("rho", -0.1), ("share", math.nan)):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to 1"):
            VAR(model, layers=[1], tau=4.0, **{name: value})
    with pytest.raises(ValueError, match="dims must be numbers from -32 to 31"):
        VAR(model, layers=[1], tau=4.0, dims=[32])
    with pytest.raises(ValueError, match="both were given"):
        VAR(model, layers=[1], dims=[3], sinks=[[1], [1]])
    without = {name: inputs[name][:, -5:] for name in ("input_ids", "attention_mask")}
    with VAR(model, layers=[1], tau=4.0, dims=[3]), pytest.raises(ValueError, match="no image tokens"):
        model.generate(**without, **GREEDY)
    with VAR(model, layers=[1], tau=5.0), pytest.raises(ValueError, match="no such sinks, or pass dims"):
        model.generate(**inputs, **GREEDY)
    for sinks, message in (
        ([[1]], "one set for each of 2 rows; it had 1"),
        ([[1], [99]], "positions among the 24 prompt tokens of row 1"),
        ([[1], torch.ones(3, dtype=torch.bool)], r"as many booleans; it was torch.bool of shape \(3,\)"),
    ):
        with VAR(model, layers=[1], sinks=sinks), pytest.raises(ValueError, match=message):
            model.generate(**inputs, **GREEDY)
    embeds = {"inputs_embeds": torch.randn(1, 5, 32)}
    with VAR(model, layers=[1], tau=4.0, dims=[3]), pytest.raises(ValueError, match="pass spans="):
        model.generate(**embeds, **GREEDY)
    weights, image, sinks = maps()
    with pytest.raises(ValueError, match=r"sinks must be \(B, K\), here \(2, 12\); it was \(2, 11\)"):
        redistributed(weights, image, sinks[:, 1:])
