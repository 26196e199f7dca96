"""Starting a training on several processes: launch local, launch hosts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.options import ConfigFile, Debug, DryRun, Force, Out, Overrides, default_out, read_config

if TYPE_CHECKING:
    from launch.start.hostfile import LaunchPlan

launch_app = typer.Typer(help="Start a training on several processes.", no_args_is_help=True)


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
    from launch.start.local import launch, single_node_ranks, train_command

    loaded = read_config(config, overrides)
    folder = out or default_out(config, loaded.train.seed, loaded.data.fold)
    line = train_command(config, overrides or [], folder, force=force, debug=debug)
    if dry_run:
        typer.echo(f"{procs} processes of: {shlex.join(line)}")
        return 0
    return launch(single_node_ranks(line, procs), folder)


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
    from launch.start.hostfile import LaunchPlan, read_hostfile
    from launch.start.local import train_command

    loaded = read_config(config, overrides)
    folder = out or default_out(config, loaded.train.seed, loaded.data.fold)
    line = train_command(config, overrides or [], folder, force=force, debug=debug)
    plan = LaunchPlan(read_hostfile(hostfile), tuple(line), folder, master_addr, master_port)
    if no_ssh:
        return _launch_this_node(plan, node_rank, dry_run=dry_run)
    if node_rank is not None:
        raise ValueError("--node-rank belongs to --no-ssh: over ssh all nodes are started from here")
    return _launch_over_ssh(plan, config, overrides or [], env or [], dry_run=dry_run)


def _launch_this_node(plan: LaunchPlan, node_rank: int | None, *, dry_run: bool) -> int:
    from launch.start.local import launch

    ranks = plan.ranks_of(node_rank)
    if dry_run:
        typer.echo(plan.describe([ranks], {}))
        return 0
    return launch(ranks, plan.out)


def _launch_over_ssh(
    plan: LaunchPlan, config: Path, overrides: list[str], more_variables: list[str], *, dry_run: bool
) -> int:
    from launch.start.hosts import launch
    from launch.start.node_check import check_nodes, with_rank_zero
    from launch.start.ssh import forwarded_environment

    variables = forwarded_environment(more_variables)
    if dry_run:
        typer.echo(plan.describe(plan.ranks(), variables))
        return 0
    reports = check_nodes(plan.hosts, config, overrides, plan.out)
    return launch(with_rank_zero(plan, reports), variables)
