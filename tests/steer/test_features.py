"""One vector for each input is what the encoder itself gives, by its pooling or by hand."""

import pytest
import torch
import transformers as t

from glocal.steer.features import pooled
from glocal.steer.similarity import align
from tests.steer.judged import some_triplets

VISION = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16)


def encoder(name):
    torch.manual_seed(0)
    if name == "clip":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**VISION, patch_size=8))
    if name.startswith("vit"):
        config = t.ViTConfig(**VISION, patch_size=8)
        return t.ViTModel(config, add_pooling_layer=name == "vit")
    config = t.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return t.BertModel(config)


@pytest.mark.parametrize("name", ["clip", "vit", "vit without pooling", "bert"])
def test_pooled_features_are_the_encoders_own(name):
    model = encoder(name)
    model.train()
    list(model.modules())[3].eval()
    modes = [module.training for module in model.modules()]
    draw = torch.Generator().manual_seed(0)
    if name == "bert":
        batches = [{"input_ids": torch.randint(50, (n, 7), generator=draw)} for n in (3, 2)]
        single = batches[0]["input_ids"]
    else:
        batches = [torch.randn(n, 3, 16, 16, generator=draw) for n in (3, 2)]
        single = batches[0]
    found = pooled(model, batches)
    assert found.shape == (5, 24) and not found.requires_grad
    assert [module.training for module in model.modules()] == modes  # dropout was off nevertheless
    model.eval()
    with torch.no_grad():
        out = model(single)
    own = out.pooler_output if name != "vit without pooling" else out.last_hidden_state.mean(1)
    torch.testing.assert_close(found[:3], own, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled(model, batches[:1], how="first"), out.last_hidden_state[:, 0])
    torch.testing.assert_close(pooled(model, batches[:1], how="mean"), out.last_hidden_state.mean(1))
    if name == "vit without pooling":
        with pytest.raises(ValueError, match="this ViTModel has none"):
            pooled(model, batches, how="pooler")


def test_padding_does_not_count():
    model = encoder("bert").eval()
    ids, mask = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    found = pooled(model, [{"input_ids": ids, "attention_mask": mask}], how="mean")
    alone = pooled(model, [ids[:1, :3]], how="mean")
    torch.testing.assert_close(found[:1], alone, atol=1e-6, rtol=1e-5)


def test_features_of_an_encoder_can_be_aligned():
    model = encoder("vit")
    draw = torch.Generator().manual_seed(0)
    x = pooled(model, [torch.randn(10, 3, 16, 16, generator=draw)] * 2, progress=True)
    fit = align(x, some_triplets(20, 30), epochs=2, progress=True)
    assert fit(x).isfinite().all() and fit.weight.grad is None


def test_bad_input_is_named():
    cases = [
        (lambda: pooled(encoder("vit"), []), "batches must hold at least one"),
        (lambda: pooled(encoder("vit"), [], how="max"), "how must be"),
    ]
    for call, named in cases:
        with pytest.raises(ValueError, match=named):
            call()
    classifier = t.ViTForImageClassification(t.ViTConfig(**VISION, patch_size=8))
    with pytest.raises(TypeError, match="ViTForImageClassification gave none"):
        pooled(classifier, [torch.zeros(1, 3, 16, 16)])
