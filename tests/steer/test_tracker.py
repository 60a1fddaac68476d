"""Rectangles against scikit-image, IoU against transformers, the loop against rules written out by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from skimage.draw import rectangle_perimeter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.loss.loss_for_object_detection import box_iou
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from glocal.bench.tracking import iou, normalised_precision, precision, success_auc
from glocal.steer.tracker import VPTracker, ask_with, jitter, seen_size
from tests.steer import models

SIZE = (120, 90)


def photo(size=SIZE, seed=0):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8))


def some_boxes(count, size=SIZE, seed=0):
    draw = np.random.default_rng(seed)
    corners = np.sort(draw.uniform(0, 1, (count, 2, 2)), axis=1) * size
    corners[:, 1] += 1
    return torch.from_numpy(np.minimum(corners, size).reshape(count, 4))


# What is drawn and cut.


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("box", [(50, 40, 60, 48), (50, 40, 61, 49)])
def test_the_rectangle_against_scikit_image(box, width):
    image, tracker = photo(), VPTracker(scale=3, width=width)
    left, top, right, bottom = (int(edge) for edge in tracker.region(box, SIZE))
    assert (left + right, top + bottom) == (box[0] + box[2], box[1] + box[3])
    assert (right - left, bottom - top) == (3 * (box[2] - box[0]), 3 * (box[3] - box[1]))
    wanted = np.asarray(image).copy()
    # rectangle_perimeter draws one pixel outside of what it is given.
    for n in range(1, width + 1):
        wanted[rectangle_perimeter((top + n, left + n), (bottom - 1 - n, right - 1 - n))] = 255, 0, 0
    assert np.array_equal(np.asarray(tracker.search(image, box)), wanted)


def test_the_rectangle_against_pil():
    image, tracker = photo(), VPTracker()
    wanted = image.copy()
    ImageDraw.Draw(wanted).rectangle((30, 24, 69, 55), outline=(255, 0, 0), width=3)
    assert np.array_equal(np.asarray(tracker.search(image, (45, 36, 55, 44))), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_the_frame_is_never_drawn_on(mode):
    image = photo().convert(mode)
    before = image.tobytes()
    for made in (VPTracker().search(image, (3, 4, 9, 9)), VPTracker().template(image, (3, 4, 9, 9))):
        assert made is not image and made.mode == "RGB"
    assert image.tobytes() == before and image.mode == mode


@pytest.mark.parametrize("box", [(10, 20, 30, 44), (0.5, 0.25, 7.75, 90), (119, 89, 120, 90), (0, 0, 0.3, 0.3)])
def test_scale_one_is_the_box_and_a_great_one_the_frame(box):
    assert VPTracker(scale=1).region(box, SIZE) == pytest.approx(box)
    assert VPTracker(scale=1e6).region(box, SIZE) == (0, 0, *SIZE)
    border = np.asarray(VPTracker(scale=1e6).search(photo(), box))
    assert (border[:3] == (255, 0, 0)).all() and (border[:, -3:] == (255, 0, 0)).all()
    assert (border[4:-4, 4:-4] != (255, 0, 0)).any(-1).all()
    VPTracker(scale=1).search(photo(), box)


@pytest.mark.parametrize(
    ("box", "factor", "edges"),
    [
        ((50, 40, 60, 50), 2.0, (45, 35, 65, 55)),
        ((50, 40, 59, 44), 2.0, (48, 36, 60, 48)),  # sqrt(36) * 2 = 12 around (54.5, 42): 48.5 to 60.5
        ((50, 40, 60, 47), 2.0, (46, 35, 63, 52)),  # sqrt(70) * 2 = 16.7, so 17 around (55, 43.5)
        ((0, 0, 10, 10), 2.0, (0, 0, 15, 15)),  # 20 around (5, 5), and no padding
        ((110, 80, 120, 90), 4.0, (95, 65, 120, 90)),
    ],
)
def test_the_template_is_a_square_without_padding(box, factor, edges):
    left, top, right, bottom = edges
    found = np.asarray(VPTracker(template_factor=factor).template(photo(), box))
    assert np.array_equal(found, np.asarray(photo())[top:bottom, left:right])


# What is said.


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('{"visible": "yes", "bbox": [1, 2, 30, 40]}', (1, 2, 30, 40)),
        ('```json\n{"visible": "Yes", "bbox": [1.5, 2, 30, 40]}\n```', (1.5, 2, 30, 40)),
        ('I think {it} is {"visible": true, "bbox": ["1", "2", "30", "40"]} there', (1, 2, 30, 40)),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "dog"}]', (1, 2, 30, 40)),
        ('{"answer": {"visible": "yes", "bbox": [1, 2, 30, 40]}}', (1, 2, 30, 40)),
        ('{"bbox": [-5, -1, 500, 40]}', (0, 0, 120, 40)),
        ('{"bbox": [1, 2, 30, 40]} {"bbox": [5, 6, 7, 8]}', (1, 2, 30, 40)),
        ('{"visible": "no", "bbox": [1, 2, 30, 40]}', None),
        ('{"visible": "No", "bbox": [0, 0, 0, 0]}', None),
        ('{"visible": false, "bbox": [1, 2, 30, 40]}', None),
        ('{"visible": null, "bbox": [1, 2, 30, 40]}', None),
        ('{"visible": "yes"}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30, 40, 50]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30, "x"]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30, null]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30, [40]]}', None),
        ('{"visible": "yes", "bbox": [false, 2, 30, 40]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30, NaN]}', None),
        ('{"visible": "yes", "bbox": [1, 2, Infinity, 40]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 1' + "0" * 400 + ", 40]}", None),
        ('{"visible": "yes", "bbox": [1, 2, 1' + "0" * 5000 + ", 40]}", None),
        ('{"visible": "yes", "bbox": "1, 2, 30, 40"}', None),
        ('{"visible": "yes", "bbox": {"x": 1}}', None),
        ('{"visible": "yes", "bbox": [30, 2, 1, 40]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 1, 40]}', None),
        ('{"visible": "yes", "bbox": [200, 2, 300, 40]}', None),
        ('{"visible": "yes", "bbox": [1, 2, 30', None),
        ('{"visible": yes/no, "bbox": [x1, y1, x2, y2]}', None),
        ("1, 2, 30, 40", None),
        ('"yes" [1, 2, 30, 40]', None),
        ("{" * 3000 + '"a"', None),
        ('{"a": ' * 3000, None),
        ("", None),
    ],
)
def test_answers(text, box):
    found = VPTracker().parse(text, SIZE)
    assert found is None if box is None else found == pytest.approx(box)


@pytest.mark.parametrize("size", [(1000, 1000), (1280, 720), (37, 4000), (1919, 1081)])
def test_normalised_coordinates_come_back_within_a_thousandth(size):
    tracker = VPTracker(form="normalised")
    for box in some_boxes(50, size).tolist():
        text = tracker.answer(box, size)
        assert max(json.loads(text)["bbox"]) <= 1000
        found = tracker.parse(text, size)
        if found is None:  # thinner than a thousandth
            assert min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) < 1e-3
            continue
        assert (np.abs(np.subtract(found, box)) <= np.array(size * 2) / 1000).all()


def test_coordinates_of_a_resized_picture():
    """What Qwen's own processor makes of a frame, and the object's corners found in its pixels."""
    reader = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    seen = seen_size(reader)
    image = Image.new("RGB", (300, 200))
    ImageDraw.Draw(image).rectangle((90, 50, 209, 149), fill=(255, 255, 255))
    made = reader(images=[image], return_tensors="pt")
    rows, columns = made["image_grid_thw"][0][1:].tolist()
    wide, high = seen((300, 200))
    assert (wide, high) == (columns * 14, rows * 14) and wide % 28 == high % 28 == 0 and (wide, high) != (300, 200)
    # Patches in the processor's order (merged 2 x 2) back to a picture.
    pixels = made["pixel_values"].view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
    bright = pixels.permute(0, 2, 5, 1, 3, 6, 4).reshape(high, wide, 3)[..., 0] > 0
    y, x = torch.where(bright)
    numbers = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
    tracker = VPTracker(seen=seen)
    found = tracker.parse(json.dumps({"visible": "yes", "bbox": numbers}), (300, 200))
    assert found == pytest.approx((90, 50, 210, 150), abs=1)
    assert json.loads(tracker.answer((90, 50, 210, 150), (300, 200)))["bbox"] == pytest.approx(numbers, abs=1)
    # Taken for the frame's own pixels they would be wrong.
    plain = VPTracker().parse(json.dumps({"bbox": numbers}), (300, 200))
    assert np.abs(np.subtract(plain, (90, 50, 210, 150))).max() > 2
    with pytest.raises(TypeError, match="use form='normalised'"):
        seen_size(lambda images, return_tensors: {"pixel_values": None})((30, 20))


# The loop.


def test_an_oracle_that_sometimes_says_no():
    truth = [tuple(box) for box in some_boxes(40, seed=3).round().clamp(min=0).tolist()]
    truth = [(x, y, max(x + 2, a), max(y + 2, b)) for x, y, a, b in truth]
    silent = np.random.default_rng(0).random(40) < 0.3
    frames = [photo(seed=n) for n in range(40)]
    calls = []

    def ask(template, search, text):
        n = len(calls) + 1
        calls.append((template, search, text))
        if silent[n]:
            return ['{"visible": "no", "bbox": [1, 1, 9, 9]}', "nowhere", '{"bbox": [5, 5, 5, 9]}'][n % 3]
        return json.dumps({"visible": "yes", "bbox": truth[n]})

    tracker = VPTracker()
    track = tracker.track(iter(frames), truth[0], ask, "the cat")
    wanted = [truth[0]]
    for n in range(1, 40):
        wanted.append(wanted[-1] if silent[n] else tuple(min(e, s) for e, s in zip(truth[n], SIZE * 2, strict=True)))
    assert track.boxes == wanted
    assert track.found == [True, *(~silent[1:]).tolist()] and 5 < silent[1:].sum() < 20
    assert track.answers[0] == "" and len(track.answers) == 40
    # Each frame is shown with the rectangle around the last output, next to the same template.
    for n, (template, search, text) in enumerate(calls, 1):
        assert np.array_equal(np.asarray(search), np.asarray(tracker.search(frames[n], wanted[n - 1])))
        assert template is calls[0][0] and "the cat" in text
        assert '{"visible"' in text
    assert np.array_equal(np.asarray(calls[0][0]), np.asarray(tracker.template(frames[0], truth[0])))


def test_frames_may_change_their_size_and_a_bar_may_be_shown():
    frames = [photo(), photo((60, 200)), photo((30, 30))]
    said = iter(['{"bbox": [10, 150, 20, 180]}', '{"bbox": [1, 1, 5, 5]}'])
    # The last box is outside of the third frame: an honest error rather than a silent guess.
    with pytest.raises(ValueError, match="frame of 30 x 30"):
        VPTracker().track(frames, (3, 3, 9, 9), lambda *_: next(said), progress=True)
    track = VPTracker().track(frames[:1], (3, 3, 9, 9), None, progress=True)
    assert track.boxes == [(3, 3, 9, 9)]


@pytest.mark.parametrize("inside", [0.0, 0.9, 1.0])
def test_jitter(inside):
    draw, held, scales = torch.Generator().manual_seed(0), 0, set()
    box = (400.0, 300.0, 410.0, 320.0)
    shifts = []
    for _ in range(2000):
        left, top, right, bottom = jitter(box, (1000, 800), draw, inside=inside)
        assert 0 <= left < right <= 1000 and 0 <= top < bottom <= 800
        over = max(0, min(right, 410) - max(left, 400)) * max(0, min(bottom, 320) - max(top, 300))
        assert over == pytest.approx(200) or over == pytest.approx(0, abs=1e-6)  # all of it, or none
        held += over > 1
        if over > 1:
            scale = (right - left) / 10
            assert (bottom - top) / 20 == pytest.approx(scale)
            scales.add(round(scale, 6))
            shifts.append(
                (((left + right) / 2 - 405) / (10 * (scale - 1) / 2), ((top + bottom) / 2 - 310) / (scale - 1) / 10)
            )
    assert held / 2000 == pytest.approx(inside, abs=0.02)
    if inside:
        assert scales == {2, 3, 4, 5, 6, 7, 8}
        # Uniform as far as the box stays inside: of mean 0 and variance 1/3.
        assert np.mean(shifts, 0) == pytest.approx([0, 0], abs=0.05)
        assert np.var(shifts, 0) == pytest.approx([1 / 3, 1 / 3], abs=0.03)


def test_jitter_at_the_border_and_of_what_cannot_be_seen():
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        left, top, right, bottom = jitter((0, 0, 6, 6), (8, 8), draw, scales=(1, 3), inside=0)
        assert left >= 6 or top >= 6  # the only sides with room
        assert jitter((0, 0, 8, 8), (8, 8), draw, inside=0) == (0, 0, 8, 8)  # none
        left, top, right, bottom = jitter(None, (80, 60), draw)
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60 and 9.9 <= right - left <= 40.1
        assert jitter((10.0, 10, 20, 20), (80, 60), draw, scales=(1, 1), inside=1) == pytest.approx((10, 10, 20, 20))
    assert json.loads(VPTracker().answer(None, (80, 60))) == {"visible": "no", "bbox": [0, 0, 0, 0]}
    one, two = (jitter((10, 10, 20, 20), (80, 60), torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == two


# Models.


class Reader:
    """A processor: letters as words, sixteen image tokens a picture of 32 x 32."""

    chat_template = None
    image_token = "<image>"

    def __init__(self, chat=False):
        self.chat_template = "any" if chat else None
        self.content = None

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize and messages[0]["role"] == "user"
        self.content = messages[0]["content"]
        return "".join(part.get("text", "<image>") for part in self.content) + "!"

    def __call__(self, images, text, return_tensors):
        assert return_tensors == "pt" and len(text) == 1
        ids = [1]
        for n, part in enumerate(text[0].split("<image>")):
            ids += [models.IMAGE] * 16 * (n > 0) + [10 + ord(letter) % 80 for letter in part]
        pixels = [torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 255 for image in images]
        ids = torch.tensor([ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(pixels)}

    def batch_decode(self, out, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(map(str, row.tolist())) for row in out]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_a_model_is_its_greedy_answer(chat, dtype):
    model, reader = models.build("llava").to(dtype), Reader(chat)
    template, search, text = photo((20, 20)), photo(seed=1), "a<image>b<image>c"
    model.generation_config.do_sample = True  # what the model's own settings say does not matter
    said = ask_with(model, reader, max_new_tokens=5)(template, search, text)
    inputs = reader([template, search], [text + "!" * chat], "pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = torch.cat([ids, model(**inputs).logits[:, -1:].argmax(-1)], 1)
    wanted = ids[0, -5:].tolist()
    assert said == " ".join(map(str, wanted))
    if chat:
        assert [part["type"] for part in reader.content] == ["text", "image", "text", "image", "text"]


CHAT = (
    "{% for said in messages %}{% for part in said.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} answer"
)


@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_processor_of_transformers_is_understood(chat):
    """LLaVA's own, with a tokenizer of few words: what the model is given, seen by a hook."""
    words = {word: n for n, word in enumerate(["<pad>", "<s>", "<unk>", "<image>", "find", "it", "here", "answer"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    reader = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        reader,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=chat,
        num_additional_image_tokens=1,
    )
    model, given, seen = models.build("llava"), [], []
    hooks = [
        model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True),
        model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("pixel_values", *args)), with_kwargs=True
        ),
    ]
    said = ask_with(model, processor, max_new_tokens=3)(photo((20, 20)), photo(seed=1), "find <image> it here <image>")
    for hook in hooks:
        hook.remove()
    assert isinstance(said, str) and len(given) == 3
    images = [3] * 16
    assert given[0]["input_ids"].tolist() == [[4, *images, 5, 6, *images, *([7] if chat else [])]]
    wanted = reader(images=[photo((20, 20)), photo(seed=1)], return_tensors="pt")["pixel_values"]
    assert len(seen) == 1 and torch.equal(seen[0], wanted)


def test_a_model_of_random_weights_tracks_and_says_nothing_of_use():
    track = VPTracker().track(
        [photo(seed=n) for n in range(3)], (3, 4, 30, 40), ask_with(models.build("llava"), Reader())
    )
    assert track.boxes == [(3, 4, 30, 40)] * 3 and track.found == [True, False, False]
    assert len(track.answers[1].split()) == 64


# Measures.


def test_iou_against_transformers():
    a, b = some_boxes(60, seed=1), some_boxes(60, seed=2)
    wanted = box_iou(a, b)[0].diagonal()
    assert (wanted > 0).any() and (wanted == 0).any()
    torch.testing.assert_close(iou(a, b), wanted)
    torch.testing.assert_close(iou(a, a), torch.ones(60, dtype=torch.float64))
    assert iou([[5, 5, 5, 9], [9, 9, 1, 1]], [[0, 0, 10, 10]] * 2).tolist() == [0, 0]
    # And against counted pixels.
    c, d = a.round().long(), b.round().long()
    for one, two, found in zip(c.tolist(), d.tolist(), iou(c, d).tolist(), strict=True):
        masks = [np.zeros(SIZE, bool) for _ in range(2)]
        for mask, (left, top, right, bottom) in zip(masks, (one, two), strict=True):
            mask[left:right, top:bottom] = True
        union = (masks[0] | masks[1]).sum()
        assert found == pytest.approx((masks[0] & masks[1]).sum() / union if union else 0)


def test_perfect_boxes():
    truth = some_boxes(30)
    assert success_auc(truth, truth) == pytest.approx(20 / 21)
    assert precision(truth, truth) == 1 and normalised_precision(truth, truth) == 1


def test_measures_by_hand():
    truth = [[0, 0, 10, 10]] * 4
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5], [2, 0, 12, 10], [20, 0, 30, 10]]  # IoU 1, 1/2, 2/3, 0
    # Above k/20: 20 of 21 thresholds, 10 (0 to .45), 14 (0 to .65), and none.
    assert success_auc(boxes, truth) == pytest.approx((20 + 10 + 14 + 0) / 84)
    # Centres 0, 2.5, 2 and 20 pixels off: at most 20 counts.
    assert precision(boxes, truth) == 1 and precision(boxes, truth, 19.9) == 0.75 and precision(boxes, truth, 2) == 0.5
    # In sizes 0, .25, .2 and 2: 51, 26, 31 and no thresholds of k/100.
    assert normalised_precision(boxes, truth) == pytest.approx((51 + 26 + 31) / 204, abs=1 / 204)
    # Widths and heights count each for themselves.
    assert normalised_precision([[40, 0, 140, 1]], [[0, 0, 100, 1]]) == pytest.approx(11 / 51, abs=1 / 51)
    assert normalised_precision([[0, 40, 1, 140]], [[0, 0, 100, 100]]) < 1e-9


def test_frames_without_the_object_do_not_count():
    truth, boxes = [[0, 0, 10, 10], [0, 0, 0, 0]], [[0, 0, 10, 10], [90, 90, 95, 95]]
    assert success_auc(boxes, truth) == pytest.approx(20 / 21) and precision(boxes, truth) == 1


def test_bad_input_is_named():
    ok, draw = VPTracker(), torch.Generator()
    cases = [
        (lambda: VPTracker(scale=0.5), "scale must be at least 1; it was 0.5"),
        (lambda: VPTracker(width=0), "width must be an int"),
        (lambda: VPTracker(width=1.5), "width must be an int"),
        (lambda: VPTracker(template_factor=0), "template_factor must be above 0"),
        (lambda: VPTracker(form="relative"), "form must be 'absolute' or 'normalised'"),
        (lambda: VPTracker(form="normalised", seen=lambda size: size), "seen is for absolute numbers"),
        (lambda: VPTracker(prompt="<image> {description}"), "prompt must hold <image> twice"),
        (lambda: ok.region((5, 5, 5, 9), SIZE), "box must have an area in the frame of 120 x 90"),
        (lambda: ok.search(photo(), (200, 5, 210, 9)), "box must have an area"),
        (lambda: ok.template(photo(), (1, 2, math.nan, 4)), "box must be left, top, right, bottom"),
        (lambda: ok.template(photo(), (1, 2, 3)), "box must be left, top, right, bottom"),
        (lambda: ok.track([], (1, 2, 3, 4), None), "frames must hold at least one"),
        (lambda: jitter((1, 2, 3, 4), SIZE, draw, scales=(0, 2)), "scales must be from 1 on"),
        (lambda: jitter((1, 2, 3, 4), SIZE, draw, scales=(3, 2)), "scales must be from 1 on"),
        (lambda: jitter((1, 2, 3, 4), SIZE, draw, inside=1.1), "inside must be from 0 to 1"),
        (lambda: jitter((1, 2, 1, 4), SIZE, draw), "box must have an area"),
        (lambda: iou([[0, 0, 1, 1]], [[0, 0, 1, 1]] * 2), r"must both be \(T, 4\)"),
        (lambda: precision([[0, 0, 1, 1]], [[0, 0, 0, 0]]), "truth must have a box with an area"),
    ]
    for call, named in cases:
        with pytest.raises(ValueError, match=named):
            call()
