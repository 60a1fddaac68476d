"""Models from folders: the shipped one is what its record says, and damage is told before anything is used."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, DynamicCache, LlamaForCausalLM

from glocal.bench.corpus import from_ids, python_source, to_ids
from glocal.bench.decoder import load, text
from glocal.bench.recall import copies, copy_right, needles, needles_right
from glocal.hf import adapt, byte_llama, byte_llama_folder, load_causal


def bits(model, source, at: int, length: int = 1024) -> float:
    """Of the second half of a piece, by hand."""
    ids = to_ids(source[at : at + length])[None]
    with torch.no_grad():
        log = model(ids).logits[0, :-1].double().log_softmax(-1)
    each = -log.gather(1, ids[0, 1:, None])[length // 2 :]
    return float(each.mean() / torch.log(torch.tensor(2.0).double()))


def test_the_shipped_model_is_as_small_as_said():
    folder = byte_llama_folder()
    weights = list(folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) < 16e6
    model = byte_llama()
    assert isinstance(model, LlamaForCausalLM) and not model.training and model.dtype == torch.float32
    assert 3e6 <= model.num_parameters() <= 8e6 and model.config.max_position_embeddings >= 2048
    curve = json.loads((folder / "training.json").read_text())["curve"]
    assert curve[0]["held_out"] > 3 > 1.2 > curve[-1]["held_out"]
    assert curve[0]["copied"] < 0.1 < 0.8 < curve[-1]["copied"]


def test_it_predicts_text_that_it_has_not_seen_and_uses_its_context():
    model, source = byte_llama(), python_source(held_out=True)
    starts = torch.linspace(0, len(source) - 1024, 12).long().tolist()
    full = sum(bits(model, source, at) for at in starts) / len(starts)
    with adapt(model, "sliding(31, 0)"):
        near = sum(bits(model, source, at) for at in starts) / len(starts)
    assert full < 1.5 and near > full + 0.2
    noise = torch.randint(32, 127, (2048,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert bits(model, noise, 0) > 5  # and it has learned text, not the mean byte


def test_it_copies_from_as_far_as_its_context_reaches_and_not_through_a_window():
    decoder = load("bytes")
    pieces = text(decoder, None, 4, 2048).ids
    probe = copies(decoder, pieces, 6)

    def right():
        return copy_right(decoder, probe, lambda: None, False, lambda: None)

    assert probe.distances == (128, 512, 1024, 1968) and min(right()) > 0.6
    with adapt(decoder.model, "sliding(255, 0) | sinks(4)"):
        near, *far = right()
    assert near > 0.6 and max(far) < 0.1


def test_it_finds_a_needle():
    decoder = load("bytes")
    probe = needles(decoder, text(decoder, None, 4, 2048).ids, 4)

    def found():
        shares = needles_right(decoder, probe, DynamicCache, False, lambda: None)
        return sum(shares) / len(shares)

    assert found() > 0.5
    with adapt(decoder.model, "sliding(255, 0) | sinks(4)"):
        assert found() < 0.3  # one needle in five is near enough


def test_the_tokenizer_is_bytes():
    tokens = AutoTokenizer.from_pretrained(byte_llama_folder())
    ids = tokens("def é():", add_special_tokens=False).input_ids
    assert ids == to_ids("def é():").tolist() and from_ids(torch.tensor(ids)) == "def é():"
    assert tokens.decode(ids) == "def é():"


def copied(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(byte_llama_folder(), folder)
    return folder


def test_damaged_weights_are_told(tmp_path):
    folder = copied(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"nonsense" * 1000):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights in .*model.* are damaged|cannot|can be loaded"):
            load_causal(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="can be loaded"):
        load_causal(folder)


def test_incomplete_weights_are_told(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_causal(folder)


def test_folders_that_hold_no_causal_model(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_causal(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_causal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ValueError, match="abacus"):
        load_causal(tmp_path)
    encoder = tmp_path / "encoder"
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(BertConfig(**sizes)).save_pretrained(encoder)
    with pytest.raises(ValueError, match=r"bert|incomplete"):
        load_causal(encoder)
