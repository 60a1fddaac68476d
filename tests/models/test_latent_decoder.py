"""S038: decoders by torch's own cells, alignment search against Viterbi, recognition against all hypotheses."""

import itertools

import pytest
import torch

import glocal
from glocal.models.language.aligned import AlignedDecoder
from glocal.models.language.latent_decoder import LatentDecoder, max_approximation_loss
from glocal.nn import (
    AdditiveAttention,
    AlignmentStore,
    DynamicConvolutionAttention,
    GMMAttention,
    LatentMonotonicAttention,
    best_path,
    linear_alignment,
    log_marginal,
    recognise_tokens,
)

B, N, T, D, C, V = 2, 3, 6, 4, 5, 4
FORMS = ("hard", "window", "segmental")


def inputs():
    draw = torch.Generator().manual_seed(0)
    memory = torch.randn(B, T, C, generator=draw, dtype=torch.double)
    targets = torch.randint(V, (B, N), generator=draw)
    tokens = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)
    return memory, tokens, targets


def make(form="window", **options):
    torch.manual_seed(1)
    attention = LatentMonotonicAttention(D, C, form=form, hidden=6, before=1, after=1)
    model = LatentDecoder(V, attention, embed_dim=3, hidden=8, **options).double().eval()
    for p in model.parameters():  # sure of itself
        torch.nn.init.normal_(p)
    return model


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_decoder_by_torch(cell):
    """The cell over all steps at once by torch.nn.LSTM or GRU, as what was looked at is known afterwards."""
    memory, tokens, _ = inputs()
    torch.manual_seed(0)
    attention = AdditiveAttention(D, C, hidden=6)
    model = AlignedDecoder(V, attention, embed_dim=3, hidden=8, cell=cell).double()
    state, logits, contexts = model.start(memory), [], []
    for token in tokens.unbind(1):
        now, state = model.step(token, state)
        logits.append(now)
        contexts.append(state.context)
    assert torch.equal(torch.stack(logits, 1), model(memory, tokens))
    before = torch.stack([torch.zeros_like(contexts[0]), *contexts[:-1]], 1)
    whole = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(3 + C, D, batch_first=True).double()
    whole.load_state_dict({f"{name}_l0": p for name, p in model.cell.state_dict().items()})
    embedded = model.embed(tokens)
    hidden, _ = whole(torch.cat([embedded, before], -1))
    wanted, _ = attention.over(hidden, memory)
    assert torch.allclose(torch.stack(contexts, 1), wanted, atol=1e-12)
    made = torch.cat([hidden, embedded, wanted], -1) @ model.readout.weight.T + model.readout.bias
    wanted = torch.maximum(made[..., ::2], made[..., 1::2]) @ model.head.weight.T + model.head.bias
    assert torch.allclose(torch.stack(logits, 1), wanted, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_forced_to_its_own_choice_it_is_the_decoder(form):
    memory, tokens, _ = inputs()
    model, frames = make(form), []
    state = model.start(memory)
    for token in tokens.unbind(1):
        _, state = model.step(token, state)
        frames.append(state.alignment.position[:, 0].long())
    labels, chances = model.forced(memory, tokens, torch.stack(frames, 1))
    assert torch.allclose(labels, model(memory, tokens).log_softmax(-1), atol=1e-12)
    assert (chances <= 0).all()


def zero_order(form):
    """A decoder whose states do not depend on what was looked at, and its tables, label by label and frame by frame."""
    memory, tokens, targets = inputs()
    model = make(form)
    with torch.no_grad():
        model.cell.weight_ih[:, 3:] = 0
        if form == "hard":
            model.attention.feedback_proj.weight.zero_()
    state, energies, labels = model.start(memory), [], []
    for i, token in enumerate(tokens.unbind(1)):
        state = model.ask(token, state)
        inner = model.attention.inner(state.hidden, state.alignment)
        vector = model.attention.boundary if form == "segmental" else model.attention.energy
        energies.append(vector(inner)[..., 0])
        _, look = model.place(state)
        rows = []
        for last in range(-1, T) if form == "segmental" else [-1]:
            position = torch.full_like(state.alignment.position, last)
            there = state._replace(alignment=state.alignment._replace(position=position))
            said = [model.look_at(torch.full((B,), t), look, there)[0].gather(1, targets[:, i, None]) for t in range(T)]
            rows.append(torch.cat(said, 1))
        labels.append(torch.stack(rows, 1) if form == "segmental" else rows[0])
    return model, (memory, tokens, targets), torch.stack(energies, 1).detach(), torch.stack(labels, 1).detach()


@pytest.mark.parametrize("form", ["hard", "window"])
def test_a_full_beam_is_viterbi_where_frames_before_do_not_matter(form):
    model, given, energies, labels = zero_order(form)
    path, score = best_path(energies, labels, stay=form == "hard")
    found = model.align(*given, beam=T)
    assert torch.equal(found.frames, path) and torch.allclose(N * found.score, score)
    narrow = model.align(*given, beam=1)
    assert (narrow.score <= found.score + 1e-12).all()
    wide = model.align(*given, beam=50)  # more than there are frames
    assert torch.equal(wide.frames, path)


def test_segments_sum_by_the_general_recursion():
    """The tables of pairs are those of the decoder: its score of the best path is Viterbi's, the sum is above it."""
    model, (memory, tokens, targets), energies, labels = zero_order("segmental")
    path, score = best_path(energies, labels)
    said, chances = model.forced(memory, tokens, path)
    mine = said.gather(2, targets[..., None])[..., 0].sum(1) + chances.sum(1)
    assert torch.allclose(mine, score, atol=1e-10)
    assert (log_marginal(energies, labels) > score).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_the_score_of_a_search_is_that_of_its_frames(form, weight):
    memory, tokens, targets = inputs()
    model, count = make(form), torch.tensor([3, 2])
    real = torch.arange(T) < torch.tensor([[6], [4]])
    found = model.align(memory, tokens, targets, real, count=count, beam=3, weight=weight)
    labels, chances = model.forced(memory, tokens, found.frames, real, count)
    said = labels.gather(2, targets[..., None])[..., 0] + weight * chances
    wanted = (said * (torch.arange(N) < count[:, None])).sum(1) / count
    assert torch.allclose(found.score.double(), wanted, atol=1e-5)
    alone = model.align(memory[1:, :4], tokens[1:, :2], targets[1:, :2], beam=3, weight=weight)
    assert torch.equal(alone.frames[0], found.frames[1, :2]) and found.frames[1, 2] == 0


@pytest.mark.parametrize("form", FORMS)
def test_beams_wider_than_what_is_left_of_the_source(form):
    """Of 3 frames and of 1, for 3 tokens: frames stay inside, impossible hypotheses spoil nothing."""
    memory, tokens, targets = inputs()
    model, memory, real = make(form), memory[:, :3], torch.tensor([[True, True, True], [True, False, False]])
    found = model.align(memory, tokens, targets, real, beam=50)
    assert found.score.isfinite().all() and not found.frames[1].any() and (found.frames[0] < 3).all()
    labels, chances = model.forced(memory, tokens, found.frames, real)
    said = labels.gather(2, targets[..., None])[..., 0] + chances
    assert torch.allclose(found.score.double(), said.mean(1), atol=1e-5)
    spoken = model.recognise(memory, real, start=0, stop=1, longest=4, beam=50, positions=50)
    assert spoken.score.isfinite().all() and not spoken.frames[1].any() and (spoken.frames[0].diff() >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_recognition_by_all_hypotheses(form):
    memory, _, _ = inputs()
    memory, stop, longest = memory[:, :3], 1, 2
    model = make(form)
    found = model.recognise(memory, start=0, stop=stop, longest=longest, beam=1000, positions=1000)
    for b in range(B):
        best = (-torch.inf, None, None)
        for size in range(1, longest + 1):
            for said, path in itertools.product(
                itertools.product(range(V), repeat=size), itertools.product(range(3), repeat=size)
            ):
                if stop in said[:-1] or (size < longest and said[-1] != stop):
                    continue
                if any(y < x + (form != "hard") and y < 2 for x, y in itertools.pairwise(path)) or (
                    any(y < x for x, y in itertools.pairwise(path))
                ):
                    continue
                tokens = torch.tensor([[0, *said[:-1]]])
                labels, chances = model.forced(memory[b : b + 1], tokens, torch.tensor([path]))
                score = (labels[0, torch.arange(size), torch.tensor(said)] + chances[0]).sum() / size
                best = max(best, (score.item(), said, path))
        size = len(best[1])
        assert abs(float(found.score[b]) - best[0]) < 1e-5
        assert tuple(found.tokens[b, :size].tolist()) == best[1] and (found.tokens[b, size:] == stop).all()
        assert tuple(found.frames[b, :size].tolist()) == best[2]


def test_recognition_by_soft_attention_is_a_beam_over_tokens():
    memory, _, _ = inputs()
    torch.manual_seed(5)
    model = AlignedDecoder(V, AdditiveAttention(D, C, hidden=6), embed_dim=3, hidden=8).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    found, best = model.recognise(memory, start=0, stop=1, longest=2, beam=100), []
    for said in [(1,), *((x, y) for x in range(V) for y in range(V) if x != 1)]:
        labels = model(memory, torch.tensor([[0, *said[:-1]]] * B)).log_softmax(-1)
        best.append((labels[:, torch.arange(len(said)), torch.tensor(said)].sum(1) / len(said)).detach())
    assert torch.allclose(found.score.double(), torch.stack(best).amax(0), atol=1e-5)


class Table:
    """Log-probabilities by step alone: to say 2 costs 1.1, then 0.3; to stop 1, 0.1, then 0.05."""

    steps = torch.tensor([[-9.0, -1.0, -1.1], [-9.0, -0.1, -0.3], [-9.0, -0.05, -9.0]])

    def ask(self, token, state):
        return state

    def place(self, state):
        return torch.zeros(len(state[0]), 1), torch.zeros(len(state[0]), 1)

    def look_at(self, at, energies, state):
        return self.steps[state[0]], (state[0] + 1,)


def test_a_beam_keeps_what_is_best_per_token():
    """By sums it would keep what stopped at once, -1, instead of 2 2, -1.4, whose continuation is best of all."""
    found = recognise_tokens(Table(), (torch.zeros(1, dtype=torch.long),), batch=1, start=0, stop=1, longest=3, beam=2)
    assert found.tokens.tolist() == [[2, 2, 1]] and abs(found.score.item() + 1.45 / 3) < 1e-6


def test_the_loss_by_hand():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randn(B, N, V, generator=draw).log_softmax(-1)
    chances, targets = torch.randn(B, N, generator=draw), torch.tensor([[1, 2, 0], [3, -100, -100]])
    total = 0.0
    for b, i in ((0, 0), (0, 1), (0, 2), (1, 0)):
        total -= 0.8 * labels[b, i, targets[b, i]] + 0.2 * labels[b, i].mean() + 0.3 * chances[b, i]
    found = max_approximation_loss(labels, chances, targets, weight=0.3, smoothing=0.2)
    assert torch.allclose(found, total / 4, atol=1e-6)


def test_weights_of_a_soft_decoder():
    memory, tokens, _ = inputs()
    torch.manual_seed(3)
    soft = AlignedDecoder(V, AdditiveAttention(D, C, hidden=6), embed_dim=3, hidden=8).double()
    model = make("window").from_soft(soft)
    model.attention.before = model.attention.after = T
    assert torch.allclose(model(memory, tokens), soft(memory, tokens), atol=1e-12)
    with pytest.raises(ValueError, match=r"soft must have attention.query_proj.weight \(6, 4\); it was \(7, 4\)"):
        make().from_soft(AlignedDecoder(V, AdditiveAttention(D, C, hidden=7), embed_dim=3, hidden=8).double())


@pytest.mark.parametrize("form", FORMS)
def test_training_in_turns_learns(form):
    """Search, keep what is better, step; scores of what is kept only rise."""
    memory, tokens, targets = inputs()
    model, store = make(form).train(), AlignmentStore()
    frames = linear_alignment(torch.tensor([T, T]), torch.tensor([N, N]), stay=form == "hard")
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-2), []
    for step in range(40):
        if step and step % 10 == 0:
            found = model.align(memory, tokens, targets)
            frames = store.better(["a", "b"], found.frames, found.score)
        loss = max_approximation_loss(*model.forced(memory, tokens, frames), targets, smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_the_store_keeps_the_better_of_each():
    store = AlignmentStore()
    store.better(["a", "b"], torch.tensor([[1, 2], [3, 4]]), torch.tensor([-1.0, -1.0]))
    kept = store.better(["a", "b"], torch.tensor([[5, 6], [7, 8]]), torch.tensor([-2.0, -0.5]))
    assert kept.tolist() == [[1, 2], [7, 8]] and store.known(["b"]).tolist() == [[7, 8]]


def test_any_alignment_attention_serves_the_decoder():
    memory, tokens, _ = inputs()
    for attention in (GMMAttention(D, C, hidden=6), DynamicConvolutionAttention(D, C, hidden=6)):
        model = AlignedDecoder(V, attention, embed_dim=3, hidden=8).double()
        model(memory, tokens).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_published_size():
    # Word pieces, an LSTM of 1,000 over 621 + 2,048, the energies' network of 1,024, maxout of 1,000, the head.
    attention = 1000 * 1024 + 1024 + 2048 * 1024 + 1024
    readout = (1000 + 621 + 2048) * 1000 + 1000
    size = 1030 * 621 + 4 * 1000 * (621 + 2048 + 1000 + 2) + attention + readout + 500 * 1030 + 1030
    assert glocal.models.parameters("latent_switchboard") == size
    assert glocal.models.parameters("latent_switchboard", form="hard") == size + 2048 + 1024
    assert glocal.models.parameters("latent_switchboard", form="segmental") == size + 1024


def test_bad_input():
    memory, tokens, targets = inputs()
    model = make()
    with pytest.raises(ValueError, match="cell must be one of lstm, gru; it was 'rnn'"):
        AlignedDecoder(V, AdditiveAttention(D, C), cell="rnn")
    with pytest.raises(ValueError, match="hidden must be even"):
        AlignedDecoder(V, AdditiveAttention(D, C), hidden=7)
    with pytest.raises(TypeError, match="attention must be LatentMonotonicAttention; it was AdditiveAttention"):
        LatentDecoder(V, AdditiveAttention(D, C))
    with pytest.raises(ValueError, match=r"tokens must be \(2, N\) with N above 0"):
        model(memory, tokens[:1])
    with pytest.raises(ValueError, match="frames must move forward"):
        model.forced(memory, tokens, torch.tensor([[0, 2, 1], [0, 1, 2]]))
    with pytest.raises(ValueError, match=r"frames must be as tokens \(2, 3\)"):
        model.forced(memory, tokens, targets[:, :2])
    with pytest.raises(ValueError, match="beam must be at least 1"):
        model.align(memory, tokens, targets, beam=0)
    with pytest.raises(ValueError, match="count must be 1 to 3 of each sample"):
        model.align(memory, tokens, targets, count=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="tokens and targets must be"):
        model.align(memory, tokens, targets[:, :2])
    with pytest.raises(ValueError, match="beam, positions and longest must be at least 1"):
        model.recognise(memory, start=0, stop=1, longest=0)
    with pytest.raises(ValueError, match="names, frames and scores must be as many"):
        AlignmentStore().better(["a"], targets, torch.zeros(2))
