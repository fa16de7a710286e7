"""`pipeline.together`: jobs at the same time, all of them ended at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from tests.engine.harness import PATIENCE_S, Background, Gate, agents, run_python

from pipeload.machine.threads import together


def test_results_come_in_the_order_of_the_jobs() -> None:
    assert together([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    assert together([]) == []


def test_jobs_run_at_the_same_time_in_threads_with_names() -> None:
    barrier = threading.Barrier(3)

    def job() -> str:
        barrier.wait(PATIENCE_S)
        return threading.current_thread().name

    assert together([job] * 3) == [f"pipeload-loader-{i}" for i in range(3)]
    assert agents() == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_first_error_is_raised_when_all_have_ended(kind: type[BaseException]) -> None:
    gate, ended = Gate(), []

    def fail(text: str) -> Callable[[], None]:
        def job() -> None:
            raise kind(text)

        return job

    def wait() -> None:
        gate.stop_here()
        ended.append(True)

    call = Background(together, [wait, fail("one"), fail("two")])
    gate.wait_reached()
    gate.open()
    error = call.wait()
    assert isinstance(error, kind)
    assert error.args == ("one",)
    assert ended == [True]


def test_no_job_begins_when_a_thread_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "pipeload-loader-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        together([lambda: begun.append(0), lambda: begun.append(1)])
    assert begun == []
    assert agents() == []


def test_an_interrupted_caller_still_waits_for_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, ended = Gate(), []
    join, interrupts = threading.Thread.join, [KeyboardInterrupt()]

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if interrupts and thread.name.startswith("pipeload-"):
            gate.wait_reached()
            gate.open()
            raise interrupts.pop()
        join(thread, timeout)

    def job() -> None:
        gate.stop_here()
        ended.append(True)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together([job])
    assert ended == [True]
    assert agents() == []


def test_a_thread_for_which_there_is_no_address_space_is_an_error_and_no_wait() -> None:
    """CPython waits for ever for a thread that finds no memory before it has begun."""
    run_python(
        "import re, resource, threading\n"
        "from pathlib import Path\n"
        "from pipeload.machine.threads import start\n"
        "threading.stack_size(1 << 20)\n"
        "for left in (0, 1 << 20, 2 << 20, 3 << 20, 4 << 20):\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    size = int(re.search(r'VmSize:\\s*(\\d+) kB', status)[1]) * 1024\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size + left, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        start(threading.Thread(target=int))\n"
        "    except MemoryError as error:\n"
        "        assert 'ulimit -v' in str(error)\n"
        "    else:\n"
        "        raise AssertionError(left)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "start(threading.Thread(target=int))\n"
    )
