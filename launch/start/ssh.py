"""Commands on other nodes over ssh, and the environment variables that reach them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=5",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=4",
)
SSH_FAILED = 255  # ssh's own exit code; any other is the remote command's
# environment variables that reach the nodes, by the beginning of their names; CUDA_VISIBLE_DEVICES is each node's own
FORWARDED = (
    "AWS_", "CUDA_HOME", "DEEPSPEED_", "DS_", "EGMF", "GLOO_", "HF_", "HTTPS_PROXY", "HTTP_PROXY", "HUGGINGFACE", "KMP_",
    "LANG", "LC_", "LD_LIBRARY_PATH", "MASTER_PORT", "MKL_", "MLFLOW", "NCCL_", "NO_PROXY", "OMP_", "PATH", "PYTHON",
    "PYTORCH_", "REQUESTS_CA_BUNDLE", "SSL_CERT", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "UCX", "VIRTUAL_ENV",
    "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip


def ssh_command(host: str, command: Sequence[str]) -> list[str]:
    """`command` on `host`: in this folder, with this Python path."""
    path = os.environ.get("PYTHONPATH")
    setting = f"env PYTHONPATH={shlex.quote(path)} " if path else ""
    return [*SSH, host, f"cd {shlex.quote(os.getcwd())} && exec {setting}{shlex.join(command)}"]


def forwarded_environment(more: Sequence[str] = ()) -> dict[str, str]:
    """The variables of this process that the nodes get, those listed in `more` too.

    Raises:
        ValueError: one of `more` is not set.
    """
    absent = [name for name in more if name not in os.environ]
    if absent:
        raise ValueError(f"--env asks for variables that are not set here: {', '.join(absent)}")
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED) or name in more}
