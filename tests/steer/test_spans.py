"""Which positions are what: against the tokens, and against where transformers itself puts an image's features."""

import pytest
import torch

from glocal.steer.spans import KINDS, Grid, SpanMap, known, prompt_of
from tests.steer import models

IDS = torch.tensor([[0, 0, 5, 9, 9, 9, 9, 6, 9, 9, 9, 9, 7], [5, 5, 9, 9, 9, 9, 6, 6, 6, 6, 6, 6, 6]])
PAD = torch.tensor([[0, 0] + [1] * 11, [1] * 13])


def names(spans, row):
    return "".join(KINDS[kind][0] for kind in spans.kinds[row].tolist())


def test_kinds_images_and_padding():
    spans = SpanMap.of(IDS, image_token=9, pad=PAD)
    assert names(spans, 0) == "ppsiiiiqiiiiq" and names(spans, 1) == "ssiiiiqqqqqqq"
    assert [run.tolist() for run in spans.images(0)] == [[3, 4, 5, 6], [8, 9, 10, 11]]
    assert [len(images) for images in spans.grids] == [2, 1]
    assert spans.grids[0][1][0].index.tolist() == [[0, 1], [2, 3]]
    assert spans.positions(1, "system").tolist() == [0, 1]


def test_a_prompt_without_images_is_a_question():
    for token in (None, 8):
        spans = SpanMap.of(IDS, image_token=token)
        assert names(spans, 1) == "q" * 13 and spans.images(0) == []


def test_what_comes_after_the_prompt_is_the_answer():
    spans = SpanMap.of(IDS, image_token=9, pad=PAD)
    longer = spans.extended(15)
    assert names(longer, 0) == "ppsiiiiqiiiiqaa" and spans.extended(13) is spans
    many = longer.repeated(6)
    assert [names(many, row) for row in range(6)] == [names(longer, 0)] * 3 + [names(longer, 1)] * 3
    assert [len(images) for images in many.grids] == [2, 2, 2, 1, 1, 1]


def test_padding_on_the_left_shifts_everything():
    padded = SpanMap.of(torch.cat([torch.zeros(2, 4, dtype=torch.long), IDS], 1), image_token=9)
    plain = SpanMap.of(IDS, image_token=9)
    for row in range(2):
        assert torch.equal(padded.positions(row, "image"), plain.positions(row, "image") + 4)


def test_sets_as_positions_and_as_booleans():
    spans = SpanMap.of(IDS, image_token=9, pad=PAD)
    booleans = [torch.arange(8) % 7 == 0, torch.tensor([False, True, False, False])]
    for sets in ([[0, 7], [1]], [torch.tensor([7, 0, 7]), torch.tensor([1])], booleans):
        found = spans.marked("local", sets, "image")
        assert found.nonzero().tolist() == [[0, 3], [0, 11], [1, 3]]
    found = spans.marked("sinks", [[0, 2], torch.arange(13) == 12])
    assert found.nonzero().tolist() == [[0, 2], [1, 12]]  # the first position is padding
    nothing = torch.tensor([], dtype=torch.long)
    assert not spans.marked("sinks", [nothing, nothing]).any()
    for wrong, message in (
        ([[0]], "local must have one set for each of 2 rows; it had 1"),
        ([[0], [4]], "local must be positions among the 4 image tokens of row 1, or as many booleans; it was"),
        ([[-1], [0]], "among the 8 image tokens of row 0"),
        ([[0.0], [1.0]], "it was torch.float32"),
        ([[0], torch.ones(13, dtype=torch.bool)], r"it was torch.bool of shape \(13,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            spans.marked("local", wrong, "image")


def test_what_a_prompt_must_have():
    spans = SpanMap.of(IDS, image_token=9, pad=PAD)
    spans.check_images("PAINT")
    spans.check_ends()
    with pytest.raises(ValueError, match="no image tokens: PAINT needs a picture in every row"):
        SpanMap.of(torch.tensor([[9, 5], [5, 5]]), image_token=9).check_images("PAINT")
    with pytest.raises(ValueError, match="ends with padding"):
        SpanMap.of(IDS, image_token=9, pad=PAD.flip(1)).check_ends()
    assert known(spans) is spans
    with pytest.raises(ValueError, match="pass spans="):
        known(None)


def test_the_prompt_among_arguments():
    embeds = torch.zeros(2, 13, 4)
    assert prompt_of({"input_ids": IDS, "inputs_embeds": None, "pixel_values": 0}) is IDS
    assert prompt_of({"input_ids": IDS, "inputs_embeds": embeds}) is embeds
    for given in ({}, {"input_ids": None}):
        with pytest.raises(ValueError, match="inputs must hold input_ids or inputs_embeds"):
            prompt_of(given)


def test_bad_input():
    with pytest.raises(ValueError, match="input_ids"):
        SpanMap.of(IDS[0], image_token=9)
    with pytest.raises(ValueError, match="attention_mask"):
        SpanMap.of(IDS, image_token=9, pad=PAD[:, :5])
    with pytest.raises(ValueError, match="kind must be one of"):
        SpanMap.of(IDS, image_token=9).mask("picture")
    with pytest.raises(ValueError, match="2 images are described, the prompts hold 3"):
        SpanMap.of(IDS, image_token=9, grids=[(Grid(torch.arange(4).view(2, 2)),)] * 2)
    with pytest.raises(ValueError, match="spans="):
        SpanMap.read(models.build("llama"), {"inputs_embeds": torch.zeros(1, 3, 32)})


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "paligemma"])
def test_grids_lie_as_the_model_puts_them(name):
    """A bright patch in the picture changes the tokens that the grid says are there, before attention spreads it."""
    model = models.build(name)
    inputs = models.inputs(name, model, batch=1)
    spans = SpanMap.read(model, inputs)
    grids = spans.grids[0][0]
    assert [len(run) for run in spans.images(0)] == [int((inputs["input_ids"] == models.IMAGE).sum())]
    shapes = {"llava": [(4, 4)], "paligemma": [(4, 4)], "qwen2_vl": [(3, 4)], "qwen2_5_vl": [(3, 4)]}
    # A picture of 40 x 64 on 64 x 64 tiles of 8 x 8 patches: the tiles hold 5 rows that are not padding, one more
    # patch for what the cut does not meet.
    assert [grid.shape for grid in grids] == shapes.get(name, [(4, 4), (6, 8)])
    index = torch.cat([grid.index.flatten() for grid in grids])
    assert len(index.unique()) == len(index) and int(index.max()) < len(spans.images(0)[0])
    if name in ("llava_next", "llava_onevision"):
        # The ends of rows are what is left over, and all are the same token: the newline's.
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        features = getattr(features, "pooler_output", features)[0]
        ends = torch.ones(len(features), dtype=torch.bool)
        ends[index] = False
        newline = model.model.image_newline
        assert int(ends.sum()) == 6
        assert torch.allclose(features[ends], newline.expand(6, -1)) and not torch.allclose(features[0], newline)


def test_queries_of_a_q_former_form_no_grid():
    model = models.build("blip_2")
    assert SpanMap.read(model, models.inputs("blip_2", model)).grids == (((),), ((),))
