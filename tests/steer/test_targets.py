"""Weights of intervals sum to what balances silence and speech; frames that ask are those of the rule, one by one."""

import pytest

from glocal.steer.targets import ask_high_frames, interval_targets


@pytest.mark.parametrize("spans", [[(10, 15)], [(3, 9), (20, 22)], [(0, 0)], [(5, 39)]])
def test_stage_one_weights(spans):
    targets, weights = interval_targets(40, spans, silent=2, respond=7)
    inside = [n for low, high in spans for n in range(low, high + 1)]
    assert [n for n in range(40) if targets[n] == 7] == inside and set(targets.tolist()) <= {2, 7}
    assert bool((weights[targets == 2] == 1).all())
    for low, high in spans:
        part = weights[low : high + 1].double()
        assert float(part.sum()) == pytest.approx((40 - len(inside)) / len(inside), rel=1e-5)
        if high > low:
            assert float(part[0] / part[-1]) == pytest.approx(0.3, rel=1e-5)
            assert part.diff().tolist() == pytest.approx([float(part.diff()[0])] * (high - low), rel=1e-3)


def test_stage_two_frames():
    asks = ask_high_frames(20, [(12, 14)], changes=[2, 6, 16], errors=[1, 8, 16, 13])
    assert asks.nonzero()[:, 0].tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16]


def test_bad_input():
    with pytest.raises(ValueError, match="overlap"):
        interval_targets(9, [(1, 3), (3, 4)], silent=0, respond=1)
    with pytest.raises(ValueError, match="first and last of 9 frames"):
        interval_targets(9, [(1, 9)], silent=0, respond=1)
