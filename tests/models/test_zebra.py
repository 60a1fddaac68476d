"""S011: the layer schedule and the whole decoder against transformers."""

from __future__ import annotations

import pytest
import torch

import glocal
from glocal.models.language.transformer import Transformer, zebra
from glocal.nn import Attention, Rope
from glocal.patterns import is_global


def kinds(model):
    return ["global" if type(block.attention) is Attention else "local" for block in model.blocks]


@pytest.mark.parametrize("place", [0, 3])
def test_equals_qwen2_with_these_layer_types(place):
    transformers = pytest.importorskip("transformers")
    types = ["full_attention" if is_global(n, 4, place) else "sliding_attention" for n in range(8)]
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=16, layer_types=types, rms_norm_eps=1e-5,
        attn_implementation="eager", tie_word_embeddings=False, rope_theta=10000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.Qwen2ForCausalLM(config).double().eval()
    for name, parameter in peer.named_parameters():
        if name.endswith("proj.bias"):  # Qwen2 has biases, Llama and Zebra have none
            torch.nn.init.zeros_(parameter)
    model = zebra(50, 32, 8, 4, num_kv_heads=2, window=16, place=place, hidden=64).double().eval()
    names = {
        "model.embed_tokens": "embed", "model.layers": "blocks", "self_attn": "attention", "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2", "model.norm": "norm", "lm_head": "head",
    }  # fmt: skip
    state = {}
    for name, value in peer.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if not name.endswith("proj.bias"):
            state[name] = value
    model.load_state_dict(state)
    tokens = torch.randint(50, (2, 128))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-6, rtol=1e-6)


def test_limits_of_the_schedule():
    assert kinds(zebra(10, 32, 5, 2, period=1)) == ["global"] * 5
    assert kinds(zebra(10, 32, 5, 2, period=9)) == ["global"] + ["local"] * 4
    assert kinds(zebra(10, 32, 8, 2)) == (["global"] + ["local"] * 3) * 2
    with pytest.raises(ValueError, match="place must be less than the period 4; it was 4"):
        zebra(10, 32, 5, 2, place=4)


def test_decoding_equals_the_parallel_form_and_bounds_local_layers():
    torch.manual_seed(0)
    model = zebra(50, 32, 4, 2, window=8).double().eval()
    tokens = torch.randint(50, (2, 60))
    caches = model.new_caches()
    with torch.no_grad():
        steps = [model(tokens[:, :20], caches=caches)]
        steps += [model(tokens[:, t : t + 1], caches=caches) for t in range(20, 60)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens))
    assert [cache.kept()[0].k.shape[2] for cache in caches] == [60, 8, 8, 8]


def test_causal():
    torch.manual_seed(0)
    model = zebra(50, 32, 5, 2, window=8).double().eval()
    tokens = torch.randint(50, (1, 40))
    other = tokens.clone()
    other[:, 25] = (other[:, 25] + 1) % 50
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :25], b[:, :25]) and not torch.allclose(a[:, 25:], b[:, 25:])


def test_generate_is_greedy_without_a_cache_too():
    torch.manual_seed(0)
    model = zebra(50, 32, 4, 2, window=8).eval()
    tokens = torch.randint(50, (2, 5))
    slow = tokens
    with torch.no_grad():
        for _ in range(12):
            slow = torch.cat([slow, model(slow)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 12), slow)


def test_sizes_of_the_published_variant():
    with torch.device("meta"):
        model = glocal.create("zebra_llama2_7b")
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616  # Llama-2-7B


def test_an_encoder_of_the_same_network_takes_padding():
    torch.manual_seed(0)
    model = Transformer(50, 32, [lambda dim: Attention(dim, 2, rope=Rope())] * 2).eval()
    tokens, keys = torch.randint(50, (1, 12)), torch.ones(1, 12, dtype=torch.bool)
    keys[:, 9:] = False
    torch.testing.assert_close(model(tokens, keys=keys)[:, :9], model(tokens[:, :9]))


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="did you mean 'zebra_tiny'"):
        glocal.create("zebra_tny")
