"""S085: the autoencoder against transformers' ViTMAE, the front end against formulas, the analysis against loops."""

from __future__ import annotations

import math

import pytest
import torch

import glocal
from glocal.inspect import head_reach, pwcca
from glocal.models.audio.mwmae import SpectrogramMAE, log_mel, mel_filters
from glocal.nn import MultiWindowAttention
from glocal.nn.sincos import sincos, sincos_grid


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"dim": 24, "depth": 2, "num_heads": 3, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 8}
    return SpectrogramMAE(**(sizes | options)).double().eval()


def test_patches_are_in_time_order_and_five_make_a_step():
    model = tiny()
    x = torch.arange(200 * 80, dtype=torch.float64).view(1, 200, 80)
    patches = model.patches(x)
    assert patches.shape == (1, 250, 64)
    for token in (0, 1, 5, 249):
        t, f = divmod(token, 5)
        assert torch.equal(patches[0, token].view(4, 16), x[0, 4 * t : 4 * t + 4, 16 * f : 16 * f + 16])


def test_positions_of_time_and_frequency():
    grid = sincos_grid(50, 5, 8).view(50, 5, 8)
    for t, f in ((0, 0), (3, 4), (49, 1)):
        want = [fn(at * rate) for at in (f, t) for fn in (math.sin, math.cos) for rate in (1, 0.01)]
        torch.testing.assert_close(grid[t, f], torch.tensor(want))
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_grid(2, 2, 6)
    with pytest.raises(ValueError, match="multiple of 2"):
        sincos(torch.zeros(1), 3)


def vit_mae(model, size, patch, ratio):
    """transformers' network with our weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=size,
        patch_size=patch,
        num_channels=1,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=8,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        mask_ratio=ratio,
        attn_implementation="sdpa",
    )
    peer = transformers.ViTMAEForPreTraining(config).double().eval()
    with torch.no_grad():
        embeddings = peer.vit.embeddings
        embeddings.patch_embeddings.projection.weight.copy_(model.embed.weight.view(24, 1, patch, patch))
        embeddings.patch_embeddings.projection.bias.copy_(model.embed.bias)
        embeddings.cls_token.copy_(model.cls)
        pairs = [
            (peer.vit.layernorm, model.norm),
            (peer.decoder.decoder_embed, model.decoder_embed),
            (peer.decoder.decoder_norm, model.decoder_norm),
            (peer.decoder.decoder_pred, model.head),
        ]
        for theirs, mine in (
            *zip(peer.vit.layers if hasattr(peer.vit, "layers") else peer.vit.encoder.layer, model.blocks, strict=True),
            *zip(peer.decoder.decoder_layers, model.decoder, strict=True),
        ):
            pairs += [(theirs.layernorm_before, mine.norm1), (theirs.layernorm_after, mine.norm2)]
            pairs += [(theirs.mlp.fc1, mine.mlp.fc1), (theirs.mlp.fc2, mine.mlp.fc2)]
            names = ("q_proj", "k_proj", "v_proj", "o_proj")
            pairs += [(getattr(theirs.attention, n), getattr(mine.attention, n)) for n in names]
        for theirs, mine in pairs:
            theirs.load_state_dict(mine.state_dict())
        peer.decoder.mask_token.copy_(model.mask_token)
        from transformers.models.vit_mae import modeling_vit_mae

        side = size // patch
        rows_first = modeling_vit_mae.build_2d_sinusoidal_position_embedding(side, side, 24, cls_token=True)
        embeddings.position_embeddings.copy_(rows_first.roll(12, 1))  # its pretrained weights have columns first
        # Its decoder has 2-D positions, MW-MAE's 1-D ones: any will do, if both have the same.
        model.decoder_position.copy_(torch.randn_like(model.decoder_position))
        peer.decoder.decoder_pos_embed.copy_(model.decoder_position)
    return peer


@pytest.mark.parametrize("ratio", [0.8, 0.75])
def test_masking_and_reconstruction_are_vit_maes(ratio):
    model = tiny(frames=32, bins=32, patch=(4, 4), windows=(0,) * 8, class_token=True, mask_ratio=ratio)
    peer = vit_mae(model, 32, 4, ratio)
    torch.testing.assert_close(model.position, peer.vit.embeddings.position_embeddings[0, 1:].double())
    x, noise = torch.randn(3, 32, 32, dtype=torch.float64), torch.rand(3, 64)
    mine, theirs = model(x, noise=noise), peer(x[:, None], noise=noise)
    assert torch.equal(mine.hidden, theirs.mask.bool())
    torch.testing.assert_close(mine.prediction, theirs.logits)
    torch.testing.assert_close(mine.loss, theirs.loss)


def test_a_fifth_is_seen_and_only_that():
    model = tiny()
    x, noise = torch.randn(2, 200, 80, dtype=torch.float64), torch.rand(2, 250)
    out = model(x, noise=noise)
    assert out.hidden.sum(1).tolist() == [200, 200]  # 250 * (1 - .8) in floats is less than 50
    other = x.clone()
    token = int(out.hidden[0].nonzero()[17])
    t, f = divmod(token, 5)
    other[0, 4 * t : 4 * t + 4, 16 * f : 16 * f + 16] += 1
    again = model(other, noise=noise)
    assert torch.equal(again.prediction, out.prediction) and again.loss != out.loss
    error = (out.prediction - model.patches(x)).square().mean(-1)
    torch.testing.assert_close(out.loss, error[out.hidden].mean())


def test_learns_tones():
    torch.manual_seed(0)
    model = tiny(depth=1, decoder_depth=1).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    time = torch.arange(32000) / 16000
    pitch = torch.linspace(100, 4000, 8)[:, None]
    x = log_mel(torch.sin(6.2832 * pitch * time * (1 + time / 4)))
    noise = torch.rand(8, 250)
    losses = []
    for _ in range(25):
        loss = model(x, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_features_are_the_encoders_of_all_patches_by_step():
    model = tiny()
    x = torch.randn(2, 300, 80, dtype=torch.float64)
    features = model.features(x)
    assert features.shape == (2, 75, 5 * 24)
    states = model.encode(model.embed(model.patches(x[:, :200])) + model.position)
    torch.testing.assert_close(features[1, 7], states[1, 35:40].flatten())
    torch.testing.assert_close(features[:, 50:], model.features(x[:, 200:]))
    plain = tiny(windows=(0,) * 8, class_token=True)
    assert plain.features(x).shape == features.shape


def test_windows_and_shift_of_the_decoder():
    model = tiny(shift=True)
    kinds = [block.attention for block in model.decoder]
    assert all(isinstance(kind, MultiWindowAttention) for kind in kinds)
    assert kinds[0].windows == (2, 5, 10, 25, 50, 125, 0, 0)
    assert [kind.shift for kind in kinds] == [False, True]


def test_published_sizes():
    with torch.device("meta"):
        base, mae = glocal.create("mwmae_base"), glocal.create("mae_base")
    block = 12 * 768**2 + 13 * 768
    encoder = 64 * 768 + 768 + 12 * block + 2 * 768
    bias = 4 * sum(2 * w - 1 for w in (2, 5, 10, 25, 50, 125))
    decoder = 768 * 384 + 384 + 384 + 4 * (12 * 384**2 + 13 * 384) + bias + 2 * 384 + 384 * 64 + 64
    count = sum(p.numel() for p in base.parameters())
    assert count == encoder + decoder
    assert sum(p.numel() for p in mae.parameters()) == count - bias + 768
    for name in ("tiny", "small", "medium", "large", "huge"):
        with torch.device("meta"):
            assert glocal.create(f"mwmae_{name}", depth=1, decoder_depth=1).grid == (50, 5)
            assert not any(glocal.create(f"mae_{name}", depth=1).decoder[0].attention.windows)


def test_refuses():
    with pytest.raises(ValueError, match="class_token"):
        tiny(class_token=True)
    with pytest.raises(ValueError, match="frames must be a multiple"):
        tiny(frames=201)
    with pytest.raises(ValueError, match="mask_ratio"):
        tiny(mask_ratio=1.0)
    model = tiny()
    with pytest.raises(ValueError, match="200 frames"):
        model(torch.randn(1, 100, 80).double())
    with pytest.raises(ValueError, match="spectrogram must be"):
        model.features(torch.randn(1, 30, 80).double())
    with pytest.raises(ValueError, match="noise must be"):
        model(torch.randn(1, 200, 80).double(), noise=torch.rand(1, 5))


def test_mel_filters_are_triangles_by_the_formula():
    filters = mel_filters(20, 257, 16000, 50.0, 8000.0)
    mel = [2595 * math.log10(1 + f / 700) for f in (50, 8000)]
    corner = [700 * (10 ** ((mel[0] + n * (mel[1] - mel[0]) / 21) / 2595) - 1) for n in range(22)]
    for bin_ in (0, 7, 19):
        for at in (2, 40, 200, 255):
            f, (a, b, c) = at * 8000 / 256, corner[bin_ : bin_ + 3]
            want = max(0.0, (f - a) / (b - a) if f <= b else (c - f) / (c - b))
            assert float(filters[at, bin_]) == pytest.approx(want, abs=1e-6)


def test_log_mel_is_transformers():
    audio = pytest.importorskip("transformers.audio_utils")
    wave = torch.randn(4000, dtype=torch.float64)
    bank = audio.mel_filter_bank(257, 80, 50.0, 8000.0, 16000, norm=None, mel_scale="htk")
    theirs = audio.spectrogram(
        wave.numpy(),
        audio.window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        mel_filters=bank,
        mel_floor=0.0,
        dtype="float64",
    )
    mine = log_mel(wave, standardize=False)
    theirs = torch.log(torch.from_numpy(theirs).T[:25] + torch.finfo(torch.float64).eps)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)  # our filters are float32


def test_a_tone_is_in_its_band_and_clips_are_standardized():
    time = torch.arange(32000) / 16000
    filters = mel_filters(80, 257, 16000, 50.0, 8000.0)
    for pitch in (300, 1000, 5000):
        x = log_mel(torch.sin(2 * math.pi * pitch * time), standardize=False)
        band = int(filters[round(pitch / 8000 * 256)].argmax())
        assert x.shape == (200, 80) and abs(int(x[100].argmax()) - band) <= 1
    x = log_mel(torch.randn(2, 32000))
    torch.testing.assert_close(x.mean((1, 2)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((1, 2)), torch.ones(2), atol=1e-3, rtol=0)
    assert torch.equal(log_mel(torch.ones(2, 3, 3200)), log_mel(torch.ones(3200)).expand(2, 3, -1, -1))
    with pytest.raises(ValueError, match="high must"):
        log_mel(torch.randn(4000), 8000)
    with pytest.raises(ValueError, match="at least 400 samples"):
        log_mel(torch.randn(399))


def test_reach_of_heads_against_loops():
    torch.manual_seed(0)
    layer = MultiWindowAttention(16, 2, windows=(4, 0)).double()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    distance, entropy = head_reach(layer, x)
    q, k, values = (t.detach() for t in (*layer.project(x, x, None, None)[:2], layer.bias[0]))
    for h in range(2):
        far, bits = 0.0, 0.0
        for i in range(8):
            seen = [j for j in range(8) if h == 1 or j // 4 == i // 4]
            scores = [float(q[0, h, i] @ k[0, h, j]) * layer.scale for j in seen]
            if h == 0:
                scores = [s + float(values[j - i + 3]) for s, j in zip(scores, seen, strict=True)]
            total = sum(math.exp(s) for s in scores)
            shares = [math.exp(s) / total for s in scores]
            far += sum(p * abs(i - j) for p, j in zip(shares, seen, strict=True)) / 8
            bits -= sum(p * math.log(p) for p in shares) / 8
        assert float(distance[h]) == pytest.approx(far) and float(entropy[h]) == pytest.approx(bits)


def test_pwcca_knows_shared_directions():
    torch.manual_seed(0)
    a, b = torch.randn(400, 3), torch.randn(400, 3)
    assert pwcca(a, a @ torch.randn(3, 3) + 5) == pytest.approx(1.0)  # linear maps and offsets do not matter
    assert pwcca(a, b) < 0.2
    half = torch.cat([a[:, :1], b[:, 1:]], 1)
    assert pwcca(a, b) < pwcca(a, half) < 1
    # For one column each it is the correlation.
    x, y = a[:, :1], a[:, :1] + b[:, :1]
    assert pwcca(x, y) == pytest.approx(abs(float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1])), abs=1e-5)
