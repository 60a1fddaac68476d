"""S058: the encoder against transformers on equal weights, its sizes, and pre-training by replaced tokens."""

from __future__ import annotations

import math

import pytest
import torch

from glocal import create
from glocal.models import parameters
from glocal.models.language.convbert import ConvBERT, from_transformers
from glocal.models.language.electra import MaskedTokens, ReplacedTokens, replaced_token_loss
from tests.models.networks import assert_a_step_changes, assert_exports

PUBLISHED = {  # hidden, heads, groups, embedding: as configured upstream
    "convbert_base": (768, 12, 1, 768, 106e6),
    "convbert_medium_small": (384, 8, 2, 128, 17e6),
    "convbert_small": (256, 4, 1, 128, 14e6),
}


def pair(groups=1, embed=32, kind="ConvBertModel", **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    sizes |= {"intermediate_size": 48, "embedding_size": embed, "num_groups": groups, "conv_kernel_size": 5}
    torch.manual_seed(0)
    peer = getattr(transformers, kind)(transformers.ConvBertConfig(**sizes, max_position_embeddings=40)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # biases and norms that are not all alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    return from_transformers(peer, **options), peer


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("embed", [32, 16])
def test_equals_transformers(groups, embed):
    model, peer = pair(groups, embed)
    tokens, types = torch.randint(60, (2, 33)), torch.randint(2, (2, 33))
    with torch.no_grad():
        theirs = peer(tokens, token_type_ids=types).last_hidden_state
        torch.testing.assert_close(model(tokens, types=types), theirs, atol=1e-5, rtol=0)
        keys = torch.arange(33) < torch.tensor([[33], [20]])
        theirs = peer(tokens, attention_mask=keys.long()).last_hidden_state
        torch.testing.assert_close(model(tokens, keys=keys)[keys], theirs[keys], atol=1e-5, rtol=0)


def test_a_model_with_a_head_gives_its_encoder_and_the_head_for_masked_tokens_is_transformers():
    encoder, peer = pair(embed=16, kind="ConvBertForMaskedLM")
    model = MaskedTokens(encoder).eval()
    model.dense.load_state_dict(peer.generator_predictions.dense.state_dict())
    model.norm.load_state_dict(peer.generator_predictions.LayerNorm.state_dict())
    model.bias.data.copy_(peer.generator_lm_head.bias)
    tokens = torch.randint(60, (2, 33))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)
    at = torch.rand(2, 33) < 0.3
    torch.testing.assert_close(model(tokens, at=at), model(tokens)[at])


def test_padding_counts_with_the_weights_of_transformers_and_not_with_masked_convolutions():
    tokens = torch.randint(60, (1, 33))
    keys = torch.arange(33)[None] < 20
    for mask_conv in (False, True):
        model, _ = pair(mask_conv=mask_conv)
        same = torch.isclose(model(tokens, keys=keys)[:, :20], model(tokens[:, :20]), atol=1e-5).all()
        assert bool(same) == mask_conv


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_transformers_and_near_the_published_ones(name):
    transformers = pytest.importorskip("transformers")
    hidden, heads, groups, embed, published = PUBLISHED[name]
    config = transformers.ConvBertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_groups=groups,
        embedding_size=embed,
        intermediate_size=4 * hidden,
    )
    with torch.device("meta"):
        peer = transformers.ConvBertModel(config)
    assert parameters(name) == sum(p.numel() for p in peer.parameters())
    assert f"{parameters(name):,}" in create.__globals__["maker"](name).__doc__
    # Published in millions, the small one with what else is trained: generator and heads.
    assert abs(parameters(name) / published - 1) < {"convbert_small": 0.065, "convbert_medium_small": 0.03}.get(
        name, 0.01
    )


def test_every_parameter_learns_and_the_model_exports():
    torch.manual_seed(0)
    model = create("convbert_tiny")
    tokens = torch.randint(256, (2, 30))
    assert_exports(model.eval(), tokens)
    model.train()(tokens).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    assert_a_step_changes(model)


def test_a_copy_with_the_same_state_computes_the_same_and_half_precision_is_near():
    torch.manual_seed(0)
    model, again, tokens = create("convbert_tiny").eval(), create("convbert_tiny").eval(), torch.randint(256, (2, 30))
    assert not torch.equal(again(tokens), model(tokens))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), model(tokens))
    near = (again.bfloat16()(tokens).float() - model(tokens)).abs()
    assert near.mean().item() < 0.02


def test_the_upstream_start_of_the_spans():
    torch.manual_seed(0)
    model = ConvBERT(10, 256, depth=4, num_heads=4)
    spans = torch.cat([block.attention.depthwise.weight.flatten() for block in model.blocks])
    assert spans.std().item() == pytest.approx(1 / 9, rel=0.02)


VOCAB, MASK = 12, 11


class Generator(torch.nn.Module):
    """Knows nothing, or always the same token; keeps what it was given."""

    def __init__(self, always=None):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(VOCAB))
        if always is not None:
            self.logits.data[always] = 100.0

    def forward(self, tokens, *, at):
        self.tokens, self.at = tokens, at
        return self.logits.expand(int(at.sum()), -1)


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, tokens):
        return self.logit.expand(tokens.shape)


def test_the_loss_by_hand():
    tokens, generator, detector = torch.randint(VOCAB - 1, (40, 20)), Generator(), Detector()
    rng = torch.Generator().manual_seed(0)
    found = replaced_token_loss(generator, detector, tokens, MASK, rng=rng)
    assert bool((generator.at.sum(1) == 3).all())  # 15 % of 20
    hidden = generator.tokens == MASK
    assert not (hidden & ~generator.at).any() and 0.7 < hidden.sum() / generator.at.sum() < 0.98
    assert torch.equal(generator.tokens[~hidden], tokens[~hidden])
    assert torch.equal(found.replaced, found.tokens != tokens) and not (found.replaced & ~generator.at).any()
    assert found.masked.item() == pytest.approx(math.log(VOCAB))
    share = found.replaced.double().mean().item()
    assert share == pytest.approx(0.15 * (VOCAB - 1) / VOCAB, abs=0.02)
    p = 1 / (1 + math.exp(-0.3))
    assert found.detected.item() == pytest.approx(-share * math.log(p) - (1 - share) * math.log(1 - p), rel=1e-5)
    assert found.loss.item() == pytest.approx(found.masked.item() + 50 * found.detected.item(), rel=1e-5)


def test_a_generator_that_is_right_replaces_nothing():
    tokens = torch.full((3, 20), 4)
    found = replaced_token_loss(Generator(always=4), Detector(), tokens, MASK)
    assert not found.replaced.any() and torch.equal(found.tokens, tokens)


def test_the_detector_teaches_the_generator_nothing():
    tokens, generator, detector = torch.randint(VOCAB - 1, (4, 20)), Generator(), Detector()
    found = replaced_token_loss(generator, detector, tokens, MASK)
    (own,) = torch.autograd.grad(found.loss, generator.logits, retain_graph=True)
    torch.testing.assert_close(own, torch.autograd.grad(found.masked, generator.logits, retain_graph=True)[0])
    assert torch.autograd.grad(found.loss, detector.logit)[0] != 0


def test_as_many_are_chosen_where_few_may_be():
    torch.manual_seed(0)
    tokens, generator = torch.randint(VOCAB - 1, (40, 20)), Generator()
    for free, count in ((5, 3), (2, 2)):  # 15 % of 20, and no more than there are
        maskable = (torch.arange(20) < free).expand(40, -1)
        replaced_token_loss(generator, Detector(), tokens, MASK, maskable=maskable)
        assert bool((generator.at.sum(1) == count).all()) and not (generator.at & ~maskable).any()


def test_only_what_may_be_chosen_is():
    torch.manual_seed(0)
    tokens, keys = torch.randint(250, (5, 20)), torch.arange(20) < torch.tensor([20, 15, 9, 4, 2])[:, None]
    maskable = torch.arange(20).expand(5, -1) > 0
    generator, detector = MaskedTokens(create("convbert_tiny")), ReplacedTokens(create("convbert_tiny"))
    found = replaced_token_loss(generator, detector, tokens, 255, keys=keys, maskable=maskable, share=0.9)
    changed = found.tokens != tokens
    assert not (changed & ~(keys & maskable)).any() and bool(changed.any(1).all())
    other = tokens.masked_fill(~keys, 7)
    again = [
        replaced_token_loss(
            *(generator, detector, given, 255), keys=keys, maskable=maskable, rng=torch.Generator().manual_seed(1)
        ).loss
        for given in (tokens, other)
    ]
    torch.testing.assert_close(*again)


def test_shared_embeddings_learn_from_both():
    torch.manual_seed(0)
    detector, generator = (
        kind(create("convbert_tiny", dim=dim)) for kind, dim in ((ReplacedTokens, 64), (MaskedTokens, 16))
    )
    generator.encoder.embeddings = detector.encoder.embeddings
    word = detector.encoder.embeddings.word.weight
    found = replaced_token_loss(generator, detector, torch.randint(250, (4, 20)), 255)
    parts = [torch.autograd.grad(t, word, retain_graph=True)[0] for t in (found.masked, found.detected, found.loss)]
    assert all(bool(part.any()) for part in parts)
    torch.testing.assert_close(parts[2], parts[0] + 50 * parts[1])


def test_errors_name_the_argument():
    transformers = pytest.importorskip("transformers")
    tokens, keys = torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="share must be"):
        replaced_token_loss(Generator(), Detector(), tokens, MASK, share=0)
    with pytest.raises(ValueError, match=r"keys must be booleans \(2, 8\)"):
        replaced_token_loss(Generator(), Detector(), tokens, MASK, keys=keys[:1])
    with pytest.raises(ValueError, match="maskable must have a real token in each row"):
        replaced_token_loss(Generator(), Detector(), tokens, MASK, maskable=~keys)
    with pytest.raises(ValueError, match="N at most max_length 128"):
        create("convbert_tiny")(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match=r"types must be \(2, 8\), as tokens; it was \(8,\)"):
        create("convbert_tiny")(tokens, types=tokens[0])
    with pytest.raises(ValueError, match="groups must divide"):
        ConvBERT(10, 32, depth=1, num_heads=4, groups=3)
    with pytest.raises(ValueError, match="must be a ConvBERT of transformers; it was Linear"):
        from_transformers(torch.nn.Linear(2, 2))
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = transformers.ConvBertConfig(**sizes, intermediate_size=16, embedding_size=16, head_ratio=4)
    with pytest.raises(ValueError, match="head_ratio 2"):
        from_transformers(transformers.ConvBertModel(config))
