"""The demo: generated data, a 4-bit backbone, two processes, and the proof that fusion works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.start.local import launch, single_node_ranks, train_command
from trainer.data.generated.diagnostic import generate, is_generated
from trainer.shipped import shipped_folder
from trainer.terminal import literal_console

if TYPE_CHECKING:
    from rich.table import Table

GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA's driver, of it under Windows, and of AMD's
RUNS = {"full model": "demo", "text only": "demo-text"}


def demo(runs: Path, procs: int) -> int:
    """Generate the diagnostic data, train the full and the text-only model, print one table. Returns the exit code.

    What is finished already is not done again, and what was interrupted is continued.
    """
    data = runs / "demo-data"
    if not is_generated("diagnostic", data):
        generate("diagnostic", data)
    for name, config in RUNS.items():
        out = runs / config
        _say(f"\n{name}: {out}")
        code = launch(
            single_node_ranks(train_command(shipped_folder() / f"{config}.yaml", [f"data.path={data}"], out), procs),
            out,
        )
        if code:
            return code
    literal_console().print(_table(runs, data))
    _next(runs, data)
    return 0


def usual_processes() -> int:
    """Two, which a CPU computes one after the other; on GPUs one for each of at most two."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return 2  # which takes torch two seconds to say
    import torch

    return min(2, torch.cuda.device_count() or 2)


def _table(runs: Path, data: Path) -> Table:
    import pandas as pd  # slow to import, and the runs are not to wait for it
    from rich.table import Table

    from trainer.data.dataset import open_dataset

    predictions = {
        name: pd.read_parquet(runs / config / "predictions" / "test.parquet") for name, config in RUNS.items()
    }
    prepared = open_dataset(data)
    train = prepared["train"].targets()
    majority = prepared.task.labels[int(pd.Series(train).mode()[0])]
    truth = predictions["full model"].assign(prediction=majority)
    rows: dict[str, pd.DataFrame] = {**predictions, f"majority class ({majority})": truth}
    kinds = sorted(truth["kind"].unique())
    table = Table(title=f"accuracy on {len(truth)} test samples", title_justify="left")
    for head in ("", "all", *kinds):
        table.add_column(head, justify="right" if head else "left")
    for name, frame in rows.items():
        hit = frame["prediction"] == frame["label"]
        table.add_row(name, *(f"{v:.3f}" for v in (hit.mean(), *(hit[frame["kind"] == kind].mean() for kind in kinds))))
    return table


def _next(runs: Path, data: Path) -> None:
    bin_folder = Path(sys.executable).parent
    _say(
        f"""
Try next:
  {bin_folder}/mlflow ui --backend-store-uri sqlite:///{(runs / "mlflow.db").resolve()}   # both runs side by side
  {bin_folder}/egmf evaluate {runs / "demo"} --split valid
  {bin_folder}/egmf data show {data}
  {bin_folder}/egmf train demo data.path={data} model.fusion.experts='[local,global]' --out {runs / "no-semantic"}
  {bin_folder}/egmf config show meld"""
    )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
