"""Encoders and positions against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.models.fusion.fusion_cases import INPUTS, H, backward, features, fusion, lengths_mask
from trainer.batch import Features
from trainer.models.fusion.encoders import SECONDS_PER_TOKEN, Encoders, FeatureEncoder, sinusoidal_positions

MODALITIES = ("text", "audio", "video")


@pytest.mark.parametrize("width", [2, 6, 7, 64])
def test_positions_equal_loops(width):
    times = [0.0, 0.013, 1.0, 9.6, 250.0]
    got = sinusoidal_positions(torch.tensor([times]), width)[0]
    n = math.ceil(width / 2)
    for t, row in zip(times, got.tolist(), strict=True):
        for i in range(n):
            wavelength = 0.1 * 1000 ** (i / (n - 1)) if n > 1 else 0.1
            angle = 2 * math.pi * np.float32(t) / wavelength
            assert row[i] == pytest.approx(math.sin(angle), abs=3e-3)  # float32 angles up to 16,000 rad
            if n + i < width:
                assert row[n + i] == pytest.approx(math.cos(angle), abs=3e-3)


def test_positions_are_those_of_the_common_axis():
    """The same second has the same position whatever the frame rate."""
    audio = sinusoidal_positions(torch.arange(20)[None] / 10.0, 16)
    video = sinusoidal_positions(torch.arange(10)[None] / 5.0, 16)
    torch.testing.assert_close(audio[:, ::2], video, rtol=0, atol=1e-5)


def test_positions_are_computed_in_float32_under_half_precision():
    """Late times: in bfloat16 100.1 s and 100.2 s would be one moment."""
    net = FeatureEncoder(3, 16).bfloat16()
    time = torch.tensor([[100.1, 100.2]])
    stream = net(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bool), time)
    assert stream.values_BTD.dtype == torch.bfloat16
    torch.testing.assert_close(stream.position_BTD, sinusoidal_positions(time, 16).bfloat16(), rtol=0, atol=0)
    assert not torch.equal(stream.position_BTD[0, 0], stream.position_BTD[0, 1])


def test_encoder_equals_numpy():
    torch.manual_seed(0)
    net = FeatureEncoder(5, 8).double()
    with torch.no_grad():
        net.norm.weight.normal_()
        net.norm.bias.normal_()
    given = features([4, 7], 7, 5, dtype=torch.float64)
    stream = net(given.values_BTF, given.mask_BT, given.time_BT)
    weight, bias, gain, shift = (p.detach().numpy() for p in net.parameters())
    position = sinusoidal_positions(given.time_BT, 8).double().numpy()
    for b, length in enumerate([4, 7]):
        for t in range(7):
            raw = weight @ given.values_BTF[b, t].numpy() + bias
            content = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-5) * gain + shift
            expected = content + position[b, t] if t < length else np.zeros(8)
            np.testing.assert_allclose(stream.values_BTD[b, t].detach().numpy(), expected, atol=1e-12)
    torch.testing.assert_close(stream.content_BTD + stream.position_BTD, stream.values_BTD)


def test_text_positions_are_token_indices_on_a_nominal_axis():
    torch.manual_seed(0)
    net = Encoders({"meld": {"audio": 0, "video": 0}}, ("text",), H, 8)
    mask = lengths_mask([4], 4)
    empty = features([0], 1, 0)
    streams, _ = net("meld", torch.randn(1, 4, H), mask, {"audio": empty, "video": empty})
    expected = sinusoidal_positions(torch.arange(4)[None] * SECONDS_PER_TOKEN, 8)
    torch.testing.assert_close(streams["text"].position_BTD, expected)


def test_text_embeddings_are_detached():
    net = fusion()
    words = torch.randn(2, 4, H, requires_grad=True)
    mask = lengths_mask([4, 2], 4)
    out = net("meld", words, mask, features([3, 2], 3, 5), features([3, 2], 3, 3))
    out.pseudo_BKH.sum().backward()
    assert words.grad is None


def test_names_are_stable():
    net = Encoders({"meld": {"audio": 5, "video": 3}, "mosi": {"audio": 4, "video": 0}}, MODALITIES, H, 8)
    layers = {name.removesuffix(".weight") for name, _ in net.named_parameters() if name.endswith("project.weight")}
    assert layers == {"text.project", "meld.audio.project", "meld.video.project", "mosi.audio.project"}


def test_other_tasks_encoders_take_part_with_nothing():
    net = Encoders(INPUTS, MODALITIES, H, 8)
    args = (torch.randn(2, 4, H), lengths_mask([4, 2], 4))
    given = {"audio": features([3, 2], 3, 5), "video": features([3, 2], 3, 3)}
    streams, unused_param_zero = net("meld", *args, given)
    assert list(streams) == list(MODALITIES)
    assert unused_param_zero.shape == ()
    assert unused_param_zero.item() == 0.0
    unused_param_zero.backward()
    for name, parameter in net.mosi.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert all(p.grad is None for p in net.meld.parameters())


def test_a_modality_that_the_task_does_not_have_is_missing():
    net = Encoders(INPUTS, MODALITIES, H, 8)
    given = {"audio": features([3, 2], 3, 4), "video": features([0, 0], 1, 0)}
    streams, _ = net("mosi", torch.randn(2, 4, H), lengths_mask([4, 2], 4), given)
    assert not streams["video"].mask_BT.any()
    assert not streams["video"].values_BTD.any()
    assert streams["video"].values_BTD.shape == (2, 1, 8)


def test_features_of_a_modality_nobody_built_are_not_read():
    net = fusion(modalities=["text", "audio"])
    batch = ("meld", torch.randn(2, 4, H), lengths_mask([4, 2], 4), features([3, 2], 3, 5), features([3, 2], 3, 77))
    _, grads = backward(net, batch)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_faults_say_what_is_wrong():
    net = fusion()
    args = (torch.randn(1, 4, H), lengths_mask([4], 4))
    with pytest.raises(ValueError, match="no encoders for task 'cherma'; it has meld, mosi"):
        net("cherma", *args, features([3], 3, 5), features([3], 3, 3))
    with pytest.raises(ValueError, match="meld: audio has 6 features per frame; its encoder takes 5"):
        net("meld", *args, features([3], 3, 6), features([3], 3, 3))
    with pytest.raises(ValueError, match=r"cannot use: train, a\.b; rename"):
        Encoders({"train": {}, "a.b": {}, "fine-task": {}}, MODALITIES, H, 8)


def test_frames_in_the_middle_can_be_missing():
    """Repaired frames are masked inside the clip; their content is never read."""
    net = FeatureEncoder(3, 8)
    mask = torch.tensor([[True, False, True]])
    values = torch.randn(1, 3, 3)
    other = values.clone()
    other[0, 1] = math.inf
    a, b = (net(v, mask, torch.zeros(1, 3)).values_BTD for v in (values, other))
    assert torch.equal(a, b)
    assert not a[0, 1].any()


def test_double_features_and_half_network():
    net = FeatureEncoder(3, 8).half()
    given = Features(torch.randn(1, 2, 3, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2))
    assert net(given.values_BTF, given.mask_BT, given.time_BT).values_BTD.dtype == torch.float16


def test_questions_about_the_same_samples_share_encoders():
    """Both train one set under the dataset's name; the zero frame of the others is that of the other dataset alone."""
    widths = {"audio": 5, "video": 0}
    inputs = {"valence": widths, "meld": widths, "arousal": widths}
    torch.manual_seed(0)
    net = Encoders(inputs, ("text", "audio"), H, 8, {"valence": "corpus", "arousal": "corpus"})
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"text", "corpus", "meld"}
    audio, empty = features([3], 3, 5), features([0], 1, 0)
    given = (torch.randn(1, 2, H), lengths_mask([2], 2), {"audio": audio, "video": empty})
    one, two, other = (net(task, *given)[0]["audio"].values_BTD for task in ("valence", "arousal", "meld"))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    streams, zero = net("arousal", *given)
    (streams["audio"].values_BTD.square().sum() + zero).backward()
    assert net.get_parameter("corpus.audio.project.weight").grad.abs().sum() > 0
    assert net.get_parameter("meld.audio.project.weight").grad.abs().sum() == 0
    with pytest.raises(ValueError, match="other widths than those with which they share encoders: valence"):
        Encoders(
            {**inputs, "valence": {"audio": 4, "video": 0}},
            ("audio",),
            H,
            8,
            {"valence": "corpus", "arousal": "corpus"},
        )
