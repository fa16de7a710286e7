"""A checkpoint -> an unsplit ONNX graph, by `optimum.exporters.onnx`, in a child process.

Why a child: tracing a model takes several times its size in memory, and torch gives much of it back only when the
process ends; splitting begins with all of it free. The libraries' many warnings stay out of the user's terminal,
a process that the kernel kills for lack of memory becomes an error message, and Ctrl-C ends the work at once.

The child, `tracer`, reads a request from a file, and answers with the graph in a folder and a file beside it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

import pipeload
from pipeload.errors import ExportError
from pipeload.machine.memory import auto_budget_bytes
from pipeload.machine.sizes import format_bytes
from pipeload.notify import Notify
from pipeload_export.extra import has_optimum
from pipeload_export.source.refused import Declined
from pipeload_export.source.widened import MAPPED_FROM_BYTES

__all__ = [
    "GAPS_NAME",
    "RESOLVED",
    "Request",
    "Seeded",
    "export_checkpoint",
    "needed_memory_bytes",
    "only_graph",
    "run_child",
]

GAPS_NAME = "gaps.json"
"""File beside the graph that tells which weights did not fit, if any."""

RESOLVED = "resolved"
"""Folder beside the graph that holds the checkpoint's tokenizer as transformers makes it, if there is one."""

_INLINE_BYTES = 2 << 30
"""From here on torch writes the weights beside the graph, tensor by tensor."""
_INLINE_FACTOR, _EXTERNAL_FACTOR, _LIBRARIES_BYTES = 4.4, 2.5, 350 << 20
"""Peak memory per byte of float32 weights, and without any. Measured with torch 2.13 and optimum-onnx 0.1 on BERT
(0.4 GB: 4.4) and on GPT-2 and GPT-J shapes (2.3 and 3.3 GB: 2.4)."""
_HOLLOW_FACTOR, _HOLLOW_BYTES = 0.02, 1 << 30
"""The same where the weights stay in the checkpoint: page tables, and libraries with the graph and activations."""
_CHILD = "import sys; from pipeload_export.source.tracer import run_child; run_child(*sys.argv[1:])"
_POLL_S = 0.2


class Seeded(msgspec.Struct, frozen=True, kw_only=True):
    """A model with random weights.

    Attributes:
        model_class, config_class: transformers' classes.
        config: the config's fields.
        seed: of torch.
        dtype: torch's name of the type that the weights are rounded to, as a checkpoint of that type has them.
    """

    model_class: str
    config_class: str
    config: dict[str, Any]
    seed: int
    dtype: str = "float32"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The parent's request to the child.

    Attributes:
        name: the model's name in messages.
        task: one of `TASKS`.
        weight_bytes: size of the weights in float32.
        stored_bytes: size of the checkpoint's files with weights.
        folder: the checkpoint, if it is not a seeded model.
        gguf: the file in the folder, if it is GGUF.
        seeded: the model, if it is made here.
        opset: version of the ONNX operators; None for the library's choice.
        trust_remote_code: run the checkpoint's own Python files.
        allow_missing: go on with random numbers where the checkpoint lacks weights.
        widened_bytes: size of the float32 files that are made of the checkpoint's, to be mapped; 0 for none.
        hollow: trace the model without its weights, which stay in the checkpoint.
    """

    name: str
    task: str
    weight_bytes: int
    stored_bytes: int = 0
    folder: str | None = None
    gguf: str | None = None
    seeded: Seeded | None = None
    opset: int | None = None
    trust_remote_code: bool = False
    allow_missing: bool = False
    widened_bytes: int = 0
    hollow: bool = False

    @property
    def may_be_hollow(self) -> bool:
        """Whether to try that first: the model is a checkpoint that optimum traces, and takes less memory so.

        Matrices of a GGUF file are then taken apart several times: only where memory has no room for the ordinary way.
        """
        if not self.folder or not has_optimum():
            return False
        needed = needed_memory_bytes(self.weight_bytes)
        if self.gguf:
            return needed > auto_budget_bytes()
        return needed_memory_bytes(self.weight_bytes, hollow=True) < needed

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file, if it is one."""
        return Path(str(self.folder), self.gguf) if self.gguf else None

    @property
    def mapped(self) -> bool:
        """Whether the weights stay in files while the model runs."""
        return bool(self.folder) and not self.gguf and self.weight_bytes >= MAPPED_FROM_BYTES


def needed_memory_bytes(weight_bytes: int, *, hollow: bool = False) -> int:
    """An estimate of the child's peak memory for a model of that size (in float32), traced with its weights or not."""
    if hollow:
        return _HOLLOW_BYTES + int(_HOLLOW_FACTOR * weight_bytes)
    factor = _INLINE_FACTOR if weight_bytes < _INLINE_BYTES else _EXTERNAL_FACTOR
    return _LIBRARIES_BYTES + int(factor * weight_bytes)


def export_checkpoint(request: Request, folder: Path, progress: Notify, *, obstacle: str | None = None) -> Path:
    """Write the unsplit ONNX graph, config and tokenizer into a new folder. Returns the graph's path.

    Args:
        request: the child's orders.
        folder: where to.
        progress: told what is written.
        obstacle: why the weights cannot stay in the checkpoint, where that was tried.

    Raises:
        Declined: the model cannot be traced without its weights.
        ExportError: there is not enough memory, or the libraries could not export the model.
    """
    needed, free = needed_memory_bytes(request.weight_bytes, hollow=request.hollow), auto_budget_bytes()
    if needed > free:
        why = f" Its weights cannot stay in the checkpoint meanwhile: {obstacle}." if obstacle else ""
        raise ExportError(
            f"Exporting {request.name} ({format_bytes(request.weight_bytes)} of weights in float32) takes about "
            f"{format_bytes(needed)} of memory, and {format_bytes(free)} are free. Export it on a larger machine: "
            f"the sharded model directory can then be copied.{why}"
        )
    folder.mkdir(parents=True)
    error = run_child(
        _CHILD,
        request,
        folder,
        fact=f"Exporting {request.name} to ONNX",
        needed=needed,
        online=request.trust_remote_code,
        tick=lambda: progress("export to ONNX", *_written(folder, 0 if request.hollow else request.weight_bytes)),
    )
    if error:
        raise ExportError(f"{request.name} cannot be exported to ONNX: {error}")
    path = only_graph(folder, request.name)
    progress("export to ONNX", request.weight_bytes, request.weight_bytes)
    return path


def only_graph(folder: Path, name: str) -> Path:
    """The graph of a model that was traced into a folder.

    Raises:
        ExportError: it became several.
    """
    graphs = sorted(path.name for path in folder.glob("*.onnx"))
    if graphs != ["model.onnx"]:
        raise ExportError(
            f"{name} became {len(graphs)} ONNX graphs ({', '.join(graphs)}); pipeload runs models of one. "
            "Pass the .onnx file of the one that you need."
        )
    return folder / "model.onnx"


def run_child(
    program: str,
    request: msgspec.Struct,
    folder: Path,
    *,
    fact: str,
    needed: int,
    online: bool,
    tick: Callable[[], None],
) -> str | None:
    """Run a child process, which gets a request and works in a folder. Returns its refusal, if it refuses.

    Args:
        program: Python code, whose arguments are the path of the request, the folder and this process.
        request: the child's orders.
        folder: an existing folder; request, answer and log lie beside it.
        fact: the first words of messages.
        needed: bytes of memory that the child takes.
        online: it may look at the hub.
        tick: called several times a second; what it raises ends the child.

    Raises:
        Declined: the child cannot do it in the way that it was asked to, and may be able to do it in another.
        ExportError: the child died.
        OSError: the disk is full.
    """
    request_path, result_path, log_path = (folder.with_name(n) for n in ("request.json", "result.json", "export.log"))
    result_path.unlink(missing_ok=True)
    request_path.write_bytes(msgspec.json.encode(request))
    verbose = logging.getLogger("pipeload_export").isEnabledFor(logging.DEBUG)
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            # -P: nothing is imported from the current directory.
            [sys.executable, "-P", "-c", program, str(request_path), str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=None if verbose else log,
            stderr=None if verbose else log,
            env=_environment(folder.parent, online=online, verbose=verbose),
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_S)
                    break
                tick()
        finally:
            child.kill()
            child.wait()
    if not result_path.exists():
        raise ExportError(f"{fact} {_death(child.returncode, log_path, needed)}")
    answer = json.loads(result_path.read_bytes())
    if number := answer["errno"]:
        raise OSError(number, os.strerror(number), str(folder.parent))
    if answer["declined"]:
        raise Declined(answer["declined"])
    return str(answer["error"]) if answer["error"] else None


def _environment(work: Path, *, online: bool, verbose: bool) -> dict[str, str]:
    roots = [str(Path(pipeload.__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([*dict.fromkeys(roots), environment.get("PYTHONPATH", "")]).strip(":")
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["TMPDIR"] = str(work)
    if not online:
        # All files are here by now; only a model's own code may be in another repository.
        environment["HF_HUB_OFFLINE"] = "1"
    if not verbose:
        environment["PYTHONWARNINGS"] = "ignore"
    return environment


def _written(folder: Path, weight_bytes: int) -> tuple[int, int]:
    """Bytes written so far, and in all; a small model is written in one go at the end, so nothing is known."""
    if weight_bytes < _INLINE_BYTES:
        return 0, 0
    with suppress(FileNotFoundError):  # files come and go while the child works
        return min(sum(path.stat().st_size for path in folder.iterdir()), weight_bytes), weight_bytes
    return 0, weight_bytes


def _death(code: int, log: Path, needed: int) -> str:
    if code == -signal.SIGKILL:
        return (
            f"was killed by the system, most likely for lack of memory: it takes about {format_bytes(needed)}. "
            "Free memory, or export on a larger machine."
        )
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"ended with exit code {code}. Its last words: {lines[-1] if lines else 'none'}"
