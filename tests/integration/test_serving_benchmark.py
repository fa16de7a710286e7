"""`benchmarks.serving`: its clients see wrong answers and failures, and a report with them fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_serve import folder, served  # noqa: F401 - a fixture

from pipeload.bench import cgroup

pytest.importorskip("httpx2")
pytest.importorskip("transformers")

import httpx2
from benchmarks.serving import load
from benchmarks.serving.programs.clients import Order, Seen
from benchmarks.serving.workload import ANSWER_TOKENS, QUESTIONS, chat_body

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("serve")]
needs_cgroups = pytest.mark.skipif(cgroup.permitted() is not None, reason=str(cgroup.permitted()))


def _seen(**changes: Any) -> Seen:
    right: dict[str, Any] = {
        "kind": "chat", "first_s": 1.0, "total_s": 2.0, "items": 8, "done": True, "fault": None, "right": True
    }  # fmt: skip
    return Seen(**(right | changes))


def _record(contender: str, *seen: Seen, **changes: Any) -> load.Record:
    bare: dict[str, Any] = {"part": "chat", "cap_bytes": 10**9, "contender": contender, "clients": 1, "kind": "chat"}
    return load.summarise(load.Record(**(bare | {"peak_rss_bytes": 10**8} | changes)), seen, load_s=10)


def _report(*records: load.Record) -> load.Report:
    return load.Report(machine={}, disk_bytes_per_s=None, turn_s=5, rounds=2, grace_s=1, records=records)


def test_what_was_given_up_counts_with_the_time_that_it_had_lasted() -> None:
    late = _seen(first_s=None, total_s=30.0, items=0, done=False, fault="unfinished", right=False)
    record = _record("pipeload", _seen(), _seen(), late)
    assert (record.requests_per_s, record.items_per_s, record.count, record.unfinished) == (0.2, 1.6, 3, 1)
    assert record.total_s is not None
    assert record.total_s[0] == 2.0
    assert record.total_s[1] > 29
    assert _report(record).ok


@pytest.mark.parametrize(
    ("seen", "changes"),
    [
        ([_seen(right=False)], {}),
        ([_seen(), _seen(done=False, fault="503", right=False)], {}),
        ([_seen()], {"killed": True}),
        ([_seen()], {"peak_rss_bytes": 10**9 + 1}),
        ([], {"message": "It has ended."}),
    ],
)
def test_a_fault_of_pipeload_fails_the_report_and_one_of_another_server_does_not(
    seen: list[Seen], changes: dict[str, Any]
) -> None:
    right = _record("pipeload", _seen())
    assert not _report(right, _record("pipeload", *seen, **changes)).ok
    theirs = _report(right, _record("llama.cpp", *seen, **changes))
    assert theirs.ok
    assert len(load.rows(theirs).splitlines()) == 4


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:  # noqa: F811
    with served(folder / "chat", "--budget", "4GB", "--alias", f"smollm2-135m={folder / 'chat'}") as (address, _):
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_clients_hold_each_answer_against_the_expected_one(address: str, right: bool) -> None:
    answers = {}
    for index in range(len(QUESTIONS)):
        body = chat_body(index, max(ANSWER_TOKENS)) | {"stream": False}
        made = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        answers[index] = made["choices"][0]["message"]["content"] if right else "no such answer"
    order = Order(address=address, part="chat", clients=3, seconds=1, grace_s=60, seed=0, answers=answers)
    seen = load.put_under_load(order).seen
    assert len(seen) >= 3
    assert {one.right for one in seen} == {right}
    assert all(one.fault is None and one.first_s is not None and one.first_s <= one.total_s for one in seen)


@pytest.mark.slow
def test_clients_name_what_failed() -> None:
    order = Order(address="http://127.0.0.1:9", part="chat", clients=1, seconds=0.1, grace_s=60, seed=0)
    (seen, *_) = load.put_under_load(order).seen
    assert seen.fault == "ConnectError"
    assert not seen.done


@needs_cgroups
def test_a_command_that_was_started_ends_with_its_context(tmp_path: Path) -> None:
    program = (
        'import signal, sys; print("there", file=sys.stderr, flush=True); print("here", flush=True); signal.pause()'
    )
    with cgroup.started([sys.executable, "-c", program], log=tmp_path / "log", memory_bytes=10**8) as child:
        assert child.process.stdout is not None
        assert child.process.stdout.readline() == "here\n"
        assert child.oom_kills() == 0
        assert 0 < (child.peak_bytes() or 1) <= 10**8
    assert child.process.returncode == -15
    assert (tmp_path / "log").read_text() == "there\n"
