"""Where does the time of a training step go? Parts of the model forward and backward, the slowest operators, and a trace.

    python -m benchmarks.profile [--shape meld] [--vocab 32768] [--layout packed] [--evaluate] [--steps 3] [--trace trace.json.gz]

Times are those of torch's profiler, on one process and `--threads` threads; profiling itself slows small operators
down. A part is a module (the innermost that an operator runs in); its backward is found by the sequence numbers that
autograd gives to operators. Time between operators, Python's, counts to the part it is spent in. Open the trace in
https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import tempfile
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contenders import COLUMNS, EgmfContender, build
from benchmarks.shapes import SHAPES, make_backbone, make_samples

MARK = "part: "
BACKWARD = "autograd::engine::evaluate_function"


def named_parts(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of EGMF that get a row of their own."""
    fusion, base = model.fusion, model.backbone.base
    parts = {fusion.encoders: "encoders", fusion.gate: "gate", fusion.pseudo: "pseudo tokens"}
    parts |= {expert: f"expert {name}" for name, expert in fusion.experts.items()}
    parts |= {base.get_input_embeddings(): "embedding", base.get_output_embeddings(): "head"}
    parts |= {base.get_decoder(): "backbone: norms, rest"}
    for name, module in base.get_decoder().named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("self_attn", "mlp"):
            parts[module] = "backbone: attention" if leaf == "self_attn" else "backbone: mlp"
        elif leaf in ("lora_A", "lora_B", "lora_dropout") and isinstance(module, nn.ModuleDict):
            parts |= dict.fromkeys(module.values(), "LoRA")
    return parts


def mark(parts: dict[nn.Module, str]) -> None:
    """Wrap the forward of every part in a named range."""
    for module, name in parts.items():
        entered: list[Any] = []

        def enter(module: nn.Module, args: Any, name: str = name, entered: list[Any] = entered) -> None:
            entered.append(record_function(MARK + name))
            entered[-1].__enter__()

        def leave(module: nn.Module, args: Any, out: Any, entered: list[Any] = entered) -> None:
            entered.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def by_part(events: Any) -> dict[str, dict[str, float]]:
    """Part -> {"forward": µs, "backward": µs} from a profile's events; what is in no part is "other".

    A range's own time is its length less that of ranges inside it. `events` come from one thread (CPU).
    """
    ranges = sorted(
        ((e.time_range.start, e.time_range.end, e.name[len(MARK) :]) for e in events if e.name.startswith(MARK)),
        key=lambda r: (r[0], -r[1]),
    )
    starts = [r[0] for r in ranges]
    parents: list[int] = []
    stack: list[int] = []
    for i, (start, _, _) in enumerate(ranges):
        while stack and ranges[stack[-1]][1] <= start:
            stack.pop()
        parents.append(stack[-1] if stack else -1)
        stack.append(i)

    def inside(time: float) -> int:
        i = bisect_right(starts, time) - 1
        while i >= 0 and ranges[i][1] < time:
            i = parents[i]
        return i

    times: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for i, (start, end, name) in enumerate(ranges):
        times[name]["forward"] += end - start
        if parents[i] >= 0:
            times[ranges[parents[i]][2]]["forward"] -= end - start
    owner: dict[int, str] = {}
    for e in events:
        if e.sequence_nr >= 0 and not e.name.startswith(BACKWARD) and e.name.startswith("aten::"):
            i = inside(e.time_range.start)
            if i >= 0:
                owner.setdefault(e.sequence_nr, ranges[i][2])
    for e in events:
        if e.name.startswith(BACKWARD):
            name = owner.get(e.sequence_nr, "other")
            times[name if name not in ("collation", "optimizer", "step") else "other"]["backward"] += (
                e.time_range.end - e.time_range.start
            )
    return times


def _ranged(function: Any, name: str) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        with record_function(MARK + name):
            return function(*args, **options)

    return call


def profile_steps(contender: EgmfContender, steps: int, evaluate: bool) -> profile:
    """The profile of `steps` training steps after two that warm up, or of one evaluation."""
    mark(named_parts(contender.model))
    for name in ("pack", "training"):
        setattr(contender.collate, name, _ranged(getattr(contender.collate, name), "collation"))
    contender.optimizer.step = _ranged(contender.optimizer.step, "optimizer")  # type: ignore[method-assign]
    if evaluate:
        contender.evaluate()
    else:
        for index in range(2):
            contender.step(index)
    with profile(activities=[ProfilerActivity.CPU]) as made:
        for index in range(steps):
            with record_function(MARK + "step"):
                contender.evaluate() if evaluate else contender.step(2 + index)
    return made


def table(times: dict[str, dict[str, float]], steps: int) -> str:
    """Milliseconds per step and shares, the largest first."""
    step = times.pop("step")  # its own time: what is in no part, backward included
    inside = sum(t["backward"] for t in times.values())
    times["other"]["forward"] += step["forward"] - inside
    total = sum(t["forward"] + t["backward"] for t in times.values())
    lines = [f"{'part':24} {'forward':>9} {'backward':>9} {'ms a step':>10} {'share':>6}"]
    for name, t in sorted(times.items(), key=lambda item: -sum(item[1].values())):
        both = t["forward"] + t["backward"]
        lines.append(
            f"{name:24} {t['forward'] / steps / 1e3:9.1f} {t['backward'] / steps / 1e3:9.1f} {both / steps / 1e3:10.1f} "
            f"{both / total:6.1%}"
        )
    lines.append(f"{'all':24} {'':9} {'':9} {total / steps / 1e3:10.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="meld")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--layout", choices=("packed", "padded"), default="packed")
    parser.add_argument("--evaluate", action="store_true", help="score 256 samples instead of training steps of 32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--operators", type=int, default=15, help="lines of the operators' table")
    parser.add_argument("--trace", type=Path, help="write a chrome trace there (.json or .json.gz)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as work:
        folder = make_backbone(Path(work) / "backbone", args.vocab)
        contender = build(COLUMNS[args.layout == "padded"], shape, make_samples(shape, 256), folder)
    assert isinstance(contender, EgmfContender)
    steps = 1 if args.evaluate else args.steps
    made = profile_steps(contender, steps, args.evaluate)
    what = "an evaluation of 256 samples" if args.evaluate else "training steps of 32 samples"
    print(f"{args.shape}, vocabulary {args.vocab}, {args.layout}, {args.threads} threads: {what}\n")
    print(table(by_part(made.events()), steps))
    print()
    print(made.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.operators, max_name_column_width=50))
    if args.trace:
        made.export_chrome_trace(str(args.trace))


if __name__ == "__main__":
    main()
