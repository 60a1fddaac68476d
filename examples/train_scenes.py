"""Train the small vision-language model that glocal ships, on rendered scenes of shapes on photographs.

    python examples/train_scenes.py --out runs/scenes              # about an hour on a CPU core
    python examples/train_scenes.py --out runs/scenes              # again, after a stop: it goes on where it was

A LLaVA of transformers: a CLIP tower that sees 64 patches of 12 x 12 pixels, a projector, a Llama of four layers; 2.5
million parameters and a vocabulary of some sixty words. It learns to answer whether something is there, of which
colour, how many, where, and to describe the picture (`glocal.bench.scenes`). Kinds of things have habits: some come
together often, and a model that looks badly will expect what is not there. Two fifths of the pictures are partly
black, so that hiding a part of a picture later does not put the model off.

In the first three eighths of the steps only the tower learns: to name, by a linear head, what lies in each of its 64
cells. Answers teach it that too, but slowly: after 1,000 steps on answers alone it knew colours and no shape. The
language model learns in the steps that follow, and the head goes on beside it; it is not part of what is written.

All questions on a picture share one row, for the picture costs most, but they do not see each other. If they do, they
are answered from each other: of two questions on presence one is yes and one is no, and the second was always right
after 200 steps where the first was as good as a guess.

Every ``--save-every`` steps, and on Ctrl-C, ``checkpoint.safetensors`` is replaced as a whole. A run that was stopped
and resumed ends with the same weights as one that was not. At the end the folder holds what
``LlavaForConditionalGeneration`` and ``AutoProcessor`` load, weights in float16, and ``training.json`` with the curve.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from glocal.bench.scenes import CELL, COLOURS, SHAPES, SIDE, Question, Scene, ask_all, scenes, vocabulary
from glocal.bench.training import Training

PAD, END, IMAGE, UNKNOWN = "<pad>", "</s>", "<image>", "<unk>"
PATCHES = (SIDE // CELL) ** 2
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, weights and curve.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 4000,
    pictures: Annotated[int, typer.Option(help="Pictures a step.")] = 32,
    width: Annotated[int, typer.Option(help="Channels, a multiple of 32.")] = 160,
    layers: Annotated[int, typer.Option(help="Layers of the tower, and of the language model.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    stop_after: Annotated[int | None, typer.Option(help="Stop, resumable, at this step.")] = None,
) -> None:
    """Train, or go on with training that was stopped."""
    console = Console(stderr=True)
    try:
        for name, value, least in (("steps", steps, 1), ("pictures", pictures, 1), ("layers", layers, 2)):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}; it was {value}")
        if width < 32 or width % 32:
            raise ValueError(f"--width must be a multiple of 32; it was {width}")
        run = start(width, layers, lr=lr, seed=seed)
        run.take_up(out, console)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    words, learner = tokenizer(), run.model

    def looks(step: int) -> bool:
        return step < steps * 3 // 8

    def loss_of(step: int) -> Tensor:
        seen = shown(seed, step, 2 * pictures if looks(step) else pictures, steps)
        return learner.loss(seen, None if looks(step) else batch(words, seed, step, seen))

    def figures() -> dict[str, float]:
        answers = {} if looks(run.step - 1) else right(learner.llava, words, held_out)
        return {"cells": learner.named(held_out), **answers}

    held_out = scenes(60, 1, held_out=True)
    reached = run.run(
        out,
        loss_of,
        figures,
        steps=steps,
        last=steps if stop_after is None else min(steps, stop_after),
        save_every=save_every,
        say=lambda loss: f"{loss:.3f} nats",
        console=console,
    )
    if run.step < steps:
        raise typer.Exit(0 if reached else 130)
    found = export(run, out, words)
    said = ", ".join(f"{name} {share:.3f}" for name, share in found.items())
    console.print(f"Right on held-out scenes (float16 weights): {said}. Written to {out}.")


def start(width: int, layers: int, *, lr: float, seed: int) -> Training:
    """A learner with random weights, and its optimizers."""
    torch.manual_seed(seed)
    words = tokenizer()
    common: dict[str, Any] = dict(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**common, image_size=SIDE, patch_size=CELL, projection_dim=width),
        text_config=LlamaConfig(
            **common,
            vocab_size=len(words),
            num_key_value_heads=width // 32,
            max_position_embeddings=256,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
        ),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    learner = Learner(LlavaForConditionalGeneration(config))
    model = learner.llava.model
    blocks = [model.vision_tower.encoder.layers, model.language_model.layers]
    return Training(learner, blocks, lr=lr, identity={"seed": seed, "width": width, "layers": layers})


class Learner(nn.Module):
    """The model, and a linear head that names what lies in each cell: colour, shape, whether there is a thing."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        self.head = nn.Linear(llava.config.vision_config.hidden_size, len(COLOURS) + len(SHAPES) + 1)
        llava.model.vision_tower.register_forward_hook(self._keep)

    def _keep(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._states = output.last_hidden_state[:, 1:]  # without the class token

    def loss(self, seen: Sequence[Scene], rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Nats of the head, and of the answers in ``rows`` of `batch`."""
        if rows is None:
            self.llava.model.vision_tower(pixels(seen))
            answers: Tensor | float = 0.0
        else:
            answers = self.llava(**rows).loss
        colour, shape, thing = self._looks()
        labels = cells(seen)
        names = [
            cross_entropy(logits.flatten(0, 1), labels[..., n].flatten(), ignore_index=-1)
            for n, logits in enumerate((colour, shape))
        ]
        return answers + sum(names) + binary_cross_entropy_with_logits(thing, (labels[..., 0] >= 0).float())

    @torch.no_grad()
    def named(self, seen: Sequence[Scene]) -> float:
        """Share of cells with a thing whose colour and shape are both named."""
        self.eval()
        self.llava.model.vision_tower(pixels(seen))
        colour, shape, _ = self._looks()
        labels = cells(seen)
        right = torch.stack([colour.argmax(-1), shape.argmax(-1)], -1) == labels
        return float(right.all(-1)[labels[..., 0] >= 0].float().mean())

    def _looks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of colour ``(B, 64, 6)`` and shape ``(B, 64, 8)``, and of there being a thing ``(B, 64)``."""
        colour, shape, thing = self.head(self._states).split((len(COLOURS), len(SHAPES), 1), -1)
        return colour, shape, thing[..., 0]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words and signs of the questions, in lower case."""
    table = {word: n for n, word in enumerate((PAD, END, IMAGE, UNKNOWN, *vocabulary()))}
    core = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )


def processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    """What reads pictures and text for the model."""
    pictures = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )


def shown(seed: int, step: int, count: int, steps: int) -> list[Scene]:
    """What a step sees: it depends on seed and step only, so that a resumed run sees it too.

    Pictures of the first sixth of the steps are clear.
    """
    clear = step < steps // 6
    return scenes(
        count,
        seed * 1_000_003 + step,
        things=(1, 3) if clear else (1, 5),
        noise=0.0 if clear else (0.0, 40.0),
        opacity=1.0 if clear else (0.5, 1.0),
        black=0.2 if clear else 0.4,
    )


def cells(seen: Sequence[Scene]) -> Tensor:
    """Numbers of colour and shape of the thing in each cell, ``(B, 64, 2)``; -1 where there is none."""
    colours = list(COLOURS)
    found = []
    for scene in seen:
        kinds = [(colours.index(thing.colour), SHAPES.index(thing.shape)) for thing in scene.things]
        found.append(torch.tensor([*kinds, (-1, -1)])[torch.from_numpy(scene.cells()).flatten()])
    return torch.stack(found)


def batch(words: PreTrainedTokenizerFast, seed: int, step: int, seen: Sequence[Scene]) -> dict[str, Tensor]:
    """What a step asks about what it sees.

    Two rounds of questions on a picture stand behind it in one row, and each sees the picture and itself: its positions
    go on where the picture ends, as if it were alone. The loss is of the answers.
    """
    draw = random.Random(seed * 1_000_003 + step)
    asked = [[question for _ in range(2) for question in ask_all(scene, draw)] for scene in seen]
    rows = [_row(words, list(dict.fromkeys(questions))) for questions in asked]
    ids, labels, turns, places = (
        pad_sequence([torch.tensor(row[n]) for row in rows], batch_first=True, padding_value=filler)
        for n, filler in enumerate((words.pad_token_id, -100, -1, 0))
    )
    sees = (turns[:, :, None] == turns[:, None]) | (turns[:, None] == 0)
    return {
        "input_ids": ids,
        "attention_mask": sees.tril()[:, None],
        "position_ids": places,
        "labels": labels,
        "pixel_values": pixels(seen),
    }


def _row(words: PreTrainedTokenizerFast, questions: Sequence[Question]) -> tuple[list[int], ...]:
    """Tokens, labels, of which question a token is (0 for the picture), and its position."""
    ids = [words.convert_tokens_to_ids(IMAGE)] * PATCHES
    labels, turns, places = [-100] * PATCHES, [0] * PATCHES, list(range(PATCHES))
    for turn, question in enumerate(questions, 1):
        asked = words(f"{question.text} Answer:", add_special_tokens=False)["input_ids"]
        answer = [*words(question.answer, add_special_tokens=False)["input_ids"], words.eos_token_id]
        ids += asked + answer
        labels += [-100] * len(asked) + answer
        turns += [turn] * (len(asked) + len(answer))
        places += range(PATCHES, PATCHES + len(asked) + len(answer))
    return ids, labels, turns, places


def pixels(seen: Sequence[Scene]) -> Tensor:
    """What the processor makes of pictures of the right size, ``(B, 3, SIDE, SIDE)``."""
    stacked = torch.stack([torch.from_numpy(scene.pixels.copy()) for scene in seen])
    return (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


@torch.no_grad()
def right(
    model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, seen: Sequence[Scene]
) -> dict[str, float]:
    """Share of right answers to each sort of question, all words of it."""
    model.eval()
    draw = random.Random(0)
    asked = [(n, question) for n, scene in enumerate(seen) for question in ask_all(scene, draw)]
    images = pixels(seen)
    counts: dict[str, list[bool]] = {}
    for at in range(0, len(asked), 64):
        some = asked[at : at + 64]
        texts = [f"{IMAGE * PATCHES}{question.text} Answer:" for _, question in some]
        inputs = words(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        said = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=images[[n for n, _ in some]],
            max_new_tokens=32,
            do_sample=False,
        )
        for (_, question), ids in zip(some, said[:, inputs["input_ids"].shape[1] :], strict=True):
            text = words.decode(ids, skip_special_tokens=True)
            counts.setdefault(question.about, []).append(_parts(text) == _parts(question.answer))
    return {name: sum(found) / len(found) for name, found in sorted(counts.items())}


def _parts(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def export(run: Training, out: Path, words: PreTrainedTokenizerFast) -> dict[str, float]:
    """The folder that `transformers` loads; the share of right answers of what it holds."""
    model = run.model.llava
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict({name: t.half().float() for name, t in model.state_dict().items()})
    found = right(half, words, scenes(300, 2, held_out=True))
    half.half().save_pretrained(out)
    processor(words).save_pretrained(out)
    run.write(out, right=found)
    return found


if __name__ == "__main__":
    typer.run(train)
