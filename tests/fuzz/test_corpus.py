"""Known inputs are refused with a PipeloadError or answered rightly: the corpus, and all that broke a promise once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.corpora import CORPUS, FOUND, known
from tests.fuzz.targets import NAMES

_ROOT = Path(__file__).parents[2]


def test_every_folder_is_of_a_target() -> None:
    folders = {path.name for folder in (CORPUS, FOUND) for path in folder.iterdir() if path.is_dir()}
    assert folders <= set(NAMES)


@pytest.mark.timeout(600, func_only=True)
def test_known_inputs_keep_all_promises() -> None:
    """In a process of its own, which forks: an input may end the process, and this one has threads."""
    targets = [name for name in NAMES if known(CORPUS, name) or known(FOUND, name)]
    command = [sys.executable, "-m", "tests.fuzz", "--known", *targets]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
