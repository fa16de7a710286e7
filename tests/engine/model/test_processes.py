"""Models stay in their process: forks and copies are refused."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import warnings
from pathlib import Path

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    assert_same,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    THREADS,
    load,
    no_subprocess,
)

import pipeload


@no_subprocess
def test_a_forked_child_is_refused_and_the_parent_goes_on(toy_decoder: Path) -> None:
    expected = run_sequentially(toy_decoder, toys.inputs(), threads=THREADS)
    with load(toy_decoder, smallest_budget(toy_decoder)) as model:
        state = model.new_state()
        assert_same(model.run(toys.inputs()), expected)
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            words = []
            for call in (lambda: model.run(toys.inputs()), lambda: model.step(toys.inputs(), state), model.new_state):
                try:
                    call()
                    words.append("worked")
                except BaseException as error:  # noqa: BLE001 - the parent looks at it
                    words.append(f"{type(error).__name__}: {error}")
            # Harmless: the threads are the parent's.
            model.close()
            os.write(writer, "\n".join(words).encode())
            os._exit(0)
        os.close(writer)
        try:
            with open(reader) as file:
                words = file.read().splitlines()
            assert os.waitpid(child, 0)[1] == 0
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        assert len(words) == 3
        for line in words:
            assert line.startswith("ConfigError: This model was opened in process")
            assert "Load the model after the fork" in line
        for _ in range(3):
            assert_same(model.run(toys.inputs()), expected)


def test_pickling_and_copying_are_refused(toy: Path) -> None:
    with load(toy) as model:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(pipeload.ConfigError, match="cannot be pickled"):
                attempt(model)
        model.run(toys.inputs())
