"""Models of attention alone: as transformers' are built, and one whose heads were planted."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from glocal.nn import Attention


class Layer(nn.Module):
    """Attention after a norm, added to its input."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal=True, qkv_bias=True, out_bias=True)

    def forward(self, x):
        return x + self.attention(self.norm1(x))


class Circuit(nn.Module):
    """Ids ``(B, N)`` to logits."""

    main_input_name = "input_ids"

    def __init__(self, vocab, length, dim, heads, layers=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.place.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PREVIOUS, DUPLICATE, INDUCTION, RARE = (0, 1), (0, 3), (1, 2), (1, 0)
WORD, RARE_WORD = 24, 23  # how many there are, and the one that the rare head looks at


def planted(length=48):
    """One-hot embeddings; parts of the stream are a token, its place, the previous token, and what is to come.

    Layer 0 has a head on the previous token and one on duplicates, layer 1 one that matches a token with previous ones
    and one on a rare word. All other heads look everywhere alike and write nothing.
    """
    ends = [0, WORD, WORD + length, 2 * WORD + length, 3 * WORD + length]
    word, place, before, after = (slice(*each) for each in pairwise(ends))
    dim, width = ends[-1], WORD + length
    model = Circuit(WORD, length, dim, 4).double()
    for layer in model.layers:
        layer.attention = Attention(dim, 4, head_dim=width, causal=True, qkv_bias=True, out_bias=True).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        eye = torch.eye(dim).double()
        model.embed.weight[:] = eye[word]
        model.place.weight[:] = eye[place]
        model.head.weight[:] = eye[after]

        def head(where):
            layer, number = where
            attention, rows = model.layers[layer].attention, slice(number * width, (number + 1) * width)
            o = attention.o_proj.weight[:, rows]
            return [each.weight[rows] for each in (attention.q_proj, attention.k_proj, attention.v_proj)] + [o]

        q, k, v, o = head(PREVIOUS)
        q[: length - 1, place] = 50 * eye[:length, :length][1:]
        k[:length, place] = eye[:length, :length]
        v[:WORD, word] = o[before, :WORD] = eye[:WORD, :WORD]
        q, k, v, o = head(DUPLICATE)  # the token's own place counts against it
        q[:WORD, word], k[:WORD, word] = 50 * eye[:WORD, :WORD], eye[:WORD, :WORD]
        q[WORD:, place], k[WORD:, place] = -50 * eye[:length, :length], eye[:length, :length]
        q, k, v, o = head(INDUCTION)
        q[:WORD, word], k[:WORD, before] = 50 * eye[:WORD, :WORD], eye[:WORD, :WORD]
        model.layers[1].attention.q_proj.bias[INDUCTION[1] * width + WORD] = 1
        k[WORD, place.start] = -1000  # the first token has none before it
        v[:WORD, word] = o[after, :WORD] = eye[:WORD, :WORD]
        q, k, v, o = head(RARE)
        model.layers[1].attention.q_proj.bias[RARE[1] * width] = 50
        k[0, word] = eye[RARE_WORD, :WORD]
    return model.eval()


def repeated(count, once=20, seed=0):
    """Different tokens, none of them the rare word, and then the same once more, ``(count, 2 * once)``."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(RARE_WORD, generator=draw)[:once] for _ in range(count)])
    return torch.cat([tokens, tokens], 1)


def random_circuit(vocab=8, length=10, heads=3):
    """Weights, biases, gains: all at random, in double precision."""
    torch.manual_seed(0)
    model = Circuit(vocab, length, 4 * heads, heads).double().eval()
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.5)
    return model


def transformer_lens():
    """The package, where a version with hooked transformers is there."""
    lens = pytest.importorskip(
        "transformer_lens", reason="transformer_lens brings too many packages to be a test extra"
    )
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("this transformer_lens has no HookedTransformer; version 2 has")
    return lens


def copy_from_lens(model, peer):
    """Weights of a model of that package."""
    with torch.no_grad():
        model.embed.weight[:], model.place.weight[:] = peer.W_E, peer.W_pos[:16]
        model.head.weight[:] = peer.W_U.T
        for layer, block in zip(model.layers, peer.blocks, strict=True):
            attention, theirs = layer.attention, block.attn
            layer.norm1.weight[:], layer.norm1.bias[:] = block.ln1.w, block.ln1.b
            layer.norm1.eps = peer.cfg.eps
            for mine, w, b in (
                (attention.q_proj, theirs.W_Q, theirs.b_Q),
                (attention.k_proj, theirs.W_K, theirs.b_K),
                (attention.v_proj, theirs.W_V, theirs.b_V),
            ):
                mine.weight[:], mine.bias[:] = w.movedim(1, 2).flatten(0, 1), b.flatten()
            attention.o_proj.weight[:], attention.o_proj.bias[:] = theirs.W_O.flatten(0, 1).T, theirs.b_O
