"""Scores of heads' functions against hand-set maps, loops, TransformerLens, and heads that were planted."""

import math
from dataclasses import replace

import pytest
import torch

from glocal.inspect import (
    HEAD_FUNCTIONS,
    STAGES,
    TARGETS,
    MassOn,
    Tile,
    detect,
    edit_heads,
    matches,
    negative_attention,
    offset,
    record,
    retrieval_score,
)
from glocal.nn import Attention
from tests.inspect.circuits import (
    DUPLICATE,
    INDUCTION,
    PREVIOUS,
    RARE,
    RARE_WORD,
    Circuit,
    copy_from_lens,
    planted,
    repeated,
    transformer_lens,
)


def random_circuit(length=16):
    torch.manual_seed(0)
    model = Circuit(8, length, 12, 3).double()
    for layer in model.layers:
        layer.attention.q_proj.weight.data *= 5
    return model, torch.randint(8, (3, length))


def by_loops(weights, tokens, keys):
    """The mean over queries that see one of ``keys(x, i)`` of the weights on them, ``(H,)``."""
    found = []
    for b, x in enumerate(tokens.tolist()):
        for i in range(len(x)):
            chosen = [j for j in keys(x, i) if j <= i]
            if chosen:
                found.append(weights[b, :, i, chosen].sum(-1))
    return torch.stack(found).mean(0)


KEYS = {
    "previous": lambda x, i: [i - 1] if i else [],
    "duplicate": lambda x, i: [j for j in range(i) if x[j] == x[i]],
    "induction": lambda x, i: [j for j in range(1, i) if x[j - 1] == x[i]],
}


@pytest.mark.parametrize("kind", KEYS)
def test_by_loops(kind):
    model, tokens = random_circuit()
    found = record(model, tokens)
    got, corrected = detect(found, [kind])[kind], detect(found, [kind], corrected=True)[kind]
    even = torch.ones(16, 16).double().tril()
    even = (even / even.sum(-1, keepdim=True)).expand(3, 1, 16, 16)
    for n, layer in enumerate(found):
        wanted = by_loops(layer.weights(), tokens, KEYS[kind])
        torch.testing.assert_close(got[n], wanted)
        torch.testing.assert_close(corrected[n], wanted - by_loops(even, tokens, KEYS[kind]))


def test_rare_by_loops():
    model, tokens = random_circuit()
    found = record(model, tokens)
    for n, layer in enumerate(found):
        weights, hits = layer.weights(), []
        for b, x in enumerate(tokens.tolist()):
            least = min(map(x.count, x))
            for i in range(16):
                if any(x.count(token) == least for token in x[: i + 1]):
                    key = weights[b, :, i].argmax(-1).tolist()
                    hits.append([float(x.count(x[j]) == least) for j in key])
        torch.testing.assert_close(detect(found, "rare")["rare"][n], torch.tensor(hits).double().mean(0))


def test_padding_is_nobodys_key():
    """Scores of padded sequences are those of the sequences alone."""
    torch.manual_seed(0)

    class Padded(Circuit):
        def forward(self, input_ids, keys):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x + layer.attention(layer.norm1(x), keys=keys)
            return x

    model = Padded(4, 12, 12, 3).double()
    tokens = torch.randint(4, (1, 9))
    pad = torch.nn.functional.pad(tokens, (3, 0))  # with a token that also is a real one
    alone = detect(record(model, {"input_ids": tokens, "keys": torch.ones(1, 9, dtype=torch.bool)}))
    padded = detect(record(model, {"input_ids": pad, "keys": torch.arange(12)[None] >= 3}))
    for kind in TARGETS:
        torch.testing.assert_close(padded[kind], alone[kind])


def test_hand_set_maps():
    """A map that is a shift is wholly of the previous token, and of no other kind."""
    model, _ = random_circuit()
    tokens = torch.arange(16)[None] % 8
    (layer, _) = record(model, tokens)
    shift = torch.eye(16).double().roll(-1, 1)
    shift[0] = torch.eye(16)[0]
    tile = Tile(layer, torch.arange(16), shift.expand(1, 3, 16, 16), torch.ones(16, 16, dtype=torch.bool).tril())
    score = {name: MassOn(each)(tile).nanmean(-1)[0, 0].item() for name, each in TARGETS.items() if name != "rare"}
    assert score == {"previous": 1.0, "duplicate": 0.0, "induction": 0.0}
    assert MassOn(offset(3))(tile).nanmean() == 0
    shifted = replace(tile, weights=torch.eye(16).double().roll(-7, 1).expand(1, 3, 16, 16))  # one after the same
    assert MassOn(matches(1))(shifted)[0, 0].nansum() == 8


def test_even_attention():
    found = detect(
        record(Attention(8, 2, causal=True, scale=0.0).double(), torch.randn(2, 9, 8).double()), ["previous"]
    )
    wanted = sum(1 / (i + 1) for i in range(1, 9)) / 8
    torch.testing.assert_close(found["previous"], torch.full((1, 2), wanted).double())


def test_planted_heads_are_found():
    model = planted()
    once = repeated(4)[:, :20]
    tokens = torch.cat([once, torch.full((4, 1), RARE_WORD), once], 1)
    found = detect(record(model, tokens))
    for kind, (layer, head) in {
        "previous": PREVIOUS,
        "duplicate": DUPLICATE,
        "induction": INDUCTION,
        "rare": RARE,
    }.items():
        assert found[kind].argmax() == 4 * layer + head
        assert found[kind][layer, head] > 0.99
        others = found[kind].flatten()[torch.arange(8) != 4 * layer + head]
        assert others.max() < 0.3


def test_retrieval_is_found():
    """The planted circuit copies what follows a word; only the head that does so scores."""
    model, context = planted(), repeated(3, once=18)[:, :18]
    needle = torch.zeros(3, 25, dtype=torch.bool)
    needle[:, 6:11] = True
    tokens = torch.cat([context, context[:, 5:6]], 1)  # asked for what follows
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens[:, 19:24], context[:, 6:11])
    found = retrieval_score(record(model, tokens), needle, 19)
    assert found.argmax() == 4 * INDUCTION[0] + INDUCTION[1] and found.max() == 1
    half = needle.clone()
    half[:, 2:7] = True  # four of the nine are never asked for
    assert retrieval_score(record(model, tokens), half, 19)[INDUCTION].item() == pytest.approx(5 / 9)


def test_retrieval_by_loops():
    model, tokens = random_circuit()
    tokens[:, 8:] = tokens[:, :8]
    needle = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    needle[:, 9:] = False
    found = record(model, tokens)
    for n, layer in enumerate(found):
        key, wanted = layer.weights().argmax(-1), torch.zeros(3).double()
        for b in range(3):
            for h in range(3):
                copied = {int(j) for i, j in enumerate(key[b, h, :15]) if i >= 8 and tokens[b, i + 1] == tokens[b, j]}
                wanted[h] += len([j for j in copied if needle[b, j]]) / int(needle[b].sum()) / 3
        torch.testing.assert_close(retrieval_score(found, needle, 9)[n], wanted)


def test_negative_attention():
    model, tokens = random_circuit()
    found, yes, no = record(model, tokens), torch.tensor([2, 3, 5]), torch.tensor([4, 1, 0])
    got = negative_attention(found, yes, no)
    torch.testing.assert_close(negative_attention(found, no, yes), -got)
    for n, layer in enumerate(found):
        weights = layer.weights()
        for h in range(3):
            total = 0.0
            for b in range(3):
                for i in range(max(yes[b], no[b]), 16):
                    a, c = weights[b, h, i, yes[b]].item(), weights[b, h, i, no[b]].item()
                    total += (a + c) * math.log(c / a) / 3
            assert got[n, h].item() == pytest.approx(total)


def test_against_transformer_lens():
    """Its detectors on its own random model, of what this library's record holds of the same weights."""
    lens = transformer_lens()
    torch.manual_seed(0)
    settings = {"n_layers": 2, "d_model": 12, "n_ctx": 17, "d_head": 4, "n_heads": 3, "d_vocab": 8, "attn_only": True}
    peer = lens.HookedTransformer(lens.HookedTransformerConfig(**settings, normalization_type="LN", seed=0))
    model, _ = random_circuit()
    model = model.float()
    copy_from_lens(model, peer)
    tokens = torch.randperm(8).repeat(2)[None]
    peer.to_tokens = lambda text: tokens  # it has no tokenizer
    found = record(model, tokens)
    _, cache = peer.run_with_cache(tokens)
    for n, layer in enumerate(found):
        torch.testing.assert_close(layer.weights(), cache["pattern", n], atol=1e-5, rtol=1e-4)
    # Its measure "mul" is the mass over all rows; of ours, the mean over rows that have such a key.
    for kind, name in (
        ("previous", "previous_token_head"),
        ("duplicate", "duplicate_token_head"),
        ("induction", "induction_head"),
    ):
        counted = sum(bool([j for j in KEYS[kind](tokens[0].tolist(), i) if j <= i]) for i in range(16))
        theirs = lens.head_detector.detect_head(peer, "", name, error_measure="mul")
        torch.testing.assert_close(detect(found, [kind])[kind].float() * counted / 16, theirs, atol=1e-5, rtol=1e-4)


def test_the_registry():
    assert len(HEAD_FUNCTIONS) == 41 and {each.stage for each in HEAD_FUNCTIONS.values()} == set(STAGES)
    known = {*TARGETS, "retrieval_score", "negative_attention"}
    assert {each.detector for each in HEAD_FUNCTIONS.values()} - {None} == known


def test_bad_input():
    model, tokens = random_circuit()
    found = record(model, tokens)
    with pytest.raises(ValueError, match=r"kinds must be of previous, .*; one was 'mover'"):
        detect(found, ["mover"])
    with pytest.raises(ValueError, match="after must be at least 0; it was -1"):
        matches(-1)
    with pytest.raises(ValueError, match=r"needle must be booleans \(3, 16\)"):
        retrieval_score(found, torch.zeros(3, 16, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="start must be from 1 to 15; it was 0"):
        retrieval_score(found, tokens == tokens, 0)
    with pytest.raises(ValueError, match=r"yes must hold a place of each prompt, \(3,\)"):
        negative_attention(found, torch.tensor(1), tokens[:, 0])
    with pytest.raises(ValueError, match="record must hold the tokens of"):
        detect(record(Attention(8, 2, causal=True), torch.randn(1, 3, 8)), ["duplicate"])
    with edit_heads(model, lambda number, heads: heads), pytest.raises(ValueError, match="kinds"):
        detect(found, "local")
