"""S074: torch's attention from the identity, loops over every tap, a peer's talking heads, decoding, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

import glocal
from glocal import Sliding
from glocal.cache import FullCache, QueryCache
from glocal.nn import (
    Attention,
    MultiTokenAttention,
    Rope,
    SlidingWindowAttention,
    SpanConvAttention,
    multi_token_attend,
    no_weight_decay,
)
from tests.nn.layers import project, steps

DIM, HEADS, LENGTH = 24, 4, 12
BARE = {"head_norm": False, "head_gate": False}


class Window(MultiTokenAttention, SlidingWindowAttention):
    """Both mechanisms."""


class Span(SpanConvAttention, MultiTokenAttention):
    """Both mechanisms."""


def make(kind=MultiTokenAttention, random=True, **options):
    torch.manual_seed(0)
    layer = kind(DIM, HEADS, **({"query_kernel": 3, "key_kernel": 5, "causal": True} | options)).double()
    for name, p in layer.named_parameters():
        if random and name.split(".")[-1] in MultiTokenAttention.undecayed:
            torch.nn.init.normal_(p, std=0.5)
    return layer


def tokens(length=LENGTH, batch=2):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def convolved(t, kernel, causal):
    """The section's sum, tap by tap, for one head's scores or weights ``(N, N)`` that are 0 where there is no pair."""
    queries, keys, count = *kernel.shape, len(t)
    last = queries - 1 if causal else queries // 2
    t, kernel = t.tolist(), kernel.tolist()
    out = [[0.0] * count for _ in t]
    for i in range(count):
        for j in range(count):
            for a in range(max(0, last - i), min(queries, count + last - i)):
                for b in range(max(0, keys // 2 - j), min(keys, count + keys // 2 - j)):
                    out[i][j] += kernel[a][b] * t[i + a - last][j + b - keys // 2]
    return torch.tensor(out, dtype=torch.float64)


def heads_by_loops(layer, x, mask):
    """Outputs of the heads, ``(B, H, N, D)``, by the section's third to fifth step; ``mask (N, N)``."""
    q, k, v = project(layer, x)
    k, v = (t.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1) for t in (k, v))
    scores = ((q @ k.mT) * layer.scale).masked_fill(~mask, 0)
    if layer.score_kernel is not None:
        pairs = [zip(item, layer.score_kernel, strict=True) for item in scores]
        scores = torch.stack([torch.stack([convolved(s, w, layer.causal) for s, w in item]) for item in pairs])
    if layer.score_mix is not None:
        mixed = [sum(m * scores[:, i] for i, m in enumerate(row)) for row in layer.score_mix]
        scores = torch.stack(mixed, 1)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num()
    if layer.weight_kernel is not None:
        pairs = [zip(item, layer.weight_kernel, strict=True) for item in weights]
        weights = torch.stack([torch.stack([convolved(s, w, layer.causal) for s, w in item]) for item in pairs])
        weights = weights.masked_fill(~mask, 0)
    if layer.weight_mix is not None:
        size, parts = layer.weight_mix.shape[1], []
        for u, matrix in enumerate(layer.weight_mix):
            own = weights[:, u * size : (u + 1) * size]
            parts += [sum(own[:, b] * matrix[b, c] for b in range(size)) for c in range(size)]
        weights = torch.stack(parts, 1)
    return weights @ v


def join(layer, heads):
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


def square(causal=True):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return mask.tril() if causal else mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [(6, 11), (3, 5), (1, 1), (20, 31)])
def test_from_the_identity_it_is_torchs_attention(causal, kernel):
    layer = make(random=False, causal=causal, query_kernel=kernel[0], key_kernel=kernel[1], rope=Rope(), **BARE)
    x = tokens()
    torch.testing.assert_close(layer(x), join(layer, scaled_dot_product_attention(*project(layer, x), None, 0, causal)))
    whole = make(random=False, causal=causal, query_kernel=kernel[0], key_kernel=kernel[1], **BARE)
    plain = Attention(DIM, HEADS, causal=causal).double()
    plain.load_state_dict({name: t for name, t in whole.state_dict().items() if "proj" in name})
    torch.testing.assert_close(whole(x), plain(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"convolve": ("scores",), "mix_heads": ()},
        {"convolve": ("weights",), "mix_heads": ()},
        {"convolve": (), "mix_heads": ("scores", "weights"), "group": 2},
        {"num_kv_heads": 2, "rope": Rope(), "group": 2},
        {"query_kernel": 4, "key_kernel": 3, "scale": 0.7},
        {"query_kernel": 14, "key_kernel": 27},
    ],
)
@pytest.mark.parametrize("tile_size", [None, 5])
def test_every_tap_by_itself(causal, options, tile_size):
    layer, x = make(causal=causal, tile_size=tile_size, **options, **BARE), tokens(batch=1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, square(causal))))


@pytest.mark.parametrize("causal", [False, True])
def test_in_a_sliding_window(causal):
    layer, x, i = make(Window, window=4, causal=causal, tile_size=5, **BARE), tokens(batch=1), torch.arange(LENGTH)
    mask = (i[:, None] - i).abs() < 4
    mask = mask & square() if causal else mask
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, mask)))


def test_the_norm_and_the_gate_by_hand():
    layer, bare, x = make(depth=2), make(**BARE), tokens()
    torch.nn.init.normal_(layer.head_norm.weight)
    heads = bare.mix(*project(bare, x), call(x))
    normed = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.head_norm.weight
    normed = normed * (1 - (0.8 - 0.6 * 2.718281828459045 ** (-0.3 * 2)))
    gates = 1 / (1 + (-(normed @ layer.head_gate.weight[0] + layer.head_gate.bias)).exp())
    layer.load_state_dict(bare.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), join(layer, normed * gates.unsqueeze(-1)))


def call(x):
    return glocal.nn.Call(x, x, None, None, False)


def test_with_span_convolutions():
    torch.manual_seed(0)
    layer, x = Span(DIM, 2 * HEADS, kernel_size=3, query_kernel=3, key_kernel=3, **BARE).double(), tokens()
    for name in MultiTokenAttention.undecayed:
        torch.nn.init.normal_(getattr(layer, name))
    heads = torch.cat([heads_by_loops(layer, x, square(False)), layer.convolve(x)], 1)
    torch.testing.assert_close(layer(x), join(layer, heads))


@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa"])
def test_without_convolutions_and_mixing_any_backend_will_do(backend):
    layer, x = make(convolve=(), mix_heads=(), backend=backend, **BARE), tokens()
    torch.testing.assert_close(layer(x), join(layer, scaled_dot_product_attention(*project(layer, x), is_causal=True)))
    assert type(layer.new_cache()) is FullCache
    torch.testing.assert_close(steps(layer, x)[0], layer(x))


@pytest.mark.parametrize("tile_size", [None, 3])
def test_the_future_leaks_in_nowhere(tile_size):
    layer, x = make(query_kernel=6, key_kernel=11, tile_size=tile_size), tokens(20)
    other = x.clone()
    other[:, 8:] = 100 * torch.randn_like(other[:, 8:])
    assert torch.equal(layer(other)[:, :8], layer(x)[:, :8])
    assert not torch.isclose(layer(other)[:, 8:], layer(x)[:, 8:]).all(-1).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("where", ["before", "after"])
def test_talking_heads_of_a_peer(causal, where):
    peer = pytest.importorskip("x_transformers.attend", reason="x-transformers is not installed")
    layer, x = make(causal=causal, convolve=(), **BARE), tokens()
    talking = {"before": {"pre_talking_heads": True}, "after": {"post_talking_heads": True}}[where]
    other = peer.Attend(heads=HEADS, causal=causal, **talking).double()
    eye = torch.eye(HEADS, dtype=torch.float64)
    with torch.no_grad():
        if where == "before":  # theirs is added to the scores
            other.pre_softmax_talking_heads.weight.copy_((layer.score_mix - eye)[..., None, None])
            layer.weight_mix.copy_(eye[None])
        else:
            other.post_softmax_talking_heads.weight.copy_(layer.weight_mix[0].T[..., None, None])
            layer.score_mix.copy_(eye)
        q, k, v = project(layer, x)
        torch.testing.assert_close(layer(x), join(layer, other(q, k, v)[0]))


@pytest.mark.parametrize("options", [{}, {"convolve": ("scores",)}, {"convolve": ("weights",)}, {"convolve": ()}])
@pytest.mark.parametrize("prompt", [0, 1, 3, 9])
def test_decoding_equals_the_parallel_form(options, prompt):
    layer, x = make(num_kv_heads=2, rope=Rope(), tile_size=4, **options), tokens(20)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
    assert cache.queries.shape[2] == 2 * len(options.get("convolve", "ab"))
    assert cache.kept()[0].k.shape[2] == 20


def test_decoding_in_pieces_with_padding_before():
    layer, x = make(), tokens(20)
    keys = torch.arange(20) >= torch.tensor([[0], [6]])
    cache, out = layer.new_cache(), []
    for start, end in ((0, 8), (8, 9), (9, 15), (15, 20)):
        out.append(layer(x[:, start:end], keys=keys[:, :end], cache=cache))
    whole = layer(x, keys=keys)
    torch.testing.assert_close(torch.cat(out, 1)[keys], whole[keys])
    torch.testing.assert_close(whole[1:, 6:], layer(x[1:, 6:]))


@pytest.mark.parametrize("kind", [MultiTokenAttention, Window])
def test_decoding_one_query_short_is_wrong(kind):
    options = {"window": 4} if kind is Window else {}
    layer, x = make(kind, **options), tokens(20)
    for count, same in ((4, True), (3, False)):
        layer.new_cache = lambda count=count: QueryCache(count)
        assert torch.allclose(steps(layer, x, 5)[0], layer(x)) == same


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_sequence_gives_what_it_gives_alone(causal):
    layer, x = make(causal=causal, tile_size=5), tokens()
    keys = torch.arange(LENGTH) < torch.tensor([[LENGTH], [8]])
    out = layer(x, keys=keys)
    torch.testing.assert_close(out[1:, :8], layer(x[1:, :8]))
    torch.testing.assert_close(out[:1], layer(x[:1]))
    torch.testing.assert_close(layer(x.masked_fill(~keys[..., None], torch.nan), keys=keys)[keys], out[keys])


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(causal):
    layer, x = make(causal=causal, tile_size=5, **BARE), tokens().requires_grad_()
    keys = torch.arange(LENGTH) >= torch.tensor([[0], [LENGTH]])
    out = layer(x, keys=keys)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert not out[1].any() and not grad[1].any()
    assert out[0].all(-1).all() and grad.isfinite().all() and grad[0].any()


@pytest.mark.parametrize("tile_size", [None, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(tile_size, causal):
    torch.manual_seed(0)
    layer = MultiTokenAttention(4, 2, query_kernel=2, key_kernel=3, causal=causal, tile_size=tile_size).double()
    names, values = zip(*((n, p) for n, p in layer.named_parameters() if "_proj" not in n), strict=True)
    x, keys = torch.randn(1, 5, 4, dtype=torch.float64), torch.tensor([[True, True, False, True, True]])
    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), (x,), {"keys": keys}),
        inputs,
        fast_mode=tile_size is not None,  # each of very many gradients would compute its tiles again
    )


def test_tiles_with_dropout_draw_once():
    layer, x = make(dropout=0.5, tile_size=5).train(), tokens()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        loss = layer(x).square().sum()
        found.append(torch.autograd.grad(loss, layer.score_kernel)[0])
    torch.testing.assert_close(*found)
    torch.manual_seed(3)
    with torch.no_grad():  # a finite difference along the gradient, under the same draws
        layer.score_kernel += 1e-6 * found[0]
        moved = layer(x).square().sum() - loss
    torch.testing.assert_close(moved / 1e-6, found[0].square().sum(), rtol=1e-3, atol=0)


def test_weights_are_the_values_of_unit_vectors_and_rows_need_not_sum_to_one():
    layer, x = make(**BARE), tokens(batch=1)
    q, k, _ = project(layer, x)
    units = torch.eye(LENGTH, dtype=torch.float64).expand(1, HEADS, -1, -1)
    kernels = {name: getattr(layer, name) for name in MultiTokenAttention.undecayed}
    weights = multi_token_attend(q, k, units, scale=layer.scale, **kernels)
    torch.testing.assert_close(layer(x), join(layer, weights @ project(layer, x)[2]))
    assert not weights.triu(1).any() and not torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    narrow = multi_token_attend(q, k, units, Sliding(0, 0), scale=layer.scale, score_kernel=layer.score_kernel)
    torch.testing.assert_close(narrow, units)  # one key: all weight


def test_no_weight_decay_and_the_start():
    layer = make(random=False, query_kernel=6, key_kernel=11, group=2)
    assert no_weight_decay(layer) == set(MultiTokenAttention.undecayed)
    kernel = torch.zeros(HEADS, 6, 11, dtype=torch.float64)
    kernel[:, 5, 5] = 1
    assert torch.equal(layer.score_kernel, kernel) and torch.equal(layer.weight_kernel, kernel)
    assert torch.equal(layer.weight_mix, torch.eye(2, dtype=torch.float64).expand(2, 2, 2))


SCRIPT = """
import sys
import torch
from glocal.nn import multi_token_attend

torch.set_num_threads(1)
length, tile_size = map(int, sys.argv[1:])

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def step(length):
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))
    kernel = torch.randn(2, 2, 3, requires_grad=True)
    multi_token_attend(q, k, v, score_kernel=kernel, weight_kernel=kernel, tile_size=tile_size).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v, kernel))

step(64)
before = peak()
step(length)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_a_tile_forward_and_backward():
    source = os.path.dirname(os.path.dirname(glocal.__file__))

    def peak(length, tile_size):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(length), str(tile_size)],
            env={**os.environ, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    matrix = 2 * 3072**2 * 4  # one N x N tensor of two heads
    small, large, whole = peak(1024, 32), peak(3072, 32), peak(1024, 1024)
    print(f"tiles of 32: {small / 2**20:.0f} MiB at 1024, {large / 2**20:.0f} at 3072; one tile: {whole / 2**20:.0f}")
    assert large < 1.5 * matrix and large < 6 * small and whole > 4 * small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_kernel": 0}, "query_kernel must be at least 1; it was 0"),
        ({"key_kernel": 4}, "key_kernel must be odd; it was 4"),
        ({"convolve": "scores"}, "convolve must be of 'scores' and 'weights'"),
        ({"mix_heads": ("heads",)}, "mix_heads must be of"),
        ({"group": 3}, "group must divide num_heads 4; it was 3"),
        ({"depth": -1}, "depth must be at least 0"),
        ({"depth": 1, "head_norm": False}, "depth must be at least 0, and is of the norm"),
        ({"tile_size": 0}, "tile_size must be at least 1"),
        ({"softcap": 5.0}, "softcap must be None"),
        ({"backend": "sdpa"}, "backend 'auto'"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refuses_bad_input():
    class Biased(MultiTokenAttention):
        def score(self, call):
            return torch.zeros(1)

    layer, x = make(), tokens()
    with pytest.raises(ValueError, match="no causal-cross form: it is defined where"):
        layer(x, x)
    with pytest.raises(ValueError, match=r"x must be a sequence \(B, N, 24\)"):
        make(causal=False)(x.unflatten(1, (3, 4)))
    with pytest.raises(ValueError, match="cache must be a QueryCache"):
        layer(x, cache=FullCache())
    with pytest.raises(ValueError, match="score must be None"):
        make(Biased)(x)
    q = torch.randn(1, 2, 5, 4)
    for options, message in (
        ({"score_kernel": torch.ones(2, 3, 2)}, r"score_kernel must be \(2, queries, keys\), keys odd"),
        ({"weight_kernel": torch.ones(3, 3, 3)}, "weight_kernel must be"),
        ({"halo": 6}, "halo of them; it had 5, halo 6"),
        ({"score_mix": torch.ones(3, 3)}, r"score_mix must be \(2, 2\)"),
        ({"weight_mix": torch.ones(2, 2, 2)}, r"weight_mix must be \(groups, g, g\), 2 heads in all"),
        ({"keys": torch.ones(1, 4, dtype=torch.bool)}, r"keys must be booleans \(1, 5\)"),
        ({"tile_size": 0}, "tile_size must be at least 1; it was 0"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_token_attend(q, q, q, **options)
    with pytest.raises(ValueError, match="q, k and v must be"):
        multi_token_attend(q, q, q[:, :, 1:])
    with pytest.raises(ValueError, match="at most the 4 tokens of k"):
        multi_token_attend(q, q[:, :, 1:], q[:, :, 1:])
