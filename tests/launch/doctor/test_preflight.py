"""``egmf doctor``: sound things are found sound, and every planted fault is found, with what to do."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from launch.doctor import collective_probe, machine, versions
from launch.doctor.findings import Check, Findings, worst_state
from launch.doctor.machine import check_attention, check_build, check_folder, check_machine
from launch.doctor.resolved_config import ResolvedConfig, check_resolved_config
from launch.doctor.versions import PAIRS, Facts, check_pairs, check_ranges
from tests.distributed.processes import ROOT, egmf, environment, free_port
from tests.toy import prepare_toy
from trainer.config import TinyConfig, load_config
from trainer.distributed.deepspeed_config import slow_precision
from trainer.models.backbone.tiny import build_tiny

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy data, and a model folder that fits them."""
    folder = tmp_path_factory.mktemp("doctor")
    prepare_toy("meld", folder)
    build_tiny(TinyConfig(vocab_size=400), ["neutral joy anger sadness surprise fear disgust"] * 50, folder / "model")
    return folder


def asked(work: Path, *more: str) -> list[str]:
    return ["task=meld", f"data.path={work}/{{task}}", "model.backbone.tiny.vocab_size=400", *more]


def examined(work: Path, scratch: Path, *more: str) -> tuple[ResolvedConfig | None, dict[str, Check]]:
    findings = Findings()
    found = check_resolved_config(findings, TINY, asked(work, *more), scratch)
    return found, {check.name: check for check in findings.checks}


def only(findings: Findings) -> Check:
    assert len(findings.checks) == 1, findings.checks
    return findings.checks[0]


# ---- what the config asks for


def test_sound_data_and_model_are_found_sound(work: Path, tmp_path: Path) -> None:
    for more in ((), (f"model.backbone.name={work}/model",)):
        found, checks = examined(work, tmp_path / str(len(more)), *more)
        assert found is not None
        assert found.complete
        assert {check.state for check in checks.values()} == {"ok"}, checks
        assert checks["data of meld"].values["samples"]["train"] == 48
    assert checks["weights"].values["bytes"] == (work / "model" / "model.safetensors").stat().st_size


def test_every_fault_of_config_data_and_model_is_found(work: Path, tmp_path: Path) -> None:
    found, checks = examined(work, tmp_path, "train.zero=7", "train.sed=1")
    assert found is None
    assert "2 faults" in checks["config"].found
    found, checks = examined(work, tmp_path, f"data.path={tmp_path}/none", f"model.backbone.name={work}/model")
    assert found is not None
    assert not found.complete
    assert checks["data"].state == "fault"
    assert "egmf prepare" in checks["data"].found
    assert checks["weights"].state == "ok"  # one fault does not hide what else there is
    _, checks = examined(work, tmp_path, f"model.backbone.name={tmp_path}/none")
    assert "no model folder" in checks["model"].found


def damaged(work: Path, folder: Path) -> Path:
    shutil.copytree(work / "model", folder)
    return folder


def test_damaged_models_are_found(work: Path, tmp_path: Path) -> None:
    cut = damaged(work, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    missing = damaged(work, tmp_path / "gone") / "model.safetensors"
    missing.rename(missing.with_name("model-1.safetensors"))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    missing.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    small = damaged(work, tmp_path / "small") / "config.json"
    small.write_text(json.dumps({**json.loads(small.read_text()), "vocab_size": 64}))
    blind = damaged(work, tmp_path / "blind") / "tokenizer.json"  # sees an x wherever there is a word
    tokenizer = json.loads(blind.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[a-z]+"}, "content": "x"}
    blind.write_text(json.dumps(tokenizer))
    result = {}
    (damaged(work, tmp_path / "adapter") / "adapter_config.json").write_text("{}")
    (damaged(work, tmp_path / "bare") / "model.safetensors").unlink()
    several = damaged(work, tmp_path / "several")
    (several / "config.json").write_text("{")
    (several / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    (several / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for name in ("cut", "gone", "small", "blind", "adapter", "bare", "several"):
        found, checks = examined(work, tmp_path, f"model.backbone.name={tmp_path}/{name}")
        result[name] = {check.name: check.found for check in checks.values() if check.state == "fault"}
        assert name == "blind" or (found is not None and not found.complete)
    assert "model.safetensors" in result["cut"]["weights"]
    assert "model-2.safetensors is missing" in result["gone"]["weights"]
    assert "adapter_config.json lies beside a full model" in result["adapter"]["weights"]
    assert "neither model.safetensors nor" in result["bare"]["weights"]
    for part in (
        "has 3 faults",
        "config.json is no JSON",
        "model.safetensors is an HTML page",
        "tokenizer.json is a Git",
    ):
        assert part in result["several"]["model"]
    assert "more tokens than the model" in result["small"]["model"]
    assert "joy" in result["blind"]["answers of meld"]


def test_a_hub_model_that_cannot_be_had_offline_says_how(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, checks = examined(work, tmp_path, "model.backbone.name=nobody/nothing")
    assert checks["model"].state == "fault"
    assert "hf download nobody/nothing" in checks["model"].found


# ---- versions

BAD = {
    "torch and driver": (
        Facts({}, cuda=Version("13.0"), driver=Version("570.86")),
        Facts({}, cuda=Version("12.8"), driver=Version("580.65")),
    ),
    "bitsandbytes and CUDA": (
        Facts({}, cuda=Version("13.2"), bitsandbytes_libraries=frozenset({"libbitsandbytes_cuda128.so"}), quantized=True),
        Facts({}, cuda=Version("12.9"), bitsandbytes_libraries=frozenset({"libbitsandbytes_cuda128.so"}), quantized=True),
    ),
    "bitsandbytes and torch": (
        Facts({"bitsandbytes": Version("0.50"), "torch": Version("2.3.1+cu121")}),
        Facts({"bitsandbytes": Version("0.50"), "torch": Version("2.13.0+cpu")}),
    ),
    "bitsandbytes and AVX512-BF16": (
        Facts({}, flags=frozenset({"avx512_bf16"}), quantized=True),
        Facts({}, flags=frozenset({"avx512_bf16"}), quantized=False),
    ),
    "triton and numpy": (
        Facts({"triton": Version("3.6.0"), "numpy": Version("2.4.6")}),
        Facts({"triton": Version("3.9.0"), "numpy": Version("2.4.6")}),
    ),
    "deepspeed and 4-bit ZeRO-3": (
        Facts({"deepspeed": Version("0.21.0")}, quantized=True, zero=3),
        Facts({"deepspeed": Version("0.19.8")}, quantized=True, zero=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_bad_pair_is_found_and_a_good_one_is_not(pair: versions.Pair) -> None:
    bad, good = BAD[pair.name]
    assert pair.bad(bad)
    assert not pair.bad(good)
    assert pair.source
    findings = Findings()
    check_pairs(findings, bad)
    assert only(findings).name == pair.name
    assert only(findings).state == pair.state
    assert pair.advice or pair.state == "ok"


def test_packages_outside_their_range_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = Findings()
    check_ranges(findings)
    assert only(findings).state == "ok"
    wanted = ["numpy>=1.26", "torch>=9", "nothing-of-the-kind>=1", 'triton>=99; extra == "cuda"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    findings = Findings()
    check_ranges(findings)
    assert only(findings).state == "fault"
    assert "torch" in only(findings).found
    assert "nothing-of-the-kind missing" in only(findings).found
    assert "numpy" not in only(findings).found
    assert "triton" not in only(findings).found


# ---- the machine


def test_a_flash_attn_without_its_cuda_extension_is_a_warning_and_a_fault_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(TINY, ["task=meld"])
    for asked_for, state in (("auto", "warning"), ("flash_attention_2", "fault")):
        config.model.backbone.attention = asked_for  # type: ignore[assignment]
        findings = Findings()
        check_attention(findings, config)
        flash = findings.checks[0]
        assert flash.state == state
        assert "lacks its CUDA extension" in flash.found
        assert "--no-build-isolation" in flash.advice
    sys.modules.pop("flash_attn", None)
    if not torch.cuda.is_available():
        config.model.backbone.attention = "flex"
        findings = Findings()
        check_attention(findings, config)
        (flex,) = [check for check in findings.checks if check.name == "attention"]
        assert flex.state == "fault"
        assert "needs a CUDA device" in flex.found


def test_too_little_shared_memory_and_too_many_processes_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BUFFER", 1 << 60)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # NCCL needs it, gloo does not
    findings = Findings()
    check_machine(findings, 4096)
    processor, memory = findings.checks
    assert processor.state == "warning"
    assert "use fewer" in processor.advice
    assert memory.state == "fault"
    assert "--shm-size" in memory.advice
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    findings = Findings()
    check_machine(findings, 4096)
    assert findings.checks[1].state == "ok"


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    for place, state in ((tmp_path / "runs" / "x", "ok"), (Path("/proc/runs/x"), "fault")):
        findings = Findings()
        check_folder(findings, place)
        assert only(findings).state == state
    assert list(tmp_path.iterdir()) == []


def test_missing_compilers_and_stale_ops_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    op = tmp_path / "cpu_adam"
    op.mkdir()
    (op / "cpu_adam.so").touch()
    (op / "build.ninja").write_text("cflags = -isystem /another/torch/include")
    config = load_config(TINY, ["task=meld", "train.offload=cpu"])
    findings = Findings()
    check_build(findings, config)
    assert [check.state for check in findings.checks] == ["ok", "warning"]
    assert "another torch" in findings.checks[1].found
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = Findings()
    check_build(findings, None)
    assert findings.checks[0].state == "ok"  # nothing that is compiled is used
    findings = Findings()
    check_build(findings, config)
    assert findings.checks[0].state == "fault"
    assert "C++ compiler" in findings.checks[0].found


def test_a_check_that_breaks_is_one_fault_and_not_the_end() -> None:
    findings = Findings()
    with findings.explained("machine", "one"):
        raise KeyError("x")
    findings.add("machine", "two", "ok", "fine")
    assert [check.state for check in findings.checks] == ["fault", "ok"]
    assert worst_state(findings.checks) == "fault"


# ---- the command, on real processes


def parse_findings(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    result = json.loads(done.stdout)
    return result, {check["name"]: check for check in result["checks"]}


@pytest.mark.distributed
@pytest.mark.slow
def test_a_sound_run_is_probed_on_two_ranks(work: Path) -> None:
    out = work / "run"
    config = asked(work, "model.backbone.quantization=nf4", "train.micro_batch=4")
    done = egmf("doctor", str(TINY), *config, "--procs", "2", "--out", str(out), "--json", timeout=500)
    assert done.returncode == 0, done.stderr
    result, checks = parse_findings(done)
    assert result["faults"] == 0
    reduced = checks["all-reduce"]["values"]
    assert (reduced["world"], reduced["backend"]) == (2, "gloo")
    for size in collective_probe.SIZES:  # the bus bandwidth of two ranks is bytes / seconds
        one = reduced["sizes"][str(size)]
        assert one["bus_gb_per_second"] == pytest.approx(size / one["seconds"] / 1e9)
    assert checks["largest batch"]["state"] == "ok"
    assert checks["largest batch"]["values"]["peak_bytes"] > 100 << 20
    assert not out.exists()
    assert not list(work.glob(".egmf-doctor-*"))


@pytest.mark.distributed
def test_faults_end_the_command_with_1_and_name_the_rank(work: Path) -> None:
    done = egmf("doctor", str(TINY), *asked(work, "task=meldd"), "--json", "--procs", "1", timeout=500)
    assert done.returncode == 1
    result, checks = parse_findings(done)
    assert result["state"] == "fault"
    assert "did you mean meld" in checks["data"]["found"]
    assert checks["largest batch"]["state"] == "skipped"
    assert egmf("doctor", "--procs", "0").returncode == 2


@pytest.mark.slow  # a launcher's ranks, a fault on one of them, and a training beside the estimate
@pytest.mark.distributed
def test_the_ranks_of_a_launcher_are_used_and_checkpoints_are_as_large_as_estimated(work: Path) -> None:
    config = asked(work, "train.steps=1", "train.micro_batch=4", "track.mlflow=false", "train.zero=2")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        "--module", "trainer", "doctor", str(TINY), *config, "--out", str(work / "there"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    _, checks = parse_findings(done)
    assert checks["all-reduce"]["values"]["world"] == 2
    output = checks["checkpoints"]["values"]["needed_bytes"] / (
        load_config(TINY, config).train.keep + collective_probe.HEADROOM
    )
    assert not list(work.glob(".egmf-doctor-*"))
    trained = egmf("launch", "local", "--procs", "2", str(TINY), *config, "--out", str(work / "trained"), timeout=500)
    assert trained.returncode == 0, trained.stderr
    checkpoint = next((work / "trained" / "checkpoints").glob("step-*"))
    measured = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert output == pytest.approx(measured, rel=0.15)


@pytest.mark.slow  # a batch of 1500 samples
@pytest.mark.distributed
def test_a_batch_larger_than_memory_is_found_before_the_run(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path, train=1500)
    config = asked(
        tmp_path,
        "train.global_batch=1500",
        "train.micro_batch=1500",
        "train.micro_tokens=20000",
        "train.precision=fp32",
    )
    done = egmf(
        "doctor", str(TINY), *config, "--procs", "2", "--json", timeout=500,
        EGMF_TEST_MEMORY="200", PYTHONPATH=f"{ROOT}/tests/distributed/failing:{ROOT}",
    )  # fmt: skip
    assert done.returncode == 1
    result = parse_findings(done)[1]["largest batch"]
    assert result["state"] == "fault"
    assert "does not fit into memory" in result["found"]
    assert re.search(r"train\.micro_tokens=(99\d\d|10000) \(now 20000\)", result["found"]), result["found"]


@pytest.mark.parametrize(
    ("instructions", "bf16", "slow"),
    [
        ("AVX2", False, "15 times"),
        ("DEFAULT", False, "15 times"),
        ("AVX512", False, "2 times"),
        ("AVX512", True, None),
        ("SVE256", False, None),
    ],
)
def test_bf16_without_instructions_for_it_is_told(
    monkeypatch: pytest.MonkeyPatch, instructions: str, bf16: bool, slow: str | None
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    config = load_config("meld")
    found = slow_precision(config, torch.device("cpu"))
    assert (found is None) == (slow is None)
    assert slow is None or (slow in str(found) and "set train.precision=fp32" in str(found))
    assert slow_precision(config, torch.device("cuda")) is None
    assert slow_precision(load_config("meld-cpu"), torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("version", "cuda", "libraries", "bad"),
    [
        ("0.50.2", "13.2", {"cuda130"}, False),
        ("0.50.2", "13.0", {"cuda128", "cuda130"}, False),
        ("0.50.2", "12.1", {"cuda128"}, False),
        ("0.50.2", "13.0", {"cuda128"}, True),
        ("0.50.2", "1.3", {"cuda130"}, True),
        ("0.48.1", "12.9", {"cuda128"}, True),
        ("0.48.1", "12.8", {"cuda128"}, False),
        ("0.50.2", "13.0", set(), False),
    ],
)
def test_a_bitsandbytes_of_the_same_cuda_major_will_do(version: str, cuda: str, libraries: set[str], bad: bool) -> None:
    """Those before 0.50 load the exact one alone."""
    names = frozenset(f"libbitsandbytes_{name}.so" for name in libraries)
    facts = Facts({"bitsandbytes": Version(version)}, cuda=Version(cuda), bitsandbytes_libraries=names, quantized=True)
    pair = next(pair for pair in PAIRS if pair.name == "bitsandbytes and CUDA")
    assert pair.bad(facts) == bad
