"""The interface of pipeload, as text: public names, signatures, help. The files in `pinned/` hold its earlier state.

    python -m tests.interface.pins      write the files anew, when a change is meant: users notice all of the diff

Each file is compared without spaces and frames, which depend on the versions of the libraries that draw them.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pipeload
import pipeload_export

PINNED = Path(__file__).with_name("pinned")
COMMANDS = (
    "",
    "export",
    "convert",
    "catalog",
    "inspect",
    "verify",
    "profile",
    "plan",
    "run",
    "embed",
    "classify",
    "zero-shot",
    "rerank",
    "answer",
    "fill-mask",
    "generate",
    "chat",
    "serve",
    "node",
    "cluster",
    "cluster init",
    "cluster start",
    "cluster plan",
    "cluster status",
    "timeline",
    "bench",
)
_WIDTH = 100


def help_of(command: str, width: int = _WIDTH) -> str:
    """The output of `pipeload COMMAND --help`."""
    from typer.testing import CliRunner

    from pipeload.cli import app

    variables = {"COLUMNS": str(width), "TERMINAL_WIDTH": str(width), "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [*command.split(), "--help"], env=variables, prog_name="pipeload")
    assert result.exit_code == 0
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"


def file_of(command: str) -> str:
    """The name of the file with a command's help."""
    return f"help-{command.replace(' ', '-') or 'pipeload'}.txt"


def signatures_of(package: Any) -> str:
    """The public names of a package: how functions are called, and the members of classes that callers use."""
    lines: list[str] = []
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isfunction(value):
            lines.append(f"{name}{_call(value)}")
        elif isinstance(value, type):
            lines.append(f"{name}({', '.join(base.__name__ for base in value.__bases__)})")
            lines += [f"    {line}" for line in sorted(_members(value))]
        else:
            lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"


def _members(kind: type) -> set[str]:
    """Methods, and attributes: those of the class, its fields, and those that its docstring names."""
    found = _documented(kind) | {field.name for field in _fields(kind)}
    for name, value in vars(kind).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            found.add(f"{name}{_call(value, method=True)}")
        elif isinstance(value, property) and not name.startswith("_"):
            found.add(name)
    return found


def _call(function: Any, *, method: bool = False) -> inspect.Signature:
    """How it is called: names, order and defaults. mypy checks the types."""
    parameters = [
        each.replace(annotation=inspect.Parameter.empty) for each in inspect.signature(function).parameters.values()
    ]
    return inspect.Signature(parameters[method:])


def _fields(kind: type) -> tuple[Any, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _documented(kind: type) -> set[str]:
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    names = re.findall(r"^    (\w[\w, ]*):", section.partition("\n\n")[0], re.MULTILINE)
    return {name.strip() for group in names for name in group.split(",")}


def without_frames(text: str) -> str:
    """The words alone: how they are wrapped and framed is up to the library that draws them."""
    return re.sub(r"[\s\u2500-\u257f]+", " ", text).strip()


def texts() -> dict[str, str]:
    """File name -> content."""
    found = {file_of(command): help_of(command) for command in COMMANDS}
    found["pipeload.txt"] = signatures_of(pipeload)
    found["pipeload_export.txt"] = signatures_of(pipeload_export)
    return found


if __name__ == "__main__":
    PINNED.mkdir(exist_ok=True)
    for name, text in texts().items():
        (PINNED / name).write_text(text)
        print(os.path.relpath(PINNED / name))
