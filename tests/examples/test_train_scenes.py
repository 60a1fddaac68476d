"""The recipe of the vision-language model: what it sees and is asked, what it writes; and a stop changes nothing."""

import json
import re

import pytest
import torch
from torch.nn.functional import max_pool2d
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from glocal.bench.scenes import COLOURS, SHAPES, Question, scenes

RECIPE = "train_scenes"
SMALL = ("--pictures", 2, "--width", 32, "--layers", 2, "--save-every", 2)


@pytest.fixture(autouse=True)
def on_six_scenes(script, monkeypatch):
    """The script measures on six scenes instead of hundreds."""
    right = script.right
    monkeypatch.setattr(script, "right", lambda model, words, seen: right(model, words, seen[:6]))


def test_a_resumed_run_ends_with_the_same_weights(resumed):
    curve = resumed(*SMALL)
    # In the first three eighths only the tower learns.
    assert set(curve[-1]) - set(curve[0]) == {"presence", "shape", "colour", "count", "position", "caption"}
    assert {"cells", "loss"} <= set(curve[0])


def test_what_it_writes_is_a_model_of_transformers(call, script, tmp_path):
    result = call("--out", tmp_path, "--steps", 60, *SMALL, "--pictures", 6, "--lr", 0.02, "--save-every", 60)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, LlavaProcessor) and processor.tokenizer.padding_side == "left"
    # The shares that it prints, one question at a time through the processor.
    draw, counts = script.random.Random(0), {}
    for scene in scenes(6, 2, held_out=True):
        for question in script.ask_all(scene, draw):
            inputs = processor(images=scene.image(), text=f"<image> {question.text} Answer:", return_tensors="pt")
            said = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            text = processor.decode(said, skip_special_tokens=True)
            counts.setdefault(question.about, []).append(text.split() == question.answer.replace(",", " ,").split())
    assert 0 < sum(map(sum, counts.values())) < sum(map(len, counts.values()))
    for name, found in counts.items():
        said = float(re.search(rf"{name} (\d\.\d+)", " ".join(result.output.split()))[1])
        assert said == pytest.approx(sum(found) / len(found), abs=1e-3)
        assert json.loads((tmp_path / "training.json").read_text())["right"][name] == pytest.approx(said, abs=1e-3)


def test_the_processor_makes_what_was_trained_on(script):
    words = script.tokenizer()
    processor = script.processor(words)
    (scene,) = scenes(1, 3)
    question = Question("Is there a red square?", "yes", "presence")
    inputs = processor(images=scene.image(), text=f"<image> {question.text} Answer:", return_tensors="pt")
    ids, labels, *_ = script._row(words, [question])
    assert inputs["input_ids"][0].tolist() == ids[:-2] and labels[-2:] == ids[-2:]
    assert torch.allclose(inputs["pixel_values"], script.pixels([scene]), atol=1e-5)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert words(prompt)["input_ids"] == words(f"<image> {question.text} Answer:")["input_ids"]


def test_the_loss_is_of_the_answers(script):
    words = script.tokenizer()
    rows = script.batch(words, 0, 900, script.shown(0, 900, 4, 1000))
    ids, labels = rows["input_ids"], rows["labels"]
    assert (ids == words.convert_tokens_to_ids("<image>")).sum(1).tolist() == [64] * 4
    known = {"yes", "no", "top", "bottom", "left", "right", "nothing", "a", "and", ",", "</s>", *map(str, range(9))}
    for row, label in zip(ids, labels, strict=True):
        kept = label >= 0
        assert torch.equal(row[kept], label[kept])
        assert set(words.convert_ids_to_tokens(row[kept].tolist())) <= known | set(COLOURS) | set(SHAPES)
        # An answer stands right behind each "Answer:", and goes on to its end.
        tokens = words.convert_ids_to_tokens(row.tolist())
        text = " ".join(f"[{t}]" if k else t for t, k in zip(tokens, kept.tolist(), strict=True))
        asked = re.findall(r"answer : (\[.*?\]) (?!\[)", text + " ")
        assert len(asked) == tokens.count("answer") and all(part.endswith("[</s>]") for part in asked)


def test_a_question_is_answered_as_if_it_were_alone(script):
    """Whatever else is asked about the picture: else one answer gives another away."""
    words = script.tokenizer()
    model = script.start(32, 2, lr=3e-3, seed=0).model.llava.eval()
    rows = script.batch(words, 0, 900, script.shown(0, 900, 3, 1000))
    picture = rows["input_ids"][:, :64]
    alone = 0
    with torch.no_grad():
        together = model(**{name: value for name, value in rows.items() if name != "labels"}).logits
        for n, ids in enumerate(rows["input_ids"].tolist()):
            start = 64
            while start < len(ids) and ids[start] != words.pad_token_id:
                end = ids.index(words.eos_token_id, start) + 1
                row = torch.cat([picture[n], torch.tensor(ids[start:end])])[None]
                logits = model(input_ids=row, pixel_values=rows["pixel_values"][n : n + 1]).logits
                assert torch.allclose(logits[0, 64:], together[n, start:end], atol=1e-5)
                start, alone = end, alone + 1
    assert alone > 20


def test_pictures_depend_on_seed_and_step_only_and_get_harder(script):
    words = script.tokenizer()

    def asked(seed, step, count=4):
        return script.batch(words, seed, step, script.shown(seed, step, count, 100))

    one, other = asked(0, 7), asked(0, 7)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for seed, step in ((1, 7), (0, 8)):
        assert not torch.equal(one["pixel_values"], asked(seed, step)["pixel_values"])

    def grain(step):
        """Mean difference of neighbours, and the share of pictures with four black cells or more."""
        seen = script.pixels(script.shown(0, step, 200, 100))
        cells = max_pool2d((seen > -1).any(1, keepdim=True).float(), 12)  # a cell with a bright pixel is 1
        return (seen[..., 1:] - seen[..., :-1]).abs().mean(), ((cells == 0).flatten(1).sum(1) >= 4).float().mean()

    (clear, some), (noisy, more) = grain(2), grain(60)
    assert noisy > 1.5 * clear and 0.1 < some < 0.28 and 0.32 < more < 0.5


def test_right_answers_by_hand(script):
    """An oracle that errs in the word of each colour question, and in the last word of each caption."""
    words = script.tokenizer()
    seen = scenes(3, 4, held_out=True)
    draw = script.random.Random(0)
    asked = [question for scene in seen for question in script.ask_all(scene, draw)]

    class Oracle:
        at = 0

        def eval(self):
            pass

        def generate(self, input_ids, **_):
            some, self.at = asked[self.at : self.at + len(input_ids)], self.at + len(input_ids)
            wrong = {"colour": lambda answer: "heart", "caption": lambda answer: f"{answer} red"}
            said = [words(wrong.get(q.about, str)(q.answer))["input_ids"] + [1] for q in some]
            length = max(map(len, said))
            return torch.cat([input_ids, torch.tensor([ids + [0] * (length - len(ids)) for ids in said])], 1)

    found = script.right(Oracle(), words, seen)
    assert found.pop("colour") == found.pop("caption") == 0.0 and set(found.values()) == {1.0} and len(found) == 4


def test_it_learns_what_it_is_shown(script):
    words = script.tokenizer()
    run = script.start(64, 2, lr=3e-3, seed=0)
    seen = script.shown(0, 0, 2, 1000)
    rows = script.batch(words, 0, 0, seen)
    losses = [run.advance(lambda step: run.model.loss(seen, rows), 1000) for _ in range(150)]
    assert losses[-1] < 0.5 < 5 < losses[0] and run.model.named(seen) == 1.0
    # All of it takes part, but for what pools the class token.
    run.model.loss(seen, rows).backward()
    still = {name for name, p in run.model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all("post_layernorm" in name for name in still)


def test_the_head_teaches_the_tower_alone(script):
    run = script.start(32, 2, lr=3e-3, seed=0)
    run.model.loss(script.shown(0, 0, 2, 1000)).backward()
    parts = {name.split(".")[2] for name, p in run.model.named_parameters() if p.grad is not None and "llava" in name}
    assert parts == {"vision_tower"} and run.model.head.weight.grad.any()


def test_cells_are_named_by_hand(script):
    seen = script.shown(0, 0, 3, 1000)
    labels = script.cells(seen)
    assert labels.shape == (3, 64, 2)
    for scene, row in zip(seen, labels.tolist(), strict=True):
        names = {(list(COLOURS)[colour], SHAPES[shape]) for colour, shape in row if colour >= 0}
        assert names == scene.kinds()
        for thing in scene.things:  # the cell of its middle, whose centre is less than half of 16 pixels away
            x, y = (int(value // 12) for value in thing.centre)
            assert row[8 * y + x] == [list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)]


def test_another_run_s_or_a_damaged_checkpoint_is_refused(call, tmp_path):
    call("--out", tmp_path, "--steps", 6, "--stop-after", 1, *SMALL)
    for option, value, word in (("--width", 64, "width"), ("--layers", 3, "layers"), ("--seed", 1, "seed")):
        small = [*SMALL, option, value]  # the last one counts
        result = call("--out", tmp_path, "--steps", 6, *small)
        assert result.exit_code == 2 and word in result.output
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    result = call("--out", tmp_path, "--steps", 6, *SMALL)
    assert result.exit_code == 2 and "damaged" in result.output and len(path.read_bytes()) == len(whole) // 2


@pytest.mark.parametrize(
    "option,value", [("--steps", 0), ("--pictures", 0), ("--width", 33), ("--width", 0), ("--layers", 1)]
)
def test_bad_settings_are_refused_before_work(call, tmp_path, option, value):
    result = call("--out", tmp_path / "new", option, value)
    assert result.exit_code == 2 and option in result.output and not (tmp_path / "new").exists()
