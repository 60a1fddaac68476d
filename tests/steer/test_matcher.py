"""Matchers: BLIP's relevance against finite differences, the model's own against its parts."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipConfig, BlipForImageTextRetrieval

from glocal.steer.matcher import BlipMatcher, SelfMatcher
from glocal.steer.relevance import attention_relevance
from tests.steer import models

TEXTS = torch.tensor([[30, 11, 12, 13, 31, 0, 0], [30, 14, 15, 16, 17, 18, 31]])


def blip():
    torch.manual_seed(0)
    text = dict(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32, encoder_hidden_size=16, pad_token_id=0, bos_token_id=30, sep_token_id=31,
        eos_token_id=31,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=8)
    model = BlipForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)  # so that attention differs between patches
    return model


def pixels(images):
    return torch.stack(
        [torch.tensor(np.asarray(i.resize((32, 32))) / 127.5 - 1).permute(2, 0, 1) for i in images]
    ).float()


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 56, 3), np.uint8))


@pytest.mark.parametrize("block", [0, 1])  # in the last, only the first token counts, which is left out
def test_blip_s_relevance_is_a_finite_difference(block):
    model = blip().double()
    matcher = BlipMatcher(model, None, block=block)
    mask = (TEXTS != 0).long()
    images = pixels([picture(0), picture(1)]).double()
    found = matcher.maps(TEXTS, images, mask)
    layer = model.text_encoder.encoder.layer[block].crossattention.self
    state = {"by": None}
    # A nudge of one weight, by the context it makes: values are what the layer's projection gives.
    seen = {}

    def nudge(module, args, kwargs, output):
        context, weights = output[0], output[1]
        seen["weights"] = weights.detach()
        if state["by"] is None:
            return None
        row, head, word, patch, by = state["by"]
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        size = module.attention_head_size
        value = module.value(states)[row, patch, head * size : (head + 1) * size]
        context = context.clone()
        context[row, word, head * size : (head + 1) * size] += by * value
        return (context, *output[1:])

    hook = layer.register_forward_hook(nudge, with_kwargs=True)

    def score(row):
        with torch.no_grad():
            return model(input_ids=TEXTS, pixel_values=images, attention_mask=mask).itm_score[row, 1]

    row, words = 0, (1, 2, 3)  # without start and end
    wanted = torch.zeros(16, dtype=torch.float64)
    for patch in (0, 3, 9, 15):
        for word in words:
            for head in range(2):
                ends = []
                for by in (1e-5, -1e-5):
                    state["by"] = (row, head, word, patch + 1, by)
                    ends.append(score(row))
                slope = (ends[0] - ends[1]) / 2e-5
                wanted[patch] += seen["weights"][row, head, word, patch + 1] * slope.clamp(min=0) / 2 / len(words)
        assert abs(float(found[row].flatten()[patch] - wanted[patch])) < 1e-8
    hook.remove()
    assert found.shape == (2, 4, 4) and float(found.max()) > 1e-6


def test_blip_as_a_matcher():
    model = blip()

    def processor(images, text, return_tensors, padding):
        assert return_tensors == "pt" and padding
        ids = TEXTS[: len(text)]
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels(images)}

    matcher = BlipMatcher(model, processor)
    assert matcher.block == 1
    found = matcher([picture(0), picture(1)], ["a", "b"])
    assert [relevance.shape for relevance, _ in found] == [(4, 4)] * 2
    with torch.no_grad():
        inputs = processor([picture(0), picture(1)], ["a", "b"], "pt", True)
        alike = model(**inputs, use_itm_head=False).itm_score
    assert [similarity for _, similarity in found] == pytest.approx(alike.diagonal().tolist())
    alone = matcher([picture(0)], ["a"])[0]
    assert np.allclose(alone[0], found[0][0], atol=1e-6)
    assert all(not module._forward_hooks for module in model.modules())


def test_blip_refuses():
    with pytest.raises(TypeError, match="BlipForImageTextRetrieval"):
        BlipMatcher(models.build("llava"), None)
    with pytest.raises(ValueError, match="block must be from 0 to 2"):
        BlipMatcher(blip(), None, block=3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        BlipMatcher(blip(), None).maps(TEXTS, pixels([picture(0)] * 2))


class Processor:
    """Prompts of a start, sixteen image tokens and the question's letters."""

    def __init__(self, word_tokens=1):
        self.word_tokens = word_tokens

    def tokenizer(self, text, add_special_tokens):
        return {"input_ids": [20 + len(text)] * self.word_tokens}

    def __call__(self, images, text, return_tensors, padding):
        rows = [torch.tensor([1, *[models.IMAGE] * 16, *(10 + ord(letter) % 80 for letter in said)]) for said in text]
        return {"input_ids": torch.stack(rows), "pixel_values": pixels(images)}


def test_the_model_as_its_own_matcher_sees_one_quarter_after_the_other():
    model, processor = models.build("llava"), Processor()
    matcher = SelfMatcher(model, processor, prompt=lambda question: question + "?", views=2)
    assert (matcher.yes, matcher.no) == (23, 22)
    image = picture(0)
    relevance, similarity = matcher([image], ["red"])[0]
    assert relevance.shape == (8, 8)
    # The lower left quarter by itself.
    inputs = processor([image.crop((0, 20, 28, 40))], ["red?"], "pt", True)
    alone = attention_relevance(model, inputs, lambda logits: logits[:, 23] - logits[:, 22]).sum(0)[0, 1:17]
    assert np.allclose(relevance[4:, :4], alone.view(4, 4).numpy(), atol=1e-6)
    with torch.no_grad():
        boxes = [(0, 0, 28, 20), (28, 0, 56, 20), (0, 20, 28, 40), (28, 20, 56, 40)]
        logits = model(**processor([image.crop(box) for box in boxes], ["red?"] * 4, "pt", True)).logits[:, -1]
    assert similarity == pytest.approx(float((logits[:, 23] - logits[:, 22]).sigmoid().max()), abs=1e-5)


def test_the_model_as_its_own_matcher_refuses():
    model = models.build("llava")
    with pytest.raises(ValueError, match="views must be at least 1"):
        SelfMatcher(model, Processor(), prompt=str, views=0)
    with pytest.raises(ValueError, match="'yes' is 2"):
        SelfMatcher(model, Processor(2), prompt=str)
