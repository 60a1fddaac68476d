"""S039: fastmax by its N x N definition, against two peers, its limits, its bounds, and what it refuses."""

import importlib.util

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import Rope
from glocal.nn.taylor import FastmaxAttention, fastmax, taylor_features
from tests.nn.layers import project, steps
from tests.peers import FOLDER, load_port

SETTINGS = [
    (2, "standard", None),
    (2, "standard", 3.0),
    (1, "standard", None),
    (2, "maxnorm", None),
    (1, "maxnorm_centred", None),
    (2, "maxnorm_centred", 0.5),
    (2, None, None),
]


def tensors(n=13, m=13, d=4, e=3, heads=2, kv_heads=2):
    torch.manual_seed(0)
    sizes = ((heads, n, d), (kv_heads, m, d), (kv_heads, m, e))
    return [torch.randn(2, *size, dtype=torch.double).requires_grad_() for size in sizes]


def normalised(x, name):
    if name == "standard":
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    if name is None:
        return x
    x = x - x.mean(-1, keepdim=True) if name == "maxnorm_centred" else x
    return x / x.square().sum(-1).sqrt().amax(-1)[:, :, None, None]


def weights(q, k, power, name, temperature, causal=False):
    """A of the definition."""
    default = {"standard": q.shape[-1] ** (0.5 if power == 2 else 1), None: 8 * q.shape[-1] ** 0.5}.get(name, 1.0)
    s = normalised(q, name) @ normalised(k, name).mT / (default if temperature is None else temperature)
    f = 1 + s + (s**2 / 2 if power == 2 else 0)
    f = f.tril(k.shape[2] - q.shape[2]) if causal else f
    return f / f.sum(-1, keepdim=True)


def assert_same(found, wanted, inputs, atol=1e-10):
    """Forward and gradient."""
    assert torch.allclose(found, wanted, atol=atol)
    weight = torch.sin(torch.arange(found.numel(), dtype=found.dtype)).view(found.shape)
    one, other = (torch.autograd.grad((t * weight).sum(), inputs) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=atol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("power,name,temperature", SETTINGS)
@pytest.mark.parametrize("n,m", [(13, 13), (5, 20)])
def test_by_definition(power, name, temperature, n, m):
    q, k, v = tensors(n, m)
    found, _ = fastmax(q, k, v, power=power, normalisation=name, temperature=temperature)
    assert_same(found, weights(q, k, power, name, temperature) @ v, (q, k, v))


@pytest.mark.parametrize("power,name", [(2, "standard"), (1, "standard"), (2, None)])
@pytest.mark.parametrize("n,chunk", [(1, 7), (13, 1), (64, 7), (64, 64)])
def test_causal_by_definition(power, name, n, chunk):
    q, k, v = tensors(n, 64)
    found, _ = fastmax(q, k, v, power=power, normalisation=name, causal=True, chunk=chunk)
    assert_same(found, weights(q, k, power, name, None, causal=True) @ v, (q, k, v))


def test_grouped_queries():
    q, k, v = tensors(heads=4)
    more = (t.repeat_interleave(2, 1) for t in (k, v))
    assert torch.allclose(fastmax(q, k, v, causal=True)[0], fastmax(q, *more, causal=True)[0])


@pytest.mark.parametrize("power", [1, 2])
def test_products_of_features_are_the_series(power):
    x, y = torch.randn(2, 7, 5, dtype=torch.double)
    s = x @ y.T
    found = taylor_features(x, power) @ taylor_features(y, power).T
    assert torch.allclose(found, 1 + s + (power == 2) * s**2 / 2, rtol=0, atol=1e-12)
    assert taylor_features(x, power).shape[-1] == (6 if power == 1 else 21)


@pytest.mark.parametrize("once", [False, True])
def test_features_equal_taylor_series_linear_attention(once):
    peer = load_port("taylor_series_linear_attention.attention")
    x, y = torch.randn(2, 7, 5, dtype=torch.double)
    theirs = [peer.second_taylor_expansion(t, remove_even_power_dups=once) for t in (x, y)]
    torch.testing.assert_close(taylor_features(x) @ taylor_features(y).T, theirs[0] @ theirs[1].T)


def test_equals_flash_linear_attention():
    """The definition that stands beside the kernels of Based; it adds 1e-6 to the sum."""
    path = FOLDER / "fla" / "ops" / "based" / "naive.py"
    if not path.exists():
        pytest.skip(f"{path} is not there; make test, or: pip install --no-deps --target FOLDER fla-core")
    spec = importlib.util.spec_from_file_location("naive_based", path)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    q, k, v = tensors(40, 40)
    found, _ = fastmax(q, k, v, normalisation=None, temperature=1.0, causal=True, chunk=8)
    torch.testing.assert_close(found, naive.naive_parallel_based(q, k, v, scale=1.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_small_scores_give_softmax_attention(causal):
    """Halved scores leave an eighth of the difference, of the order s^3; with power 1 a quarter."""
    q, k, v = (t.detach() for t in tensors(20, 20))
    for power, name, ratio in ((2, None, 8), (1, "maxnorm", 4)):
        if causal and name == "maxnorm":
            continue
        a, b = normalised(q, name), normalised(k, name)
        errors = []
        for t in (50.0, 100.0):
            found, _ = fastmax(q, k, v, power=power, normalisation=name, temperature=t, causal=causal)
            errors.append((found - scaled_dot_product_attention(a, b, v, scale=1 / t, is_causal=causal)).abs().max())
        assert float(errors[0] / errors[1]) == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("power,name,temperature", SETTINGS)
def test_weights_are_at_least_0_and_sum_to_one(power, name, temperature):
    q, k, _ = (10 * t.detach() for t in tensors())
    k[:, :, 0] = -q[:, :, 0]  # the smallest score that there can be
    eye = torch.eye(13, dtype=torch.double).expand(2, 2, -1, -1)
    found, _ = fastmax(q, k, eye, power=power, normalisation=name, temperature=temperature)
    assert (found > -1e-12).all() and torch.allclose(found.sum(-1), torch.ones(2, 2, 13).double())


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_differences(causal):
    given = [t.detach()[:1, :1].requires_grad_() for t in tensors(5, 5)]

    def call(*t):
        out, state = fastmax(*t, causal=causal, chunk=2)
        return out, *state

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("cut", [1, 6, 12])
def test_in_pieces(cut, power):
    q, k, v = tensors(heads=4)
    first, state = fastmax(*(t[:, :, :cut] for t in (q, k, v)), causal=True, power=power)
    then, last = fastmax(*(t[:, :, cut:] for t in (q, k, v)), causal=True, power=power, state=state)
    whole, after = fastmax(q, k, v, causal=True, power=power, chunk=4)
    assert_same(torch.cat([first, then], 2), whole, (q, k, v))
    assert all(torch.allclose(a, b) for a, b in zip(last, after, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_training_holds_no_features(causal, monkeypatch):
    """What backward is given to keep grows by the inputs and the sums, not by the features; gradients are the same."""
    q, k, v = tensors(256, 256, d=16, e=16)

    def held():
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = fastmax(q, k, v, causal=causal)
        return out, sum(s.nbytes() for s in found.values())

    whole, _ = held()
    monkeypatch.setattr("glocal.nn.taylor._AT_ONCE", 100)
    pieces, much = held()
    assert_same(pieces, whole, (q, k, v))
    features = 2 * 2 * 2 * 256 * 153 * 8  # of queries and keys
    assert 2 * much < features


@pytest.mark.parametrize("power,name,temperature", SETTINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_count(causal, power, name, temperature):
    if causal and name not in ("standard", None):
        pytest.skip(f"{name} has no causal form, and says so")
    q, k, v = (t.detach() for t in tensors())
    q[0, :, :4] *= 100  # the largest norms are those of padding
    k[0, :, :4] *= 100
    keys = torch.arange(13) >= torch.tensor([[4], [0]])
    options = dict(power=power, normalisation=name, temperature=temperature, causal=causal)
    found, _ = fastmax(q, k, v, keys=keys, queries=keys, **options)
    alone, _ = fastmax(*(t[:1, :, 4:] for t in (q, k, v)), **options)
    assert torch.allclose(found[:1, :, 4:], alone, atol=1e-12) and found.isfinite().all()


def test_a_change_in_the_future_leaves_the_past_bit_for_bit():
    q, k, v = (t.detach().float() for t in tensors(100, 100))
    before, _ = fastmax(q, k, v, causal=True)
    for t in (q, k, v):
        t[:, :, 77:] *= 50
    after, _ = fastmax(q, k, v, causal=True)
    assert torch.equal(before[:, :, :77], after[:, :, :77]) and not torch.allclose(before[:, :, 77:], after[:, :, 77:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["standard", "maxnorm"])
def test_half_inputs(dtype, name):
    q, k, v = (t.detach().to(dtype) for t in tensors(500, 500))
    found, _ = fastmax(q, k, v, normalisation=name)
    wanted, _ = fastmax(*(t.double() for t in (q, k, v)), normalisation=name)
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=torch.finfo(dtype).eps, rtol=0.01)


def test_tokens_without_any_difference_between_channels_weigh_alike():
    q, k, v = (t.detach() for t in tensors())
    for name in ("standard", "maxnorm_centred"):
        found, _ = fastmax(q, torch.ones_like(k).requires_grad_(), v, normalisation=name)
        assert torch.allclose(found, v.mean(2, keepdim=True).expand_as(found), atol=1e-6)


@pytest.mark.parametrize("power,name", [(2, "standard"), (1, "standard"), (2, "maxnorm"), (1, "maxnorm_centred")])
@pytest.mark.parametrize("length", [None, 5])
def test_the_layer_is_the_operator_between_projections(power, name, length):
    layer = FastmaxAttention(24, 3, power=power, normalisation=name).double()
    context = torch.randn(2, 11, 24).double()
    x = context if length is None else torch.randn(2, length, 24).double()
    q, k, v = (layer.heads(t, 3) for t in (layer.q_proj(x), layer.k_proj(context), layer.v_proj(context)))
    wanted = layer.o_proj((weights(q, k, power, name, None) @ v).movedim(1, -2).flatten(-2))
    assert torch.allclose(layer(x) if length is None else layer(x, context), wanted, atol=1e-10)


@pytest.mark.parametrize("name", ["standard", "maxnorm_centred"])
def test_turned_scores_depend_on_distances_only(name):
    layer = FastmaxAttention(24, 3, normalisation=name, rope=Rope()).double()
    x = 3 + torch.randn(2, 9, 24).double()
    assert torch.allclose(layer(x), layer(x, positions=torch.arange(100, 109)), atol=1e-10)
    plain = FastmaxAttention(24, 3, normalisation=name).double()
    plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x), plain(x), atol=1e-4)
    assert all(torch.isfinite(t).all() for t in project(layer, x))


@pytest.mark.parametrize("options", [{}, {"power": 1}, {"normalisation": None}, {"num_kv_heads": 1, "rope": Rope()}])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_decoding_with_a_state(options, prompt):
    torch.manual_seed(0)
    layer = FastmaxAttention(24, 3, causal=True, **options).double()
    x = torch.randn(2, 20, 24).double()
    assert torch.allclose(steps(layer, x, prompt)[0], layer(x), atol=1e-12)


def test_padding_of_the_layer_does_not_decide_the_largest_norm():
    layer = FastmaxAttention(24, 3, normalisation="maxnorm").double()
    x = torch.randn(1, 9, 24).double()
    keys = torch.arange(9)[None] < 6
    x[:, 6:] *= 50
    assert torch.allclose(layer(x, keys=keys)[:, :6], layer(x[:, :6]), atol=1e-12)


@pytest.mark.parametrize(
    "options,match",
    [
        (dict(power=3), "power must be 1 or 2; it was 3"),
        (dict(normalisation="layer"), "normalisation must be one of 'standard'"),
        (dict(temperature=0.0), "temperature must be more than 0"),
        (dict(power=1, normalisation=None), "power 1 needs a normalisation"),
        (dict(power=1, temperature=7.9), "temperature must be at least 8 with power 1 and 'standard'"),
        (dict(power=1, normalisation="maxnorm", temperature=0.9), "temperature must be at least 1"),
        (dict(normalisation="maxnorm", causal=True), "causal with 'maxnorm' would leak"),
        (dict(normalisation="maxnorm_centred", causal=True), "causal with 'maxnorm_centred' would leak"),
    ],
)
def test_refusals(options, match):
    q, k, v = tensors(d=8)
    for call in (lambda: fastmax(q, k, v, **options), lambda: FastmaxAttention(24, 3, **options)):
        with pytest.raises(ValueError, match=match):
            call()


def test_other_bad_input():
    q, k, v = tensors()
    state = fastmax(q, k, v)[1]
    with pytest.raises(ValueError, match="state with 'maxnorm'"):
        fastmax(q, k, v, normalisation="maxnorm", state=state)
    with pytest.raises(ValueError, match="queries must be booleans"):
        fastmax(q, k, v, queries=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot be the last positions"):
        fastmax(q, k[:, :, :5], v[:, :, :5], causal=True)
    for name in ("feature", "scale"):
        with pytest.raises(ValueError, match=f"{name} does not apply to fastmax"):
            FastmaxAttention(24, 3, **{name: "elu" if name == "feature" else 1.0})
