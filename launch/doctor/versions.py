"""Versions of libraries and drivers: what is required, and pairs that are known not to work together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from launch.doctor.findings import Findings, State

DISTRIBUTION = "egmf-trainer"
LISTED = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy", "triton", "flash-attn")
# the oldest driver for programs of a CUDA release; newer drivers run older programs
DRIVERS = {11: Version("450.80.02"), 12: Version("525.60.13"), 13: Version("580")}


@dataclass
class Facts:
    """What decides whether a bad pair is here."""

    versions: Mapping[str, Version]
    cuda: Version | None = None  # that torch was built for
    driver: Version | None = None
    flags: frozenset[str] = frozenset()  # of the processor
    bitsandbytes_libraries: frozenset[str] = frozenset()  # names of its compiled libraries
    quantized: bool = False
    zero: int | None = None

    def has(self, name: str, specifier: str = "") -> bool:
        """Whether a package is there, in a version that `specifier` (such as ``<3.7``) takes."""
        version = self.versions.get(name)
        return version is not None and Requirement(f"{name}{specifier}").specifier.contains(version, prereleases=True)


@dataclass(frozen=True)
class Pair:
    """A combination that is known to be bad; `bad` says whether it is here."""

    name: str
    state: State
    bad: Callable[[Facts], bool]
    found: str
    advice: str
    source: str = field(compare=False)


def _driver_too_old(facts: Facts) -> bool:
    least = DRIVERS.get(facts.cuda.major) if facts.cuda else None
    return least is not None and facts.driver is not None and facts.driver < least


def _no_cuda_library(facts: Facts) -> bool:
    if not (facts.cuda and facts.bitsandbytes_libraries):
        return False
    wanted = f"libbitsandbytes_cuda{facts.cuda.major}{facts.cuda.minor}.so"
    if facts.has("bitsandbytes", "<0.50"):
        return wanted not in facts.bitsandbytes_libraries
    same_major = re.compile(
        rf"libbitsandbytes_cuda{facts.cuda.major}\d\.so"
    )  # 0.50 takes the nearest of the same major
    return not any(map(same_major.fullmatch, facts.bitsandbytes_libraries))


PAIRS = (
    Pair(
        "torch and driver", "fault", _driver_too_old,
        "the NVIDIA driver is older than torch's CUDA needs (CUDA 13: 580, CUDA 12: 525.60.13, CUDA 11: 450.80.02)",
        "update the driver, or install a torch built for an older CUDA",
        "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
    ),
    Pair(
        "bitsandbytes and CUDA", "fault", lambda f: f.quantized and _no_cuda_library(f),
        "this bitsandbytes has no library for torch's CUDA, so NF4 cannot run on the GPU",
        "install a newer bitsandbytes, or a torch for a CUDA that it knows",
        "the files libbitsandbytes_cuda*.so of the installed bitsandbytes",
    ),
    Pair(
        "bitsandbytes and torch", "fault", lambda f: f.has("bitsandbytes") and f.has("torch", "<2.4"),
        "bitsandbytes needs torch 2.4 or later",
        "update torch",
        "requirements of bitsandbytes 0.50",
    ),
    Pair(
        "bitsandbytes and AVX512-BF16", "ok",
        lambda f: f.quantized and f.cuda is None and "avx512_bf16" in f.flags,
        "on this processor bitsandbytes repacks 4-bit weights in evaluation, after which training is wrong; we switch it off",
        "",
        "measured with bitsandbytes 0.50.2; trainer/models/backbone/linear4bit.py",
    ),
    Pair(
        "triton and numpy", "warning", lambda f: f.has("triton", "<3.7") and f.has("numpy", ">=2.4"),
        "Triton before 3.7 fails under its interpreter (TRITON_INTERPRET=1) with numpy 2.4; on a GPU it works",
        "for the interpreter: pip install 'triton>=3.7', or 'numpy<2.4'",
        "https://github.com/triton-lang/triton/issues/9171",
    ),
    Pair(
        "deepspeed and 4-bit ZeRO-3", "warning",
        lambda f: f.quantized and f.zero == 3 and f.has("deepspeed") and not f.has("deepspeed", ">=0.18,<0.20"),
        "sharded 4-bit loading uses inner functions of DeepSpeed and is tested with 0.19",
        "use deepspeed 0.19, or train.zero=2",
        "trainer/models: parameters are partitioned by _convert_to_deepspeed_param",
    ),
)  # fmt: skip


def installed(names: Iterable[str]) -> dict[str, Version]:
    """Name -> version of the packages that are there."""
    found = {}
    for name in names:
        try:
            found[name] = Version(importlib.metadata.version(name))
        except (importlib.metadata.PackageNotFoundError, InvalidVersion):
            continue
    return found


def check_ranges(findings: Findings) -> None:
    """Every requirement of this package against what is installed."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        findings.add("versions", "packages", "warning", f"{DISTRIBUTION} is not installed here", "pip install .")
        return
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    versions = installed(one.name for one in wanted)
    bad = [
        f"{one.name} {versions.get(one.name, 'missing')} (wanted {one.specifier})"
        for one in wanted
        if one.name not in versions or not one.specifier.contains(versions[one.name], prereleases=True)
    ]
    listed = ", ".join(f"{name} {version}" for name, version in installed(LISTED).items())
    if bad:
        findings.add("versions", "packages", "fault", "; ".join(bad), "pip install -c constraints.txt .")
    else:
        every = {name: str(version) for name, version in versions.items()}
        findings.add("versions", "packages", "ok", listed, versions=every)


def check_pairs(findings: Findings, facts: Facts) -> None:
    """The known bad pairs that are here."""
    bad = [pair for pair in PAIRS if pair.bad(facts)]
    for pair in bad:
        findings.add("versions", pair.name, pair.state, pair.found, pair.advice, source=pair.source)
    if not bad:
        findings.add("versions", "bad pairs", "ok", f"none of {len(PAIRS)} that are known")


def bitsandbytes_libraries() -> frozenset[str]:
    """Names of the compiled libraries in the installed bitsandbytes."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return frozenset()
    return frozenset(path.name for path in Path(spec.origin).parent.glob("libbitsandbytes_*.so"))
