"""PAINT: its sets against NumPy and SciPy, its edit against a float mask given to PyTorch's attention, its refusals."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from glocal.steer.paint import PAINT, local_set, raised, summary_set, without_image
from glocal.steer.spans import SpanMap
from tests.steer import models

GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])


@pytest.fixture
def llava():
    model = models.build("llava")
    return model, models.inputs("llava", model)


def some_sets(model, inputs):
    """Every other image token is local, the first of them a summary token instead."""
    spans = SpanMap.read(model, inputs)
    counts = [len(spans.positions(row, "image")) for row in range(2)]
    return dict(local=[torch.arange(0, n, 2) for n in counts], summary=[torch.tensor([0])] * 2)


@pytest.mark.parametrize("count", [16, 25, 576])
def test_the_quartile_rule_is_numpy_s_and_scipy_s(count):
    draw = np.random.default_rng(count)
    maps = draw.lognormal(0, 1, (3, count))
    found = summary_set(torch.from_numpy(maps)).numpy()
    for row, chosen in zip(maps, found, strict=True):
        fence = np.percentile(row, 75) + 1.5 * scipy.stats.iqr(row)
        number = int((row > fence).sum())
        assert number > 0 or count < 30
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-row)[:number])  # so many of the highest
        quarter = local_set(torch.from_numpy(row)).numpy()
        assert set(np.flatnonzero(quarter)) == set(np.argsort(-row)[: round(count / 4)])
    assert not summary_set(torch.ones(7)).any()


def test_positive_scores_are_scaled_and_a_shift_is_not_free():
    scores = torch.randn(2, 3, 1, 9, dtype=torch.double)
    strength = 0.7 * (torch.arange(9) % 2).double()
    positive = scores.abs()
    torch.testing.assert_close(raised(positive, strength), positive * (1 + strength))
    shifted = raised(scores + 5, strength).softmax(-1)
    # A softmax does not see the shift, the edit does: nobody may subtract the maximum first.
    torch.testing.assert_close((scores + 5).softmax(-1), scores.softmax(-1))
    assert (shifted - raised(scores, strength).softmax(-1)).abs().max() > 0.05
    masked = torch.tensor([-torch.inf, 1.0])
    assert raised(masked, torch.ones(2)).tolist() == [-torch.inf, 2.0]


@torch.no_grad()
def test_the_edit_is_a_float_mask_built_outside(llava):
    """And only the last row of each prompt differs, in the layers asked for."""
    model, inputs = llava
    sets = some_sets(model, inputs)
    image = inputs["input_ids"] == models.IMAGE
    alpha, beta = torch.zeros(image.shape), torch.zeros(image.shape)
    for row in range(2):
        at = image[row].nonzero()[:, 0]
        alpha[row, at[2::2]], beta[row, at[0]] = 0.7, 0.4
    rows = {}

    def edited(module, query, key, value, mask, scaling, **kwargs):
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        bias = mask.expand(-1, query.shape[1], -1, -1).clone()
        if module.layer_idx in (1, 2):
            for head in range(query.shape[1]):
                score = torch.einsum("bd,bkd->bk", query[:, head, -1], key[:, head]) * scaling
                bias[:, head, -1] += (alpha + beta) * score.abs()
        return F.scaled_dot_product_attention(query, key, value, bias, scale=scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", edited)
    AttentionMaskInterface.register("by_hand", eager_mask)
    inner = model.model.language_model
    for n, layer in enumerate(inner.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, n=n: rows.setdefault(n, []).append(args[0]))
    with PAINT(model, layers=[1, 2], alpha=0.0, beta=0.0, **sets):
        plain = model(**inputs).logits
    with PAINT(model, layers=[1, 2], alpha=0.7, beta=0.4, **sets):
        found = model(**inputs).logits
    before = inner.config._attn_implementation
    inner.set_attn_implementation("by_hand")
    wanted = model(**inputs).logits
    inner.set_attn_implementation(before)
    torch.testing.assert_close(found[:, -1], wanted[:, -1], atol=2e-4, rtol=1e-4)
    assert torch.equal(found[:, :-1], plain[:, :-1])
    assert (found[:, -1] - plain[:, -1]).abs().max() > 1e-2
    assert torch.equal(rows[0][0], rows[0][1])  # layer 0 is not asked for
    for layer in (1, 2):
        assert torch.equal(rows[layer][0][:, :-1], rows[layer][1][:, :-1])
        assert not torch.equal(rows[layer][0][:, -1], rows[layer][1][:, -1])


@pytest.mark.parametrize("name", models.VISION)
def test_twenty_tokens_on_every_model(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    sets = some_sets(model, inputs)
    plain = model.generate(**inputs, **GREEDY)
    with PAINT(model, alpha=0.0, beta=0.0, **sets):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with PAINT(model, layers=range(3), alpha=3.0, beta=2.0, **sets):
        found = model.generate(**inputs, **GREEDY)
    assert found.shape == plain.shape and not torch.equal(found, plain)
    with PAINT(model, head_mode="visual-share", **sets):
        assert model.generate(**inputs, **GREEDY).shape == plain.shape
    with pytest.raises(RuntimeError, match="on purpose"), PAINT(model, **sets):
        model.generate(**inputs, **GREEDY, logits_processor=[_fails])
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def _fails(ids, scores):
    raise RuntimeError("on purpose")


def eager_rows(model, pixels):
    """The class token's attention in the tower's first and last layer but one, and of all patches in the first."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    maps = tower(pixel_values=pixels, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    return maps[0][:, :, 0, 1:].sum(1), maps[-2][:, :, 0, 1:].sum(1), maps[0][:, :, 1:, 1:].sum((1, 2))


@torch.no_grad()
def test_sets_are_those_of_the_tower_s_eager_maps(llava):
    model, inputs = llava
    first, late, columns = eager_rows(model, inputs["pixel_values"])
    image = inputs["input_ids"] == models.IMAGE
    with PAINT(model, whisker=0.2, spatial_share=0.2) as method:
        found = model.generate(**inputs, **GREEDY)
    outliers = [
        np.flatnonzero(row > np.percentile(row, 75) + 0.2 * scipy.stats.iqr(row)).tolist() for row in late.numpy()
    ]
    assert all(0 < len(some) < 8 for some in outliers)
    local = [
        sorted({*a.topk(4).indices.tolist(), *b.topk(3).indices.tolist()} - set(some))
        for a, b, some in zip(first, columns, outliers, strict=True)
    ]
    for row in range(2):
        assert method.sets[0][row, image[row]].nonzero()[:, 0].tolist() == local[row]
        assert method.sets[1][row, image[row]].nonzero()[:, 0].tolist() == outliers[row]
    assert not (method.sets[0] | method.sets[1])[~image].any()
    masks = [torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor(some), True) for some in local]
    with PAINT(model, local=masks, summary=[torch.tensor(some) for some in outliers]):
        assert torch.equal(model.generate(**inputs, **GREEDY), found)


@torch.no_grad()
def test_of_a_picture_in_tiles_the_whole_view_counts():
    model = models.build("llava_next")
    inputs = models.inputs("llava_next", model)
    sizes = torch.tensor([[32, 64], [64, 64]])  # of 3 and 5 views
    counts = [len(f) for f in model.get_image_features(inputs["pixel_values"], sizes).pooler_output]
    rows = [torch.tensor([1, *[models.IMAGE] * n, 20]) for n in counts]
    ids = torch.stack([F.pad(row, (max(counts) + 2 - len(row), 0)) for row in rows])
    given = dict(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=inputs["pixel_values"])
    with PAINT(model, beta=0.0) as method:
        model(**given, image_sizes=sizes)
    local, summary = method.sets
    for row in range(2):
        first, late, _ = eager_rows(model, inputs["pixel_values"][row, :1])
        at = (ids[row] == models.IMAGE).nonzero()[:, 0]
        wanted = local_set(first[0]) & ~summary_set(late[0])
        assert torch.equal(local[row, at[:16]], wanted) and torch.equal(summary[row, at[:16]], summary_set(late[0]))
        assert not local[row, at[16:]].any()


@torch.no_grad()
def test_heads_that_look_at_the_picture_get_more(llava):
    """The weights of heads are those of eager maps of a layer whose input is not changed."""
    model, inputs = llava
    sets = some_sets(model, inputs)
    inner = model.model.language_model
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[0]
    inner.set_attn_implementation(before)
    image = (inputs["input_ids"] == models.IMAGE)[:, None]
    share = (weights[:, :, -1] * image).sum(-1)
    wanted = (share / share.mean(1, keepdim=True)).clamp(0, 2)
    assert (wanted - 1).abs().max() > 0.05
    scores = torch.randn(2, 4, 1, inputs["input_ids"].shape[1])
    kept = []

    class Watch(PAINT):
        def scores(self, site, given):
            super().scores(site, given)  # takes the shares
            strength = self.alpha * self.sets[0].float() + self.beta * self.sets[1].float()
            decode = type(site)(**(vars(site) | {"prefill": False}))
            kept.append((super().scores(decode, scores) - scores, strength[:, None, None] * scores.abs()))
            return given

    with Watch(model, layers=[0], head_mode="visual-share", **sets):
        model(**inputs)
    ((found, unit),) = kept
    torch.testing.assert_close(found, unit * wanted[:, :, None, None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "paligemma", "gemma3"])
def test_the_contrast_is_with_the_prompt_without_its_image(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    sets = some_sets(model, inputs)
    asked = GREEDY | dict(max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    with PAINT(model, gamma=2.0, plausibility=0.0, **sets) as method:
        both = model.generate(**inputs, **asked)
    with PAINT(model, **sets):
        one = model.generate(**inputs, **asked).logits[0]
    for row in range(2):
        ids = inputs["input_ids"][row]
        words = ids[(ids != models.IMAGE) & (ids != 0)][None]
        more = {"token_type_ids": torch.zeros_like(words)} if "token_type_ids" in inputs else {}
        blind = model(input_ids=words, attention_mask=torch.ones_like(words), **more).logits[:, -1]
        torch.testing.assert_close(both.logits[0][row], (2 * one[row] - blind[0]).detach(), atol=2e-4, rtol=1e-4)
    with PAINT(model, gamma=2.0, plausibility=0.3, **sets) as method:
        cut = model.generate(**inputs, **asked).logits[0].softmax(-1)
    share = one.softmax(-1) / one.softmax(-1).max(-1, keepdim=True).values
    assert torch.equal(cut == 0, share < 0.3)
    assert method._branch is None
    with PAINT(model, gamma=2.0, **sets), pytest.raises(ValueError, match="num_beams must be 1"):
        model.generate(**inputs, **GREEDY, num_beams=2)


def test_blind_inputs_can_be_given_where_they_cannot_be_made():
    model = models.build("blip_2")
    inputs = models.inputs("blip_2", model)
    sets = some_sets(model, inputs)
    grey = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with PAINT(model, gamma=2.0, plausibility=0.0, blind=grey, **sets):
        assert model.generate(**inputs, **GREEDY).shape[1] == 20 + inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="no prompt without a picture: pass blind="):
        PAINT(model, gamma=2.0, **sets)


def test_a_prompt_without_its_image(llava):
    model, inputs = llava
    embeds = torch.randn(*inputs["input_ids"].shape, 4)
    found = without_image(inputs | {"inputs_embeds": embeds}, SpanMap.read(model, inputs))
    ids = inputs["input_ids"]
    for row in range(2):
        words = [token for token in ids[row].tolist() if token not in (0, models.IMAGE)]
        assert found["input_ids"][row].tolist() == [0] * (8 - len(words)) + words
        assert found["attention_mask"][row].tolist() == [0] * (8 - len(words)) + [1] * len(words)
    assert found["inputs_embeds"].shape == (2, 8, 4) and "pixel_values" not in found


def test_caches_beams_and_half_precision(llava):
    model, inputs = llava
    with PAINT(model, alpha=2.0, head_mode="visual-share", layers=range(3)):
        wanted = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), wanted)
        assert len(model.generate(**inputs, **GREEDY, num_beams=2, num_return_sequences=2)) == 4
    model = model.bfloat16()
    inputs = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
    with PAINT(model, gamma=1.1):
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert len(model.generate(**inputs, **GREEDY)) == 2


def test_what_is_refused(llava):
    model, inputs = llava
    for name, reason in (("gemma3", "no class token"), ("qwen2_vl", "no q_proj"), ("blip_2", "no q_proj")):
        with pytest.raises(TypeError, match=f"{reason}.*pass the sets yourself"):
            PAINT(models.build(name))
    text = models.build("llama")
    with pytest.raises(TypeError, match=r"no vision tower.*pass the sets yourself"):
        PAINT(text)
    sets = dict(local=[torch.tensor([0])] * 2)
    with PAINT(text, **sets), pytest.raises(ValueError, match="no image tokens"):
        text.generate(**models.inputs("llama", text), **GREEDY)
    with pytest.raises(ValueError, match="head_mode must be 'uniform' or 'visual-share'; it was 'all'"):
        PAINT(model, head_mode="all")
    for name, value in (("alpha", -1.0), ("beta", -1.0), ("gamma", 0.5), ("local_share", 1.5), ("whisker", -1.0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            PAINT(model, **{name: value})
    for given, message in (
        (dict(local=[[0]]), "local must have one set for each of 2 rows; it had 1"),
        (dict(summary=[[0], [16]]), "summary must be positions among the 16 image tokens of row 1"),
        (dict(local=torch.ones(2, 5, dtype=torch.bool)), r"as many booleans; it was torch.bool of shape \(5,\)"),
    ):
        with PAINT(model, **given), pytest.raises(ValueError, match=message):
            model.generate(**inputs, **GREEDY)
    embeds = {"inputs_embeds": torch.randn(2, 20, 32)}
    with PAINT(model), pytest.raises(ValueError, match="pass spans="):
        model.generate(**embeds, **GREEDY)
    kinds = torch.full((2, 20), 3)
    kinds[:, 2:18] = 2
    with PAINT(model, spans=SpanMap(kinds)), pytest.raises(ValueError, match="read from pixel_values"):
        model.generate(**embeds, **GREEDY)
    half = inputs | {"pixel_values": inputs["pixel_values"][:1]}
    with PAINT(model), pytest.raises(ValueError, match="16 patches, the prompt 32 image tokens"):
        model.generate(**half, **GREEDY)
    right = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    with PAINT(model), pytest.raises(ValueError, match="pad on the left"):
        model.generate(**(inputs | right), **GREEDY)
