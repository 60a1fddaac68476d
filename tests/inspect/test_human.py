"""Habit of position and resemblance to readers against scikit-learn and planted maps."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import LinearRegression

from glocal.inspect import (
    fit_trivial,
    human_resemblance,
    noise_ceiling,
    sentence_correlation,
    trivial_patterns,
    trivial_reliance,
)

LENGTHS = torch.tensor([7, 4, 1, 6])


def maps(heads, seed=0):
    return torch.rand(4, heads, 7, 7, generator=torch.Generator().manual_seed(seed)).double()


def flat(x, whole=False):
    """``(B, C, n, n)`` to rows of ``(M, C)``, by loops."""
    rows = [
        x[b, :, i, j].tolist()
        for b, n in enumerate(LENGTHS.tolist())
        for i in range(n)
        for j in range(n if whole else i + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64).numpy()


def test_patterns_of_five_words():
    itself, previous, start = trivial_patterns(5).int()
    assert itself.tolist() == torch.eye(5).int().tolist()
    assert previous.tolist() == [
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
    ]
    assert start.tolist() == [[1, 0, 0, 0, 0]] * 5


@pytest.mark.parametrize("whole", [False, True])
def test_sklearn_fits_the_same(whole):
    x, people = maps(3), maps(5, seed=1)
    patterns = flat(trivial_patterns(7).expand(4, -1, -1, -1), whole)
    found = fit_trivial(x, LENGTHS, whole=whole)
    resembled = human_resemblance([x], people.transpose(0, 1), LENGTHS, whole=whole)
    ceiling = noise_ceiling(people.transpose(0, 1), LENGTHS, whole=whole)
    y, heads = flat(people, whole), flat(x, whole)
    for h in range(3):
        peer = LinearRegression().fit(patterns, heads[:, h])
        assert float(found.r2[h]) == pytest.approx(peer.score(patterns, heads[:, h]))
        assert found.coefficients[h].tolist() == pytest.approx(peer.coef_.tolist())
        assert float(found.intercept[h]) == pytest.approx(peer.intercept_)
        rest = heads[:, h] - peer.predict(patterns)
        assert flat(found.residual, whole)[:, h].tolist() == pytest.approx(rest.tolist())
    for s in range(5):
        peer = LinearRegression().fit(heads, y[:, s])
        assert float(resembled.r2[0, s]) == pytest.approx(peer.score(heads, y[:, s]))
        mean = y.mean(1, keepdims=True)
        assert float(ceiling[s]) == pytest.approx(LinearRegression().fit(mean, y[:, s]).score(mean, y[:, s]))
    assert float(trivial_reliance([x], LENGTHS, whole=whole)) == pytest.approx(float(found.r2.mean()))


def test_planted_coefficients_are_found():
    lengths = torch.full((40,), 12)
    draw = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(40, 1, 12, 12, generator=draw).double()
    _, previous, start = trivial_patterns(12)
    signal = (0.5 * previous + 0.3 * start).expand(40, 1, -1, -1)
    found = fit_trivial(signal + noise, lengths)
    assert found.coefficients[0].tolist() == pytest.approx([0, 0.5, 0.3], abs=0.02)
    lower = torch.ones(12, 12).tril().bool()
    share = signal[..., lower].var() / (signal + noise)[..., lower].var()
    assert float(found.r2) == pytest.approx(float(share), abs=0.02)
    pure = fit_trivial(signal, lengths)
    assert float(pure.r2) == pytest.approx(1) and pure.residual.abs().max() < 1e-12


def test_one_word_takes_the_shortest_solution():
    """Sentences of one word: all attention is 1, self and start are the same column."""
    found = fit_trivial(torch.ones(3, 2, 1, 1), torch.ones(3, dtype=torch.long))
    assert found.r2.isnan().all() and found.coefficients.abs().max() == 0 and found.residual.abs().max() == 0
    assert found.intercept.tolist() == [1, 1]
    # Two words: self = (1, 0, 1), previous = (0, 1, 0), start = (1, 1, 0) once centred are of rank 2.
    two = torch.tensor([[1.0, 0.0], [0.4, 0.6]])[None, None]
    assert fit_trivial(two, torch.tensor([2])).coefficients[0].isfinite().all()
    assert float(fit_trivial(two, torch.tensor([2])).r2) == pytest.approx(1)


def test_more_heads_explain_more_and_adjusted_does_not_count_noise():
    people = maps(6, seed=1).transpose(0, 1)
    noise = maps(20, seed=2)
    r2 = [human_resemblance([noise[:, :h]], people, LENGTHS).r2[0] for h in range(1, 21)]
    assert all((b >= a - 1e-12).all() for a, b in pairwise(r2))
    many = human_resemblance([noise], people, LENGTHS)
    count = len(flat(noise))
    wanted = 1 - (1 - many.r2) * (count - 1) / (count - 21)
    torch.testing.assert_close(many.adjusted, wanted)
    assert many.r2.mean() > 0.2 > many.adjusted.mean()


def test_the_best_layer_and_a_ceiling_without_the_reader():
    people = maps(6, seed=1).transpose(0, 1)
    other = maps(6, seed=2)
    found = human_resemblance([other, people.transpose(0, 1), other], people, LENGTHS)
    assert found.layer == 1 and found.score == pytest.approx(1) and found.adjusted_score == pytest.approx(1)
    own, others = noise_ceiling(people, LENGTHS), noise_ceiling(people, LENGTHS, leave_out=True)
    assert others.mean() < own.mean() - 0.05  # readers are independent of each other here
    y = flat(people.transpose(0, 1))
    rest = y[:, 1:].mean(1, keepdims=True)
    assert float(others[0]) == pytest.approx(LinearRegression().fit(rest, y[:, 0]).score(rest, y[:, 0]))


@pytest.mark.parametrize("over", ["mean", "max"])
def test_correlation_of_sentences(over):
    x, people = maps(3), maps(1, seed=1)[:, 0]
    got = sentence_correlation(x, people, LENGTHS, over=over)
    joined = x.mean(1) if over == "mean" else x.amax(1)
    for b, n in enumerate(LENGTHS.tolist()):
        lower = torch.ones(n, n).tril().bool()
        a, c = joined[b, :n, :n][lower], people[b, :n, :n][lower]
        if n == 1:
            assert got[b].isnan()
        else:
            assert float(got[b]) == pytest.approx(pearsonr(a.numpy(), c.numpy())[0])
    same = sentence_correlation(people[:, None], people, LENGTHS)
    shuffled = sentence_correlation(people[:, None], people, LENGTHS, shuffle=torch.Generator().manual_seed(0))
    assert same[[0, 1, 3]].tolist() == pytest.approx([1, 1, 1]) and (shuffled[[0, 1, 3]].abs() < 0.7).all()


def test_what_lies_beyond_a_sentence_does_not_count():
    x, people = maps(3), maps(2, seed=1).transpose(0, 1)
    real = torch.arange(7) < LENGTHS[:, None]
    beyond = ~(real[:, None, :, None] & real[:, None, None]) | torch.ones(7, 7).triu(1).bool()
    found = human_resemblance([x], people, LENGTHS).r2
    torch.testing.assert_close(human_resemblance([x.masked_fill(beyond, 9.0)], people, LENGTHS).r2, found)
    assert fit_trivial(x, LENGTHS).residual[beyond.expand(-1, 3, -1, -1)].abs().max() == 0


def test_bad_input():
    x = maps(3)
    with pytest.raises(ValueError, match=r"lengths must be of sentences of 1 to 7 words; they were \[7, 8, 1, 6\]"):
        fit_trivial(x, torch.tensor([7, 8, 1, 6]))
    with pytest.raises(ValueError, match=r"maps must be \(B, H, n, n\) with B, n, n = \(3, 7, 7\)"):
        fit_trivial(x, LENGTHS[:3])
    with pytest.raises(ValueError, match=r"people, .* must be .*\(4, 5, 6, 6\)"):
        human_resemblance([x], torch.rand(5, 4, 6, 6), LENGTHS)
    with pytest.raises(ValueError, match=r"people must be \(S, B, n, n\), at least 2 of them"):
        noise_ceiling(torch.rand(1, 4, 7, 7), LENGTHS, leave_out=True)
    with pytest.raises(ValueError, match="over must be 'mean' or 'max'; it was 'sum'"):
        sentence_correlation(x, x[:, 0], LENGTHS, over="sum")
    with pytest.raises(ValueError, match="words must be at least 1; it was 0"):
        trivial_patterns(0)
    with pytest.raises(ValueError, match=r"layers must be \(B, H, n, n\), one a layer"):
        trivial_reliance([], LENGTHS)
