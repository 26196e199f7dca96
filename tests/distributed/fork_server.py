"""Processes that are forked from one in which torch, DeepSpeed and the other libraries are imported already.

Importing them takes ten seconds of a core, and the tests start hundreds of processes. What is started here is what executing
``python -m MODULE ...`` gives: a process with an id, arguments, environment, working directory, files, module search path, signal
handlers and exit code of its own, in which none of our modules is imported yet. Python processes that it starts are forked from it
in turn, as its children. Whatever a fork could not give is executed: other programs, interpreters and options, and an environment
that differs in a variable which libraries may read when they are imported. So is everything on a machine with a GPU: CUDA does not
survive a fork.

``python -m tests.distributed.fork_server SOCKET OWNER`` is the server; it ends with the process OWNER.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import inspect
import json
import logging
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent.parent
FOLDER = "EGMF_TEST_FORK_SERVER"  # the variable that holds the folder of the server's socket
OWNER = "EGMF_TEST_SESSION"  # ... and the id of the process with which the server ends
LIBRARIES = (
    "torch", "torch.distributed.elastic.multiprocessing.errors", "torch.utils.cpp_extension", "torch.utils.serialization",
    "transformers", "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.modeling_auto", "transformers.integrations.bitsandbytes", "transformers.trainer",
    "peft", "peft.tuners.lora", "bitsandbytes", "safetensors.torch", "tokenizers", "datasets", "pandas", "pyarrow.parquet",
    "pyarrow.dataset", "sklearn.metrics", "scipy.stats", "scipy.optimize", "matplotlib.figure", "matplotlib.backends.backend_svg",
    "matplotlib.backends.backend_agg", "mlflow", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "alembic.command",
    "sqlalchemy.dialects.sqlite", "git", "jinja2", "typer", "rich.table", "rich.progress", "rich.logging", "pydantic", "omegaconf",
    "yaml", "deepspeed", "deepspeed.ops.adam", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer", "setuptools",
)  # fmt: skip
OWN = ("trainer", "launch", "tests", "benchmarks", "sitecustomize")
READ_LATE = (  # how the variables begin that no library reads at its import, or that are the same by then
    "PYTHONPATH", "OMP_NUM_THREADS", "COLUMNS", "LINES", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CUDA_VISIBLE_DEVICES", "EGMF_",
    "SLURM_", "TORCHELASTIC_", "PYTEST_", "MLFLOW_", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS",
    "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR",  # set by imports
)  # fmt: skip
FORKED_OPTIONS = {"env", "cwd", "stdin", "stdout", "stderr", "text", "start_new_session"}
cpu_seconds: list[float] = []  # of the forked processes that this one waited for, and of theirs
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # as trainer.logs sets before importing


def offer(folder: Path) -> None:
    """Let this process and those that it starts use a server, which the first one that needs it starts in `folder`."""
    os.environ.update({FOLDER: str(folder), OWNER: str(os.getpid())})
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    (folder / "environment.json").write_text(json.dumps(variables))


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """`command` as ``subprocess.Popen(command, **options)`` starts it, forked from the server where that gives the same."""
    folder = os.environ.get(FOLDER)
    if folder and set(options) <= FORKED_OPTIONS and not os.path.exists("/dev/nvidiactl"):
        known = json.loads((Path(folder) / "environment.json").read_text())
        if _can_fork(list(map(str, command)), dict(options.get("env") or os.environ), known):
            return ForkedProcess(command, **options)
    return subprocess.Popen(command, **options)


def run(command: Sequence[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run(command, capture_output=True, text=True, ...)``, with :func:`start`."""
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _can_fork(words: list[str], env: dict[str, str], known: dict[str, str]) -> bool:
    """This interpreter, without options, with a module, a program or a file, and with what the libraries were imported with."""
    python = words[:1] == [sys.executable] and len(words) > 1 and (words[1] in ("-m", "-c") or words[1].endswith(".py"))
    bin_folder = f"{Path(sys.executable).parent}{os.pathsep}"  # trainer.distributed.process_group puts it in front
    one, other = ({**e, "PATH": e.get("PATH", "").removeprefix(bin_folder)} for e in (env, known))
    different = {name for name, _ in one.items() ^ other.items() if not name.startswith(READ_LATE)}
    return python and not different and "OMP_NUM_THREADS" in env


class ForkedProcess(subprocess.Popen[Any]):
    """A child of the fork server, with the interface of ``subprocess.Popen``; killed when this process ends or forgets it."""

    def _execute_child(self, args: Any, *more: Any) -> None:  # type: ignore[override]
        _, _, _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[:15]
        asked = {
            "command": list(map(str, args)),
            "env": dict(os.environ if env is None else env),
            "cwd": os.fspath(cwd or os.getcwd()),
            "new_session": bool(more[20]),
        }
        files = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        self._line = _connect()
        socket.send_fds(self._line, [json.dumps(asked).encode()], files)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        self.pid = self._number()
        self._child_created = True

    def _number(self) -> int:
        return int(self._answer()[0])

    def _end(self) -> int:
        code, seconds = self._answer()
        cpu_seconds.append(float(seconds))
        return int(code)

    def _answer(self) -> list[bytes]:
        answer = self._line.recv(64)
        if not answer:
            raise RuntimeError(f"the fork server ended; see {os.environ[FOLDER]}/log.txt")
        return answer.split()

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self.returncode = self._end()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = self._end()
        return self.returncode


def _connect() -> socket.socket:
    """To the server, which the first one that needs it starts."""
    folder = Path(os.environ[FOLDER])
    path = folder / "socket"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            env = json.loads((folder / "environment.json").read_text())
            command = [sys.executable, "-m", "tests.distributed.fork_server", str(folder), os.environ[OWNER]]
            with (folder / "log.txt").open("wb") as log:
                server = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while not path.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"the fork server did not start: {(folder / 'log.txt').read_text()}")
                time.sleep(0.05)
            server.returncode = 0  # it ends with the session, not with the process that happened to need it first
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(str(path))
    return line


def serve(folder: Path, owner: int) -> None:
    """Import the libraries, then fork a process for every message; a connection's end kills the process it asked for."""
    base, known = sys.path[1:], dict(os.environ)
    os.environ.update(QUIET)
    for name in LIBRARIES:
        with contextlib.suppress(ModuleNotFoundError):  # of later releases than the oldest
            importlib.import_module(name)
    _fill_caches()
    subprocess.Popen._execute_child = _fork_child(subprocess.Popen._execute_child, base, known)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the tests end, and then this process
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "new"))
    listener.listen(64)
    (folder / "new").rename(folder / "socket")
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ, None)
    end = os.pidfd_open(owner)
    events.register(end, selectors.EVENT_READ, None)
    children: dict[int, tuple[socket.socket, int]] = {}

    def forget(pid: int) -> int:
        line, watched = children.pop(pid)
        for watched_file in (line, watched):
            events.unregister(watched_file)
        os.close(watched)
        _, status, used = os.wait4(pid, 0)
        with contextlib.suppress(OSError):
            line.send(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}".encode())
        line.close()
        return status

    while True:
        for key, _ in events.select():
            if key.fileobj == end:
                for pid in list(children):
                    os.kill(pid, signal.SIGKILL)
                    forget(pid)
                return
            if key.fileobj is listener:
                line, _ = listener.accept()
                events.register(line, selectors.EVENT_READ, 0)
            elif isinstance(key.fileobj, socket.socket) and key.data == 0:
                message, files, _, _ = socket.recv_fds(key.fileobj, 1 << 22, 3)
                events.unregister(key.fileobj)
                if not message:
                    key.fileobj.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    _become(base, files=files, **json.loads(message))
                for file in files:
                    os.close(file)
                watched = os.pidfd_open(pid)
                children[pid] = key.fileobj, watched
                key.fileobj.send(str(pid).encode())
                events.register(key.fileobj, selectors.EVENT_READ, pid)
                events.register(watched, selectors.EVENT_READ, pid)
            elif key.data in children:
                if isinstance(key.fileobj, socket.socket):  # who asked for the process is gone
                    os.kill(key.data, signal.SIGKILL)
                forget(key.data)


def _fill_caches() -> None:
    """What every process would find out anew, of the imported libraries and of this machine."""
    nowhere = compile("", "<nowhere>", "exec")
    inspect.getmodule(nowhere)  # notes the file of every module: registering an operator of torch looks for one
    conversion_mapping = importlib.import_module("transformers.conversion_mapping")
    conversion_mapping.get_checkpoint_conversion_mapping("qwen2")  # renamings of all families
    _ = sys.modules["deepspeed"].ops.__compatible_ops__  # asks the compiler several times


def _fork_child(execute: Callable[..., None], base: list[str], known: dict[str, str]) -> Callable[..., None]:
    """What replaces ``Popen._execute_child`` in forked processes: forks where that gives what `execute` gives."""

    def start_child(self: Any, args: Any, *more: Any) -> None:
        (
            executable,
            preexec,
            close,
            keep,
            cwd,
            env,
            _,
            _,
            shell,
            p2cread,
            p2cwrite,
            c2pread,
            c2pwrite,
            errread,
            errwrite,
        ) = more[:15]
        env = dict(os.environ if env is None else env)
        given = (
            shell,
            keep,
            executable,
            *more[16:20],
            *more[21:],
        )  # user, groups, umask, process group: None or -1 or empty
        plain = close and all(option in (None, False, -1, ()) for option in given)
        loaded = any(
            name.startswith("trainer.kernels") for name in sys.modules
        )  # torch's operators are registered once
        words = [] if isinstance(args, (str, bytes, os.PathLike)) else list(map(os.fspath, args))
        if not plain or loaded or not _can_fork(words, env, known):
            execute(self, args, *more)
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if pid == 0:
            files = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
            _become(base, command=words, env=env, cwd=cwd, new_session=more[20], files=files, before=preexec)
        self.pid = pid
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    return start_child


def _become(
    base: list[str],
    *,
    command: list[str],
    env: dict[str, str],
    cwd: Any,
    new_session: bool,
    files: Sequence[int],
    before: Callable[[], None] | None = None,
) -> NoReturn:
    """In a forked child: be the process that executing `command` gives. Does not return."""
    code = 255
    try:
        gc.freeze()  # what the parent left must not be collected here: its descriptors are other files' now
        for place, copy in enumerate([os.dup(file) for file in files]):
            os.dup2(copy, place)
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 2:
                with contextlib.suppress(OSError):
                    os.close(file)
        for number in signal.valid_signals() - {signal.SIGINT}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if cwd is not None:
            os.chdir(cwd)
        if new_session:
            os.setsid()
        if before is not None:
            before()
        os.environ.clear()
        os.environ.update(env)
        code = _run(base, command[1:])
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(base: list[str], words: list[str]) -> int:
    """Run a module, program or file as ``__main__`` to the end of the process; the exit code."""
    kind, rest = words[0], words[1:]
    first = {"-m": os.getcwd(), "-c": ""}.get(kind, os.path.dirname(os.path.abspath(kind)))
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [first, *path, *(place for place in base if place not in path)]
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    importlib.invalidate_caches()
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in OWN]:
        del logging.root.manager.loggerDict[name]
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.orig_argv[:] = [sys.executable, *words]
    if os.environ["OMP_NUM_THREADS"] != "1":
        sys.modules["torch"].set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), len(os.sched_getaffinity(0))))
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    code = 0
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("sitecustomize")
        if kind == "-m":
            sys.argv[:] = ["-m", *rest[1:]]
            runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        elif kind == "-c":
            sys.argv[:] = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv[:] = words
            main.__dict__["__file__"] = kind
            exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code & 255


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
