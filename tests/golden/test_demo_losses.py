"""The demo's first steps against written losses: a change of data, model, order, loss or optimizer shows here.

Twice: with standardised features, and with features as generated, whose losses are those from before there was standardisation.

After a change that is meant to move them: ``python -m tests.golden.test_demo_losses`` writes them anew.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.processes import egmf
from trainer.data.generated.diagnostic import generate

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "demo.yaml"
GOLDEN = HERE / "demo_losses.json"
STEPS = 4


def losses(folder: Path, standardise: bool) -> list[float]:
    """The losses of the demo's first steps, one process, on a small cut of its data."""
    data = folder / "data"
    generate("diagnostic", data, sizes={"train": 480, "valid": 12, "test": 12})
    out = folder / "run"
    overrides = (
        f"data.path={data}",
        f"model.fusion.standardise={standardise}",
        f"train.steps={STEPS}",
        "train.log_every=1",
        "train.warmup=0.0",
        "eval.splits=[valid]",
    )
    done = egmf("train", str(CONFIG), "--out", str(out), *overrides, "track.system_metrics=false", "track.report=false")
    assert done.returncode == 0, done.stderr
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run_id = json.loads((out / "run.json").read_text())["mlflow"]["run_id"]
    return [m.value for m in sorted(client.get_metric_history(run_id, "train/loss"), key=lambda m: m.step)]


@pytest.mark.parametrize(("key", "standardise"), [("losses", True), ("losses_of_raw_features", False)])
def test_the_demo_begins_as_written(key: str, standardise: bool, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[key]
    np.testing.assert_allclose(losses(tmp_path, standardise), expected, rtol=2e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        golden = {
            "steps": STEPS,
            "torch": torch.__version__.split("+")[0],
            "losses": losses(Path(name) / "standardised", True),
            "losses_of_raw_features": losses(Path(name) / "raw", False),
        }
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
