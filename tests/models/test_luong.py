"""S040: Luong's translator: what feeding and turning round do, padding, decoding, learning."""

import pytest
import torch

import glocal
from glocal.models.language.luong import Translator


def make(**options):
    torch.manual_seed(0)
    return Translator(11, 13, dim=8, layers=2, **options).double().eval()


def tokens(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(11, (3, 6), generator=draw), torch.randint(13, (3, 5), generator=draw)


@pytest.mark.parametrize("feeding", [False, True])
def test_by_torch_modules(feeding):
    """Step by step with torch's own LSTM on a turned source; attention over the memory in reading order."""
    model = make(feeding=feeding, attention={"score": "dot"})
    source, target = tokens()
    out, (hidden, cell) = model.encoder(model.source_embed(source.flip(1)))
    memory, fed, wanted = out.flip(1), torch.zeros(3, 8, dtype=torch.double), []
    for token in target.unbind(1):
        given = model.target_embed(token)
        given = torch.cat([given, fed], 1) if feeding else given
        top, (hidden, cell) = model.decoder(given[:, None], (hidden, cell))
        top = top[:, 0]
        looked = torch.softmax((memory * top[:, None]).sum(-1), -1)
        context = (looked[..., None] * memory).sum(1)
        fed = torch.tanh(torch.cat([context, top], 1) @ model.attention.out_proj.weight.T)
        wanted.append(fed @ model.head.weight.T)
    assert torch.allclose(model(source, target), torch.stack(wanted, 1), atol=1e-12)


@pytest.mark.parametrize("place", ["global", "local_m", "local_p"])
def test_padding_is_as_if_it_were_not_there(place):
    model = make(attention={"score": "general", "place": place, "window": 2})
    source, target = tokens()
    real = torch.arange(6) < torch.tensor([[6], [4], [1]])
    found = model(source, target, real)
    for b, length in enumerate((6, 4, 1)):
        assert torch.allclose(found[b], model(source[b : b + 1, :length], target[b : b + 1])[0], atol=1e-12)


def test_without_attention_only_the_last_state_is_known():
    model = make(attention=None, feeding=False)
    source, target = tokens()
    _, (hidden, cell) = model.encoder(model.source_embed(source.flip(1)))
    out, _ = model.decoder(model.target_embed(target), (hidden, cell))
    assert torch.allclose(model(source, target), model.head(out), atol=1e-12)


def test_generation_takes_the_most_probable_and_stops():
    model = make()
    source, _ = tokens()
    found = model.generate(source, start=1, stop=2, longest=7)
    given = torch.cat([torch.ones(3, 1, dtype=torch.long), found[:, :-1]], 1)
    again = model(source, given).argmax(-1)
    for row, best in zip(found, again, strict=True):
        ended = (row == 2).nonzero()[:, 0]
        upto = int(ended[0]) + 1 if len(ended) else len(row)
        assert torch.equal(row[:upto], best[:upto]) and (row[upto:] == 2).all()
    stop = int(found[0, 0])  # what comes first is the end
    ended = model.generate(source[:1], start=1, stop=stop, longest=7)
    assert ended.tolist() == [[stop]]


def test_it_learns():
    model = make().train()
    source, target = tokens()
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-2), []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_the_published_size():
    # Two tables and a head of 50,000 words, an LSTM of four layers, one more whose first layer is fed, the attention's.
    lstm = [4 * 1000 * (n + 1000 + 2) for n in (1000, 1000, 1000, 1000)]
    fed = [4 * 1000 * (n + 1000 + 2) for n in (2000, 1000, 1000, 1000)]
    attention = 1000 * 1000 + 1000 * 1000 + 1000 + 2000 * 1000
    assert glocal.models.parameters("luong_wmt") == 3 * 50_000 * 1000 + sum(lstm) + sum(fed) + attention


def test_bad_input():
    with pytest.raises(ValueError, match="without attention it must be False"):
        Translator(5, 5, attention=None)
    with pytest.raises(ValueError, match="layers must be at least 1"):
        Translator(5, 5, layers=0)
    model, (source, target) = make(), tokens()
    with pytest.raises(ValueError, match="with S above 0"):
        model(source[:, :0], target)
    with pytest.raises(ValueError, match="padding come after them"):
        model(source, target, torch.arange(6).expand(3, 6) > 2)
    with pytest.raises(ValueError, match="at least one token of each source"):
        model(source, target, torch.zeros(3, 6, dtype=torch.bool))
