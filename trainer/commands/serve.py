"""serve: a trained model that answers over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.options import Debug, TrustCode, option_groups
from trainer.serving.http.limits import Limits

app = typer.Typer()
_USUAL = Limits()


@dataclass(frozen=True)
class LimitOptions:
    """The fields of :class:`trainer.serving.http.limits.Limits` as options."""

    max_queue: Annotated[
        int, typer.Option(help="samples that are taken and not yet answered; more get 429", metavar="N")
    ] = _USUAL.max_queue
    max_wait_ms: Annotated[
        float, typer.Option(help="milliseconds that a sample waits for others to share its batch", metavar="MS")
    ] = _USUAL.max_wait_ms
    max_body_mib: Annotated[float, typer.Option(help="MiB of a JSON request", metavar="M")] = _USUAL.max_body_mib
    max_clip_mib: Annotated[float, typer.Option(help="MiB of a request with files", metavar="M")] = _USUAL.max_clip_mib
    max_held_mib: Annotated[float, typer.Option(help="MiB of all requests that are not yet answered", metavar="M")] = (
        _USUAL.max_held_mib
    )
    max_samples: Annotated[int, typer.Option(help="samples of one request", metavar="N")] = _USUAL.max_samples
    max_frames: Annotated[int, typer.Option(help="frames of one array", metavar="N")] = _USUAL.max_frames
    max_text: Annotated[int, typer.Option(help="characters of one text", metavar="N")] = _USUAL.max_text
    body_seconds: Annotated[float, typer.Option(help="for a request's headers, and for its body", metavar="S")] = (
        _USUAL.body_seconds
    )
    clip_seconds: Annotated[float, typer.Option(help="for the features of one clip", metavar="S")] = _USUAL.clip_seconds
    answer_seconds: Annotated[float, typer.Option(help="from a request's body to its answer", metavar="S")] = (
        _USUAL.answer_seconds
    )
    stop_seconds: Annotated[
        float, typer.Option(help="for what was taken, once the server is told to stop", metavar="S")
    ] = _USUAL.stop_seconds
    max_connections: Annotated[int, typer.Option(help="connections that are open, of each worker", metavar="N")] = (
        _USUAL.max_connections
    )


USUAL_LIMITS = LimitOptions()


@app.command()
@option_groups
def serve(
    model: Annotated[
        str,
        typer.Argument(help="an exported folder, a run folder, or models:/NAME/VERSION", metavar="DIR|RUN|models:/…"),
    ],
    host: Annotated[
        str, typer.Option(help="address to listen on; one that others reach needs --token-file", metavar="ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free", metavar="N")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="a file with the token that requests must bring (Authorization: Bearer …)", metavar="FILE"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="a name that the Host header may have, such as a reverse proxy's (repeated)", metavar="NAME"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that share the port; each holds the model")] = 1,
    limits: LimitOptions = USUAL_LIMITS,
    clip_workers: Annotated[
        int, typer.Option(min=0, help="processes that extract clips, of each worker; 0: clips are not taken")
    ] = 1,
    clip_device: Annotated[
        str, typer.Option(help="of the recipe's encoders: auto, cpu, cuda or cuda:N", metavar="DEVICE")
    ] = "auto",
    device: Annotated[str, typer.Option(help="of the model: auto, cpu, cuda or cuda:N", metavar="DEVICE")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as trained", metavar="DTYPE")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="of the backbone: none or nf4; default: as trained", metavar="KIND")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="positions of a batch: limits memory; default: the run's eval.tokens")
    ] = None,
    unbatched: Annotated[bool, typer.Option("--unbatched", help="one sample at a time, to compare with")] = False,
    trust_code: TrustCode = None,
    debug: Debug = False,
) -> int:
    """Answer samples and clips over HTTP: /v1/predict, /v1/tasks, /healthz, /readyz, /metrics, and a page at / to try it.

    SIGTERM and Ctrl-C stop it once everything that it has taken is answered; a second one stops it at once.
    """
    from dataclasses import asdict

    from trainer.logs import set_up_logging
    from trainer.serving.http.server import serve as run
    from trainer.serving.http.settings import ClipProcesses, ModelChoice, ServerSettings

    settings = ServerSettings(
        ModelChoice(model, device, dtype, quantization, tokens, trust_code),
        host=host,
        port=port,
        token_file=token_file,
        hosts=tuple(allow_host or ()),
        limits=Limits(**asdict(limits)),
        clips=ClipProcesses(clip_workers, clip_device),
        workers=workers,
        unbatched=unbatched,
        debug=debug,
    )
    set_up_logging(None, 0, debug=debug)
    return run(settings)
