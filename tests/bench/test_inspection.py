"""What `glocal inspect` measures, against the model itself, and what it refuses."""

import math

import pytest
import torch
from PIL import Image

from glocal.bench.inspection import Inspection, Settings, inspect_model
from glocal.bench.inspection_report import headline, heads_table, render, tables
from glocal.bench.run import Interrupted
from glocal.hf import byte_llama
from glocal.inspect import record


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspect_model(Settings("bytes", "def add(a, b):\n    return a + b", tokens=24))


def test_maps_and_loss_are_the_models(found):
    model = byte_llama()
    ids = found.subject.inputs["input_ids"]
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss) / math.log(2)
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.cells == 1
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    for mine, wanted in zip(found.maps, maps, strict=True):
        torch.testing.assert_close(mine, wanted[0], atol=1e-5, rtol=1e-4)
    received = torch.stack(maps).double().mean((0, 1, 2, 3))
    torch.testing.assert_close(found.received, received, atol=1e-6, rtol=1e-4)
    assert found.subject.labels == list("def add(a, b):\n    retur") and found.subject.cut == 31


def test_cost_is_that_of_the_projections_columns_gone(found):
    """A head without its columns of the output projection gives nothing."""
    cost, width = found.metrics["cost"], 32
    for layer, head in [(0, 0), (3, 5)]:
        model = byte_llama()
        with torch.no_grad():
            width = model.config.hidden_size // model.config.num_attention_heads
            projection = model.model.layers[layer].self_attn.o_proj.weight
            projection[:, head * width : (head + 1) * width] = 0
            ids = found.subject.inputs["input_ids"]
            loss = float(model(input_ids=ids, labels=ids).loss) / math.log(2)
        assert float(cost[layer, head]) == pytest.approx(loss - found.loss, abs=1e-4)
    shares, losses = zip(*found.pruned, strict=True)
    assert shares[0] == 0 and losses[0] == pytest.approx(found.loss) and list(shares) == sorted(shares)


def test_long_maps_are_pooled(monkeypatch, found):
    monkeypatch.setattr("glocal.bench.inspection._CELLS", 8)
    pooled = inspect_model(Settings("bytes", "def add(a, b):\n    return a + b", tokens=24, pruning=False))
    assert pooled.cells == 3 and pooled.maps[0].shape == (8, 8, 8) and not pooled.pruned
    wanted = found.maps[2].view(8, 8, 3, 8, 3).sum(-1).mean(2)
    torch.testing.assert_close(pooled.maps[2], wanted)


def test_tables(found):
    first, drawn, lost = tables(found)
    assert first == heads_table(found) and len(first.rows) == 12
    layer, head = int(first.rows[0][0]) - 1, int(first.rows[0][1]) - 1
    assert float(found.metrics["cost"][layer, head]) == float(found.metrics["cost"].max())
    assert drawn.rows[0][0] == "'d'" and len(lost.rows) == 10
    assert f"head that it can spare least is {head + 1} of layer {layer + 1}" in headline(found)


def test_an_encoder_and_a_picture(tmp_path):
    encoder = inspect_model(Settings(None, "The cat sat on the mat.", pruning=False))
    assert encoder.subject.labels[:3] == ["[CLS]", "the", "cat"]
    assert len(encoder.layers) == 6 and encoder.maps[0].shape == (12, 9, 9)
    assert float(encoder.attributions["attention rollout"].sum()) == pytest.approx(1)
    assert bool((encoder.attributions["GlobEnc"] > 0).all())
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), (200, 30, 30)).save(path)
    picture = inspect_model(Settings("scenes", str(path), pruning=False))
    assert picture.subject.grid == (8, 8) and picture.subject.labels[:2] == ["class token", "row 1, column 1"]
    patches = picture.attributions["gradient x input"]
    assert patches[0] == 0 and bool((patches[1:] > 0).all())
    assert "data:image/png;base64," in render(picture)


def test_distances_of_pictures_are_in_patches():
    picture = inspect_model(Settings("scenes", pruning=False))
    (layer,) = record(picture.subject.model, picture.subject.inputs, layers=[1])
    weights, total = layer.weights()[0].double(), 0.0
    for q in range(65):
        for k in range(1, 65):
            if q:
                total = total + weights[:, q, k] * math.dist(divmod(q - 1, 8), divmod(k - 1, 8))
    torch.testing.assert_close(picture.metrics["distance"][1], total / 65)


def test_interrupted_keeps_what_was_measured():
    def stop(what, done, total):
        if what.startswith("trying") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as raised:
        inspect_model(Settings("bytes", "def add(a, b):", tokens=24), stop)
    partial = raised.value.partial
    assert "cost" not in partial.metrics and partial.metrics["entropy"].shape == (4, 8) and tables(partial)


def test_bad_input(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\x00")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "model").mkdir()
    cases = [
        (("bytes", str(tmp_path / "empty.txt")), "input must hold text; empty.txt was empty"),
        (("bytes", ""), "input must hold text"),
        (("bytes", "a"), "at least two tokens; it had 1"),
        (("bytes", str(tmp_path / "raw.txt")), "cannot be read as UTF-8"),
        (("bytes", str(tmp_path / "none.txt")), "none.txt' is not a file"),
        (("bytes", str(tmp_path / "a.png")), "input must be text for bytes; it was the picture 'a.png'"),
        ((None, str(tmp_path / "a.png")), "input must be text for the encoder MiniLM"),
        (("scenes", "a text"), "must be a picture .* for 'scenes', which reads images; it was 'a text'"),
        (("scenes", str(tmp_path / "broken.png")), "cannot be read as a picture"),
        ((str(tmp_path / "model"), "a text"), "has no config.json"),
        (("nowhere", "a text"), "is not a folder"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            inspect_model(Settings(*given))
    with pytest.raises(ValueError, match="tokens must be from 2"):
        Settings(tokens=1)


def test_a_folder_of_an_image_model(tmp_path):
    from transformers import CLIPImageProcessor, ViTConfig, ViTModel

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)
    found = inspect_model(Settings(str(tmp_path), pruning=True))
    assert found.subject.kind == "image" and found.subject.grid == (4, 4) and found.maps[0].shape == (4, 17, 17)
    assert set(found.metrics) == {"distance", "entropy", "local", "sink", "cost"}
    assert found.pruned[-1][1] > found.pruned[0][1] == pytest.approx(0, abs=1e-6)


def test_a_folder_of_a_language_model():
    from glocal.hf import byte_llama_folder

    found = inspect_model(Settings(str(byte_llama_folder()), "a = 1", pruning=False))
    assert found.subject.kind == "causal" and found.subject.labels == list("a = 1")
