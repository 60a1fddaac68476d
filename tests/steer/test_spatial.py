"""The loss against torch and scipy; recorded rows and their gradient against eager attention and differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import reduce
from scipy.special import rel_entr
from transformers import LlamaConfig, LlamaForCausalLM

from glocal.steer.spans import SpanMap
from glocal.steer.spatial import SpatialPrompting, choose_objects, mask_loss, mask_shares, spatial_loss
from tests.steer import models

SEG = 7


def marked(name, model):
    """Prompts with two looking tokens in the first row and one in the second; the booleans that mark them."""
    inputs = models.inputs(name, model)
    ids = inputs["input_ids"]
    ids[0, -1] = ids[0, -3] = ids[1, -2] = SEG
    return inputs, ids == SEG


def blobs(count, side=48, seed=0):
    """Masks of some smooth shape, neither empty nor full."""
    draw = torch.Generator().manual_seed(seed)
    found = F.interpolate(torch.randn(count, 1, 4, 4, generator=draw), (side, side), mode="bilinear")[:, 0]
    return found > found.flatten(1).quantile(0.8, dim=1)[:, None, None]


# The loss.


def test_the_loss_against_torch_and_scipy():
    draw = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 256, generator=draw, dtype=torch.float64) / 400
    shares = mask_shares(blobs(3, 448).double(), (16, 16))
    found = float(spatial_loss(attention, shares))
    assert found == pytest.approx(float(F.kl_div((attention + 1e-6).log(), shares, reduction="batchmean")))
    assert found == pytest.approx(rel_entr(shares.numpy(), attention.numpy() + 1e-6).sum() / 3)
    # Not scaled over the picture: half the attention costs log 2 of it.
    less = float(spatial_loss(attention / 2, shares))
    assert less - found == pytest.approx(float(shares.sum() / 3) * np.log(2), abs=1e-2)


def test_attention_on_the_mask_costs_nothing():
    shares = mask_shares(blobs(4, 448), (16, 16))
    assert abs(float(spatial_loss(shares.clone(), shares))) <= 256e-6


def test_shares_are_the_largest_pixel_of_each_cell():
    masks = blobs(3, 448).float() * torch.tensor([1.0, 0.2, 255.0])[:, None, None]
    cells = reduce((masks > 0).float(), "s (a h) (b w) -> s (a b)", "max", h=28, w=28)
    torch.testing.assert_close(mask_shares(masks, (16, 16)), cells / (cells.sum(1, keepdim=True) + 1e-6))
    assert 0 < cells.mean() < 1
    oblong = mask_shares(torch.eye(6, 8)[None], (3, 4))
    assert (oblong.view(3, 4) > 0).tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
    ]


def test_empty_masks_are_skipped():
    attention = torch.rand(3, 16).requires_grad_()
    masks = blobs(3, 16)
    masks[1] = False
    shares = mask_shares(masks, (4, 4))
    assert (shares[1] == 0).all()
    torch.testing.assert_close(spatial_loss(attention, shares), spatial_loss(attention[[0, 2]], shares[[0, 2]]))
    nothing = spatial_loss(attention, torch.zeros(3, 16))
    assert nothing.item() == 0 and (torch.autograd.grad(nothing, attention)[0] == 0).all()


def test_objects_of_a_sample():
    draw = torch.Generator().manual_seed(0)
    assert sorted(choose_objects(5, generator=draw).tolist()) == list(range(5))
    assert choose_objects(3).tolist() == [0, 1, 2, 0, 1]
    seen = torch.stack([choose_objects(8, generator=draw) for _ in range(400)])
    assert all(len(set(row.tolist())) == 5 for row in seen)
    assert (seen.flatten().bincount(minlength=8) / 400 - 5 / 8).abs().max() < 0.1


def test_mask_loss_is_that_of_all_pixels_where_points_are_many():
    """Cells of a constant logit and mask: what many points say is what the areas say."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, 4, 4, generator=draw)
    logits = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    masks = (torch.rand(3, 4, 4, generator=draw) < 0.4).repeat_interleave(32, 1).repeat_interleave(32, 2)
    p, t = logits.sigmoid().double().numpy(), masks.double().numpy()
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    dice = (1 - 2 * (p * t).sum((1, 2)) / (p + t).sum((1, 2))).mean()
    for weights, wanted in (((1.0, 0.0), entropy), ((0.0, 1.0), dice), ((2.0, 0.5), 2 * entropy + dice / 2)):
        found = mask_loss(logits, masks, points=200_000, weights=weights, generator=draw)
        assert float(found) == pytest.approx(wanted, rel=0.02)
    one = mask_loss(torch.full((1, 2, 2), -50.0), torch.zeros(1, 5, 5), weights=(0.0, 1.0))
    assert float(one) == pytest.approx(0.0, abs=1e-6)  # with eps an empty mask is met by an empty answer
    logits.requires_grad_()
    mask_loss(logits, masks, generator=draw).backward()
    assert ((logits.grad < 0) == masks)[logits.grad != 0].double().mean() > 0.9
    with pytest.raises(ValueError, match="logits and masks must be"):
        mask_loss(logits, masks[:2])


# Recording.


@pytest.mark.parametrize("name", models.VISION)
def test_recorded_rows_are_eager_attention(name):
    model = models.build(name)
    inputs, looking = marked(name, model)
    greedy = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])
    plain, before = model.generate(**inputs, **greedy), model(**inputs).logits
    with SpatialPrompting(model, queries=SEG, layers=[0, -1]) as prompting:
        assert torch.equal(model.generate(**inputs, **greedy), plain)
        assert sorted(prompting.weights_of) == [0, 2]
        with pytest.raises(KeyError):
            raise KeyError
    with SpatialPrompting(model, queries=looking) as prompting:
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(**inputs).logits, before) and torch.equal(model.generate(**inputs, **greedy), plain)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    maps = getattr(output, "attentions", None) or output.language_model_outputs.attentions
    for row in range(2):
        image = (inputs["input_ids"][row] == models.IMAGE).nonzero()[:, 0]
        wanted = maps[-1][row].mean(0)[looking[row]][:, image]
        if "blip" in name and not row:  # queries of a Q-Former stand at no place
            with pytest.raises(ValueError, match="is not known: pass grid="):
                prompting.maps(row)
            prompting.grid = (3, 3)
        found = prompting.maps(row)
        torch.testing.assert_close(found, wanted[:, : found.shape[1]], atol=1e-6, rtol=1e-4)
        assert "next" in name or "one" in name or found.shape[1] == len(image)


def toy(dtype=torch.float32, **options):
    torch.manual_seed(0)
    settings = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
    config = LlamaConfig(**settings, pad_token_id=0, bos_token_id=None, eos_token_id=None, **options)
    model = LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)
    if dtype == torch.float64:  # Llama's own norms compute in float32
        for layer in model.model.layers:
            layer.input_layernorm = layer.post_attention_layernorm = torch.nn.RMSNorm(16, dtype=dtype)
    return model.train()


def prompt():
    """Two rows of ``[start, 9 image tokens, 2 text]``, the second one padded; spans; masks."""
    ids = torch.full((2, 13), 9)
    ids[:, 0], ids[:, 10:] = 1, torch.tensor([5, SEG, 6])
    ids[1] = ids[1].roll(1)
    ids[1, 0] = 0
    mask = (ids != 0).long()
    spans = SpanMap.of(ids, image_token=9, pad=mask)
    return {"input_ids": ids, "attention_mask": mask}, spans, [blobs(1, 9, seed=n) for n in range(2)]


def labels(inputs):
    """Nothing of padding, and not what padding would predict."""
    found = inputs["input_ids"].clone()
    found[1, :2] = -100
    return found


def loss_of(model, layers=None, backward=False, **more):
    inputs, spans, masks = prompt()
    with SpatialPrompting(model, queries=SEG, layers=layers, spans=spans, **more) as prompting:
        output = model(**inputs, labels=labels(inputs))
        loss = output.loss + 0.1 * prompting.loss(masks)
        if backward:
            loss.backward()
    return loss


def eager_loss(model, layers):
    inputs, spans, masks = prompt()
    model.set_attn_implementation("eager")
    output = model(**inputs, labels=labels(inputs), output_attentions=True)
    parts = []
    for layer in layers:
        for row in range(2):
            at = (inputs["input_ids"][row] == SEG).nonzero()[0]
            a = output.attentions[layer][row].mean(0)[at][:, spans.positions(row, "image")]
            m = mask_shares(masks[row].to(torch.float64), (3, 3)).to(a)
            parts.append(F.kl_div((a + 1e-6).log(), m, reduction="batchmean"))
    model.set_attn_implementation("sdpa")
    return output.loss + 0.1 * sum(parts) / len(parts)


@pytest.mark.parametrize("layers", [None, [0], [0, 1]])
def test_gradient_is_that_of_eager_attention(layers):
    model = toy()
    loss = loss_of(model, layers)
    mine = torch.autograd.grad(loss, list(model.parameters()))
    wanted = eager_loss(model, layers or [1])
    theirs = torch.autograd.grad(wanted, list(model.parameters()))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradient_by_differences():
    """In float64, of queries' and keys' weights in both layers, along random directions."""
    model = toy(torch.float64)
    inputs, spans, masks = prompt()

    def loss():
        with SpatialPrompting(model, queries=SEG, spans=spans) as prompting:
            model(**inputs)
        return prompting.loss(masks)

    for layer in model.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
            (gradient,) = torch.autograd.grad(loss(), weight, allow_unused=False)
            along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            values = []
            for sign in (1, -1):
                weight.data.add_(along, alpha=sign * 1e-6)
                values.append(float(loss().detach()))
                weight.data.add_(along, alpha=-sign * 1e-6)
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((gradient * along).sum()), rel=1e-5, abs=1e-7)


def test_gradient_checkpointing():
    model = toy(torch.float64)
    loss_of(model, backward=True)
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model, backward=True)
    for a, b in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(a.grad, b)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(model, backward=True)


def test_lora_learns_to_look():
    """Adapters of peft alone are trained, and the token's attention comes to be on the mask."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(toy(), LoraConfig(r=4, lora_dropout=0.05, target_modules=["q_proj", "k_proj"]))
    inputs, spans, masks = prompt()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    shares = torch.cat([mask_shares(each, (3, 3)) for each in masks])
    inside = []
    for _ in range(60):
        with SpatialPrompting(model, queries=SEG, spans=spans) as prompting:
            model(**inputs)
            loss = prompting.loss(masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        maps = torch.cat([prompting.maps(row) for row in range(2)])
        inside.append((maps * (shares > 0)).sum().item() / 2)
    assert inside[0] < 0.6 and inside[-1] > 0.75


def test_rows_that_are_left_out():
    model = toy()
    inputs, spans, masks = prompt()
    with SpatialPrompting(model, queries=SEG, spans=spans) as prompting:
        model(**inputs)
    each = [prompting.loss([masks[0], None]), prompting.loss([None, masks[1]])]
    torch.testing.assert_close(prompting.loss(masks), sum(each) / 2)
    torch.testing.assert_close(prompting.loss([masks[0], masks[1] & False]), each[0])
    nothing = prompting.loss([None, None])
    nothing.backward()
    assert nothing.item() == 0


def test_bfloat16():
    model = toy()
    exact = loss_of(model)
    half = loss_of(model.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.05)


def test_bad_input():
    model = toy(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 .* is 0.1"):
        loss_of(model)
    loss_of(model.eval())
    model = toy()
    inputs, spans, masks = prompt()
    with pytest.raises(ValueError, match="queries must be a token's id"):
        SpatialPrompting(model, queries=torch.ones(2, 3))
    with pytest.raises(ValueError, match="grid must be rows and columns"):
        SpatialPrompting(model, queries=SEG, grid=(0, 9))
    with pytest.raises(ValueError, match="does not fit the picture's 9"):
        loss_of(model, grid=(2, 4))
    with pytest.raises(ValueError, match="no position of the prompt"), SpatialPrompting(model, queries=29):
        model(**inputs)
    with SpatialPrompting(model, queries=torch.ones(2, 5).bool()), pytest.raises(ValueError, match="of the prompt's"):
        model(**inputs)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    with SpatialPrompting(model, queries=SEG), pytest.raises(ValueError, match="where the prompt has no input_ids"):
        model(**embeds)
    with SpatialPrompting(model, queries=SEG, spans=spans) as prompting:
        with pytest.raises(RuntimeError, match="nothing is recorded"):
            prompting.loss(masks)
        model(**inputs)
    with pytest.raises(ValueError, match="masks must be of 2 rows"):
        prompting.loss(masks[:1])
    with pytest.raises(ValueError, match="masks of row 0 must be 1"):
        prompting.loss([masks[0].expand(2, -1, -1), masks[1]])
    with SpatialPrompting(model, queries=SEG) as prompting:
        model(**inputs)
    with pytest.raises(ValueError, match="must have one picture"):
        prompting.loss(masks)
    with pytest.raises(ValueError, match="alike"):
        spatial_loss(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="masks must be"):
        mask_shares(torch.ones(2, 3), (1, 1))
    with pytest.raises(ValueError, match="count must be at least 1"):
        choose_objects(0)
