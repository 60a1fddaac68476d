"""The second branch sees its own picture at every step; fused logits are what transformers' own guidance gives."""

import pytest
import torch
from transformers import MinPLogitsWarper, UnbatchedClassifierFreeGuidanceLogitsProcessor

from glocal.steer.agla import AGLA
from glocal.steer.branch import Branch, fuse, plausible
from glocal.steer.steering import Steering
from tests.steer import models

STEPS = 8
GREEDY = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[models.IMAGE])


def continued(name, model, inputs, pixels, ids):
    """Logits of the next token, all read anew: no cache at all."""
    mask = inputs["attention_mask"]
    more = ids.shape[1] - mask.shape[1]
    full = inputs | {"pixel_values": pixels, "input_ids": ids}
    full["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), more)], 1)
    for key, value in (("token_type_ids", int(name == "paligemma")), ("mm_token_type_ids", 0)):
        if key in full:  # PaliGemma's prompt sees itself both ways, its answer only back
            full[key] = torch.cat([full[key], full[key].new_full((len(mask), more), value)], 1)
    if not name.startswith(("qwen2_", "blip", "instruct")):
        full["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0) + int(name == "paligemma")
    with torch.no_grad():
        return model(**full, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("name", models.VISION)
def test_both_branches_see_their_own_picture_at_every_step(name):
    """Greedy tokens equal those of two models that read everything anew at each step."""
    model = models.build(name)
    inputs = models.inputs(name, model)
    other = inputs["pixel_values"].flip(-1) * 2
    with AGLA(model, augmented={"pixel_values": other}, alpha=3.0, beta=0.0):
        found = model.generate(**inputs, **GREEDY)[:, -STEPS:]
    ids = inputs["input_ids"]
    for _ in range(STEPS):
        logits = continued(name, model, inputs, inputs["pixel_values"], ids)
        fused = logits + 3 * continued(name, model, inputs, other, ids)
        fused[:, models.IMAGE] = -torch.inf
        ids = torch.cat([ids, fused.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids[:, -STEPS:])
    # Shared caches would give this: the picture that is whole, from the second token on.
    with AGLA(model, augmented={"pixel_values": other}, alpha=3.0, beta=0.0, first_token_only=True):
        official = model.generate(**inputs, **GREEDY)[:, -STEPS:]
    assert torch.equal(official[:, 0], found[:, 0]) and not torch.equal(official, found)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "instructblip"])
def test_several_answers_a_prompt(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    other = {"pixel_values": inputs["pixel_values"].flip(-1)}
    settings = dict(max_new_tokens=5, do_sample=True, num_return_sequences=3, top_k=1, suppress_tokens=[models.IMAGE])
    with AGLA(model, augmented=other, beta=0.0):
        one = model.generate(**inputs, **GREEDY)[:, -STEPS:][:, :5]
        many = model.generate(**inputs, **settings)[:, -5:]
    assert torch.equal(many, one.repeat_interleave(3, 0))


def test_prompts_as_embeddings():
    model = models.build("llama")
    ids = models.inputs("llama", model)["input_ids"][:1]
    embeds = model.get_input_embeddings()(ids).detach()
    other = embeds.flip(1)
    with AGLA(model, augmented={"inputs_embeds": other}, alpha=1.0, beta=0.0):
        found = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GREEDY)
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(inputs_embeds=embeds).logits[:, -1] + model(inputs_embeds=other).logits[:, -1]
        logits[:, models.IMAGE] = -torch.inf
        word = model.get_input_embeddings()(logits.argmax(-1, keepdim=True))
        embeds, other = torch.cat([embeds, word], 1), torch.cat([other, word], 1)
        assert int(logits.argmax()) == int(found[0, embeds.shape[1] - ids.shape[1] - 1])


def test_fusion_is_guidance_with_another_scale():
    """``z + alpha z'`` is ``1 + alpha`` times guidance of scale ``1 / (1 + alpha)``, up to a number for each row."""
    model = models.build("llama")
    inputs = models.inputs("llama", model)["input_ids"][:1]
    other = inputs.flip(1)
    alpha = 2.0
    with torch.no_grad():
        z = model(inputs).logits[:, -1]
        branch = model(other).logits[:, -1]
    guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        1 / (1 + alpha), model, unconditional_ids=other, unconditional_attention_mask=torch.ones_like(other)
    )
    theirs = guide(inputs, z) * (1 + alpha)
    # It mixes log-probabilities, which are logits less a number for each row.
    difference = fuse(z, branch, alpha) - theirs
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-4)


@pytest.mark.parametrize("beta", [0.02, 0.1, 0.5, 0.9])
def test_plausible_tokens_are_those_of_min_p(beta):
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 2
    theirs = MinPLogitsWarper(min_p=beta, min_tokens_to_keep=1)(torch.zeros(50, 1, dtype=torch.long), logits)
    assert torch.equal(plausible(logits, beta), ~theirs.isneginf())
    assert plausible(logits, 0.0).all()


def test_ruled_out_tokens_stay_ruled_out():
    z = torch.tensor([[-torch.inf, 1.0]])
    assert fuse(z, torch.tensor([[5.0, 1.0]]), 2.0).tolist() == [[-torch.inf, 3.0]]


def test_what_is_refused():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    same = {"pixel_values": inputs["pixel_values"]}
    with AGLA(model, augmented=same) as method:
        with pytest.raises(ValueError, match="num_beams must be 1"):
            model.generate(**inputs, **GREEDY, num_beams=2)
        with pytest.raises(ValueError, match="leave out prompt_lookup_num_tokens"):
            model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
        with pytest.raises(ValueError, match="only one method at a time"), AGLA(model, augmented=same):
            pass
        branch = Branch(model, inputs, 2)
        branch.logits(None)
        with pytest.raises(ValueError, match="chosen"):
            branch.logits(None)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            Branch(model, same, 2)
    assert method._branch is None and "generate" not in vars(model)
    assert Steering.of(model).methods == []
