"""Which action the logits choose by the threshold, by hand, and a frame's tokens by its patches' means."""

import pytest
import torch

from glocal.steer.actions import Actions, choose, frame_tokens

SILENT, RESPOND, ASK = 11, 12, 13
THREE = Actions(SILENT, RESPOND, ASK)


@pytest.mark.parametrize(
    "shares, threshold, may_ask, expected",
    [
        ((0.6, 0.1, 0.3), 0.5, True, SILENT),
        ((0.6, 0.1, 0.3), 0.7, True, ASK),
        ((0.6, 0.3, 0.1), 0.7, True, RESPOND),
        ((0.3, 0.2, 0.5), 0.0, True, ASK),
        ((0.3, 0.2, 0.5), 0.0, False, SILENT),
        ((0.3, 0.2, 0.5), 0.61, False, RESPOND),
        ((1.0, 0.0, 0.0), 1.1, True, RESPOND),
    ],
)
def test_the_threshold_rule(shares, threshold, may_ask, expected):
    logits = torch.full((2, 20), 50.0)  # other tokens do not count
    logits[:, [SILENT, RESPOND, ASK]] = torch.tensor(shares).clamp(min=1e-9).log()
    chosen, silence = choose(logits, THREE, threshold, may_ask=may_ask)
    assert chosen.tolist() == [expected] * 2
    assert float(silence[0]) == pytest.approx(shares[0] / (sum(shares) if may_ask else sum(shares[:2])), abs=1e-6)


def test_frames_as_tokens():
    patches = torch.randn(6, 9, 5)
    found = frame_tokens(patches, 3)
    assert found.shape == (10, 5) and torch.allclose(found[0], patches.mean((0, 1)))
    assert torch.allclose(found[1 + 4], patches[2:4, 3:6].mean((0, 1)), atol=1e-6)
    assert torch.equal(frame_tokens(patches, 7, summary=torch.ones(5))[0], torch.ones(5))
    assert frame_tokens(patches.bfloat16(), 7).shape == (50, 5)


def test_bad_input():
    with pytest.raises(ValueError, match="actions must be different tokens"):
        Actions(1, 1)
