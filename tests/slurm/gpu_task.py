"""Stands for the training in a job's script: which GPU this task would take, and what DeepSpeed would then read.

No GPU is here: how many the task sees is read from CUDA_VISIBLE_DEVICES, as CUDA does.
"""

import json
import os
import sys
from pathlib import Path

import torch

from trainer.distributed.process_group import choose_device

visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
torch.cuda.is_available = lambda: bool(visible)
torch.cuda.device_count = lambda: len(visible)
chosen: list[int] = []
torch.cuda.set_device = chosen.append  # type: ignore[assignment]

device = choose_device()
seen = {
    "visible": visible, "place": int(os.environ["SLURM_LOCALID"]), "device": str(device), "chosen": chosen,
    "local_rank": os.environ["LOCAL_RANK"], "cores": os.environ.get("SLURM_CPUS_PER_TASK"),
}  # fmt: skip
run = Path(sys.argv[1])
(run / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
(run / "run.json").write_text(json.dumps({"state": "done"}))
