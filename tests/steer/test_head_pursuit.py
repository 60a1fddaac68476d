"""Heads' writes against the blocks that they make up, edits against edited weights, rankings against planted heads."""

import pytest
import torch
import transformers as t

from glocal.steer.agla import AGLA
from glocal.steer.head_pursuit import HeadScale, head_writes, rank_heads, top_heads, unembedding
from glocal.steer.steering import language_layers
from tests.steer import models

ALL = [*models.VISION, *models.TEXT]
GREEDY = dict(max_new_tokens=20, do_sample=False, suppress_tokens=[models.IMAGE])


def gpt2():
    config = t.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, bos_token_id=1)
    return t.GPT2LMHeadModel(config)


def neox():
    config = t.GPTNeoXConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return t.GPTNeoXForCausalLM(config)


def gemma():
    return t.GemmaForCausalLM(t.GemmaConfig(**models._TEXT, head_dim=8))


def clip():
    config = t.CLIPConfig(vision_config=models._VISION, text_config=dict(hidden_size=16, num_attention_heads=2))
    return t.CLIPVisionModel(config.vision_config)


def any_model(name):
    torch.manual_seed(0)
    make = {"gpt2": gpt2, "neox": neox, "gemma": gemma}.get(name)
    if make is None:
        model = models.build(name)
        return model, models.inputs(name, model)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains too
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, models.inputs("llama", model)


def blocks(model, modules, inputs):
    """What each attention module gives, ``(B, N, C)``."""
    kept = []

    def keep(module, args, output):
        kept.append((output[0] if isinstance(output, tuple) else output).detach())

    placed = [module.register_forward_hook(keep) for module in modules]
    model(**inputs)
    for hook in placed:
        hook.remove()
    return kept


def hooks(model):
    return [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()]


@pytest.mark.parametrize("name", [*ALL, "gpt2", "neox", "gemma"])
def test_heads_and_bias_sum_to_the_block(name):
    model, inputs = any_model(name)
    modules = list(language_layers(model).values())
    wanted = blocks(model, modules, inputs)
    writes = head_writes(model, inputs)
    assert sorted(writes) == list(range(len(modules)))
    for layer, module in enumerate(modules):
        output = next(
            getattr(module, name) for name in ("o_proj", "out_proj", "dense", "c_proj") if hasattr(module, name)
        )
        bias = 0 if output.bias is None else output.bias
        assert writes[layer].shape[:2] == (4, 2)
        assert torch.allclose(writes[layer].sum(0) + bias, wanted[layer][:, -1], atol=1e-5)
    first = head_writes(model, inputs, where=torch.tensor([5, -2]), layers=[-1])
    assert list(first) == [len(modules) - 1]
    whole = torch.stack([wanted[-1][0, 5], wanted[-1][1, -2]])
    assert torch.allclose(first[len(modules) - 1].sum(0) + bias, whole, atol=1e-5)
    some = inputs["attention_mask"].bool()
    mean = torch.stack([wanted[-1][row, some[row]].mean(0) for row in range(2)])
    assert torch.allclose(head_writes(model, inputs, where=some)[len(modules) - 1].sum(0) + bias, mean, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "llava", "paligemma", "blip_2"])
def test_an_image_tower_s_heads(name):
    model = models.build(name) if name != "clip" else clip().eval()
    inputs = models.inputs(name, model) if name != "clip" else {"pixel_values": torch.randn(2, 3, 32, 32)}
    modules = [m for path, m in model.named_modules() if path.endswith("self_attn") and "language" not in path]
    assert len(modules) == 3
    wanted = blocks(model, modules, inputs)
    for where, pick in ((0, lambda states: states[:, 0]), (None, lambda states: states.mean(1))):
        writes = head_writes(model, inputs, where=where, tower=True)
        assert len(writes) == 3
        for layer, module in enumerate(modules):
            output = getattr(module, "out_proj", getattr(module, "projection", None))
            assert torch.allclose(writes[layer].sum(0) + output.bias, pick(wanted[layer]), atol=1e-5)


@pytest.mark.parametrize("name", [*ALL, "gpt2", "neox"])
def test_identities_and_nothing_left_behind(name):
    model, inputs = any_model(name)
    plain = model.generate(**inputs, **GREEDY)
    logits = model(**inputs).logits
    before = hooks(model)  # transformers leaves some of its own
    with HeadScale(model, heads=[(0, 1), (-1, 3)], factor=1.0):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
        assert torch.equal(model(**inputs).logits, logits)
    with HeadScale(model, heads=[(0, 1), (-1, 3)], factor=-3.0), pytest.raises(KeyError, match="mine"):
        changed = model.generate(**inputs, **GREEDY)
        raise KeyError("mine")
    assert changed.shape == plain.shape and not torch.equal(changed, plain)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain) and torch.equal(model(**inputs).logits, logits)
    assert hooks(model) == before


@pytest.mark.parametrize("name", ["llava", "qwen2", "blip_2", "gpt2"])
def test_all_heads_at_zero_are_no_block(name):
    model, inputs = any_model(name)
    modules = list(language_layers(model).values())
    with HeadScale(model, heads=[(layer, head) for layer in range(len(modules)) for head in range(4)], factor=0.0):
        found = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY)
    placed = []
    for module in modules:
        output = next(getattr(module, name) for name in ("o_proj", "out_proj", "c_proj") if hasattr(module, name))
        bias = 0.0 if output.bias is None else output.bias

        def gone(module, args, output, bias=bias):
            return (torch.zeros_like(output[0]) + bias, *output[1:])

        placed.append(module.register_forward_hook(gone))
    assert torch.equal(model(**inputs).logits, found) and torch.equal(model.generate(**inputs, **GREEDY), tokens)
    for hook in placed:
        hook.remove()
    assert not torch.allclose(model(**inputs).logits, found, atol=1e-2)


@pytest.mark.parametrize("name", ["llava", "gpt2"])
def test_scaling_is_scaling_of_the_projection_s_columns(name):
    model, inputs = any_model(name)
    with HeadScale(model, heads=[(1, 2), (0, -1)], factor=-2.0):
        found, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    modules = list(language_layers(model).values())
    with torch.no_grad():
        for layer, head in ((1, 2), (0, 3)):
            if name == "gpt2":
                modules[layer].c_proj.weight[8 * head : 8 * head + 8] *= -2
            else:
                modules[layer].o_proj.weight[:, 8 * head : 8 * head + 8] *= -2
    assert torch.allclose(model(**inputs).logits, found, atol=1e-4)
    assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


def test_an_image_tower_is_scaled():
    model = clip().eval()
    pixels = torch.randn(2, 3, 32, 32)
    plain = model(pixel_values=pixels).last_hidden_state
    with HeadScale(model, heads=[(2, 1)], factor=0.0, tower=True) as scale:
        found = model(pixel_values=pixels).last_hidden_state
        with pytest.raises(ValueError, match="block already"):
            scale.__enter__()
    assert torch.equal(model(pixel_values=pixels).last_hidden_state, plain)
    last = [m for path, m in model.named_modules() if path.endswith("self_attn")][2]
    with torch.no_grad():
        last.out_proj.weight[:, 6:12] = 0
    assert torch.allclose(model(pixel_values=pixels).last_hidden_state, found, atol=1e-6)
    llava = models.build("llava")
    inputs = models.inputs("llava", llava)
    before = llava(**inputs).logits
    with HeadScale(llava, heads=[(0, 1)], factor=0.0, tower=True):
        assert not torch.allclose(llava(**inputs).logits, before)
        llava.generate(**inputs, **GREEDY)
    assert torch.equal(llava(**inputs).logits, before)


@pytest.mark.parametrize("tower", [False, True])
def test_another_method_s_second_branch_is_not_scaled(tower):
    model, inputs = any_model("llava")
    one = GREEDY | dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True, suppress_tokens=None)
    plain = model.generate(**inputs, **one).logits[0]
    heads = dict(heads=[(0, 1), (1, 0)], factor=0.0, tower=tower)
    with HeadScale(model, **heads):
        scaled = model.generate(**inputs, **one).logits[0]
    same = {"pixel_values": inputs["pixel_values"]}
    with AGLA(model, augmented=same, alpha=1.0, beta=0.0), HeadScale(model, **heads):
        fused = model.generate(**inputs, **one).logits[0]
    assert not torch.allclose(plain, scaled, atol=1e-2) and torch.allclose(fused, plain + scaled, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma", "llava", "gemma3"])
def test_the_gain_makes_the_stream_s_logits(name):
    """Of models with root-mean-square norms, logits are the rows times the stream, over its size."""
    model, inputs = any_model(name)
    norm = next(m for path, m in model.named_modules() if path.endswith(("model.norm", "language_model.norm")))
    with torch.no_grad():
        norm.weight.add_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    kept = []
    hook = norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    logits = model(**inputs).logits[:, -1]
    hook.remove()
    stream = kept[0][:, -1]
    found = stream @ unembedding(model).T / stream.pow(2).mean(-1, keepdim=True).sqrt()
    assert torch.allclose(found, logits, atol=1e-3, rtol=1e-4)
    head = model.get_output_embeddings().weight
    assert torch.equal(unembedding(model, gain=False), head)
    words = [7, [8, 9]]
    assert torch.equal(unembedding(model, words, gain=False), head[[7, 8]])
    mean = unembedding(model, words, gain=False, several="mean")
    assert torch.equal(mean, torch.stack([head[7], (head[8] + head[9]) / 2]))


@pytest.mark.parametrize("name", ["gpt2", "neox", "blip_2"])
def test_the_gain_of_a_layer_norm(name):
    model, _ = any_model(name)
    norm = next(
        m
        for path, m in model.named_modules()
        if path.endswith(("ln_f", "final_layer_norm", "decoder.final_layer_norm"))
    )
    wanted = unembedding(model, [3, 4], gain=False) * norm.weight
    assert torch.allclose(unembedding(model, [3, 4]), wanted, rtol=1e-4, atol=1e-6)


def test_a_planted_head_ranks_first():
    model, _ = any_model("llama")
    concept = [20, 21, 22]
    rows = unembedding(model, concept)
    module = list(language_layers(model).values())[1]
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        module.o_proj.weight[:, 16:24] = rows.T @ torch.randn(3, 8, generator=draw)
    ids = torch.randint(10, 99, (40, 12), generator=draw)
    writes = head_writes(model, {"input_ids": ids})
    ranks = rank_heads(writes, rows)
    assert ranks[0][:2] == (1, 2) and ranks[0].score > 0.999 and ranks[1].score < 0.7 and len(ranks) == 12
    assert [rank.score for rank in ranks] == sorted((rank.score for rank in ranks), reverse=True)
    assert top_heads(ranks) == [(1, 2)] and len(top_heads(ranks, 0.25)) == 3
    by_hand = (writes[1][2] - writes[1][2].mean(0)) @ (rows / rows.norm(dim=1, keepdim=True)).T
    lens = {rank[:2]: rank.score for rank in rank_heads(writes, rows, by="lens")}
    assert lens[1, 2] == pytest.approx(by_hand.abs().amax(1).mean().item(), rel=1e-5)


def test_low_precision():
    model, inputs = any_model("llama")
    wide = head_writes(model, inputs)
    model = model.bfloat16()
    writes = head_writes(model, inputs)
    assert writes[0].dtype == torch.float32 and torch.allclose(writes[0], wide[0], atol=0.1)
    plain = model.generate(**inputs, **GREEDY)
    with HeadScale(model, heads=[(0, 0)], factor=1.0):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def test_what_is_refused():
    model, inputs = any_model("llama")
    with pytest.raises(ValueError, match="at least one; there were none"):
        HeadScale(model)
    with pytest.raises(ValueError, match="heads' layers must be numbers from -3 to 2"):
        HeadScale(model, heads=[(3, 0)])
    with pytest.raises(ValueError, match="heads must be numbers from -4 to 3"):
        HeadScale(model, heads=[(0, 4)])
    with pytest.raises(ValueError, match="layers must be None"):
        HeadScale(model, heads=[(0, 0)], layers=[0])
    with pytest.raises(ValueError, match="pad on the left"):
        head_writes(model, {name: value.flip(1) for name, value in inputs.items()})
    with pytest.raises(ValueError, match=r"where must be from -8 to 7"):
        head_writes(model, inputs, where=8)
    with pytest.raises(ValueError, match="true somewhere in each row"):
        head_writes(model, inputs, where=torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens must be at least one"):
        unembedding(model, [])
    with pytest.raises(ValueError, match="several must be"):
        unembedding(model, [1], several="last")
    with pytest.raises(TypeError, match="no head over a vocabulary"):
        unembedding(clip())
    with pytest.raises(ValueError, match="by must be"):
        rank_heads({}, torch.eye(3), by="random")
    with pytest.raises(TypeError, match="transformers PreTrainedModel"):
        HeadScale(torch.nn.Linear(2, 2), heads=[(0, 0)])
    qwen, pictures = any_model("qwen2_vl")
    with pytest.raises(TypeError, match="packs all pictures"):
        head_writes(qwen, pictures, tower=True)
    assert not any(hooks(model)) and not any(module._forward_pre_hooks for module in qwen.modules())
