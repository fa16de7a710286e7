"""Under a real memory cgroup, whole process and page cache counted: a model that is larger than the cap runs in it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_same, run_sequentially
from tests.marks import slow

from pipeload.bench import cgroup
from pipeload.format import manifest as manifests

pytestmark = [
    pytest.mark.cgroup,
    pytest.mark.skipif(cgroup.permitted() is not None, reason=str(cgroup.permitted())),
]
REPOSITORY = Path(__file__).resolve().parents[2]
CAP_BYTES = 112_000_000
TIMEOUT_S = 120

_PROGRAM = """
import json, sys
import numpy as np
import pipeload.model  # with all that a model needs, so that it is not counted for the weights
from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from tests.engine import toy
directory, budget, answers = sys.argv[1:]
before = rss_bytes()
with pipeload.load(directory, budget, threads=1) as model:
    for _ in range(4):
        outputs = model.run(toy.inputs(1, 32))
    plan = model.plan
np.savez(answers, **outputs)
report = {"before": before, "peak": peak_rss_bytes(), "budget": plan.budget_bytes, "streamed": plan.streamed_bytes}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB of weights."""
    pytest.importorskip("onnx")
    return toys.make_toy(tmp_path_factory.mktemp("cgroup") / "model", blocks=24, width=1024)


def _run(program: str, *arguments: str) -> cgroup.Outcome:
    paths = os.pathsep.join(map(str, (REPOSITORY / "engine", REPOSITORY)))
    return cgroup.run(
        [sys.executable, "-c", program, *arguments],
        memory_bytes=CAP_BYTES,
        timeout_s=TIMEOUT_S,
        env=os.environ | {"PYTHONPATH": paths},
    )


@pytest.mark.parametrize("budget", [slow(str(CAP_BYTES)), "auto"])
def test_a_model_larger_than_the_cap_runs_in_it(model: Path, tmp_path: Path, budget: str) -> None:
    cgroup.evict((model / "shards").iterdir())
    outcome = _run(_PROGRAM, str(model), budget, str(tmp_path / "answers.npz"))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.oom_kills == 0
    assert outcome.peak_bytes is not None
    assert outcome.peak_bytes <= CAP_BYTES
    report = json.loads(outcome.stdout)
    assert report["streamed"] > 0
    # RSS counts pages of shared libraries that may be charged to another cgroup, so "auto" may be above the cap.
    assert report["peak"] <= report["budget"]
    weights = manifests.read(model).weight_bytes
    assert weights + report["before"] > 1.3 * CAP_BYTES, "the cap is well below what would be needed"
    with np.load(tmp_path / "answers.npz") as answers:
        assert_same(dict(answers), run_sequentially(model, toys.inputs(1, 32), threads=1))


def test_the_cap_is_real(model: Path) -> None:
    """All weights in memory beside the same process: the kernel kills it."""
    nbytes = manifests.read(model).weight_bytes
    outcome = _run(f"import numpy, pipeload; numpy.ones({nbytes}, numpy.uint8)")
    assert outcome.returncode == -9
    assert outcome.oom_kills == 1


def test_a_child_beside_another_is_charged_to_its_cgroup() -> None:
    """Neither of the two needs what the cap forbids: together they do."""
    program = "import signal; held = b'1' * {}; print('there', flush=True); signal.pause()"
    command = [sys.executable, "-c", program.format(CAP_BYTES * 6 // 10)]
    with cgroup.started(command, memory_bytes=CAP_BYTES) as one:
        assert one.process.stdout is not None
        assert one.process.stdout.readline() == "there\n"
        assert one.oom_kills() == 0
        with cgroup.started(command, beside=one) as other:
            assert other.process.stdout is not None
            other.process.stdout.readline()
            assert other.oom_kills() == one.oom_kills() == 1


def test_a_quota_of_processors_is_what_the_child_may_use() -> None:
    program = "from pipeload.machine import cgroups, hardware; print(cgroups.cpu_quota(), hardware.cores())"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "engine")}
    with cgroup.started([sys.executable, "-c", program], processors=0.5, env=environment) as child:
        assert child.process.communicate(timeout=TIMEOUT_S)[0] == "0.5 1\n"
