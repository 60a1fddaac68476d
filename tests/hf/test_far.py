"""Heads that look far: planted ones are found, and on the shipped model they keep what windows lose."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glocal.bench.corpus import python_source, to_ids
from glocal.hf import adapt, byte_llama, far_heads
from glocal.patterns import Full, PerHead, parse

NEAR = "sliding(7, 0)"


def planted():
    """Two layers of four heads whose queries all see alike, but for two that see nothing but what is near."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # uniform attention: as far as the text reaches
    return model


def near_only(model, layer, head):
    """A head that looks at the newest token: a constant query that rotation turns towards itself."""
    attention = model.model.layers[layer].self_attn
    rows = slice(head * 8, head * 8 + 8)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[rows] = 0
            projection.weight[rows, 0] = 6.0


def test_planted_heads_are_told_apart():
    model = planted()
    for layer, head in ((0, 1), (0, 2), (1, 0)):
        near_only(model, layer, head)
    inputs = {"input_ids": torch.randint(50, (2, 128), generator=torch.Generator().manual_seed(1))}
    found = far_heads(model, inputs, NEAR, share=5 / 8)
    full, near = Full(), parse(NEAR)
    assert found == [PerHead([full, near, near, full]), PerHead([near, full, full, full])]


def test_all_heads_and_none():
    model = planted()
    inputs = {"input_ids": torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        plain = model(**inputs).logits
        with adapt(model, far_heads(model, inputs, NEAR, share=1.0)):
            assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)
        with adapt(model, NEAR):
            windowed = model(**inputs).logits
        with adapt(model, far_heads(model, inputs, NEAR, share=0.0)):
            assert torch.allclose(model(**inputs).logits, windowed, atol=1e-5)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_are_checked_before_work(share):
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        far_heads(planted(), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, NEAR, share=share)


def test_on_the_shipped_model_an_eighth_of_the_heads_keeps_what_windows_lose():
    """Chosen on text that it was trained on, judged on text that it has not seen; a quarter of the keys."""
    model, text, held = byte_llama(), python_source(), python_source(held_out=True)

    def pieces(source, count):
        return torch.stack(
            [to_ids(source[at : at + 2048]) for at in range(0, len(source) - 2048, len(source) // count)]
        )

    where = far_heads(model, {"input_ids": pieces(text, 4)[:4]}, "sliding(255, 0) | sinks(4)")
    ids = pieces(held, 6)[:6]

    def loss():
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    full = loss()
    with adapt(model, where):
        far = loss()
    with adapt(model, "sliding(255, 0) | sinks(4)"):
        near = loss()
    assert far < full * 1.02 < full * 1.04 < near
    keys = sum(float(p.rows(torch.tensor([2047]), (2048,), (2048,)).double().mean()) for p in where) / len(where)
    assert keys < 0.25
