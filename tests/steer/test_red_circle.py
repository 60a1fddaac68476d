"""Scores against the model's own logits of pictures marked by hand, and what must hold for marks and banks."""

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from glocal.steer import marks
from glocal.steer.clip import class_attention, text_features
from glocal.steer.red_circle import RedCircle

SIDE = 48
VISION = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
)
TEXT = dict(
    hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
    max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
BOXES = torch.tensor([[3.0, 4.0, 50.0, 40.0], [30.0, 10.0, 60.0, 55.0], [62.5, 20.25, 90.0, 60.0]])


def model(kind="clip"):
    torch.manual_seed(0)
    if kind == "clip":
        clip = t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20))
    else:
        clip = t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=TEXT | {"projection_size": 24}))
        torch.nn.init.normal_(clip.logit_bias)
    for name, weight in clip.named_parameters():
        weight.data.mul_(1 if "logit" in name else 3)  # so that pictures differ
    return clip.eval()


def photo(height=60, width=90):
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))


class Reader:
    """A processor: transformers' image processor, and letters as words."""

    def __init__(self):
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
        self.paddings = []

    def __call__(self, text, padding, truncation, return_tensors):
        self.paddings.append(padding)
        ids = torch.zeros(len(text), 16, dtype=torch.long)
        for row, each in zip(ids, text, strict=True):
            words = [1, *(3 + ord(letter) % 40 for letter in each[:14]), 2]
            row[: len(words)] = torch.tensor(words)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "other": None}


def features(clip, pictures):
    pixels = Reader().image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def by_hand(clip, pictures, texts):
    """The model's own forward pass on marked pictures: logits (T, K)."""
    inputs = Reader()(texts, True, True, "pt")
    pixels = Reader().image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    options = {"attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        return clip(input_ids=inputs["input_ids"], pixel_values=pixels, **options).logits_per_text


def squared(picture, box):
    """Resized to the model's square, and the box with it."""
    across, down = SIDE / picture.width, SIDE / picture.height
    small = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return small, (box[0] * across, box[1] * down, box[2] * across, box[3] * down)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_the_models_logits_of_marked_pictures(kind):
    clip, texts = model(kind), ["dog", "a cat"]
    ways = {
        "ring": lambda image, box: marks.ring(image, box, width=2, colour=(0, 9, 200)),
        "frame": lambda image, box: marks.frame(image, box, width=2, colour=(0, 9, 200)),
        "blur": lambda image, box: marks.blur_outside(image, box, radius=4),
        "grey": marks.grey_outside,
        "crop": lambda image, box: marks.crop(image, box).resize((SIDE, SIDE), Image.Resampling.BICUBIC),
    }
    full = ["a photo of dog", "a photo of a cat"]
    total = 0
    for name, way in ways.items():
        pictures = [way(*squared(photo(), box)) for box in BOXES.tolist()]
        want = by_hand(clip, pictures, full)
        found = RedCircle((name,), width=2, colour=(0, 9, 200), blur=4, batch=2).scores(
            clip, Reader(), photo(), BOXES, texts
        )
        assert found.shape == (2, 3) and found.std() > 1e-3
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
        total = total + want
    every = RedCircle(tuple(ways), width=2, colour=(0, 9, 200), blur=4)
    torch.testing.assert_close(every.scores(clip, Reader(), photo(), BOXES, texts), total, atol=5e-4, rtol=1e-4)
    assert every.choose(clip, Reader(), photo(), BOXES, texts).tolist() == total.argmax(1).tolist()


def test_a_function_is_a_mark_and_features_are_texts():
    clip, texts = model(), torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    plain = photo().resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    want = clip.logit_scale.exp() * F.normalize(texts, dim=-1) @ features(clip, [plain]).T
    found = RedCircle((lambda image, box: image,)).scores(clip, Reader().image_processor, photo(), BOXES, texts)
    torch.testing.assert_close(found, want.expand(4, 3), atol=1e-4, rtol=1e-4)
    # any function that gives pixels will do for a processor

    def bare(images, return_tensors):
        return Reader().image_processor(images=images, return_tensors=return_tensors)["pixel_values"]

    assert torch.equal(found, RedCircle((lambda image, box: image,)).scores(clip, bare, photo(), BOXES, texts))


def test_a_line_of_no_width_leaves_all_boxes_alike():
    clip, texts = model(), torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    found = RedCircle(("ring", "frame"), width=0).scores(clip, Reader(), photo(), BOXES, texts)
    torch.testing.assert_close(found, found[:, :1].expand(4, 3), atol=1e-5, rtol=0)
    thick = RedCircle(("ring", "frame"), width=3).scores(clip, Reader(), photo(), BOXES, texts)
    assert (thick - thick[:, :1]).abs().max() > 0.01


def test_with_a_bank_a_constant_of_each_picture_cancels():
    """All texts share one direction: what a picture has of it is a constant of its own in all its logits."""
    clip, draw = model(), torch.Generator().manual_seed(1)
    shared = torch.zeros(20)
    shared[-1] = 1
    texts, bank = (F.normalize(torch.randn(count, 20, generator=draw) * (1 - shared), dim=-1) for count in (3, 9))
    method, photos = RedCircle(width=2), (clip, Reader(), photo(), BOXES)
    for angle in (0.5, 1.2):
        cos, sin = np.cos(angle), np.sin(angle)
        mixed, others = texts * cos + shared * sin, bank * cos + shared * sin
        found = method.scores(*photos, mixed, bank=others)
        torch.testing.assert_close(found, method.scores(*photos, texts, bank=bank) * cos, atol=1e-4, rtol=1e-4)
        away = method.scores(*photos, mixed) - method.scores(*photos, texts) * cos
        assert away.std(dim=1).max() > 1e-3  # which does not hold without it
    # and what is subtracted is the mean over the bank
    want = method.scores(*photos, texts) - method.scores(*photos, bank).mean(0)
    torch.testing.assert_close(method.scores(*photos, texts, bank=bank), want, atol=1e-4, rtol=1e-4)


def test_a_large_bank_is_drawn_from_by_the_seed():
    clip, draw = model(), torch.Generator().manual_seed(1)
    texts, bank = torch.randn(2, 20, generator=draw), torch.randn(40, 20, generator=draw)
    given = (clip, Reader(), photo(), BOXES, texts)
    found = [RedCircle(width=2, bank_size=5, seed=seed).scores(*given, bank=bank) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    whole = RedCircle(width=2).scores(*given, bank=bank)
    assert torch.equal(whole, RedCircle(width=2, bank_size=40, seed=7).scores(*given, bank=bank))
    words = ["one", "two", "three"]
    assert RedCircle(bank_size=2).scores(*given, bank=words).isfinite().all()


def test_keypoints_against_all_permutations():
    clip, points = model(), [[10, 10], [80, 15], [45, 30], [20, 55]]
    for seed in range(6):
        names = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
        circles = []
        for x, y in points:
            small, (x, y, _, _) = squared(photo(), (x, y, 0, 0))
            circles.append(marks.circle(small, (x, y), radius=6, width=2))
        table = F.normalize(names, dim=-1) @ features(clip, circles).T
        best = max(permutations(range(4), 3), key=lambda order: sum(table[n, k] for n, k in enumerate(order)))
        method = RedCircle(width=2, radius=6)
        assert method.name(clip, Reader(), photo(), points, names).tolist() == list(best)
        assert method.name(clip, Reader(), photo(), points, names, assign=False).tolist() == table.argmax(1).tolist()
    with pytest.raises(ValueError, match="5 names are more than 4 points"):
        RedCircle().name(clip, Reader(), photo(), points, torch.randn(5, 20))


def test_all_of_an_oblong_picture_is_seen():
    """A circle at the border of a wide picture, which a centre crop would lose, changes the scores."""
    clip, texts = model(), torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    border = [[0, 0, 30, 60], [270, 0, 300, 60]]
    found = RedCircle(width=3).scores(clip, Reader(), photo(60, 300), border, texts)
    none = RedCircle(width=0).scores(clip, Reader(), photo(60, 300), border, texts)
    assert (found - none).abs().amin(1).min() > 1e-4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_mass_sums_what_is_in_the_box(kind):
    clip, method = model(kind), RedCircle(width=2)
    pixels = Reader().image_processor(
        images=[photo().resize((SIDE, SIDE), Image.Resampling.BICUBIC)], return_tensors="pt"
    )["pixel_values"]
    share = class_attention(clip, pixels)[0]
    share = share / share.sum()
    patch = (90 / 6, 60 / 6)
    found = method.attention_mass(
        clip,
        Reader(),
        photo(),
        [[0, 0, 90, 60], [patch[0], 0, 4 * patch[0], 2 * patch[1]], [0, 0, 90, 25], [0, 25, 90, 60]],
    )
    torch.testing.assert_close(found[0], torch.ones(2))
    torch.testing.assert_close(found[1, 0], share[:2, 1:4].sum())
    torch.testing.assert_close(found[2, 0], share[:2].sum() + share[2].sum() / 2)
    torch.testing.assert_close(found[2, 0] + found[3, 0], torch.tensor(1.0))
    assert (found[1:, 0] != found[1:, 1]).all()
    marked = [marks.ring(*squared(photo(), (0, 0, 90, 25)), width=2)]
    seen = class_attention(clip, Reader().image_processor(images=marked, return_tensors="pt")["pixel_values"])[0]
    torch.testing.assert_close(found[2, 1], (seen[:2].sum() + seen[2].sum() / 2) / seen.sum(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="a crop does not"):
        RedCircle(("crop",)).attention_mass(clip, Reader(), photo(), BOXES)


def test_siglip_reads_texts_at_full_length():
    reader = Reader()
    text_features(model("siglip"), reader, ["a"])
    text_features(model(), reader, ["a"])
    assert reader.paddings == ["max_length", True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    texts = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    want = RedCircle(width=2).scores(model(), Reader(), photo(), BOXES, texts)
    found = RedCircle(width=2).scores(model().to(dtype), Reader(), photo(), BOXES, texts.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, atol=1.0, rtol=0)  # 0.07 of a cosine


def test_the_model_is_left_as_it_was():
    clip = model()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    RedCircle().attention_mass(clip, Reader(), photo(), BOXES)
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clip.modules())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"marks": ()}, "marks must be"),
        ({"marks": "ring"}, "marks must be .* 'ring'"),
        ({"marks": ("circle",)}, "marks must be"),
        ({"width": -1}, "width must be"),
        ({"radius": 0}, "radius must be at least 1"),
        ({"blur": 1.5}, "blur must be"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"side": 0}, "side must be at least 1"),
        ({"template": "a photo"}, "template must hold"),
    ],
)
def test_bad_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        RedCircle(**options)


def test_bad_input_is_named():
    clip, texts = model(), torch.randn(2, 20)
    for boxes in ([[1, 2, 3]], [], torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="boxes must be"):
            RedCircle().scores(clip, Reader(), photo(), boxes, texts)
    with pytest.raises(ValueError, match=r"box must be .* with an area"):
        RedCircle().scores(clip, Reader(), photo(), [[5, 5, 5, 9]], texts)
    for wrong in ("a text", [], torch.randn(20)):
        with pytest.raises(ValueError, match="texts must be"):
            RedCircle().scores(clip, Reader(), photo(), BOXES, wrong)
    with pytest.raises(ValueError, match="image must be a PIL image; it was a ndarray"):
        RedCircle().scores(clip, Reader(), np.zeros((9, 9, 3)), BOXES, texts)
    with pytest.raises(TypeError, match=r"clip must be .* it was clip_vision_model"):
        RedCircle().scores(clip.vision_model, Reader(), photo(), BOXES, texts)
