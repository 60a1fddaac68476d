"""S038: choices and windows by explicit softmaxes, limits, and sums over all alignments by enumeration."""

import itertools
import math

import pytest
import torch

from glocal.nn import (
    AdditiveAttention,
    LatentMonotonicAttention,
    best_path,
    linear_alignment,
    log_marginal,
    suffix_log_softmax,
)

B, N, T, D, C = 2, 4, 9, 3, 5


def inputs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, N, D, generator=draw, dtype=torch.double)
    memory = torch.randn(B, T, C, generator=draw, dtype=torch.double)
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 7:] = False
    return queries, memory, real


def make(form, **options):
    torch.manual_seed(1)
    return LatentMonotonicAttention(D, C, form=form, hidden=6, **options).double()


def network(layer, vector, query, frame, looked):
    """One energy, by definition."""
    inner = layer.memory_proj.weight @ frame + layer.query_proj(query)
    if layer.feedback:
        share = 0.5 * torch.sigmoid(layer.share.weight[0] @ frame)
        inner = inner + layer.feedback_proj.weight[:, 0] * share * looked
    return vector.weight[0] @ torch.tanh(inner)


@pytest.mark.parametrize("form,feedback", [("hard", True), ("hard", False), ("window", False), ("segmental", False)])
def test_a_known_alignment_by_definition(form, feedback):
    queries, memory, real = inputs()
    layer = make(form, before=2, after=1, feedback=feedback)
    paths = [[1, 2, 5, 8], [0, 4, 6, 6]]  # the second one uses its source up
    state = layer.start(memory, real)
    for n in range(N):
        before = state
        chances, energies = layer.place(queries[:, n], state)
        context, state = layer.look_at(torch.tensor([path[n] for path in paths]), energies, state)
        for b, path in enumerate(paths):
            length, at, last = int(real[b].sum()), path[n], path[n - 1] if n else -1
            opening = min(max(last if form == "hard" else last + 1, 0), length - 1)
            looked = [sum(path[i] == t for i in range(n)) if form == "hard" else 0 for t in range(length)]
            vector = layer.boundary if form == "segmental" else layer.energy
            choice = torch.stack(
                [network(layer, vector, queries[b, n], memory[b, t], looked[t]) for t in range(length)]
            )
            wanted = torch.softmax(choice[opening:], 0)
            assert torch.allclose(chances[b, opening:length].exp(), wanted, atol=1e-12)
            assert (chances[b, :opening] == -torch.inf).all() and (chances[b, length:] == -torch.inf).all()
            look = torch.stack(
                [network(layer, layer.energy, queries[b, n], memory[b, t], looked[t]) for t in range(length)]
            )
            low, high = {"hard": (at, at), "window": (max(at - 2, 0), at + 1), "segmental": (opening, at)}[form]
            high = min(high, length - 1)
            weights = torch.softmax(look[low : high + 1], 0)
            assert torch.allclose(context[b], weights @ memory[b, low : high + 1], atol=1e-12)
            assert before.position[b, 0] == last and state.position[b, 0] == at


@pytest.mark.parametrize("form", ["hard", "window", "segmental"])
def test_the_layer_alone_takes_the_most_probable_frame(form):
    queries, memory, real = inputs()
    layer = make(form)
    state, last = layer.start(memory, real), torch.full((B,), -1)
    for query in queries.unbind(1):
        chances, energies = layer.place(query, state)
        at = chances.argmax(-1)
        wanted, _ = layer.look_at(at, energies, state)
        context, state = layer(query, state)
        assert torch.equal(context, wanted) and torch.equal(state.position[:, 0].long(), at)
        assert ((at > last) | ((at == last) & ((form == "hard") | (at == real.sum(1) - 1)))).all()
        last = at


def test_a_wide_window_and_one_segment_of_all_are_global_attention():
    queries, memory, real = inputs()
    soft = AdditiveAttention(D, C, hidden=6).double()
    _, wanted = soft.over(queries, memory, real)
    for layer, at in ((make("window", before=T, after=T), torch.tensor([3, 0])), (make("segmental"), real.sum(1) - 1)):
        layer.load_state_dict(soft.state_dict(), strict=False)
        state = layer.start(memory, real)
        _, energies = layer.place(queries[:, 0], state)
        assert torch.allclose(layer.weights_at(at, energies, state), wanted[:, 0], atol=1e-12)


def test_hard_attention_with_clear_energies_gathers():
    """Each query names a frame by a gap of 1e4."""
    layer = LatentMonotonicAttention(T, C + T, form="hard", hidden=T, feedback=False).double()
    for part in layer.parameters():
        torch.nn.init.zeros_(part)
    with torch.no_grad():  # tanh(30 (both - 1.5)) is 1 where query and memory name the same frame, -1 elsewhere
        layer.query_proj.weight.copy_(30 * torch.eye(T))
        layer.query_proj.bias.fill_(-45)
        layer.memory_proj.weight[:, C:] = 30 * torch.eye(T)
        layer.energy.weight.fill_(1e4)
    path = torch.tensor([[0, 3, 3, 8], [2, 4, 5, 7]])
    content = torch.randn(B, T, C, dtype=torch.double)
    memory = torch.cat([content, torch.eye(T, dtype=torch.double).expand(B, T, T)], -1)
    contexts, weights = layer.over(torch.nn.functional.one_hot(path, T).double(), memory)
    assert torch.equal(contexts[..., :C], content.gather(1, path[..., None].expand(-1, -1, C)))
    assert torch.equal(weights.argmax(-1), path)


@pytest.mark.parametrize("first", range(T))
def test_a_softmax_over_what_is_left(first):
    energies = torch.randn(B, T, dtype=torch.double)
    found = suffix_log_softmax(energies, torch.tensor([[first]])).exp()
    seen = torch.arange(T) >= first
    assert torch.allclose(found, torch.softmax(energies.masked_fill(~seen, -torch.inf), -1), atol=1e-14)


S, F = 3, 5


def tables(pairs=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    energies = 2 * torch.randn(B, S, F, generator=draw, dtype=torch.double)
    shape = (B, S, F + 1, F) if pairs else (B, S, F)
    return energies, torch.randn(shape, generator=draw, dtype=torch.double) - 2


def enumerated(energies, labels, stay, frames=F, tokens=S):
    """Every alignment of one sample with its log-probability and that of its labels."""
    found = {}
    for path in itertools.product(range(frames), repeat=tokens):
        total, last = 0.0, -1
        for i, t in enumerate(path):
            opening = min(max(last if stay else last + 1, 0), frames - 1)
            if t < opening:
                break
            total = total + energies[i, t] - torch.logsumexp(energies[i, opening:frames], 0)
            total = total + (labels[i, last + 1, t] if labels.dim() == 3 else labels[i, t])
            last = t
        else:
            found[path] = total
    return found


@pytest.mark.parametrize("stay,pairs", itertools.product([False, True], [False, True]))
def test_sum_and_best_by_enumeration_of_all_alignments(stay, pairs):
    energies, labels = tables(pairs)
    total = log_marginal(energies, labels, stay=stay)
    path, score = best_path(energies, labels, stay=stay)
    for b in range(B):
        every = enumerated(energies[b], labels[b], stay)
        assert len(every) == (35 if stay else 15)  # the rising runs of 3 of 5, or those that end in the last frame
        assert torch.allclose(total[b], torch.logsumexp(torch.stack(list(every.values())), 0), atol=1e-12)
        best = max(every, key=every.get)
        assert tuple(path[b].tolist()) == best and torch.allclose(score[b], every[best], atol=1e-12)


@pytest.mark.parametrize("stay,pairs", itertools.product([False, True], [False, True]))
def test_the_gradient_of_the_sum_is_the_posterior(stay, pairs):
    energies, labels = tables(pairs)
    labels.requires_grad_()
    (occupied,) = torch.autograd.grad(log_marginal(energies, labels, stay=stay).sum(), labels)
    wanted = torch.zeros_like(labels)
    for b in range(B):
        every = enumerated(energies[b], labels[b].detach(), stay)
        total = torch.logsumexp(torch.stack(list(every.values())), 0)
        for path, value in every.items():
            for i, t in enumerate(path):
                cell = wanted[b, i] if not pairs else wanted[b, i, (path[i - 1] if i else -1) + 1]
                cell[t] += torch.exp(value - total)
    assert torch.allclose(occupied, wanted, atol=1e-12)
    assert torch.autograd.gradcheck(lambda e, x: log_marginal(e, x, stay=stay), [energies.requires_grad_(), labels])


@pytest.mark.parametrize("stay", [False, True])
def test_padding_of_frames_and_tokens(stay):
    energies, labels = tables()
    real, count = torch.ones(B, F, dtype=torch.bool), torch.tensor([3, 2])
    real[1, 4:] = False
    given = {"stay": stay, "real": real, "count": count}
    total, (path, score) = log_marginal(energies, labels, **given), best_path(energies, labels, **given)
    every = enumerated(energies[1], labels[1], stay, frames=4, tokens=2)
    assert torch.allclose(total[1], torch.logsumexp(torch.stack(list(every.values())), 0), atol=1e-12)
    best = max(every, key=every.get)
    assert tuple(path[1].tolist()) == (*best, 0) and torch.allclose(score[1], every[best], atol=1e-12)
    alone = log_marginal(energies[:1], labels[:1], stay=stay)
    assert torch.allclose(total[:1], alone, atol=1e-12)
    energies.requires_grad_()
    (grad,) = torch.autograd.grad(log_marginal(energies, labels, **given).sum(), energies)
    assert (grad[1, :, 4] == 0).all() and (grad[1, 2] == 0).all() and grad.isfinite().all()


def test_the_sum_in_float32_over_a_long_source():
    """Log-sums from both ends do not lose what is far from the largest energy."""
    draw = torch.Generator().manual_seed(0)
    energies = 30 * torch.randn(1, 40, 300, generator=draw)
    labels = torch.randn(1, 40, 300, generator=draw).log_softmax(-1)
    wanted = log_marginal(energies.double(), labels.double())
    assert torch.allclose(log_marginal(energies, labels).double(), wanted, rtol=1e-4)


def test_the_alignment_to_begin_with():
    """Rows by hand: 11 frames for 4 tokens at a pace of 2.5, rounded to even; 3 for 4; 2 tokens of 8 frames."""
    frames, tokens = torch.tensor([11, 3, 8]), torch.tensor([4, 4, 2])
    assert linear_alignment(frames, tokens, stay=True).tolist() == [[2, 5, 8, 10], [0, 1, 2, 2], [4, 7, 0, 0]]
    assert linear_alignment(frames, tokens).tolist() == [[2, 5, 8, 10], [1, 2, 2, 2], [4, 7, 0, 0]]


def test_half_precision():
    queries, memory, _ = inputs()
    for form in ("hard", "window", "segmental"):
        contexts, weights = make(form).bfloat16().over(queries.bfloat16(), memory.bfloat16())
        assert contexts.dtype == weights.dtype == torch.bfloat16 and contexts.isfinite().all()


@pytest.mark.parametrize("form", ["hard", "window", "segmental"])
def test_every_parameter_has_a_gradient(form):
    """Of the hard form by the probability of its choice only."""
    queries, memory, _ = inputs()
    layer = make(form)
    state, loss = layer.start(memory), 0.0
    for n, at in enumerate((1, 3, 6)):
        chances, energies = layer.place(queries[:, n], state)
        context, state = layer.look_at(torch.full((B,), at), energies, state)
        loss = loss + context.square().sum() - chances[:, at].sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="form must be one of hard, window, segmental; it was 'soft'"):
        LatentMonotonicAttention(D, C, form="soft")
    with pytest.raises(ValueError, match="before and after must be at least 0; they were -1 and 4"):
        LatentMonotonicAttention(D, C, before=-1)
    energies, labels = tables()
    with pytest.raises(ValueError, match=r"energies must be \(B, S, T\) with S and T above 0"):
        log_marginal(energies[:, :0], labels[:, :0])
    with pytest.raises(ValueError, match=r"labels must be \(2, 3, 5\) or \(2, 3, 6, 5\)"):
        best_path(energies, labels[:, :2])
    with pytest.raises(ValueError, match=r"frames and tokens must be .* at least 1"):
        linear_alignment(torch.tensor([3]), torch.tensor([0]))
    assert math.isfinite(float(log_marginal(energies[:, :, :1], labels[:, :, :1])[0]))  # one frame, used again
