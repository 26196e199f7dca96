"""Whether this machine can run the GPU stages: every import, a GPU, and 4 bits on it; all that is missing is named at once.

    python -m benchmarks.gpu.ready                # prints what is here; exit code 69 where something is missing
    python -m benchmarks.gpu.ready --card         # the GPU's name as a folder's, such as nvidia-h100-80gb-hbm3

At its start it needs nothing but Python's own library.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import sys
from typing import Any

MISSING = 69  # EX_UNAVAILABLE of sysexits.h
NEEDED = {  # import -> package; MLflow is left out, which no stage uses
    "accelerate": "accelerate", "bitsandbytes": "bitsandbytes", "datasets": "datasets", "deepspeed": "deepspeed", "hjson": "hjson",
    "jinja2": "Jinja2", "matplotlib": "matplotlib", "numpy": "numpy", "omegaconf": "omegaconf", "pandas": "pandas", "peft": "peft",
    "psutil": "psutil", "pyarrow": "pyarrow", "pydantic": "pydantic", "pytest": "pytest", "pytest_timeout": "pytest-timeout",
    "rich": "rich", "safetensors": "safetensors", "scipy": "scipy", "sklearn": "scikit-learn", "tokenizers": "tokenizers",
    "torch": "torch", "transformers": "transformers", "triton": "triton", "typer": "typer", "xdist": "pytest-xdist", "yaml": "PyYAML",
}  # fmt: skip


def import_faults() -> list[str]:
    """What cannot be imported, and why."""
    faults = []
    for name, package in NEEDED.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  a library may fail with anything while it is imported
            first = str(error).splitlines()[0] if str(error) else ""
            faults.append(f"{package}: {type(error).__name__}: {first}")
    return faults


def gpu_fault(torch: Any) -> str | None:
    """Why the GPU cannot be used, if so: none is there, or 4 bits do not come back from it as they should."""
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} (built for CUDA {torch.version.cuda}) sees none"
    functional = importlib.import_module("bitsandbytes.functional")
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    try:
        packed, state = functional.quantize_4bit(weight.cuda(), quant_type="nf4")
        back = functional.dequantize_4bit(packed, state).cpu()
    except Exception as error:  # noqa: BLE001  of a library without code for this CUDA or this GPU
        return f"bitsandbytes cannot quantise on this GPU: {type(error).__name__}: {error}"
    error = float((back - weight).norm() / weight.norm())
    # NF4 of a normal distribution, blocks of 64: about 0.09 (QLoRA, arXiv 2305.14314)
    return None if error < 0.15 else f"bitsandbytes gives wrong values on this GPU: relative error {error:.3f} in NF4"


def card(name: str) -> str:
    """A GPU's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    """Print what is here, or all that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--card", action="store_true", help="print the GPU's name alone")
    asked = parser.parse_args()
    if asked.card:
        print(card(importlib.import_module("torch").cuda.get_device_name()))
        return 0
    faults = import_faults()
    if asked.device == "cuda" and not any(fault.startswith(("torch:", "bitsandbytes:")) for fault in faults):
        fault = gpu_fault(importlib.import_module("torch"))
        faults += [fault] if fault else []
    if faults:
        print(f"{len(faults)} missing here:", *faults, sep="\n  ", file=sys.stderr)
        print("benchmarks/gpu/wheels.sh gathers the packages to carry to such a machine", file=sys.stderr)
        return MISSING
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in NEEDED.values()))
    if asked.device == "cuda":
        torch = importlib.import_module("torch")
        print(
            f"{torch.cuda.get_device_name()}, compute capability {torch.cuda.get_device_capability()}, CUDA {torch.version.cuda}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
