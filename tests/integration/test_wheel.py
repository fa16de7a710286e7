"""`pip install pipeload` alone, from the built wheel in a bare environment, runs a sharded directory given arrays."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_same, run_sequentially

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).resolve().parents[2]
FOREIGN = {"torch", "onnx", "transformers", "optimum", "tokenizers", "jinja2", "PIL", "pytest"}

_PROGRAM = """
import json, sys
import numpy as np
import pipeload
directory, asked, answers = sys.argv[1:]
try:
    pipeload.load(directory, 1)
except pipeload.BudgetError as error:
    budget = error.needed_bytes
with pipeload.load(directory, budget, threads=1) as model, np.load(asked) as inputs:
    np.savez(answers, **model.run(dict(inputs)))
    streamed = model.plan.streamed_bytes
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"file": pipeload.__file__, "streamed": streamed, "modules": modules}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree by the tools that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("pipeload-*.whl")
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The interpreter of a virtual environment that holds the wheel and its requirements, and nothing else."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--constraint", str(REPOSITORY / "constraints.txt"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def test_the_wheel_holds_both_packages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pipeload/model.py", "pipeload/serve/page/index.html", "pipeload_export/export.py"} <= set(names)
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"pipeload", "pipeload_export"}


def test_the_wheel_says_that_it_is_typed(wheel: Path) -> None:
    assert {"pipeload/py.typed", "pipeload_export/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())


def test_the_source_distribution_holds_what_the_readme_tells_to_run(tmp_path: Path) -> None:
    """Its first two commands, `make demo` and `make test`, failed there."""
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("pipeload-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"Makefile", "constraints.txt", ".ci/install", "benchmarks/demo/__main__.py", "tests/conftest.py"}
    assert needed | {"models/catalog.toml", "engine/pipeload/model.py", "CONTRIBUTING.md"} <= names
    assert not [name for name in names if name.startswith("models/exported")]


def test_it_runs_a_sharded_directory_given_arrays(bare: Path, tmp_path: Path) -> None:
    model = toys.make_toy(tmp_path / "model", blocks=6, width=256)
    np.savez(tmp_path / "asked.npz", **toys.inputs())
    # -I: neither this folder nor PYTHONPATH, so that only installed packages can be imported.
    done = subprocess.run(
        [bare, "-I", "-c", _PROGRAM, model, tmp_path / "asked.npz", tmp_path / "answers.npz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert str(bare.parents[1]) in report["file"]
    assert report["streamed"] > 0
    assert FOREIGN.isdisjoint(report["modules"])
    with np.load(tmp_path / "answers.npz") as answers:
        assert_same(dict(answers), run_sequentially(model, toys.inputs(), threads=1))


def test_no_framework_was_installed(bare: Path) -> None:
    done = subprocess.run(
        [bare, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    names = {entry["name"].lower() for entry in json.loads(done.stdout)}
    assert "pipeload" in names
    assert {name.lower() for name in FOREIGN}.isdisjoint(names)


def test_the_command_is_installed(bare: Path) -> None:
    done = subprocess.run(
        [bare.with_name("pipeload"), "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
