"""What a run needs, before it is started: plan."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer.commands.options import ConfigFile, Debug, Json, Overrides, read_config
from trainer.commands.output import print_json, say, wide

app = typer.Typer()


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a machine, one rank each")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="of one GPU, GiB")] = 80.0,
    samples_per_second: Annotated[float | None, typer.Option(help="of all GPUs together, for the hours")] = None,
    positions_per_second: Annotated[
        float | None, typer.Option(help="instead: through the backbone, padding included")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="instead: reached on each GPU")] = None,
    positions: Annotated[
        int | None, typer.Option(min=8, help="of a sample's whole prompt with its answer, instead of the data's")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="of an epoch, where there are no prepared data")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Tell memory of a GPU at each ZeRO stage, bytes on the wire, checkpoint size and hours, without any GPU.

    Reads the backbone's configuration alone (a folder with config.json will do), no weights.
    """
    loaded = read_config(config, overrides)
    stated = [rate for rate in (samples_per_second, positions_per_second, tflops) if rate is not None]
    if len(stated) > 1 or any(rate <= 0 for rate in stated):
        raise ValueError("state one throughput, more than 0: --samples-per-second, --positions-per-second or --tflops")
    from trainer.distributed.light_imports import import_libraries
    from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    import_libraries()
    from launch.plan.plan import Throughput, make_plan
    from launch.plan.tables import render

    throughput = Throughput(samples_per_second, positions_per_second, tflops)
    made = make_plan(loaded, nodes, gpus_per_node, gpu_memory, throughput, positions=positions, samples=samples)
    if as_json:
        print_json(made.to_json())
        return 0
    console = wide()
    for part in render(made):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    if made.recommended is None:
        say("nothing fits")
    return 0
