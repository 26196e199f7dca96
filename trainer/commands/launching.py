"""Starting a training on several processes: launch local, launch hosts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.shared import ConfigFile, Debug, Force, Out, Overrides, check_tasks, default_out

launch_app = typer.Typer(help="Start a training on several processes.", no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="print what will be done, and stop")]


@launch_app.command("local")
def launch_local(
    config: ConfigFile,
    overrides: Overrides = None,
    procs: Annotated[int, typer.Option(min=1, help="processes on this machine, one per GPU")] = 1,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Train on several processes of this machine."""
    from launch.start.local import alone, command, launch
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    check_tasks(loaded.tasks)
    folder = out or default_out(config, loaded.train.seed)
    line = command(config, overrides or [], folder, force=force, debug=debug)
    if dry_run:
        typer.echo(f"{procs} processes of: {shlex.join(line)}")
        return 0
    return launch(alone(line, procs), folder)


@launch_app.command("hosts")
def launch_hosts(
    config: ConfigFile,
    hostfile: Annotated[Path, typer.Option(help="lines 'name slots=N', as DeepSpeed's", metavar="FILE")],
    overrides: Overrides = None,
    out: Out = None,
    master_addr: Annotated[str | None, typer.Option(help="address of the first node that all others reach")] = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="port of rank 0; default: a free one")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="one more environment variable for the nodes")] = None,
    no_ssh: Annotated[bool, typer.Option("--no-ssh", help="start this node's processes only; once per node")] = False,
    node_rank: Annotated[int | None, typer.Option(min=0, help="this node's line in the hostfile, from 0")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Train on several machines: over ssh from one of them, or with --no-ssh once on each.

    The nodes are checked together first. A stop signal stops the run on all of them: exit code 85.
    """
    from launch.start import hosts
    from launch.start.local import command
    from launch.start.local import launch as launch_part
    from trainer.config import load_config

    loaded = load_config(config, overrides or [])
    check_tasks(loaded.tasks)
    folder = out or default_out(config, loaded.train.seed)
    line = command(config, overrides or [], folder, force=force, debug=debug)
    plan = hosts.LaunchPlan(hosts.read_hostfile(hostfile), tuple(line), folder, master_addr, master_port)
    if no_ssh:
        part = hosts.own_part(plan, node_rank)
        if dry_run:
            typer.echo(hosts.shown([part], plan, {}))
            return 0
        return launch_part(part, folder)
    if node_rank is not None:
        raise ValueError("--node-rank belongs to --no-ssh: over ssh all nodes are started from here")
    variables = hosts.environment(env or [])
    if dry_run:
        typer.echo(hosts.shown(plan.parts(), plan, variables))
        return 0
    reports = hosts.check(plan.hosts, config, overrides or [], folder)
    return hosts.launch(hosts.placed(plan, reports), variables)
