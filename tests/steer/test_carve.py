"""CARVE: maps from eager attention by other tools, components as scikit-image labels them, what is shown in the end."""

from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.measure import label, regionprops
from skimage.transform import resize

from glocal.steer.carve import CARVE, contrast, contrast_map, main_components, picture_complexity
from glocal.steer.spans import Grid
from tests.steer import models
from tests.steer.test_matcher import pixels


class Processor:
    """Of the small LLaVA: ``#`` is a picture, any other letter a token; pads on the left."""

    def __init__(self, side="left"):
        self.side, self.seen = side, []

    def __call__(self, images, text, return_tensors, padding):
        assert len(images) == len(text) and return_tensors == "pt" and padding
        self.seen.append(images)
        rows = [
            [1] + [t for letter in words for t in ([3] * 16 if letter == "#" else [10 + ord(letter) % 89])]
            for words in text
        ]
        length = max(map(len, rows))
        padded = [
            [0] * (length - len(row)) + row if self.side == "left" else row + [0] * (length - len(row)) for row in rows
        ]
        ids = torch.tensor(padded)
        flat = [F.interpolate(pixels([image]), (32, 32)) for some in images for image in some]
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.cat(flat)}

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row)) + " " for row in ids.tolist()]


class Canned:
    """Of any model: its prompt's question is drawn anew from the text."""

    def __init__(self, name, model):
        self.inputs = models.inputs(name, model)

    def __call__(self, images, text, return_tensors, padding):
        ids = self.inputs["input_ids"].clone()
        for row, words in zip(ids, text, strict=True):
            row[-4:] = torch.randint(10, 99, (4,), generator=torch.Generator().manual_seed(crc32(words.encode())))
        return self.inputs | {"input_ids": ids}

    batch_decode = Processor.batch_decode


def pictures(*sizes):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(50, 255, (height, width, 3), np.uint8)) for height, width in sizes]


def show(question, count):
    return "#" * count + question


def carve(model, processor=None, **settings):
    settings = dict(prompt=show, general="draw it", suffix="!", layers=[1, 2], max_new_tokens=6) | settings
    return CARVE(model, processor or Processor(), **settings)


@pytest.fixture
def llava():
    model = models.build("llava")
    model.generation_config.suppress_tokens = [models.IMAGE]
    return model


def recorded(model, inputs, steps):
    """Eager attention of each step's last row to the picture, ``(row, steps, layers, 16)``, and the tokens."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    options = dict(max_new_tokens=steps, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    output = model.generate(**inputs, **options)
    model.set_attn_implementation(before)
    maps = torch.stack(
        [
            torch.stack([each[:, :, -1].mean(1)[:, : inputs["input_ids"].shape[1]] for each in step])
            for step in output.attentions
        ]
    )
    image = inputs["input_ids"] == models.IMAGE
    found = [maps[:, :, row, image[row]].double().numpy() for row in range(len(image))]
    return found, output.sequences[:, inputs["input_ids"].shape[1] :]


def test_maps_are_ratios_of_eager_attention(llava):
    """Ended answers count up to their end; the sums and the enlargement are numpy's and scikit-image's."""
    images, questions = pictures((40, 64), (48, 48)), ["what is it", "how"]
    reader = Processor()
    nested = [[image] for image in images]
    asked = reader(nested, ["#" + q + "!" for q in questions], "pt", True)
    _, free = recorded(llava, asked, 6)
    llava.generation_config.eos_token_id, llava.generation_config.pad_token_id = [int(free[0, 2])], 0
    wanted, ids = recorded(llava, asked, 6)
    general, other = recorded(llava, reader(nested, ["#draw it!"] * 2, "pt", True), 6)
    end = int(free[0, 2])
    ends = [[[*row, end].index(end) + 1 for row in rows.tolist()] for rows in (ids, other)]
    common = [min(6, *pair) for pair in zip(*ends, strict=True)]
    assert common[0] <= 3 and max(common) > common[0]
    for settings in (dict(), dict(lambda_=0.1, relative=True), dict(normalise=True, rank="size"), dict(steps="first")):
        found = carve(llava, **settings).refine(images, questions)
        for row, image in enumerate(images):
            total = np.zeros((image.height, image.width))
            for step in range(1 if "steps" in settings else common[row]):
                for layer in (1, 2):
                    ratio = wanted[row][step, layer] / (
                        general[row][step, layer] + (0.1 / 16 if "relative" in settings else 1e-8)
                    )
                    ratio = ratio / ratio.sum() if "normalise" in settings else ratio
                    total += (step + 1) * resize(
                        ratio.reshape(4, 4), total.shape, order=1, mode="edge", anti_aliasing=False
                    )
            assert np.allclose(found[row].map, total, rtol=1e-3, atol=1e-6)
            mask = components(total, 80, settings.get("rank", "sum"), 3, 0.2)
            assert (found[row].mask == mask).mean() > 0.999
            left, top, right, bottom = found[row].box
            assert found[row].mask[:, left].any() and found[row].mask[bottom - 1].any()
            assert found[row].mask[top:bottom, left:right].sum() == found[row].mask.sum()
            width, height = found[row].picture.size
            assert width >= image.width and height >= image.height and (width == image.width or height == image.height)


def components(values, percentile, rank, least, share):
    """By scikit-image."""
    regions = regionprops(label(values >= np.percentile(values, percentile), connectivity=2), values)
    worth = {"sum": lambda r: r.area * r.intensity_mean, "size": lambda r: r.area}[rank]
    kept = np.zeros(values.shape, bool)
    for region in sorted(regions, key=worth, reverse=True)[: max(least, int(share * len(regions)))]:
        kept[tuple(region.coords.T)] = True
    return kept


@pytest.mark.parametrize("rank", ["sum", "size"])
@pytest.mark.parametrize("least, share", [(3, 0.2), (1, 0.0), (2, 0.5)])
def test_components_as_scikit_image_labels_them(rank, least, share):
    draw = np.random.default_rng(0)
    for size in ((37, 53), (64, 64), (1, 40)):
        values = draw.random(size) + np.arange(size[1]) / 50
        kept = main_components(values, 80, rank=rank, least=least, share=share)
        wanted = components(values, 80, rank, least, share)
        if rank == "size":  # parts of equal size are equally good
            assert kept.sum() == wanted.sum()
        else:
            assert (kept == wanted).all()


def test_corners_connect():
    values = np.eye(6)
    assert main_components(values, 90, least=1).sum() == 6


def test_equal_prompts_keep_the_whole_picture(llava):
    images = pictures((40, 64), (48, 48))
    found = carve(llava, general="same", lambda_=0.0).refine(images, ["same"] * 2)
    for image, part in zip(images, found, strict=True):
        assert np.ptp(part.map) < 1e-9 and part.mask.all() and part.box == (0, 0, image.width, image.height)
        assert (np.asarray(part.picture) == np.asarray(image)).all()
    near = carve(llava, general="same").refine(images, ["same"] * 2)  # one, up to lambda
    assert np.ptp(near[0].map) / near[0].map.max() < 1e-3


def test_the_contrast_takes_out_what_both_share():
    draw = torch.Generator().manual_seed(0)
    wanted, shared = (torch.rand(1, 1, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(contrast(wanted * shared, shared, 0.0), wanted, atol=1e-15)
    grid = Grid(torch.arange(12).view(3, 4))
    found = contrast_map(wanted * shared, shared, [grid], (3, 4), lambda_=0.0)
    assert np.allclose(found, wanted.view(3, 4).numpy())
    assert torch.equal(contrast(torch.zeros(2), torch.tensor([0.0, 1.0]), 0.0), torch.zeros(2))


def test_steps_layers_and_grids_add_up():
    draw = torch.Generator().manual_seed(0)
    question, general = (torch.rand(t, 2, 20, generator=draw, dtype=torch.float64) for t in (4, 3))
    whole, fine = Grid(torch.arange(4).view(2, 2)), Grid(torch.arange(4, 20).view(4, 4)[:, :3])
    wanted = np.zeros((9, 15))
    for step in range(3):
        for layer in range(2):
            ratio = (question / 1)[step, layer].numpy() / (general[step, layer].numpy() + 0.1)
            for tokens in (ratio[:4].reshape(2, 2), ratio[4:].reshape(4, 4)[:, :3]):
                wanted += (step + 1) * resize(tokens, (9, 15), order=1, mode="edge", anti_aliasing=False)
    assert np.allclose(contrast_map(question, general, [whole, fine], (9, 15), lambda_=0.1), wanted)


def test_a_batch_is_many_alone(llava):
    images, questions = pictures((40, 64), (48, 48), (64, 32)), ["what is it", "how", "of which colour"]
    together = carve(llava).ask(images, questions)
    for image, question, found in zip(images, questions, together, strict=True):
        (alone,) = carve(llava).ask([image], [question])
        assert np.allclose(alone.refinement.map, found.refinement.map, rtol=1e-3)
        assert torch.equal(alone.ids, found.ids) and alone.text == found.text


@pytest.mark.parametrize("both", [True, False])
def test_the_question_is_asked_again(llava, both):
    images, questions, reader = pictures((40, 64), (48, 48)), ["what is it", "how"], Processor()
    plain = llava.generate(**reader([[i] for i in images], ["#a", "#b"], "pt", True), max_new_tokens=6)
    answers = carve(llava, reader, both=both).ask(images, questions, max_new_tokens=9)
    shown = reader.seen[-1]
    for image, some, answer in zip(images, shown, answers, strict=True):
        assert some == ([image, answer.refinement.picture] if both else [answer.refinement.picture])
        dark = np.asarray(answer.refinement.picture.convert("L"))
        assert (dark < 5).mean() > 0.02 or answer.refinement.mask.all()
    inputs = reader(shown, [("##" if both else "#") + q + "!" for q in questions], "pt", True)
    ids = llava.generate(**inputs, max_new_tokens=9, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(torch.stack([answer.ids for answer in answers]), ids)
    assert answers[0].text == " ".join(map(str, ids[0].tolist()))
    again = llava.generate(**reader([[i] for i in images], ["#a", "#b"], "pt", True), max_new_tokens=6)
    assert torch.equal(again, plain) and "_glocal_steering" not in vars(llava)


@pytest.mark.parametrize("name", models.VISION)
def test_every_kind_of_model(name):
    model = models.build(name)
    for part in (model, getattr(model, "language_model", model)):
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.suppress_tokens = [models.IMAGE]
    inputs = models.inputs(name, model)
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    method = CARVE(model, Canned(name, model), prompt=show, both=False, max_new_tokens=20)
    assert sorted(method.numbers) == [2]
    images = pictures((40, 64), (40, 64))
    if "blip" in name:
        with pytest.raises(ValueError, match="9 tokens of the picture form no grid"):
            method.refine(images, ["a", "b"])
    else:
        answers = method.ask(images, ["a", "b"])
        assert all(len(a.ids) == 20 and 0 < a.refinement.mask.mean() < 0.5 for a in answers)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain)


def test_what_the_middle_square_leaves_out_is_not_kept(llava):
    reader = Processor()
    reader.image_processor = type(
        "Cuts", (), dict(do_center_crop=True, size={"shortest_edge": 32}, crop_size={"height": 32})
    )()
    (part,) = carve(llava, reader).refine(pictures((40, 64)), ["what"])
    assert not part.mask[:, :12].any() and not part.mask[:, 52:].any() and (part.map[:, :12] == 0).all()
    (whole,) = carve(llava).refine(pictures((40, 40)), ["what"])
    reader.image_processor.crop_size = {"height": 16}
    (inner,) = carve(llava, reader).refine(pictures((40, 40)), ["what"])
    assert not inner.mask[:10].any() and not inner.mask[:, 30:].any() and inner.map.sum() < whole.map.sum()


def test_layers_are_shares_of_the_depth(llava):
    assert sorted(carve(llava, layers=None).numbers) == [2]
    assert sorted(carve(llava, layers=None, depth=(0.0, 0.4)).numbers) == [0, 1]
    assert sorted(carve(llava, layers=[-3]).numbers) == [0]
    deep = models.TEXT["llama"]().config
    deep.num_hidden_layers = 28
    model = type(models.TEXT["llama"]())(deep)
    assert sorted(carve(model, layers=None).numbers) == list(range(20, 26))


def test_low_precision(llava):
    (part,) = carve(llava.bfloat16()).refine(pictures((40, 64)), ["what"])
    assert np.isfinite(part.map).all() and part.map.dtype == np.float64


def test_clutter_is_complex():
    flat = Image.new("RGB", (64, 64), (200, 30, 30))
    checks = np.kron((np.indices((8, 8)).sum(0) % 2)[..., None] * np.array([0, 220, 40]), np.ones((8, 8, 1)))
    edges, hues = picture_complexity(Image.fromarray((checks + np.array([200, 0, 0])).astype(np.uint8)))
    assert picture_complexity(flat) == (0.0, 0.0) and edges > 0.1
    assert hues == pytest.approx(np.log(2), abs=0.1)  # two hues, of about equal saturation
    assert picture_complexity(Image.new("L", (32, 32), 90)) == (0.0, 0.0)


def test_what_is_refused(llava):
    images = pictures((40, 64), (48, 48))
    for settings, message in (
        (dict(lambda_=-1.0), "lambda_ must be at least 0"),
        (dict(steps="last"), "steps must be 'all' or 'first'"),
        (dict(rank="mean"), "rank must be 'sum' or 'size'"),
        (dict(percentile=101), "percentile must be"),
        (dict(least=0), "least must be"),
        (dict(share=2), "share must be"),
        (dict(depth=(0.9, 0.1)), "depth must be"),
        (dict(layers=[5]), "layers must be numbers from -3 to 2"),
        (dict(max_new_tokens=0), "max_new_tokens must be"),
    ):
        with pytest.raises(ValueError, match=message):
            carve(llava, **settings)
    with pytest.raises(ValueError, match="2 images and 1 questions"):
        carve(llava).refine(images, ["a"])
    with pytest.raises(ValueError, match="pad on the left"):
        carve(llava, Processor("right")).refine(images, ["a long one", "b"])
    with pytest.raises(ValueError, match="hold one picture"):
        carve(llava, prompt=lambda question, count: question).refine(images[:1], ["a"])
    with pytest.raises(ValueError, match=r"lambda_ was 0\.0, raise it"):
        contrast_map(torch.ones(1, 1, 4), torch.zeros(1, 1, 4), [Grid(torch.arange(4).view(2, 2))], (4, 4), lambda_=0.0)
    with pytest.raises(ValueError, match="alike but for steps"):
        contrast_map(torch.ones(1, 1, 4), torch.ones(1, 2, 4), [], (4, 4))
    with pytest.raises(ValueError, match="no grid that is known"):
        contrast_map(torch.ones(1, 1, 4), torch.ones(1, 1, 4), [], (4, 4))
    with pytest.raises(ValueError, match="general must have question's shape"):
        contrast(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="values must be finite"):
        main_components(np.array([[np.nan, 1.0]]))
    with pytest.raises(TypeError, match="transformers PreTrainedModel"):
        carve(torch.nn.Linear(2, 2))
    assert "_glocal_steering" not in vars(llava)
