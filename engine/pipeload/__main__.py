"""Entry of `pipeload` and `python -m pipeload`: few imports, because the others take seconds on a small board."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from pipeload.foreign import shortage_in
from pipeload.machine.heap import one_arena
from pipeload.serve import HANDOVER

__all__ = ["main"]

_COMMAND_NEEDS = ("rich", "typer")
"""Packages that the command needs beside those of the Python API: the smallest install goes without them."""


def main() -> None:
    """Run the command line; Ctrl-C during the imports ends it as it does later, with one line and exit code 130."""
    if sys.platform == "win32":
        # Its modules do not even import there.
        sys.exit("error: pipeload runs on Linux, whose memory it measures by /proc and cgroups. On Windows, use WSL 2.")
    # Before libraries start threads.
    one_arena()
    if (handover := os.environ.pop(HANDOVER, None)) is not None:
        # An idle server has replaced itself. Signals are held back until it listens.
        from pipeload.serve.server import go_on

        go_on(handover)
        return
    # Not where the parent has it ignored, as a shell does for commands in the background.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, _leave)
    try:
        from pipeload import cli
    except ModuleNotFoundError as error:
        if error.name not in _COMMAND_NEEDS:
            raise
        sys.exit(
            f"error: The command pipeload needs the package {error.name}, which is not installed: "
            f"pip install {' '.join(_COMMAND_NEEDS)}. The Python API works without it."
        )

    except (ImportError, MemoryError, OSError) as error:
        if (shortage := shortage_in(error)) is None:
            raise
        sys.exit(f"error: pipeload cannot start: {shortage}. Raise the limits of the process (ulimit -a).")

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _leave(_number: int, _frame: object) -> NoReturn:
    # The process holds nothing yet. Some library would take an exception here for a failed import.
    os.write(2, b"error: interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
