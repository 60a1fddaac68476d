"""The waveform against transformers' rotation; peaks and troughs against SciPy; the search against loops."""

import itertools

import numpy as np
import pytest
import torch
from scipy.signal import argrelextrema
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split

from glocal.steer.waveform import TOOL_BASES, peaks, search_bases, troughs, waveform


@pytest.mark.parametrize("head_dim, base", [(128, 10000.0), (64, 25000.0), (6, 500.0)])
def test_it_is_the_score_of_rotated_ones(head_dim, base):
    distances = torch.tensor([0, 1, 7, 100, 1000, 4090])
    inverse = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    start = 13
    ones = torch.ones(1, 1, 1, head_dim, dtype=torch.float64)
    for m in distances.tolist():
        angles = torch.tensor([start + m, start], dtype=torch.float64)[:, None] * inverse
        both = torch.cat([angles, angles], -1)
        pair, _ = half_split(ones.expand(1, 1, 2, -1), ones.expand(1, 1, 2, -1), both.cos()[None], both.sin()[None])
        wanted = float(pair[0, 0, 0] @ pair[0, 0, 1]) / head_dim**0.5
        assert waveform(m, base, head_dim) == pytest.approx(wanted, abs=1e-9)
        turned = interleaved(ones[:, 0].expand(1, 2, -1)[:, :, None], angles.sin()[None], angles.cos()[None])[0, :, 0]
        assert waveform(m, base, head_dim) == pytest.approx(float(turned[0] @ turned[1]) / head_dim**0.5, abs=1e-9)
    assert waveform(distances.view(2, 3), base, head_dim).shape == (2, 3)


def test_peaks_and_troughs_are_local_extremes_and_the_highest_of_their_stretch():
    wave = waveform(np.arange(1000, 4091), 10000)
    tops, lows = peaks(wave), troughs(wave)
    every = set(argrelextrema(wave, np.greater)[0])
    assert set(tops) <= every and set(lows) <= set(argrelextrema(wave, np.less)[0])
    assert len(tops) == len(lows) == 6 and tops == sorted(tops) and lows == sorted(lows)
    assert wave[tops[0]] == max(wave[list(every)])
    for before, after in itertools.pairwise(tops):
        assert after - before >= 50 and wave[after] == max(wave[n] for n in every if before + 50 <= n < before + 550)


def test_a_wave_s_end_cuts_the_window():
    wave = np.zeros(30)
    wave[[2, 9, 11, 28]] = [5.0, 2.0, 3.0, 1.0]
    assert peaks(wave, window=10, gap=3) == [2, 11]  # 28 lies beyond the window of 11
    assert peaks(wave, window=100, gap=3) == [2, 11, 28]
    assert peaks(wave, window=100, gap=3, most=2) == [2, 11]
    assert peaks(wave, window=100, gap=12) == [2, 28]
    assert troughs(-wave[::-1], window=10, gap=3) == [29 - 11, 29 - 2]
    assert peaks([1.0, 2.0, 3.0]) == [] and troughs([3.0]) == []


def covered(a, b, tops, lows):
    near = [(p - t) ** 2 for x, y in ((a, b), (b, a)) for p in tops[x] for t in lows[y] if abs(p - t) <= 3]
    return len(near), -np.mean(near) if near else -np.inf


def test_the_best_pair_by_trying_all():
    choices = [10000, 12500, 16500, 18000, 22500, 24000, 30000]
    waves = {base: waveform(np.arange(1000, 4091), base) for base in choices}
    tops, lows = ({b: {at for at in find(w)} for b, w in waves.items()} for find in (peaks, troughs))
    best = max(itertools.combinations(choices, 2), key=lambda pair: covered(*pair, tops, lows))
    found = search_bases(choices, count=2)
    assert found.bases == best and found.covered == (covered(*best, tops, lows)[0],) and found.covered[0] >= 1


def test_greedy_additions_by_hand():
    choices = list(range(10000, 30001, 500))
    found = search_bases(first=[18000, 10000], count=3)
    waves = {base: waveform(np.arange(1000, 4091), base) for base in choices}
    tops, lows = ({b: {1000 + at for at in find(w)} for b, w in waves.items()} for find in (peaks, troughs))
    high, low = tops[18000] | tops[10000], lows[18000] | lows[10000]
    assert high & low == {1970}  # one's peak is the other's trough: covered, so that it counts no more
    tops["taken"], lows["taken"] = high - low, low - high
    rest = [base for base in choices if base not in (10000, 18000)]
    best = max(rest, key=lambda base: covered("taken", base, tops, lows))
    assert found.bases == (18000, 10000, best) and found.covered == (covered("taken", best, tops, lows)[0],)
    few = [10000, 12500, 16500, 18000]
    assert sorted(search_bases(few, count=4).bases) == few


def test_no_pair_of_the_paper_s_set_covers_more_than_the_pair_found():
    assert search_bases(count=2).covered[0] >= max(
        search_bases(pair, count=2).covered[0] for pair in itertools.combinations(TOOL_BASES, 2)
    )


def test_what_is_refused():
    for call, message in (
        (lambda: waveform(1, 0), "base must be above 0"),
        (lambda: waveform(1, 10, 7), "head_dim must be even"),
        (lambda: peaks(np.zeros((2, 2))), r"values must be \(N,\)"),
        (lambda: peaks([1.0], gap=0), "gap must be at least 1"),
        (lambda: search_bases([1, 2], count=3), "count must be from 2 to the number of candidates, 2"),
        (lambda: search_bases(distances=(5, 5)), "distances must be two rising"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
