"""Where a cgroup allows few threads, a model takes no more than it allows, or says what was refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.engine.harness import run_python

import pipeload
from pipeload import LoadError, opening

_PIDS = Path("/sys/fs/cgroup/pids")
_PROGRAM = """
import os
from pathlib import Path
import numpy as np
import onnxruntime
import pipeload

group = Path({group!r})
(group / "cgroup.procs").write_text(str(os.getpid()))
current = int((group / "pids.current").read_text())
(group / "pids.max").write_text(str(current + {more}))
try:
    with pipeload.load({directory!r}, "1GB", threads={threads}) as model:
        model.run({{name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask")}})
        print(model.plan.threads, model.plan.loaders)
except pipeload.LoadError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("spare", "loaders", "threads"),
    [(float("inf"), None, None), (31, None, None), (30, None, 3), (15, None, 2), (14, None, 1), (1, 1, 1)],
)
def test_sessions_compute_with_fewer_threads_where_their_pools_do_not_fit(
    spare: float, loaders: int | None, threads: int | None
) -> None:
    """Three agents, four Loading Agents, and for each of six shards and two that close the threads beside the first."""
    options = _options()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "spare_threads", lambda: spare)
        assert opening._startable(options, 6, 4) == (loaders, threads)


def test_one_loading_agent_where_four_do_not_fit() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "spare_threads", lambda: 6)
        assert opening._startable(_options(), 6, 4) == (1, 1)
        assert opening._startable(_options(loaders=2, threads=1), 6, 4) == (2, 1), "as the caller says"
        with pytest.raises(LoadError, match=r"With threads=3 this model takes 20 threads, .* allows 6 more"):
            opening._startable(_options(threads=3), 6, 4)


def _options(loaders: int | None = None, threads: int | None = None) -> opening.Options:
    return opening.Options(
        budget=pipeload.Budget(), loaders=loaders, threads=threads, dims={}, verify=True, profile=None, progress=None
    )


@pytest.fixture
def group() -> Iterator[Path]:
    """A new cgroup of the controller pids."""
    folder = _PIDS / f"pipeload-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no cgroup (v1) of the controller pids can be made")
    yield folder
    with suppress(OSError):
        folder.rmdir()


@pytest.mark.parametrize(
    ("more", "threads", "said"),
    [
        (4, None, "1 1\n"),
        (2, None, "The thread of the agent 'loader-"),
        (8, 4, "With threads=4 this model takes 37 threads, and the cgroup allows 8 more"),
    ],
)
def test_a_model_runs_in_a_cgroup_of_few_threads(
    group: Path, toy: Path, more: int, threads: int | None, said: str
) -> None:
    program = _PROGRAM.format(group=str(group), more=more, directory=str(toy), threads=threads)
    printed = run_python(program).stdout
    assert printed.startswith(said)
    assert "pids.max" in printed or printed == said
