"""`make serve-demo`: serve an embedder and a chat model in one memory cgroup of 300 MB, and call both.

The models are exported if they are missing. The calls are printed as lines for a shell, and made once; then the server
goes on until Ctrl-C. `--once` ends it after the calls, with exit code 0 if all answers were right; `--port` is 8080.

The budget, which counts all pages of libraries, lies below the cgroup's limit: so the limit holds whether or not other
processes have paid for these pages already.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmarks.models import exported
from benchmarks.serve_demo.calls import CALLS, Call
from benchmarks.serve_demo.server import Running, ServerEndedError, serving
from pipeload.bench.cgroup import permitted
from pipeload.machine.sizes import format_bytes

CAP_BYTES = 300_000_000
_BUDGET_BYTES = CAP_BYTES - 4_000_000
"""The kernel charges the rest to a cgroup beside the memory of its processes."""
_MODELS = ("minilm", "smollm2-135m")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_demo")
    parser.add_argument("--once", action="store_true", help="end after the calls")
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args(arguments)
    console = Console(width=160, highlight=False)
    directories = [exported(name, console)[0] for name in _MODELS]
    # What exports still have to write would slow down those who read first.
    os.sync()
    return demo(directories, CALLS, console, port=given.port, once=given.once)


def demo(directories: Sequence[Path], calls: Sequence[Call], console: Console, *, port: int, once: bool) -> int:
    """Serve and call; the exit code is 0 if all answers are right."""
    refusal = permitted()
    place = f"without a memory cgroup ({refusal})" if refusal else f"in a memory cgroup of {format_bytes(CAP_BYTES)}"
    console.print(f"Serving {place}, with a budget of {format_bytes(_BUDGET_BYTES)}:")
    try:
        with serving(directories, cap_bytes=CAP_BYTES, budget_bytes=_BUDGET_BYTES, port=port) as running:
            running.wait()
            right = [_called(call, running, console) for call in calls]
            _print_peak(running.peak_bytes(), console)
            if not once and all(right):
                console.print(f"\nServing until Ctrl-C; a page for a browser: {running.address}/")
                with suppress(KeyboardInterrupt):
                    running.child.process.wait()
                running.child.process.wait()  # the same Ctrl-C ends it
                if not refusal:
                    _print_peak(running.child.peak_bytes(), console)
    except ServerEndedError:
        console.print("The server has ended, with its message above. SERVE_DEMO_ARGS='--port 0' takes a free port.")
        return 1
    return 0 if all(right) else 1


def _called(call: Call, running: Running, console: Console) -> bool:
    console.print(f"\n{call.line(running.address)}", markup=False, soft_wrap=True)
    answer: object = None
    try:
        answer = call.answer(running.address)
        console.print(f"  {call.told(answer)}", markup=False)
    except (OSError, LookupError, TypeError, ValueError) as error:
        console.print(f"  WRONG: {error!r} in the answer {answer}", markup=False)
        return False
    return True


def _print_peak(peak_bytes: int | None, console: Console) -> None:
    console.print(f"\nPeak memory: {format_bytes(peak_bytes or 0)} of {format_bytes(CAP_BYTES)}")


def _terminate(number: int, _frame: object) -> NoReturn:
    # An exception, so that the server and the cgroup are given up.
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
