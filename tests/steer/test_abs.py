"""ABS against the model's own features, torchvision's crops, eager attention, loops, and what chance must give."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from PIL import Image
from scipy.stats import chisquare
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from glocal.steer.abs import ABS, feature_crops
from glocal.steer.clip import class_attention, read
from tests import peers

SIDE = 48
VISION = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
)
TEXT = dict(hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
GUIDES = {
    "vit": lambda: t.ViTModel(t.ViTConfig(**VISION | {"image_size": 64}), add_pooling_layer=False),
    "deit": lambda: t.DeiTModel(t.DeiTConfig(**VISION)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),
    "registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**VISION)),
    "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
}


def strong(model):
    """Weights large enough that pictures and patches differ."""
    for name, weight in model.named_parameters():
        if "logit" not in name:
            weight.data.mul_(4)
    return model.eval()


def clip_model(kind="clip"):
    torch.manual_seed(0)
    if kind == "clip":
        return strong(t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20)))
    return strong(t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=TEXT | {"projection_size": 24})))


def guide_model(name):
    torch.manual_seed(1)
    return strong(GUIDES[name]())


def photos(*sizes):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def pixel_values(count=2, height=SIDE, width=SIDE):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def plain(clip, pictures):
    """CLIP's own features of whole pictures, as its processor reads them."""
    with torch.no_grad():
        return clip.get_image_features(**PROCESSOR(images=pictures, return_tensors="pt")).pooler_output


def before_last(clip, pixels):
    with torch.no_grad():
        return clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


# Attention.


@pytest.mark.parametrize("name", GUIDES)
def test_attention_is_that_of_the_eager_model(name):
    model = guide_model(name)
    side, own = (64, 64) if name == "vit" else (SIDE, SIDE), {"deit": 2, "registers": 5}.get(name, 1)
    pixels = pixel_values(2, *side)
    with torch.no_grad():
        before = model(pixel_values=pixels).last_hidden_state
    found = class_attention(model, pixels)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(pixel_values=pixels, output_attentions=True).attentions[-1].mean(1)[:, 0, own:]
    assert found.shape == (2, side[0] // 8, side[1] // 8) and want.std() > 1e-3
    torch.testing.assert_close(found.flatten(1), want)


def test_attention_of_oblong_pictures_keeps_rows_and_columns():
    model = guide_model("dinov2")
    pixels = pixel_values(1, 32, 64)
    found = class_attention(model, pixels)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(pixel_values=pixels, output_attentions=True).attentions[-1].mean(1)[0, 0, 1:]
    assert found.shape == (1, 4, 8)
    torch.testing.assert_close(found[0], want.view(4, 8))


def test_attention_of_siglip_is_its_pooling_heads():
    clip, pixels = clip_model("siglip"), pixel_values()
    head = clip.vision_model.head
    with torch.no_grad():
        states = clip.vision_model(pixel_values=pixels).last_hidden_state
        weight, bias = head.attention.in_proj_weight.split(24), head.attention.in_proj_bias.split(24)
        query, key = head.probe[0, 0] @ weight[0].T + bias[0], states @ weight[1].T + bias[1]
        heads = [torch.softmax(key[..., 6 * n : 6 * n + 6] @ query[6 * n : 6 * n + 6] / 6**0.5, -1) for n in range(4)]
    found = class_attention(clip, pixels)
    assert found.std() > 1e-3
    torch.testing.assert_close(found.flatten(1), sum(heads) / 4)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))


def test_what_has_no_plain_class_row_is_refused():
    with pytest.raises(TypeError, match=r"model must be one of .* it was beit"):
        class_attention(t.BeitModel(t.BeitConfig(**VISION)), pixel_values())
    with pytest.raises(TypeError, match="Linear has no vision tower"):
        class_attention(torch.nn.Linear(2, 2), pixel_values())


# Feature crops.


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_whole_grid_gives_the_models_own_feature(kind):
    clip, pictures = clip_model(kind), photos((48, 48), (48, 48))
    pixels = PROCESSOR(images=pictures, return_tensors="pt")["pixel_values"]
    hidden = before_last(clip, pixels)
    found = torch.cat([feature_crops(clip, each, [(0, 0, 6, 6)]) for each in hidden])
    torch.testing.assert_close(found, plain(clip, pictures), atol=5e-6, rtol=1e-5)
    part = feature_crops(clip, hidden[0], [(0, 0, 6, 5)])
    assert (F.normalize(part, dim=-1) - F.normalize(found[:1], dim=-1)).norm() > 1e-3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_feature_crops_against_torchvision(kind):
    """The peer cuts and enlarges the grid; a hook puts that into the whole model's forward before its last block."""
    with peers._peers("torchvision==0.28.0"):
        peers._import_torchvision()
        functional = importlib.import_module("torchvision.transforms.functional")
        mode = importlib.import_module("torchvision.transforms").InterpolationMode.BICUBIC
    clip, pixels = clip_model(kind), pixel_values(1)
    hidden, own = before_last(clip, pixels)[0], int(kind == "clip")
    grid = hidden[own:].T.reshape(24, 6, 6)
    boxes = [(0, 0, 6, 6), (1, 2, 4, 6), (5, 0, 6, 1), (0, 3, 5, 5)]
    found = feature_crops(clip, hidden, boxes)
    for box, feature in zip(boxes, found, strict=True):
        left, top, right, bottom = box
        part = functional.resized_crop(grid, top, left, bottom - top, right - left, [6, 6], mode, antialias=False)

        def put(module, args, part=part):
            return (torch.cat([hidden[:own], part.flatten(1).T])[None], *args[1:])

        hook = clip.vision_model.encoder.layers[-1].register_forward_pre_hook(put)
        with torch.no_grad():
            want = clip.get_image_features(pixel_values=pixels).pooler_output[0]
        hook.remove()
        torch.testing.assert_close(feature, want, atol=1e-5, rtol=1e-4)


# Crops.


def test_centres_are_drawn_as_often_as_their_probability_says():
    attention = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 0.1
    method, count = ABS(top=12, temperature=0.03), 100_000
    found = method.centres(attention, count, torch.Generator().manual_seed(1))
    seen = np.zeros((5, 7))
    np.add.at(seen, tuple(np.array(found).T), 1)
    values = attention.double().numpy()
    allowed = values >= np.sort(values, axis=None)[-12]
    weight = np.exp(values / 0.03) * allowed
    assert seen[~allowed].sum() == 0
    assert chisquare(seen[allowed], count * (weight / weight.sum())[allowed]).pvalue > 0.01
    assert chisquare(seen[allowed]).pvalue < 1e-9  # which even chances are not
    spread = ABS(top=None, temperature=1e6).centres(attention, count, torch.Generator().manual_seed(1))
    assert (
        chisquare(np.unique(np.array(spread), axis=0, return_counts=True)[1]).pvalue > 0.01 and len(set(spread)) == 35
    )


def peak(row, column, rows=6, columns=6):
    attention = torch.zeros(rows, columns)
    attention[row, column] = 1
    return attention


def test_boxes_have_sides_in_the_range_and_are_clipped_not_shifted():
    method = ABS(top=1, raw_crops=3000, feature_crops=3000, raw_scale=(0.3, 0.5), feature_scale=(0.1, 0.5))
    boxes = np.array(method.raw_boxes(peak(2, 3), (200, 103), torch.Generator().manual_seed(0)))
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (wide.min(), wide.max()) == (60, 100) and (high.min(), high.max()) == (30, 51)
    assert chisquare(np.bincount(wide)[60:]).pvalue > 0.01 and chisquare(np.bincount(high)[30:]).pvalue > 0.01
    assert abs(np.corrcoef(wide, high)[0, 1]) < 0.06
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert abs(middle - [3.5 / 6 * 200, 2.5 / 6 * 103]).max() <= 1
    # at the corner half of a box is left of it
    boxes = np.array(method.raw_boxes(peak(0, 5), (200, 103), torch.Generator().manual_seed(0)))
    assert (boxes[:, 1] == 0).all() and (boxes[:, 2] == 200).all()
    assert boxes[:, 3].max() <= 103 / 12 + 26 and boxes[:, 0].min() >= 200 * 11 / 12 - 51
    # in the grid: sides from 1 to 5 of 10 patches, to either side of the middle alike
    boxes = np.array(method.grid_boxes(peak(4, 6, 10, 10), 10, torch.Generator().manual_seed(0)))
    assert set(map(tuple, boxes.tolist())) == {(6 - n, 4 - n, 7 + n, 5 + n) for n in range(3)}
    boxes = np.array(method.grid_boxes(peak(0, 9, 10, 10), 10, torch.Generator().manual_seed(0)))
    assert set(map(tuple, boxes.tolist())) == {(9 - n, 0, 10, 1 + n) for n in range(3)}


@pytest.mark.parametrize(("grid", "want"), [(14, (3, 10)), (7, (1, 5)), (16, (4, 12))])
def test_centres_go_to_other_grids_in_proportion(grid, want):
    method = ABS(top=1, feature_crops=1, feature_scale=(0.01, 0.01))
    ((left, top, right, bottom),) = method.grid_boxes(peak(3, 10, 14, 14), grid, torch.Generator())
    assert (top, left, bottom, right) == (*want, want[0] + 1, want[1] + 1)


@pytest.mark.parametrize("square", ["stretch", "crop"])
@pytest.mark.parametrize("size", [(160, 60), (60, 200), (90, 90)])
def test_guide_and_clip_look_at_one_place_of_an_oblong_picture(square, size):
    """Where a bright spot is in the picture as the models see it, crops are where it is in the picture itself."""
    clip, guide = clip_model(), guide_model("vit")
    method = ABS(top=1, raw_scale=(0.2, 0.3), feature_scale=(0.1, 0.1), raw_crops=20, feature_crops=20, square=square)
    left, top, right, bottom = method.seen(size)
    for across, down in ((0.2, 0.8), (0.7, 0.4)):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        x, y = int(left + across * (right - left)), int(top + down * (bottom - top))
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
        seen = []

        def keep(images, return_tensors, seen=seen):
            seen.extend(images)
            return PROCESSOR(images=images, return_tensors=return_tensors)["pixel_values"]

        def guide_keep(images, return_tensors):
            keep(images, return_tensors)
            return torch.zeros(1, 3, 64, 64)

        method.features(clip, [Image.fromarray(pixels)], processor=keep, guide=guide, guide_processor=guide_keep)
        whole = [np.asarray(image.convert("L")) for image in seen if image.size in ((64, 64), (48, 48))]
        assert [len(image) for image in whole] == [64, 48]  # the guide's, then CLIP's for its states
        bright = []
        for image in whole:
            patches = torch.from_numpy(image.copy()).float().unfold(0, 8, 8).unfold(1, 8, 8).sum((-1, -2))
            place = int(patches.argmax())
            bright.append((place // patches.shape[1], place % patches.shape[1], patches.shape[0]))
        attention = peak(bright[0][0], bright[0][1], 8, 8)
        for a, b, c, d in method.raw_boxes(attention, size, torch.Generator().manual_seed(0)):
            assert a - 2 <= x <= c + 2 and b - 2 <= y <= d + 2
        for a, b, c, d in method.grid_boxes(attention, 6, torch.Generator().manual_seed(0)):
            assert abs((a + c - 1) / 2 - bright[1][1]) <= 1 and abs((b + d - 1) / 2 - bright[1][0]) <= 1


# Features.


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("guided", [False, True])
def test_features_are_those_of_the_crops(kind, guided):
    clip = clip_model(kind)
    guide = guide_model("vit") if guided else None

    def reader(images, return_tensors):
        return PROCESSOR(images=images, return_tensors=return_tensors, do_resize=False, do_center_crop=False)

    method, (image,) = ABS(raw_crops=7, feature_crops=5, top=9, batch=3), photos((90, 60))
    found = method.features(clip, [image], processor=PROCESSOR, guide=guide, guide_processor=reader if guided else None)
    assert found.shape == (1, 12, 20 if kind == "clip" else 24)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 12))

    def stretched(side):
        small = image.resize((side, side), Image.Resampling.BICUBIC)
        return PROCESSOR(images=[small], return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]

    attention = class_attention(guide, stretched(64))[0] if guided else class_attention(clip, stretched(48))[0]
    draw = torch.Generator().manual_seed(1)
    raw = method.raw_boxes(attention, image.size, draw)
    want = plain(clip, [image.crop(box) for box in raw])
    torch.testing.assert_close(found[0, :7], F.normalize(want, dim=-1), atol=1e-5, rtol=1e-4)
    boxes = method.grid_boxes(attention, 6, draw)
    want = feature_crops(clip, before_last(clip, stretched(48))[0], boxes)
    torch.testing.assert_close(found[0, 7:], F.normalize(want, dim=-1), atol=1e-5, rtol=1e-4)


def test_a_picture_has_its_features_alone_and_among_others():
    clip, pictures = clip_model(), photos((90, 60), (48, 48), (50, 120))
    method = ABS(raw_crops=4, feature_crops=4)
    every = method.features(clip, pictures, processor=PROCESSOR)
    for number, image in enumerate(pictures):
        torch.testing.assert_close(every[number], method.features(clip, [image], processor=PROCESSOR)[0])
    assert not torch.equal(
        every, ABS(raw_crops=4, feature_crops=4, seed=2).features(clip, pictures, processor=PROCESSOR)
    )
    only = [
        ABS(raw_crops=n, feature_crops=m).features(clip, pictures, processor=PROCESSOR) for n, m in ((4, 0), (0, 4))
    ]
    torch.testing.assert_close(every[:, :4], only[0])
    assert only[1].shape == (3, 4, 20)


def test_random_numbers_of_others_and_the_model_are_left_alone():
    clip = clip_model()
    before, state = {k: v.clone() for k, v in clip.state_dict().items()}, torch.get_rng_state()
    ABS(raw_crops=2, feature_crops=2).features(clip, photos((60, 60)), processor=PROCESSOR)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clip.modules())


def test_bfloat16():
    clip, pictures, method = clip_model(), photos((90, 60)), ABS(raw_crops=4, feature_crops=4)
    for weight in clip.parameters():
        weight.data.div_(2)
    hidden, boxes = before_last(clip, pixel_values(1))[0], [(0, 0, 6, 6), (1, 2, 4, 6), (5, 0, 6, 1)]
    want, attention = feature_crops(clip, hidden, boxes), class_attention(clip, pixel_values(1))
    texts = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    clip = clip.bfloat16()
    assert F.cosine_similarity(feature_crops(clip, hidden.bfloat16(), boxes).float(), want).min() > 0.99
    found = class_attention(clip, pixel_values(1).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, attention, atol=2e-3, rtol=0.05)
    found = method.features(clip, pictures, processor=PROCESSOR)
    assert found.dtype == torch.bfloat16
    logits = method.match(found, texts.bfloat16())
    torch.testing.assert_close(logits, method.match(found.float(), texts), atol=1.0, rtol=0.02)


# Matching.


def test_matching_against_loops():
    draw = torch.Generator().manual_seed(0)
    crops, texts = torch.randn(2, 5, 8, generator=draw), torch.randn(3, 4, 8, generator=draw)
    unit_crops, unit_texts = F.normalize(crops, dim=-1).double().numpy(), F.normalize(texts, dim=-1).double().numpy()
    want = np.zeros((2, 3))
    for b in range(2):
        for crop in unit_crops[b]:
            s = np.array([[crop @ text / 0.1 for text in each] for each in unit_texts])
            p = np.exp(s) / np.exp(s).sum()
            want[b] += (p * s).sum(1)
    method = ABS(match_temperature=0.1)
    found = method.match(crops, texts)
    torch.testing.assert_close(found.double(), torch.from_numpy(want), atol=1e-4, rtol=1e-4)
    # classes may have lists of their own lengths
    uneven = [texts[0], texts[1, :1], texts[2, :3]]
    found = method.match(crops, uneven)
    for b in range(2):
        s = unit_crops[b] @ np.concatenate([unit_texts[0], unit_texts[1, :1], unit_texts[2, :3]]).T / 0.1
        each = (np.exp(s) / np.exp(s).sum(1, keepdims=True) * s).sum(0)
        want[b] = [each[:4].sum(), each[4], each[5:].sum()]
    torch.testing.assert_close(found.double(), torch.from_numpy(want), atol=1e-4, rtol=1e-4)


def test_one_crop_and_one_text_a_class_is_plain_clip():
    draw = torch.Generator().manual_seed(0)
    crops, texts = torch.rand(200, 1, 8, generator=draw), torch.rand(6, 1, 8, generator=draw)  # positive cosines
    plain_choice = F.cosine_similarity(crops, texts[:, 0], dim=-1).argmax(1)
    assert plain_choice.unique().numel() > 3
    assert torch.equal(ABS().match(crops, texts).argmax(1), plain_choice)


def test_a_high_temperature_is_the_mean_of_similarities():
    draw = torch.Generator().manual_seed(0)
    crops, texts = torch.randn(4, 5, 8, generator=draw), torch.randn(3, 2, 8, generator=draw)
    alike = torch.einsum("bnd,kmd->bknm", F.normalize(crops, dim=-1), F.normalize(texts, dim=-1))
    found = ABS(match_temperature=1e4).match(crops, texts) * 1e4 * (3 * 2) / (5 * 2)
    torch.testing.assert_close(found, alike.mean((2, 3)), atol=1e-3, rtol=1e-3)


def test_logits_match_the_features():
    clip, pictures = clip_model(), photos((90, 60), (48, 48))
    texts = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    method = ABS(raw_crops=2, feature_crops=2)
    found = method.logits(clip, pictures, texts, processor=PROCESSOR)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    torch.testing.assert_close(found, method.match(method.features(clip, pictures, processor=PROCESSOR), texts))


# Errors.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0}, "temperature must be greater than 0"),
        ({"match_temperature": -1}, "match_temperature must be"),
        ({"raw_scale": (0.9, 0.6)}, "raw_scale must be two shares"),
        ({"feature_scale": (0.5, 1.5)}, "feature_scale must be"),
        ({"top": 0}, "top must be at least 1"),
        ({"raw_crops": 0, "feature_crops": 0}, "nor both 0"),
        ({"raw_crops": -1}, "must not be below 0"),
        ({"square": "pad"}, "square must be"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_bad_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        ABS(**options)


def test_bad_input_is_named():
    clip, pictures = clip_model(), photos((60, 60))
    with pytest.raises(ValueError, match="top must be at most the guide's 36 patches; it was 37"):
        ABS(top=37).features(clip, pictures, processor=PROCESSOR)
    with pytest.raises(ValueError, match="guide and guide_processor go together"):
        ABS().features(clip, pictures, processor=PROCESSOR, guide=guide_model("vit"))
    for wrong in ([], [np.zeros((9, 9, 3))]):
        with pytest.raises(ValueError, match="images must be PIL images"):
            ABS().features(clip, wrong, processor=PROCESSOR)
    with pytest.raises(TypeError, match=r"clip must be .* it was vit"):
        ABS().features(guide_model("vit"), pictures, processor=PROCESSOR)
    config = t.SiglipConfig(
        vision_config=VISION | {"vision_use_head": False}, text_config=TEXT | {"projection_size": 24}
    )
    with pytest.raises(TypeError, match="vision_use_head=False"):
        ABS().features(t.SiglipModel(config), pictures, processor=PROCESSOR)
    with pytest.raises(ValueError, match=r"text_features \(K, M, d\)"):
        ABS().match(torch.zeros(1, 2, 8), torch.zeros(3, 2, 9))
    with pytest.raises(ValueError, match=r"hidden must be \(1 \+ g \* g, C\)"):
        feature_crops(clip, torch.zeros(36, 24), [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match=r"boxes must be .* in 6 x 6 patches"):
        feature_crops(clip, torch.zeros(37, 24), [(0, 0, 7, 1)])
    assert read(PROCESSOR, pictures, clip, whole=True).shape == (1, 3, 48, 48)
