"""Reports of eye trackers, written by hand; generated readers against what they were made from."""

import pytest
import torch

from glocal.inspect import SACCADE_TABLE, bigram_overlap, read_saccades, simulated_readers

REPORT = """RECORDING_SESSION_LABEL,TRIAL_INDEX,CURRENT_FIX_INDEX,CURRENT_FIX_INTEREST_AREA_ID,CURRENT_FIX_DURATION
ann,1,1,1,200
ann,1,2,2,150
ann,1,3,2,50
ann,1,4,1,100
ann,1,5,.,80
ann,1,6,3,90
ann,2,1,1,300
bob,1,1,3,210
bob,1,2,1,220
ann,2,2,2,60
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "report.csv").write_text(text)
        return tmp_path / "report.csv"

    return write


def test_a_fixation_report(write):
    """A fixation beside the text, another trial and another reader each end the chain."""
    found = read_saccades(write(REPORT))
    assert found.readers == ("ann", "bob") and found.sentences == ("1", "2")
    assert found.lengths.tolist() == [3, 2] and found.seen.tolist() == [[True, True], [True, False]]
    wanted = torch.zeros(2, 2, 3, 3).double()
    times = torch.zeros_like(wanted)
    for s, b, i, j, duration in [(0, 0, 0, 1, 150), (0, 0, 1, 1, 50), (0, 0, 1, 0, 100), (1, 0, 2, 0, 220)]:
        wanted[s, b, i, j] += 1
        times[s, b, i, j] += duration
    assert torch.equal(found.counts, wanted) and torch.equal(found.durations, times)
    alone = found.complete()
    assert (
        alone.readers == ("ann",) and torch.equal(alone.counts, wanted[:1]) and torch.equal(alone.durations, times[:1])
    )


def test_a_table_of_saccades_and_lengths(write):
    path = write("reader\tsentence\tfrom\tto\nann\tb\t2\t1\nann\tb\t2\t1\nann\ta\t1\t1\n")
    found = read_saccades(path, SACCADE_TABLE, lengths={"a": 4, "b": 2, "c": 3})
    assert found.sentences == ("a", "b", "c") and found.lengths.tolist() == [4, 2, 3] and found.durations is None
    assert found.counts.shape == (1, 3, 4, 4) and found.counts[0, 1, 1, 0] == 2 and found.counts.sum() == 3
    assert found.complete().readers == ()


def test_bad_reports(write):
    with pytest.raises(ValueError, match="has no column 'CURRENT_FIX_INTEREST_AREA_ID'; it has RECORDING"):
        read_saccades(write(REPORT.replace("CURRENT_FIX_INTEREST_AREA_ID", "AREA")))
    with pytest.raises(ValueError, match=r"AREA_ID must be a word's number, from 1, or '.'; line 2 has '0'"):
        read_saccades(write(REPORT.replace("1,1,1,200", "1,1,0,200")))
    with pytest.raises(ValueError, match="DURATION must be in milliseconds; line 2 has 'long'"):
        read_saccades(write(REPORT.replace("1,1,1,200", "1,1,1,long")))
    with pytest.raises(ValueError, match="lengths must have 3 words of sentence '1'; it has 2"):
        read_saccades(write(REPORT), lengths={"1": 2, "2": 2})
    with pytest.raises(ValueError, match="at least one row below the header"):
        read_saccades(write(REPORT.split("\n")[0] + "\n"))
    with pytest.raises(ValueError, match="columns must say what reader, sentence, from, to are called; it had reader"):
        read_saccades(write(REPORT), {"reader": "RECORDING_SESSION_LABEL"})


def test_generated_readers_follow_what_is_expected():
    looks = torch.rand(3, 6, 6).double() * 5
    lengths = torch.tensor([6, 4, 1])
    found = simulated_readers(looks, lengths, 4000, torch.Generator().manual_seed(0))
    for b, n in enumerate(lengths.tolist()):
        mean = found.counts[:, b].mean(0)
        assert (mean[:n, :n] - looks[b, :n, :n]).abs().max() < 0.2
        assert mean[n:].sum() == 0 and mean[:, n:].sum() == 0
    with pytest.raises(ValueError, match="readers must be at least 1; it was 0"):
        simulated_readers(looks, lengths, 0, torch.Generator())
    with pytest.raises(ValueError, match=r"looks must be \(B, n, n\) and not below 0"):
        simulated_readers(-looks, lengths, 1, torch.Generator())
    with pytest.raises(ValueError, match=r"lengths must be \(3,\), at most 6"):
        simulated_readers(looks, lengths + 1, 1, torch.Generator())


def test_overlap_of_letters():
    found = bigram_overlap(["a", "banana", "ban", "nab", "ana"])
    assert found[0].sum() == 0 and found[:, 0].sum() == 0  # no pair of letters
    assert found[2, 1].item() == pytest.approx(2 / 3) and found[4, 1].item() == pytest.approx(2 / 3)
    assert found[3, 1].item() == pytest.approx(1 / 4) and found.triu().sum() == 0
