"""What a cluster meets in four minutes, and how pipeload and three others come through it.

All send the same requests through the same events: two clients, each with the next request as soon as it has an answer.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import pipeload
from benchmarks.ring.boards import BESIDE_BYTES, Boards, Hardware, boards
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.cluster.model import ClusterModel
from pipeload.cluster.route import shards_of, stage_places
from pipeload.errors import PipeloadError
from pipeload.format.manifest import Manifest, read
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.profiler import profile_dims

__all__ = ["Contender", "Event", "Report", "live", "rows"]

BUDGETS = {
    "board-1": 800_000_000,
    "board-2": 700_000_000,
    "board-3": 600_000_000,
    "board-4": 600_000_000,
    "board-5": 700_000_000,
}
PROCESSORS = {"board-1": 0.7, "board-2": 0.7, "board-3": 0.7, "board-4": 0.5, "board-5": 0.7}
JOINS = "board-5"
READ_BYTES_PER_S, BITS_PER_S, LATENCY_S = 200_000_000, 10**9, 0.0003
SLOW_BITS_PER_S, FEW_SHARE, LESS_BYTES = 10_000_000, 1 / 4, 350_000_000
CLIENTS, TEXTS = 2, 4
LATENCY_SHARE = 0.5
"""Two requests are on their way at a time: neither one alone, nor as many as there is room for."""
WINDOW_S, SHORT_WINDOW_S = 38.0, 15.0
NOISE_S, NOISE_SHARE = 5.0, 1 / 2
TOLERANCE = 1e-4
SLO = 3.0
"""Times the median of the largest node alone before the first event."""
_SETTLED, _IN_A_ROW = 1.2, 3
_LOOK_S, _STEP_S = 0.2, 2.5
_AFTER_FAILURE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A request and how it ended.

    Attributes:
        at_s: when it ended, since the first one began.
        latency_s: its time.
        outcome: "right", "wrong", "error" (one of pipeload's), or "fault" (any other).
    """

    at_s: float
    latency_s: float
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A reconfiguration.

    Attributes:
        at_s: when it was over.
        why: the reason.
        after: the placement from then on; None where it stays.
        waited_s: seconds in which no call could begin.
    """

    at_s: float
    why: str
    after: str | None
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happens, and how the requests come through it, until the next one.

    Attributes:
        name: what it is.
        at_s: when it began.
        end_s: when the next one did, or the requests ended.
        peak_bytes: the most that was seen in use on each node.
        limit_bytes: the limits of the nodes' cgroups at the end: one falls as far as the node gives memory back.
    """

    name: str
    at_s: float
    end_s: float
    peak_bytes: dict[str, int]
    limit_bytes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to run the model, through all events.

    Attributes:
        name: who.
        before: its placement at the start.
        events: with the steady time before the first one.
        answers: to all requests.
        moves: its reconfigurations.
        errors: the first line of each error -> how often it came.
        oom_kills: of the nodes.
        links_cores: processors that the links took of this machine.
    """

    name: str
    before: str
    events: list[Event]
    answers: list[Answer]
    moves: list[Move]
    errors: dict[str, int]
    oom_kills: int
    links_cores: float

    def within(self, event: Event) -> list[Answer]:
        """The requests that ended from an event to the next one."""
        return [one for one in self.answers if event.at_s <= one.at_s < event.end_s]

    def latencies_s(self, answers: Sequence[Answer] | None = None) -> list[float]:
        """Times of right answers."""
        return [one.latency_s for one in (self.answers if answers is None else answers) if one.outcome == "right"]

    def stall_s(self, event: Event) -> float:
        """The longest time without an answer."""
        ends = [one.at_s for one in self.within(event) if one.outcome == "right"]
        return max(later - sooner for sooner, later in pairwise([event.at_s, *ends, event.end_s]))

    def settled_s(self, event: Event) -> float | None:
        """Seconds until the first of three answers in a row that take at most 1.2 times the median of the second half.

        None where there are none.
        """
        answers = [one for one in self.within(event) if one.outcome == "right"]
        half_s = (event.at_s + event.end_s) / 2
        later = [one.latency_s for one in answers if one.at_s >= half_s]
        if not later:
            return None
        near = [one.latency_s <= _SETTLED * median(later) for one in answers]
        for place in range(len(near) - _IN_A_ROW + 1):
            if all(near[place : place + _IN_A_ROW]):
                return answers[place].at_s - event.at_s
        return None

    def within_share(self, slo_s: float) -> float:
        """The part of all requests that were answered within a time."""
        return sum(one.outcome == "right" and one.latency_s <= slo_s for one in self.answers) / len(self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All contenders.

    Attributes:
        model: its name.
        window_s: seconds from one event to the next.
        machine: see `machine_facts`.
        contenders: through the trace.
        calm: pipeload without events, and with noise.
    """

    model: str
    window_s: float
    machine: dict[str, Any] = field(default_factory=machine_facts)
    contenders: list[Contender] = field(default_factory=list)
    calm: list[Contender] = field(default_factory=list)

    @property
    def slo_s(self) -> float:
        """Seconds within which a request is to be answered."""
        alone = self.contenders[-1]
        return SLO * median(alone.latencies_s(alone.within(alone.events[0])))

    @property
    def ok(self) -> bool:
        """Whether no answer was wrong, each failure was one of pipeload's errors, and without events nothing moved."""
        every = [*self.contenders, *self.calm]
        return (
            all(one.outcome in ("right", "error") for contender in every for one in contender.answers)
            and all(contender.oom_kills == 0 for contender in every)
            and not any(contender.moves for contender in self.calm[:1])
            and all(one.outcome == "right" for contender in self.calm for one in contender.answers)
        )


class _Requests:
    """Two clients that send requests all the time, in threads.

    Args:
        model: that they ask.
        given: inputs of each text.
        expected: its answer, by one machine.
    """

    def __init__(
        self, model: ClusterModel, given: Sequence[Mapping[str, NDArray[Any]]], expected: Sequence[Mapping[str, Any]]
    ) -> None:
        self._model, self._given, self._expected = model, given, expected
        self.answers: list[Answer] = []
        self.errors: Counter[str] = Counter()
        self._ended = threading.Event()
        self.began_s = time.monotonic()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    @property
    def now_s(self) -> float:
        """Seconds since they began."""
        return time.monotonic() - self.began_s

    def __enter__(self) -> _Requests:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.answers.sort(key=lambda one: one.at_s)

    def _ask(self, client: int) -> None:
        text = client
        while not self._ended.is_set():
            text, begin_s = (text + 1) % TEXTS, self.now_s
            try:
                made = self._model.run(self._given[text])
                outcome = "right" if _equal(made, self._expected[text]) else "wrong"
            except PipeloadError as error:
                outcome = "error"
                self.errors[f"{type(error).__name__}: {str(error).partition('. ')[0]}"] += 1
            except Exception as error:  # noqa: BLE001 - it is a result
                outcome = "fault"
                self.errors[f"{type(error).__name__}: {error}"] += 1
            end_s = self.now_s
            self.answers.append(Answer(at_s=end_s, latency_s=end_s - begin_s, outcome=outcome))
            if outcome != "right":
                self._ended.wait(_AFTER_FAILURE_S)


def _equal(made: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(
        float(np.abs(made[name] - array).max()) <= TOLERANCE * float(np.ptp(array)) for name, array in expected.items()
    )


class _Life:
    """The events of one run.

    Args:
        running: the nodes.
        window_s: see `Report`.
    """

    def __init__(self, running: Boards, window_s: float) -> None:
        self._running, self._window_s = running, window_s
        self._limits = {name: node.budget_bytes + BESIDE_BYTES for name, node in running.nodes.items()}
        self.events: list[Event] = []

    def through(self, requests: _Requests, happenings: Sequence[tuple[str, Callable[[], object]]]) -> None:
        """Let one happen after another."""
        for name, happen in happenings:
            begin_s, peaks = requests.now_s, Counter[str]()
            happen()
            stepped_s = -inf
            while requests.now_s - begin_s < self._window_s:
                if requests.now_s - stepped_s > _STEP_S:
                    stepped_s = requests.now_s
                    self._lower()
                self._watch(peaks)
            self.events.append(
                Event(
                    name=name,
                    at_s=begin_s,
                    end_s=requests.now_s,
                    peak_bytes=dict(peaks),
                    limit_bytes={name: self._running.nodes[name].limit_bytes for name in self._limits},
                )
            )

    def trace(self) -> list[tuple[str, Callable[[], object]]]:
        """What happens, each for one window; what was taken from a node comes back with the next event."""
        nodes, network = self._running.nodes, self._running.network

        def bandwidth() -> None:
            network.limit("board-1", SLOW_BITS_PER_S)

        def processor() -> None:
            network.limit("board-1")
            nodes["board-2"].limit_processors(FEW_SHARE * PROCESSORS["board-2"])

        def memory() -> None:
            nodes["board-2"].limit_processors(PROCESSORS["board-2"])
            self._limits["board-3"] = LESS_BYTES

        def kill() -> None:
            nodes["board-3"].kill()
            del self._limits["board-3"]

        def join() -> None:
            self._running.start(JOINS)
            self._limits[JOINS] = nodes[JOINS].budget_bytes + BESIDE_BYTES

        return [
            ("nothing", lambda: None),
            (f"link of board-1 falls to {SLOW_BITS_PER_S // 10**6} Mbit/s", bandwidth),
            ("3/4 of board-2's processor are taken", processor),
            (f"memory of board-3 falls to {format_bytes(LESS_BYTES)}", memory),
            ("board-3 is killed", kill),
            (f"{JOINS} joins", join),
        ]

    def noise(self) -> list[tuple[str, Callable[[], object]]]:
        """Half of a node's processor is taken for 5 s, again and again."""
        ended = threading.Event()

        def disturb() -> None:
            node, taken = self._running.nodes["board-1"], False
            while not ended.wait(NOISE_S):
                taken = not taken
                node.limit_processors(PROCESSORS["board-1"] * (NOISE_SHARE if taken else 1))

        thread = threading.Thread(target=disturb)

        def end() -> None:
            ended.set()
            thread.join()

        return [("noise", thread.start), ("nothing", end)]

    def _lower(self) -> None:
        """Lower the limits that are not yet where they are to be."""
        for name, limit_bytes in self._limits.items():
            node = self._running.nodes[name]
            if node.limit_bytes > limit_bytes:
                node.limit_memory(limit_bytes)

    def _watch(self, peaks: Counter[str]) -> None:
        for name in self._limits:
            with suppress(OSError):
                peaks[name] = max(peaks[name], self._running.nodes[name].used_bytes)
        time.sleep(_LOOK_S)


def live(directory: Path, *, window_s: float, only: Sequence[str] = (), console: Console) -> Report:
    """Run all contenders through the trace, and pipeload through none and through noise.

    Args:
        directory: an encoder's sharded model directory.
        window_s: see `Report`.
        only: names of contenders; none for all.
        console: is told of each run.
    """
    report, manifest = Report(model=directory.name, window_s=window_s), read(directory)
    given = [example_inputs(manifest, profile_dims(manifest)) for _ in range(TEXTS)]
    random = np.random.default_rng(1)
    for one in given:
        one["input_ids"] = random.permuted(one["input_ids"], axis=-1)
    with pipeload.load(directory) as alone:
        expected = [alone.run(one) for one in given]

    def run(name: str, stages: Callable[[Boards], Mapping[str, str] | None], life: str = "trace") -> Contender:
        with _cluster(directory) as running:
            with running.connection.load(directory.name, stages=stages(running), latency_share=LATENCY_SHARE) as model:
                before, change = _shown(manifest, model), _Life(running, window_s)
                links_s = running.network.processor_s
                happenings = {"trace": change.trace, "noise": change.noise}.get(life, lambda: change.trace()[:1])()
                with _Requests(model, given, expected) as requests:
                    change.through(requests, happenings)
                offset_s = time.time() - requests.now_s
                moves = [
                    Move(
                        at_s=one.at.timestamp() - offset_s,
                        why=one.why,
                        after=None if one.after is None else _shown(manifest, one),
                        waited_s=one.waited_s,
                    )
                    for one in model.reconfigurations
                ]
                contender = Contender(
                    name=name,
                    before=before,
                    events=change.events,
                    answers=requests.answers,
                    moves=moves,
                    errors=dict(requests.errors),
                    oom_kills=sum(node.oom_kills for node in running.nodes.values()),
                    links_cores=(running.network.processor_s - links_s) / requests.now_s,
                )
        console.print(_summary(contender), markup=False, highlight=False, soft_wrap=True)
        return contender

    contenders: dict[str, Callable[[Boards], Mapping[str, str] | None]] = {
        "pipeload": lambda _: None,
        "even split": lambda _: _even(manifest),
        "best split": lambda running: _best(manifest, running, directory.name),
        "one node": lambda _: {"board-1": ":"},
    }
    for name, stages in contenders.items():
        if not only or name in only:
            report.contenders.append(run(name, stages))
    for life in ("nothing", "noise"):
        if not only or life in only:
            report.calm.append(run(f"pipeload, {life}", contenders["pipeload"], life))
    return report


@contextmanager
def _cluster(directory: Path) -> Iterator[Boards]:
    # Profiles of this machine are not those of boards.
    with tempfile.TemporaryDirectory(prefix="pipeload-ring-") as cache:
        hardware = {
            name: Hardware(read_bytes_per_s=READ_BYTES_PER_S, processors=processors, cache=Path(cache))
            for name, processors in PROCESSORS.items()
        }
        with boards(
            [directory], BUDGETS, bits_per_s=BITS_PER_S, latency_s=LATENCY_S, hardware=hardware, later=(JOINS,)
        ) as running:
            yield running


def _even(manifest: Manifest) -> dict[str, str]:
    """Blocks by number, as many on each node."""
    names = [name for name in BUDGETS if name != JOINS]
    blocks = [place for place, shard in enumerate(manifest.shards) if shard.role == "block"]
    begins = [blocks[round(len(blocks) * number / len(names))] for number in range(1, len(names))]
    places = [0, *(min(stage_places(manifest), key=lambda cut: abs(cut - begin)) for begin in begins)]
    return {
        name: shards_of(manifest, begin, end)
        for name, (begin, end) in zip(names, pairwise([*places, len(manifest.shards)]), strict=True)
    }


def _best(manifest: Manifest, running: Boards, model: str) -> dict[str, str]:
    """What pipeload finds at the start."""
    found = running.connection.plan(model, latency_share=LATENCY_SHARE)
    return {one.node: shards_of(manifest, one.begin, one.end) for one in found.segments}


def _shown(manifest: Manifest, placed: Any) -> str:
    placement = placed.placement if isinstance(placed, ClusterModel) else placed.after
    return ", ".join(f"{one.node} {shards_of(manifest, one.begin, one.end)}" for one in placement.segments)


def _summary(one: Contender) -> str:
    lines = [f"{one.name}: {one.before}; {Counter(answer.outcome for answer in one.answers)}, {one.errors}"]
    for event in one.events:
        settled = one.settled_s(event)
        latencies = one.latencies_s(one.within(event))
        lines.append(
            f"  {event.name}: {len(latencies)} answers, p50 {median(latencies or [0.0]):.2f} s, stall "
            f"{one.stall_s(event):.1f} s, settled {settled and round(settled, 1)} s, "
            f"{event.peak_bytes} of {event.limit_bytes}"
        )
    lines += [f"  {move.at_s:.1f} s: {move.why} -> {move.after}, waited {move.waited_s:.1f} s" for move in one.moves]
    lines.append(f"  oom {one.oom_kills}, links {one.links_cores:.2f} cores")
    return "\n".join(lines)


def rows(report: Report) -> str:
    """The tables."""
    slo_s = report.slo_s
    whole = markdown_table(
        (
            "",
            "p50",
            "p99",
            "answers",
            "errors",
            "wrong",
            f"within {seconds(slo_s)}",
            "moves",
            "killed for memory",
            "links",
        ),
        [
            (
                one.name,
                *(seconds(float(np.percentile(one.latencies_s(), percent))) for percent in (50, 99)),
                *(str(sum(answer.outcome == kind for answer in one.answers)) for kind in ("right", "error", "wrong")),
                f"{one.within_share(slo_s):.0%}",
                str(len(one.moves)),
                str(one.oom_kills),
                f"{one.links_cores:.2f} cores",
            )
            for one in [*report.contenders, *report.calm]
        ],
    )
    first = report.contenders[0]
    events = markdown_table(
        ("at", "event", *(one.name for one in report.contenders)),
        [
            (f"{event.at_s:.0f} s", event.name, *(_cell(one, place) for one in report.contenders))
            for place, event in enumerate(first.events)
        ],
    )
    moves = markdown_table(
        ("at", "why", "nodes and shards from then on", "calls waited"),
        [
            ("0 s", "at the start", first.before, ""),
            *((f"{one.at_s:.0f} s", one.why, one.after or "the same", seconds(one.waited_s)) for one in first.moves),
        ],
    )
    memory = markdown_table(
        ("event", *(one.name for one in report.contenders)),
        [
            (event.name, *(_nearest(one.events[place]) for one in report.contenders))
            for place, event in enumerate(first.events)
        ],
    )
    return "\n\n".join(
        [
            whole,
            "Of each event: p50 / the longest time without an answer / seconds until it has settled.",
            events,
            f"Reconfigurations of {first.name}:",
            moves,
            "Of the node that came nearest to its limit, the most that was in use, and the limit:",
            memory,
        ]
    )


def _cell(one: Contender, place: int) -> str:
    event = one.events[place]
    latencies, settled = one.latencies_s(one.within(event)), one.settled_s(event)
    if not latencies:
        return "no answer"
    return f"{median(latencies):.2f} / {one.stall_s(event):.1f} / {'-' if settled is None else f'{settled:.1f}'} s"


def _nearest(event: Event) -> str:
    peak, limit = max(
        ((peak, event.limit_bytes[name]) for name, peak in event.peak_bytes.items()), key=lambda one: one[0] / one[1]
    )
    return f"{format_bytes(peak)} of {format_bytes(limit)}"
