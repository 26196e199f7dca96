"""The fingerprint of 4-bit weights is that of what was read: no number of threads changes it, every other weight and setting does."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file

from tests.models.tiny_models import save_family
from trainer.checkpoint.state import CheckpointState, LossMonitorState, Position, SelectionState, is_other_base
from trainer.config import AdapterConfig, BackboneConfig
from trainer.models.backbone.causal_lm import Backbone, base_fingerprint, build_backbone
from trainer.models.backbone.fingerprint import READ_BLOCK, SOURCE, BaseFingerprint, measure_read

THREADS = (1, 2, 3)


def uneven(*shape: int) -> torch.Tensor:
    """Weights whose blocks differ so much in scale that the mean of the scales is rounded at every step of its sum."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=random) * torch.exp(3 * torch.randn((shape[0], 1), generator=random)) * 0.02


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, three matrices of which have enough scales for torch to sum them in several threads."""
    folder = save_family(
        "qwen2",
        tmp_path_factory.mktemp("models") / "large",
        hidden_size=512,
        intermediate_size=8192,
        num_hidden_layers=1,
    )
    state = load_file(folder / "model.safetensors")
    for name in state:
        if ".mlp." in name:
            state[name] = uneven(*state[name].shape).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build(folder: Path, threads: int = 1, **changes: object) -> Backbone:
    torch.set_num_threads(threads)
    config = BackboneConfig.model_validate({"name": str(folder), "quantization": "nf4", **changes})
    return build_backbone(config, AdapterConfig(), torch.bfloat16, "cpu")


def test_the_mean_of_the_scales_hangs_on_threads_and_what_was_read_does_not() -> None:
    weight = uneven(8192, 512)
    offsets, read = set(), set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        packed = Params4bit(weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
        offsets.add(float(packed.quant_state.offset))
        read.add(measure_read(weight, "nf4"))
    assert len(offsets) > 1, "else this tensor shows nothing"
    assert len(read) == 1


def test_the_hash_of_what_was_read_is_the_one_of_its_blocks() -> None:
    values = torch.arange(2 * READ_BLOCK + 5, dtype=torch.int32).to(torch.float32)
    data = values.numpy().tobytes()
    step = 4 * READ_BLOCK
    digests = "".join(hashlib.sha256(data[i : i + step]).hexdigest() for i in range(0, len(data), step))
    expected = hashlib.sha256(digests.encode()).hexdigest()
    assert measure_read(values, "as nf4") == (f"torch.float32 ({len(values)},) {expected} as nf4", True)
    values[-1] = float("nan")
    assert not measure_read(values, "as nf4")[1]


def test_a_model_has_one_fingerprint_at_every_number_of_threads(large: Path) -> None:
    found = [build(large, threads).fingerprints for threads in THREADS]
    assert len({one.stored for one in found}) > 1, "else these weights show nothing"
    assert len({one.source for one in found}) == 1
    assert found[0].source.startswith(SOURCE)
    assert not found[0].exact


def test_weights_that_are_quantised_once_or_not_at_all_are_stored_alike_everywhere(large: Path) -> None:
    single = [build(large, threads, double_quantization=False).fingerprints for threads in (1, 3)]
    assert single[0] == single[1]
    assert single[0].exact
    plain = build(large, quantization="none")
    assert plain.fingerprint == plain.fingerprints.stored == base_fingerprint(plain)
    assert plain.fingerprints.exact


def test_a_bit_that_quantising_drops_is_another_weight(large: Path, tmp_path: Path) -> None:
    first = build(large).fingerprints
    changed = save_family("qwen2", tmp_path / "m", hidden_size=512, intermediate_size=8192, num_hidden_layers=1)
    state = load_file(large / "model.safetensors")
    weight = state["model.layers.0.mlp.up_proj.weight"].view(-1)
    place = int(weight[:64].abs().argmin())  # far from its block's scale
    weight[place] *= 1.01
    save_file(state, changed / "model.safetensors", metadata={"format": "pt"})
    other = build(changed).fingerprints
    assert other.stored == first.stored
    assert other.source != first.source


def checkpoint(base: str, **settings: object) -> CheckpointState:
    return CheckpointState(
        tasks=["meld"], data={}, base=base, world=1, zero=0, step=1, health=LossMonitorState(), position=Position(),
        settings={f"model.backbone.{key}": value for key, value in settings.items()},
        selection=SelectionState(best=None, validations={}, nll={}),
    )  # fmt: skip


def test_what_an_earlier_version_recorded_is_compared_with_what_is_stored(caplog: pytest.LogCaptureFixture) -> None:
    doubly = {"quantization": "nf4", "double_quantization": True}
    now = BaseFingerprint("read:aa", "bb", exact=False)
    for base in ("read:aa", "bb"):
        assert not is_other_base(checkpoint(base, **doubly), now, Path("step"))
    assert is_other_base(checkpoint("read:ab", **doubly), now, Path("step"))
    assert is_other_base(checkpoint("cc", quantization="none"), now, Path("step")), "another quantisation"
    once = BaseFingerprint("read:aa", "bb", exact=True)
    assert is_other_base(checkpoint("cc", quantization="nf4", double_quantization=False), once, Path("step"))
    plain = BaseFingerprint("bb", "bb", exact=True)
    assert is_other_base(checkpoint("cc", quantization="none"), plain, Path("step"))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert not is_other_base(checkpoint("cc", **doubly), now, Path("step"))
    assert "hangs on the number of threads" in caplog.text
    assert "cannot be told" in caplog.text
