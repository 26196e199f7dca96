"""Tests. The environment is the Makefile's, so that a plain ``pytest`` computes what ``make test`` does, bit for bit."""

import os
from pathlib import Path

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TORCH_EXTENSIONS_DIR": str(Path(__file__).resolve().parents[1] / ".cache" / "torch_extensions"),
    "EGMF_CONFIG_DIR": str(Path(__file__).resolve().parents[1] / ".cache" / "egmf"),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}.items():
    os.environ.setdefault(_name, _value)
