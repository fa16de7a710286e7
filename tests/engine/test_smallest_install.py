"""What README calls the smallest install: packages without their dependencies, for the Python API with texts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine.harness import EMULATED
from tests.engine.tasks.fakes import write_bert_tokenizer
from tests.models import REPOSITORY

pytestmark = pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")

_ONLY = """
import sys

class Only:
    def find_spec(self, name, *_):
        first = name.split(".")[0]
        if first not in allowed and first not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=first)

allowed = {*sys.argv[1].split(","), "pipeload"}
sys.meta_path.insert(0, Only())
"""


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    listed = re.search(r"^pip install --no-deps \. (.*?)( +#.*)?$", (REPOSITORY / "README.md").read_text(), re.M)
    assert listed, "README names the packages of the smallest install"
    return subprocess.run(
        [sys.executable, "-c", _ONLY + program, ",".join(listed[1].split()), *arguments],
        env={"PYTHONPATH": str(REPOSITORY / "engine")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_texts_are_embedded_with_the_packages_that_readme_lists(toy_copy: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(toy_copy)
    done = _run(
        "import pipeload\nwith pipeload.load(sys.argv[2], '8GB') as model: print(model.embed('the cat').shape)",
        str(toy_copy),
    )
    assert (done.stdout, done.stderr) == ("(64,)\n", "")


def test_the_command_names_the_packages_that_it_needs() -> None:
    done = _run("from pipeload.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr == (
        "error: The command pipeload needs the package typer, which is not installed: pip install rich typer. "
        "The Python API works without it.\n"
    )
