"""S027: the encoder against transformers on equal weights, and its published sizes."""

from __future__ import annotations

import pytest
import torch

from glocal import create
from glocal.models.language.longt5 import LongT5Encoder

NAMES = [
    (r"shared.", "embed."),
    (r"encoder.block.", "blocks."),
    (r"encoder.final_layer_norm.", "norm."),
    (r"layer.0.layer_norm.", "norm1."),
    (r"layer.1.layer_norm.", "norm2."),
    (r"layer.1.DenseReluDense.", "mlp."),
    (r"layer.0.SelfAttention.", "attention."),
    (r"layer.0.LocalSelfAttention.", "attention."),
    (r"layer.0.TransientGlobalSelfAttention.", "attention."),
    (r"global_input_layer_norm.", "side_norm."),
    (r"global_relative_attention_bias.", "side_bias."),
    (r"relative_attention_bias.", "bias."),
    *((f"attention.{n}.", f"attention.{n}_proj.") for n in "qkvo"),
]


def copied(model, peer):
    """The model with the peer's weights; its tables of biases stand in its first layer alone."""
    state = {}
    for name, value in peer.state_dict().items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all("bias.weight" in name and not name.startswith("blocks.0.") for name in missing)
    assert set(unexpected) <= {"encoder.embed_tokens.weight"}
    return model


def pair(kind, **sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    common |= {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    if kind == "full":
        peer = transformers.T5EncoderModel(transformers.T5Config(**common))
    else:
        config = transformers.LongT5Config(**common, encoder_attention_type=kind, **sizes)
        peer = transformers.LongT5EncoderModel(config)
    for parameter in peer.parameters():  # biases and norms that are not all alike
        torch.nn.init.normal_(parameter, std=0.3)
    model = LongT5Encoder(
        60,
        32,
        depth=3,
        num_heads=4,
        head_dim=8,
        hidden=48,
        radius=sizes.get("local_radius", 1000),
        global_block_size=sizes["global_block_size"] if kind == "transient-global" else None,
    )
    return copied(model, peer).double().eval(), peer.double().eval()


@pytest.mark.parametrize("kind", ["local", "transient-global"])
@pytest.mark.parametrize("lengths", [(300, 300), (300, 237), (256, 5)])
def test_equals_transformers(kind, lengths):
    model, peer = pair(kind, local_radius=15, global_block_size=16)
    tokens = torch.randint(60, (2, 300))
    keys = torch.arange(300) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        theirs = peer(tokens, attention_mask=keys.long()).last_hidden_state
        ours = model(tokens, keys=keys)
    torch.testing.assert_close(ours[keys], theirs[keys], atol=1e-4, rtol=0)
    assert bool(ours.isfinite().all())


def test_equals_t5_where_the_window_holds_everything():
    model, peer = pair("full")
    tokens = torch.randint(60, (2, 70))
    keys = torch.arange(70) < torch.tensor([70, 41])[:, None]
    with torch.no_grad():
        theirs = peer(tokens, attention_mask=keys.long()).last_hidden_state
        torch.testing.assert_close(model(tokens, keys=keys)[keys], theirs[keys], atol=1e-4, rtol=0)


def test_layers_share_the_biases_and_every_parameter_learns():
    model = create("longt5_tiny")
    first, *others = (block.attention for block in model.blocks)
    assert all(o.bias is first.bias and o.side_bias is first.side_bias for o in others)
    assert all(o.side_norm is not first.side_norm for o in others)
    model(torch.randint(256, (2, 90))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("longt5_local_base", 109_628_544),
        ("longt5_local_large", 341_231_104),
        ("longt5_tglobal_base", 109_638_144),
        ("longt5_tglobal_large", 341_256_192),
        ("longt5_tglobal_xl", 1_223_577_600),
    ],
)
def test_published_sizes(name, parameters):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = create(name)
        attention = model.blocks[0].attention
        config = transformers.LongT5Config(
            d_model=model.dim,
            d_ff=model.blocks[0].mlp.wo.in_features,
            num_layers=len(model.blocks),
            num_heads=attention.num_heads,
            d_kv=attention.head_dim,
            feed_forward_proj="gated-gelu",
            encoder_attention_type="local" if attention.global_block_size is None else "transient-global",
        )
        peer = transformers.LongT5EncoderModel(config)
    assert sum(p.numel() for p in model.parameters()) == parameters == sum(p.numel() for p in peer.parameters())
