"""AGLA: identities, what its views are made of, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from glocal.steer.agla import AGLA
from tests.steer import models
from tests.steer.test_matcher import pixels

GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])


class Reader:
    """An image processor: what it was given is kept."""

    def __init__(self):
        self.seen = []

    def __call__(self, images, return_tensors):
        self.seen = list(images)
        return {"pixel_values": pixels(images), "what_no_model_takes": torch.zeros(1)}


@pytest.fixture
def llava():
    model = models.build("llava")
    return model, models.inputs("llava", model)


def pictures(count=2):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(50, 255, (64, 64, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("name", models.VISION)
def test_identities_and_nothing_left_behind(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, **GREEDY)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    other = {"pixel_values": inputs["pixel_values"].flip(-1) * 2}
    with AGLA(model, augmented=other, alpha=0.0, beta=0.0):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with AGLA(model, augmented={"pixel_values": inputs["pixel_values"]}):  # (1 + alpha) z: greedy tokens are the same
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with AGLA(model, augmented=other, alpha=3.0):
        changed = model.generate(**inputs, **GREEDY)
    assert changed.shape == plain.shape and not torch.equal(changed, plain)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_the_view_is_the_picture_s_relevant_part(llava):
    model, inputs = llava
    images, reader = pictures(), Reader()
    relevance = np.zeros((4, 4))
    relevance[0, 3] = 1.0

    def matcher(given, questions):
        assert given == images and questions == ["a", "b"]
        return [(relevance, 0.5), (relevance.T, 1.0)]

    inputs = inputs | {"pixel_values": pixels(images)}
    settings = dict(processor=reader, images=images, questions=["a", "b"], matcher=matcher)
    with AGLA(model, **settings, alpha=3.0, beta=0.0) as method:
        found = model.generate(**inputs, **GREEDY)
        first, second = method.views
    assert first.kept.mean() == pytest.approx(0.75, abs=0.01) and second.kept.mean() == pytest.approx(0.5, abs=0.01)
    # The lit patch is at the upper right in the one, at the lower left in the other, and stays.
    assert first.kept[:16, 48:].all() and second.kept[48:, :16].all()
    masked = np.asarray(reader.seen[0])
    assert (masked[~first.kept] == 0).all() and (masked[first.kept] == np.asarray(images[0])[first.kept]).all()
    by_hand = {"pixel_values": pixels([first.picture, second.picture])}
    with AGLA(model, augmented=by_hand, alpha=3.0, beta=0.0):
        assert torch.equal(model.generate(**inputs, **GREEDY), found)
    with AGLA(model, **settings, keep=0.25) as method:
        model.generate(**inputs, **GREEDY)
    assert [view.kept.mean() for view in method.views] == pytest.approx([0.25, 0.25], abs=0.01)


def test_flat_relevance_keeps_the_whole_picture(llava):
    model, inputs = llava
    images = pictures()
    inputs = inputs | {"pixel_values": pixels(images)}
    flat = lambda given, questions: [(np.ones((4, 4)), 1.0)] * len(given)  # noqa: E731
    plain = model.generate(**inputs, **GREEDY)
    with AGLA(model, processor=Reader(), images=images, questions=["a", "b"], matcher=flat) as method:
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert all(view.kept.all() for view in method.views)


def test_implausible_tokens_are_never_chosen(llava):
    model, inputs = llava
    other = {"pixel_values": inputs["pixel_values"].flip(-1) * 3}
    settings = GREEDY | dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    raw = model.generate(**inputs, **settings).logits[0]
    with AGLA(model, augmented=other, beta=0.3):
        fused = model.generate(**inputs, **settings).logits[0]
    share = raw.softmax(-1) / raw.softmax(-1).max(-1, keepdim=True).values
    assert torch.equal(fused.softmax(-1) == 0, share < 0.3)


def test_a_ban_of_all_that_is_plausible_leaves_the_rest(llava):
    model, inputs = llava
    settings = GREEDY | dict(max_new_tokens=1)
    best = model.generate(**inputs, **settings)[:, -1].tolist()
    same = {"pixel_values": inputs["pixel_values"]}
    settings["suppress_tokens"] = [models.IMAGE, *best]
    plain = model.generate(**inputs, **settings)
    with AGLA(model, augmented=same, beta=1.0):  # nothing but the likeliest is plausible
        assert torch.equal(model.generate(**inputs, **settings), plain)


def test_sampling_follows_the_fused_logits(llava):
    model, inputs = llava
    other = {"pixel_values": inputs["pixel_values"].flip(-1) * 3}
    with AGLA(model, augmented=other, alpha=5.0, beta=0.0):
        greedy = model.generate(**inputs, **GREEDY)
        torch.manual_seed(0)
        cold = model.generate(**inputs, **(GREEDY | dict(do_sample=True, temperature=1e-3)))
    assert torch.equal(greedy, cold)


def test_a_static_cache(llava):
    model, inputs = llava
    other = {"pixel_values": inputs["pixel_values"].flip(-1)}
    with AGLA(model, augmented=other):
        wanted = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), wanted)


def test_a_failing_matcher_leaves_the_model_as_it_was(llava):
    model, inputs = llava
    plain = model.generate(**inputs, **GREEDY)

    def fails(images, questions):
        raise OSError("cannot read the picture")

    method = AGLA(model, processor=Reader(), images=pictures(), questions=["a", "b"], matcher=fails)
    with method, pytest.raises(OSError, match="cannot read"):
        model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain) and method._branch is None


def test_what_is_refused(llava):
    model, inputs = llava
    same = {"pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match="needs processor, images, questions, matcher, or augmented"):
        AGLA(model)
    with pytest.raises(ValueError, match="2 images have 1 questions"):
        AGLA(model, processor=Reader(), images=pictures(), questions=["a"], matcher=lambda *_: [])
    for settings, message in (({"alpha": -1.0}, "alpha"), ({"beta": 2.0}, "beta"), ({"keep": 1.5}, "keep")):
        with pytest.raises(ValueError, match=f"{message} must be"):
            AGLA(model, augmented=same, **settings)
    without = {name: inputs[name][:, -5:] for name in ("input_ids", "attention_mask")}
    with AGLA(model, augmented=same), pytest.raises(ValueError, match="no image tokens"):
        model.generate(**without, **GREEDY)
    three = dict(processor=Reader(), images=pictures(3), questions=["a"] * 3, matcher=lambda *_: [])
    with AGLA(model, **three), pytest.raises(ValueError, match="batch has 2 rows, AGLA was given 3"):
        model.generate(**inputs, **GREEDY)
    text = models.build("llama")
    with AGLA(text, augmented=same), pytest.raises(ValueError, match="no image tokens"):
        text.generate(**models.inputs("llama", text), **GREEDY)
