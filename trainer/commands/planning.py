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
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each node, one rank each")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="memory of one GPU, GiB")] = 80.0,
    samples_per_second: Annotated[float | None, typer.Option(help="throughput of all GPUs, for the hours")] = None,
    positions_per_second: Annotated[
        float | None, typer.Option(help="instead: positions through the backbone, padding included")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="instead: achieved on each GPU")] = None,
    positions: Annotated[
        int | None, typer.Option(min=8, help="length of a sample's prompt with its answer, in place of the data's")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="training samples of an epoch, without prepared data")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Estimate GPU memory at each ZeRO stage, communication volume, checkpoint size and hours, without a GPU.

    Reads the backbone's config.json only, no weights.
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
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    if made.recommended is None:
        say("nothing fits")
    return 0
