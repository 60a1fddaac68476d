"""The shipped vision-language model: as small as said, right about what it has not seen, and damage is told."""

import json
import random
import shutil

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from glocal.bench.pope import verdict
from glocal.bench.scenes import SIDE, ask_all, scenes
from glocal.hf import load_vision_language, scenes_llava, scenes_llava_folder


@pytest.fixture(scope="module")
def shipped():
    return scenes_llava()


def answers(shipped, pairs):
    """Of pictures and questions, in one batch padded on the left."""
    model, processor = shipped
    texts = [f"<image> {text} Answer:" for _, text in pairs]
    inputs = processor(images=[image for image, _ in pairs], text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    found = processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


def shares(shipped, some, pictures=None):
    """Of right answers, by what is asked about; captions aside."""
    draw, counts = random.Random(0), {}
    for n, scene in enumerate(some):
        asked = [question for question in ask_all(scene, draw) if question.about != "caption"]
        image = (pictures or some)[n].image()
        said = answers(shipped, [(image, question.text) for question in asked])
        for question, text in zip(asked, said, strict=True):
            counts.setdefault(question.about, []).append(text == question.answer)
    return {name: sum(found) / len(found) for name, found in counts.items()}


def test_it_is_as_small_as_said(shipped):
    folder = scenes_llava_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    model, processor = shipped
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    assert not model.training and model.dtype == torch.float32 and 2e6 <= model.num_parameters() <= 7e6
    inputs = processor(images=Image.new("RGB", (SIDE, SIDE)), text="<image> Is there a red square? Answer:")
    assert list(inputs["input_ids"][0]).count(model.config.image_token_index) == 64
    curve = json.loads((folder / "training.json").read_text())["curve"]
    assert curve[0]["loss"] > 3 * curve[-1]["loss"]


def test_it_is_right_about_held_out_scenes_and_less_so_where_they_are_noisy(shipped):
    clean = shares(shipped, scenes(60, 1001, held_out=True))
    assert clean["presence"] >= 0.9 and clean["colour"] >= 0.9 and clean["position"] >= 0.8 and clean["count"] >= 0.7
    noisy = shares(shipped, scenes(60, 1001, held_out=True, noise=80.0, opacity=0.5))
    assert noisy["presence"] < clean["presence"] - 0.05 and noisy["colour"] < clean["colour"] - 0.1


def test_it_looks_at_the_picture(shipped):
    """With another scene's picture, what is asked for is rarely there."""
    some = scenes(40, 1002, held_out=True)
    blind = shares(shipped, some, pictures=[*some[1:], some[0]])
    assert blind["presence"] < 0.75 and blind["colour"] < 0.5 and blind["position"] < 0.6
    image = Image.new("RGB", (SIDE, SIDE))
    said = answers(shipped, [(image, "Is there a red square?"), (image, "Is there a white heart?")])
    assert [verdict(text) for text in said] == [False, False]  # it has seen black in training


def test_a_batch_padded_on_the_left_answers_as_one_by_one(shipped):
    draw = random.Random(0)
    some = scenes(8, 1003, held_out=True)
    pairs = [(scene.image(), question.text) for scene in some for question in ask_all(scene, draw)]
    assert len({len(text.split()) for _, text in pairs}) > 1  # else nothing is padded
    assert answers(shipped, pairs) == [answers(shipped, [pair])[0] for pair in pairs]


def copied(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(scenes_llava_folder(), folder)
    return folder


def test_damage_is_told(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense" * 1000):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights in .*model.* are damaged|can be loaded"):
            load_vision_language(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    lost = next(name for name in tensors if "vision_tower" in name and "q_proj.weight" in name)
    tensors.pop(lost)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: .*vision_tower.*q_proj\.weight"):
        load_vision_language(folder)


def test_a_folder_without_a_processor(tmp_path):
    folder = copied(tmp_path)
    for path in folder.iterdir():
        if path.name.startswith(("processor", "preprocessor", "tokenizer")):
            path.unlink()
    with pytest.raises(ValueError, match="no processor"):
        load_vision_language(folder)
