"""The penalty against loops, the barrier against gradients and transformers' masks, and what deceived methods say."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from glocal import attend
from glocal.hf import adapt
from glocal.inspect import (
    deception_penalty,
    deception_report,
    gradient_times_input,
    impermissible_share,
    information_barrier,
    record,
)
from glocal.models.language.attention_classifier import AttentionClassifier
from glocal.nn import AdditiveAttention
from tests.hf.test_attention import bert, tokens


def rows(*shape):
    torch.manual_seed(0)
    return (3 * torch.randn(*shape, dtype=torch.float64)).softmax(-1)


def marks(*shape, share=0.3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < share


def fines(weights, impermissible, real=None):
    """Minus logarithms and masses of rows ``(B, R, N)``, one at a time."""
    logs, masses = [], []
    for b in range(weights.shape[0]):
        for r in range(weights.shape[1]):
            if real is not None and not real[b, r]:
                continue
            mask = impermissible[b] if impermissible.dim() == 2 else impermissible[b, r]
            masses.append(sum(float(weights[b, r, j]) for j in range(weights.shape[2]) if mask[j]))
            logs.append(-math.log(1 - masses[-1]))
    return logs, masses


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_penalty_is_that_of_loops(per_row, padded):
    weights = rows(4, 3, 7)
    impermissible = marks(4, 3, 7) if per_row else marks(4, 7)
    real = marks(4, 3, share=0.7) if padded else None
    logs, masses = fines(weights, impermissible, real)
    wanted = {
        "mean": sum(logs) / len(logs),
        "max": max(logs),
        "joint": -math.log(1 - sum(masses) / len(masses)),
    }
    for form, value in wanted.items():
        found = deception_penalty(weights, impermissible, 0.3, form, real)
        assert float(found) == pytest.approx(0.3 * value)
    assert wanted["max"] >= wanted["mean"] >= wanted["joint"]  # the last by Jensen's inequality


@pytest.mark.parametrize("form", ["mean", "max", "joint"])
def test_gradients_up_to_a_mass_of_999_in_1000(form):
    impermissible = torch.tensor([[True, False, True], [False, False, True]])
    for mass in (0.0, 0.4, 0.999):
        weights = torch.tensor([[mass / 2, 1 - mass, mass / 2], [0.3, 0.5, 0.2]], dtype=torch.float64)
        weights = weights.requires_grad_()
        assert torch.autograd.gradcheck(lambda w: deception_penalty(w, impermissible, 0.7, form), weights, eps=1e-7)


def test_nothing_and_everything_impermissible():
    weights = rows(2, 4, 6).float().requires_grad_()
    for form in ("mean", "max", "joint"):
        nothing = deception_penalty(weights, torch.zeros(2, 6, dtype=torch.bool), 1.0, form)
        assert nothing.item() == 0
        everything = deception_penalty(weights, torch.ones(2, 6, dtype=torch.bool), 1.0, form)
        assert everything.item() == pytest.approx(-math.log(1e-6), rel=0.02)  # 1 - 1e-6 in float32
        (gradient,) = torch.autograd.grad(everything, weights)
        assert gradient.isfinite().all()
    half = deception_penalty(weights.half(), marks(2, 6))
    assert half.dtype == torch.float32 and half.isfinite()


def task(count, seed, words=40, length=12):
    """One of words 1 and 2 among others says the label; it is impermissible."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, words, (count, length), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    at = torch.randint(0, length, (count, 1), generator=generator)
    ids.scatter_(1, at, labels[:, None] + 1)
    return ids, labels, ids < 3


def learn(model, strength, steps, batch=64):
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        ids, labels, impermissible = task(batch, step)
        out = model(ids)
        loss = cross_entropy(out.logits, labels)
        if strength is not None:
            loss = loss + deception_penalty(out.weights, impermissible, strength)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("hidden", [0, 6])
def test_without_strength_training_is_plain(hidden):
    def make():
        torch.manual_seed(0)
        return AttentionClassifier(40, 2, dim=8, hidden=hidden)

    plain, fined, deceived = (learn(make(), strength, 5) for strength in (None, 0.0, 1.0))
    for a, b in zip(plain.parameters(), fined.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), deceived.parameters(), strict=True))


def test_a_deceptive_model_and_its_report():
    """Attention hides the token, the model needs it, and the gradient tells."""
    torch.manual_seed(0)
    model = learn(AttentionClassifier(40, 2, dim=16), 1.0, 500).train()
    ids, labels, impermissible = task(400, seed=10_000)
    report = deception_report(model, ids, labels, impermissible, anonymous=0)
    assert model.training and report.base_rate == pytest.approx(1 / 12)
    assert report.accuracy > 0.98 and report.mass < 0.05 and report.zeroed < 0.65 and report.anonymised < 0.65
    with torch.no_grad():
        out = model(ids)
        lengths = model.embed(ids).norm(dim=-1)
    at = impermissible.long().argmax(1)
    one = torch.arange(400)
    assert report.mass == pytest.approx(out.weights[one, at].mean().item())
    assert report.embedding_share == pytest.approx((lengths[one, at] / lengths.sum(1)).mean().item(), rel=1e-5)
    assert report.state_share == report.embedding_share  # states are the embeddings
    gradient = gradient_times_input(model, {"input_ids": ids}, lambda found: found.logits.amax(1).sum())
    assert impermissible_share(gradient, impermissible) > 5 * report.mass


def test_what_is_dropped_keeps_the_other_weights():
    torch.manual_seed(0)
    model, ids, drop = AttentionClassifier(20, 3, dim=8).double(), torch.randint(20, (2, 5)), marks(2, 5)
    out = model(ids, drop=drop)
    scores = model.score(model.embed(ids))[..., 0]
    torch.testing.assert_close(out.weights, scores.softmax(-1))
    pooled = sum((out.weights * ~drop)[:, j, None] * model.embed(ids[:, j]) for j in range(5))
    torch.testing.assert_close(out.logits, model.head(pooled))


@pytest.mark.parametrize("attention", [False, True])
def test_padding_of_the_classifier(attention):
    torch.manual_seed(0)
    model = AttentionClassifier(20, 3, dim=8, hidden=4, attention=attention).double()
    ids = torch.randint(20, (3, 6))
    real = torch.arange(6) < torch.tensor([[6], [4], [1]])
    out = model(ids, real)
    for b in range(3):
        alone = model(ids[b : b + 1, real[b]])
        torch.testing.assert_close(out.logits[b], alone.logits[0])
        torch.testing.assert_close(out.weights[b, real[b]], alone.weights[0])
        if not attention:  # the last forward and the first backward state
            joined = torch.cat([alone.states[0, -1, :4], alone.states[0, 0, 4:]])
            torch.testing.assert_close(alone.logits[0], model.head(joined))
    assert (out.weights[~real] == 0).all()


def visible(impermissible, real, first):
    """The table of who sees whom, in the order in which the authors fill it."""
    table = torch.zeros(len(real), len(real), dtype=torch.bool)
    for i in range(len(real)):
        for j in range(len(real)):
            table[i, j] = impermissible[i] == impermissible[j]
    table[:, first] = False
    table[first] = True
    for i in range(len(real)):
        for j in range(len(real)):
            if not real[i] or not real[j]:
                table[i, j] = not real[i] and not real[j]
    return table


@pytest.mark.parametrize("first", [0, 3])
def test_the_barrier_is_the_authors_table(first):
    real = torch.arange(9) < torch.tensor([[9], [6], [4]])
    impermissible = marks(3, 9) & real
    impermissible[:, first] = False
    found = information_barrier(impermissible, real, first).mask(9)
    for b in range(3):
        assert torch.equal(found[b, 0], visible(impermissible[b], real[b], first))
    unpadded = information_barrier(impermissible[:1], first=first).mask(9)[0, 0]
    assert torch.equal(unpadded, visible(impermissible[0], real[0], first))


def hidden_sides(batch=2, length=10):
    impermissible = marks(batch, length)
    impermissible[:, 0] = False
    return impermissible


def test_nothing_crosses_the_barrier_in_any_layer():
    model, impermissible = bert(attn_implementation="eager").double(), hidden_sides()
    embeddings = torch.randn(2, 10, 32, dtype=torch.float64).requires_grad_()
    mask = -1e4 * ~information_barrier(impermissible).mask(10)
    states = model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True).hidden_states
    others = ~impermissible
    others[:, 0] = False
    for layer in states[1:]:
        for read, source in ((others, impermissible), (impermissible, others)):
            (gradient,) = torch.autograd.grad(layer[read].square().sum(), embeddings, retain_graph=True)
            assert (gradient[source] == 0).all() and (gradient[read] != 0).any()
            assert (gradient[:, 0] == 0).all()
        (gradient,) = torch.autograd.grad(layer[:, 0].square().sum(), embeddings, retain_graph=True)
        assert (gradient != 0).any(-1).all()


def test_transformers_and_glocal_agree_on_the_barrier():
    """Eager and fused attention under the authors' large negative mask, an adapted model, a record and `attend`."""
    impermissible = hidden_sides(3, 21)
    model, ids = bert(attn_implementation="eager"), tokens()["input_ids"]
    barrier = information_barrier(impermissible)
    mask = barrier.mask(21)
    given = {"input_ids": ids, "attention_mask": -1e4 * ~mask}
    with torch.no_grad():
        wanted = model(**given, output_attentions=True)
        fast = bert()(**given)
        with adapt(model, barrier):
            adapted = model(input_ids=ids)
        plain = model(input_ids=ids)
    for layer, weights in zip(record(model, given), wanted.attentions, strict=True):
        assert (weights * ~mask == 0).all()
        torch.testing.assert_close(layer.weights(), weights, atol=1e-5, rtol=1e-5)
    for other in (fast, adapted):
        torch.testing.assert_close(other.last_hidden_state, wanted.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain.last_hidden_state, wanted.last_hidden_state, atol=1e-2)
    q, k, v = torch.randn(3, 3, 2, 21, 8, dtype=torch.float64)
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, barrier), scores.softmax(-1) @ v)


def test_alignments_learn_to_look_away():
    """Source frames forbidden to each target, some targets padding; the alignment's own frame carries the penalty."""
    torch.manual_seed(0)
    layer = AdditiveAttention(6, 6, hidden=8)
    queries, memory = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
    forbidden = torch.eye(4, 5, dtype=torch.bool).expand(2, 4, 5)
    real = torch.arange(4) < torch.tensor([[4], [2]])
    optimiser = torch.optim.Adam(layer.parameters(), 3e-2)
    first = None
    for _ in range(80):
        _, weights = layer.over(queries, memory)
        penalty = deception_penalty(weights, forbidden, 1.0, "joint", real)
        looks = weights.detach() * forbidden
        mass = float(looks.sum() - looks[1, 2:].sum()) / 6
        assert penalty.item() == pytest.approx(-math.log(1 - mass), rel=1e-4)
        first = mass if first is None else first
        optimiser.zero_grad()
        penalty.backward()
        optimiser.step()
    assert mass < first / 5


def test_bad_input():
    weights, mask = rows(2, 3, 5), marks(2, 5)
    with pytest.raises(ValueError, match="form must be of mean, max, joint; it was 'sum'"):
        deception_penalty(weights, mask, form="sum")
    with pytest.raises(ValueError, match="strength must be at least 0; it was -1"):
        deception_penalty(weights, mask, -1)
    with pytest.raises(ValueError, match=r"impermissible must be booleans \(2, 5\) or \(2, 3, 5\)"):
        deception_penalty(weights, mask[:1])
    with pytest.raises(ValueError, match=r"it was torch.int64 \(2, 5\)"):
        deception_penalty(weights, mask.long())
    with pytest.raises(ValueError, match=r"real must be booleans \(2, 3\)"):
        deception_penalty(weights, mask, real=mask)
    with pytest.raises(ValueError, match="real must mark at least one row"):
        deception_penalty(weights, mask, real=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"impermissible must be booleans \(B, N\); it was torch.bool \(5,\)"):
        information_barrier(mask[0])
    with pytest.raises(ValueError, match="first must be one of 5 tokens; it was 5"):
        information_barrier(mask, first=5)
    with pytest.raises(ValueError, match=r"real must be booleans \(2, 5\)"):
        information_barrier(mask, mask[:1])
    for options, message in (
        (dict(vocab=0), "vocab must be at least 1; it was 0"),
        (dict(attention=False), "hidden must be at least 0, and 1 without attention; it was 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionClassifier(**{"vocab": 9, "classes": 2} | options)
    model, ids = AttentionClassifier(9, 2, dim=4), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"drop must be booleans \(2, 5\)"):
        model(ids, drop=mask[:1])
    with pytest.raises(ValueError, match="padding must come last"):
        model(ids, torch.tensor([[True, False, True, True, True]] * 2))
    with pytest.raises(ValueError, match="this model has no attention"):
        AttentionClassifier(9, 2, dim=4, hidden=3, attention=False)(ids, drop=mask)
