"""Nodes of a cluster that are killed at random moments of calls: a right answer, or one clear error.

python -m tests.kills                    200 kills, among three nodes on this machine
python -m tests.kills --kills 20 --seed 7

The seed chooses the call, the nodes and the moment, as a part of the time that such a call takes undisturbed; what runs
at that moment depends on the machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.engine.cluster.processes import Cluster
from tests.engine.cluster.test_answers import references, stages_on
from tests.engine.harness import PATIENCE_S, Background
from tests.models import made_once
from tests.proof.counts import Line, keep

import pipeload
from pipeload.cluster.connection import Connection

_BUDGETS = {"small": "330MB", "middle": "400MB", "large": "500MB"}
_TOLERANCE = 1e-5
_PROMPT, _TOKENS = (5, 6, 7, 8), 24

Call = Callable[[Any], Any]


def main() -> int:
    """Kill nodes. Returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="calls that are disturbed")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--keep", action="store_true", help="write the counts to docs/reliability.md")
    given = parser.parse_args()
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pipeload-kills-") as folder:
        outcomes, failures = _try_all(Path(folder), given.kills, random.Random(given.seed))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    for outcome, count in outcomes.most_common():
        print(f"{count:7,}  {outcome}")
    if given.keep:
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
        line = Line(
            fault="one or two of three nodes are killed at a random moment of a pass, of several, or of a text",
            outcome=told,
            recovered="nodes are started again, and the next model has all of them",
            runs=given.kills,
            failures=len(failures),
        )
        command = f"python -m tests.kills --kills {given.kills} --seed {given.seed}"
        keep("cluster_kills", command, time.monotonic() - begun_s, [line])
    return 1 if failures else 0


def _try_all(folder: Path, kills: int, chance: random.Random) -> tuple[Counter[str], list[str]]:
    source = made_once("bert", "llama")
    models = folder / "models"
    models.mkdir()
    for name in ("bert", "llama"):
        (models / name).symlink_to(source / name)
    inputs = references(models / "bert")[0]
    calls: dict[str, tuple[str, Call]] = {
        "pass": ("bert", lambda model: model.run(inputs)),
        "passes": ("bert", lambda model: [*model.run_many([inputs] * 8)]),
        "text": ("llama", lambda model: model.generate([*_PROMPT], max_new_tokens=_TOKENS, eos_token_id=[]).token_ids),
    }
    expected = {}
    for kind, (name, call) in calls.items():
        with pipeload.load(models / name) as alone:
            expected[kind] = call(alone)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with Cluster(models, folder) as cluster:
        cluster.start(_BUDGETS)
        with pipeload.connect(cluster.address) as connection:
            for number in range(kills):
                kind = chance.choice([*calls])
                victims = chance.sample([*_BUDGETS], chance.choice([1, 1, 1, 2]))
                moment = chance.random()
                name, call = calls[kind]
                outcome, failure = _disturbed(cluster, connection, models / name, call, expected[kind], victims, moment)
                outcomes[outcome] += 1
                if failure:
                    failures.append(f"{number}: {kind}, {', '.join(victims)} at {moment:.2f}: {failure}")
                cluster.start(_BUDGETS)
    return outcomes, failures


def _disturbed(
    cluster: Cluster,
    connection: Connection,
    directory: Path,
    call: Call,
    expected: Any,
    victims: list[str],
    moment: float,
) -> tuple[str, str]:
    """The outcome of a call during which nodes end, and the promise that it breaks, if it breaks one.

    Args:
        cluster: has all nodes.
        connection: to it.
        directory: the model's.
        call: makes an answer.
        expected: the right one.
        victims: names of the nodes.
        moment: when they end, as a part of an undisturbed call.
    """
    with connection.load(directory.name, stages=stages_on(directory, *_BUDGETS)) as model:
        begin_s = time.perf_counter()
        if not _same(call(model), expected):
            return "wrong", "the answer was wrong before"
        killing = threading.Timer(moment * (time.perf_counter() - begin_s), lambda: [*map(cluster.kill, victims)])
        killing.start()
        calling = Background(call, model)
        calling.join(PATIENCE_S)
        killing.join(PATIENCE_S)
        if calling.is_alive():
            return "without an end", f"no answer within {PATIENCE_S} s"
        error = calling.wait()
        if isinstance(error, pipeload.ClusterError):
            return "one ClusterError", ""
        if error is not None:
            return type(error).__name__, f"{type(error).__name__}: {error}"
        if not _same(calling.end(), expected):
            return "wrong", "the answer is wrong"
        return "right answers", ""


def _same(answer: Any, expected: Any) -> bool:
    if isinstance(expected, Mapping):
        return all(np.abs(answer[name] - array).max() <= _TOLERANCE for name, array in expected.items())
    if isinstance(expected, list):
        return len(answer) == len(expected) and all(map(_same, answer, expected))
    return bool(answer == expected)


if __name__ == "__main__":
    sys.exit(main())
