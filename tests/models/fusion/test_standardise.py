"""Standardised features against scikit-learn; what keeps and what changes the statistics of an encoder."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from tests.models.fusion.fusion_cases import features, fusion, inputs
from tests.models.tiny_models import make_model, save_family
from trainer.batch import Standardisation
from trainer.checkpoint.weights import load_trainable_state, trainable_tensors
from trainer.models.fusion.encoders import FeatureEncoder
from trainer.models.fusion.standardise import Standardise, standardise_modules

STATISTICS = Standardisation(np.array([1e5, 0.5], "f4"), np.array([2.0, 1e4], "f4"), 10.0)
NAME = "meld.audio.standardise.mean_F"


def statistics(width: int, seed: int = 0) -> Standardisation:
    rng = np.random.default_rng(seed)
    return Standardisation(rng.standard_normal(width).astype("f4"), rng.uniform(0.1, 9, width).astype("f4"), 10.0)


def test_an_encoder_of_raw_features_is_one_of_standardised_features_by_scikit_learn():
    torch.manual_seed(0)
    given = features([40, 70], 70, 5, dtype=torch.float64)
    raw = given.values_BTF * torch.tensor([4e-5, 48.0, 1.0, 3.0, 1e3]) + torch.tensor([0.0, 1e5, 2.0, 0.0, -7.0])
    frames = raw[given.mask_BT].numpy()
    scaler = StandardScaler().fit(frames)
    plain, net = FeatureEncoder(5, 8).double(), FeatureEncoder(5, 8, standardise=True).double()
    net.load_state_dict(plain.state_dict())
    net.standardise.use(Standardisation(scaler.mean_.astype("f4"), (1 / scaler.scale_).astype("f4"), 1e9))
    ready = torch.from_numpy(scaler.transform(raw.numpy().reshape(-1, 5)).reshape(raw.shape))
    expected = plain(ready, given.mask_BT, given.time_BT).values_BTD
    torch.testing.assert_close(net(raw, given.mask_BT, given.time_BT).values_BTD, expected, rtol=1e-3, atol=1e-3)


def test_large_values_keep_their_differences_in_half_precision():
    net = FeatureEncoder(2, 16, standardise=True)
    net.standardise.use(STATISTICS)
    half = copy.deepcopy(net).bfloat16()
    assert {b.dtype for b in half.standardise.buffers()} == {torch.float32}
    assert torch.equal(half.standardise.mean_F, net.standardise.mean_F)
    values = torch.tensor([[[1e5 + 1, 0.5], [1e5 - 1, 0.5]]])
    mask, time = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    assert torch.equal(values.bfloat16()[0, 0], values.bfloat16()[0, 1])  # a cast before would have lost it
    got, expected = (n(values, mask, time).content_BTD for n in (half, net))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


def test_buffers_are_float32_whatever_the_default_is():
    try:
        torch.set_default_dtype(torch.bfloat16)
        module = Standardise(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {b.dtype for b in module.buffers()} == {torch.float32}


def test_values_are_cut_and_what_is_masked_is_not_read():
    module = Standardise(2)
    module.use(STATISTICS)
    cut = module(torch.tensor([[3e38, -3e38], [1e5 + 2, 0.5001]]))
    assert cut[0].tolist() == [10.0, -10.0]
    assert cut[1].tolist() == pytest.approx([4.0, 1.0], rel=1e-3)
    net = FeatureEncoder(2, 8, standardise=True)
    net.standardise.use(STATISTICS)
    values, mask = torch.full((1, 3, 2), 1e5), torch.tensor([[True, False, True]])
    other = values.clone()
    other[0, 1] = torch.nan
    a, b = (net(v, mask, torch.zeros(1, 3)).values_BTD for v in (values, other))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="statistics of 2 features for an encoder of 3"):
        Standardise(3).use(STATISTICS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_statistics_nothing_changes(dtype):
    """As it was: the same outputs bit by bit, and the same names in the state dict."""
    plain, net = FeatureEncoder(5, 8).to(dtype), FeatureEncoder(5, 8, standardise=True).to(dtype)
    net.load_state_dict(plain.state_dict(), strict=True)
    assert net.state_dict().keys() == plain.state_dict().keys()
    given = features([4, 7], 7, 5)
    a = plain(given.values_BTF.to(dtype), given.mask_BT, given.time_BT)
    b = net(given.values_BTF, given.mask_BT, given.time_BT)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_state_dict_decides_whether_features_are_standardised():
    with_statistics, without = fusion(), fusion()
    both = {"audio": statistics(5), "video": statistics(3)}
    with_statistics.encoders.standardise({"meld": both})
    state = {name: value.clone() for name, value in with_statistics.state_dict().items()}
    assert {n for n in state if "standardise" in n} == {
        f"encoders.meld.{m}.standardise.{b}" for m in ("audio", "video") for b in ("mean_F", "scale_F", "limit")
    }
    bare = without.state_dict()
    batch = inputs()
    expected, raw = with_statistics(*batch).pseudo_BKH, without(*batch).pseudo_BKH
    assert not torch.allclose(expected, raw)
    assert without.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(without(*batch).pseudo_BKH, expected)
    with_statistics.load_state_dict(bare, strict=True)
    assert torch.equal(with_statistics(*batch).pseudo_BKH, raw)
    assert all(module.identity for _, module in standardise_modules(with_statistics))


def test_checkpoints_bring_their_statistics_and_those_without_bring_none(tmp_path):
    folder = save_family("qwen3", tmp_path / "m")
    run, fresh, other = (make_model(folder) for _ in range(3))
    run.fusion.encoders.standardise({"one": {"audio": statistics(6), "video": statistics(5)}})
    other.fusion.encoders.standardise({"one": {"audio": statistics(6, 1)}, "two": {"audio": statistics(4, 1)}})
    before = {name: value.clone() for name, value in trainable_tensors(fresh).items()}
    state = {name: value.clone() for name, value in trainable_tensors(run).items()}
    for model in (fresh, other):  # a dataset without statistics, and one with others
        load_trainable_state(model, state)
        assert trainable_tensors(model).keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in trainable_tensors(model).items())
        flags = {name: module.identity for name, module in standardise_modules(model)}
        assert flags == {
            "fusion.encoders.one.audio.standardise": False,
            "fusion.encoders.one.video.standardise": False,
            "fusion.encoders.two.audio.standardise": True,
        }
    load_trainable_state(other, before)  # of an earlier version
    assert trainable_tensors(other).keys() == before.keys()
    partial = {name: value for name, value in state.items() if not name.endswith("one.audio.standardise.limit")}
    with pytest.raises(ValueError, match=r"missing: fusion\.encoders\.one\.audio\.standardise\.limit"):
        load_trainable_state(other, partial)
    assert all(module.identity for _, module in standardise_modules(other))  # nothing was changed
