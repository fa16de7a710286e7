"""What type checkers and `help` say of the public interface."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pipeload

PROGRAM = """
import pipeload

def use(model: pipeload.Model) -> None:
    best: str = model.classify("a")[0].label
    pair: list[pipeload.Label] = model.classify(("a", "b"))
    pairs: list[list[pipeload.Label]] = model.classify([("a", "b"), ("c", "d")])
    texts: list[list[pipeload.Label]] = model.classify(["a", "b"])
    starts: list[int] = [found.start for found in model.classify("a") if isinstance(found, pipeload.Entity)]
    one: str = model.answer("a", "b").answer
    several: list[pipeload.Answer] = model.answer("a", "b", top_k=2)
    token: str = model.fill_mask("a")[0].token_str
    label: str = model.zero_shot("a", ["b"])[0].label
    ranked: int = model.rerank("a", ["b"])[0].index
    shape: tuple[int, ...] = model.embed("a", prompt="b", truncate_dim=2).shape
    text: str | None = model.generate("a", temperature=0).text
    peak: int = model.stats.peak_bytes

def report(progress: pipeload.Progress) -> None:
    print(progress.index, progress.count)

with pipeload.load("directory", progress=report) as model:
    stats: pipeload.Stats = model.stats
"""


@pytest.mark.slow
def test_programs_of_users_pass_mypy(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    roots = Path(pipeload.__file__).parents[1]
    arguments = ["--strict", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "program.py")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments],
        env={"MYPYPATH": str(roots), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("program.py")] == []
    assert done.stderr == ""


def test_methods_are_shown_as_methods() -> None:
    methods = {name: value for name, value in vars(pipeload.Model).items() if inspect.isfunction(value)}
    assert {name: next(iter(inspect.signature(each).parameters)) for name, each in methods.items()} == dict.fromkeys(
        methods, "self"
    )
