"""``python -m trainer``: the `egmf` command, and what the deepspeed launcher starts."""

import atexit
import contextlib
import logging
import os
import sys


def run() -> None:
    """The `egmf` command as a process of its own, which ends as soon as all is written and closed.

    Python would take apart every object of torch and the libraries around it first: a second or more, for each rank of a run.
    """
    code = 1  # of an exception that nobody catches
    atexit.register(lambda: _leave(code))  # what is registered first is called last, after all threads have ended
    try:
        from trainer.cli import main

        main()
    except KeyboardInterrupt:  # while modules are imported; later the commands answer to it
        code = 130
        raise SystemExit(code) from None
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def _leave(code: int) -> None:
    """End the process here where that saves time."""
    if "torch" not in sys.modules:
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
