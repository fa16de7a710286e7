"""Run the engine's tests on aarch64, and compare models' outputs between aarch64 and x86-64.

    python -m tests.arm64.run                                   tests/engine, then COMPARED on every CPU
    python -m tests.arm64.run --short                           the files in SHORT_SELECTION, and one CPU, for CI
    python -m tests.arm64.run --models models/exported/minilm   other models than COMPARED
    python -m tests.arm64.run --no-tests --models DIR --cpu max
    python -m tests.arm64.run -- -k budget -x                   further arguments for pytest

The exit code is 0 if everything passed, 1 if something failed, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.arm64.environment import REPOSITORY, PreparationError, is_native, prepare
from tests.models import TOYS

from pipeload.format.closeness import range_of

ENGINE_TESTS = REPOSITORY / "tests" / "engine"

# Parts that differ most on another architecture: system calls and alignment, and kernels. All of it together, threads
# included, is in the comparison of outputs.
SHORT_SELECTION = (
    *(f"storage/test_{name}.py" for name in ("buffers", "page_sizes", "rows", "weights", "widening")),
    "pipeline/test_session.py",
)

# onnxruntime chooses its kernels by the features of the CPU. One CPU a choice: Raspberry Pi 4 (plain NEON) and
# 5 (dot products), AWS Graviton 3 (SVE, bfloat16, int8 matrices), all that qemu knows (SVE2, SME).
CPUS = ("cortex-a72", "cortex-a76", "neoverse-v1", "max")
TEST_CPU = "cortex-a76"

COMPARED = ("bert", "vit", "gpt2")
"""Tiny seeded models of tests/models.py whose outputs are compared unless others are named."""

# Emulated arithmetic takes 30 to 300 times as long as on the host.
TEST_TIMEOUT_S = 1800
RUN_TIMEOUT_S = 3600


class UsageError(Exception):
    """The command line asks for an impossible run; the message is one line."""


def difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the largest difference as a share of the expected array's range.

    Whole numbers must be equal. Infinite (not comparable) where shape, type or infinities differ, and for NaN.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(expected, actual) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite]) or not np.isfinite(actual[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    one, other = expected[finite].astype(np.float64), actual[finite].astype(np.float64)
    return float(np.abs(one - other).max() / range_of(one, expected.dtype.name))


def worst_difference(expected: Mapping[str, NDArray[Any]], actual: Mapping[str, NDArray[Any]]) -> tuple[float, str]:
    """Return the largest difference over all outputs and the name of the output that has it."""
    if not expected or expected.keys() != actual.keys():
        return float("inf"), f"the names of the outputs: {sorted(actual)}, not {sorted(expected)}"
    return max((difference(value, actual[name]), name) for name, value in expected.items())


def make_models(folder: Path) -> Path:
    """Make the tests' models, which needs torch, with the host's interpreter, and name them to the tests.

    Raises:
        UsageError: the host's interpreter could not make them.
    """
    path = os.pathsep.join(str(REPOSITORY / root) for root in ("engine", "exporter"))
    command = [sys.executable, "-m", "tests.models", str(folder), *COMPARED, *TOYS]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise UsageError(f"the tests' models cannot be made, {lines[-1] if lines else 'no message'}: run `make test`")
    os.environ["PIPELOAD_TEST_MODELS"] = str(folder)
    return folder


def engine_environment(cpu: str | None = None) -> dict[str, str]:
    """Return the environment variables of a process that imports the engine from this repository."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY / "engine")}
    return variables | {"QEMU_CPU": cpu} if cpu else variables


def run_tests(interpreter: Path, cpu: str, selection: Sequence[str], further: Sequence[str]) -> bool:
    """Run pytest under the interpreter and say whether everything passed."""
    targets = [str(ENGINE_TESTS / name) for name in selection] or [str(ENGINE_TESTS)]
    if missing := [target for target in targets if not Path(target).exists()]:
        raise UsageError(f"no such tests, {' '.join(missing)}: correct SHORT_SELECTION in tests/arm64/run.py")
    arguments = [str(interpreter), "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}"]
    done = subprocess.run([*arguments, *targets, *further], cwd=REPOSITORY, env=engine_environment(cpu), check=False)
    return done.returncode == 0


def outputs_of(
    interpreter: Path, directory: Path, options: Sequence[str], *, cpu: str | None = None
) -> dict[str, NDArray[Any]]:
    """Return the outputs of one model directory under an interpreter; options are those of outputs.py.

    Raises:
        RuntimeError: the run failed; the message is its last word.
    """
    with tempfile.TemporaryDirectory(prefix="pipeload-arm64-") as folder:
        target = Path(folder) / "outputs.npz"
        script = Path(__file__).with_name("outputs.py")
        try:
            done = subprocess.run(
                [str(interpreter), str(script), str(directory), str(target), *options],
                env=engine_environment(cpu),
                capture_output=True,
                text=True,
                check=False,
                timeout=RUN_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"not finished after {RUN_TIMEOUT_S} s") from error
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"exit code {done.returncode}, {lines[-1].strip() if lines else 'no message'}")
        with np.load(target) as saved:
            return {str(name): saved[f"arr_{number}"] for number, name in enumerate(saved["arr_0"], 1)}


def compare(
    interpreter: Path,
    directory: Path,
    options: Sequence[str],
    *,
    cpus: Sequence[str],
    tolerance: float,
) -> bool:
    """Print a line for every CPU with the worst difference from x86-64, and say whether all are tolerable."""
    name = directory.resolve().name
    try:
        expected = outputs_of(Path(sys.executable), directory, options)
    except RuntimeError as error:
        print(f"FAILED  {name}  on x86-64: {error}", flush=True)
        return False
    passed = True
    for cpu in cpus:
        started = time.monotonic()
        try:
            actual = outputs_of(interpreter, directory, options, cpu=cpu)
        except RuntimeError as error:
            print(f"FAILED  {name}  {cpu}: {error}", flush=True)
            passed = False
            continue
        worst, where = worst_difference(expected, actual)
        tolerable = worst <= tolerance
        passed = passed and tolerable
        verdict = f"worst difference {worst:.1e} of the range" if np.isfinite(worst) else "not comparable"
        print(
            f"{'ok' if tolerable else 'FAILED':6}  {name}  {cpu}: {verdict}, in {where}, "
            f"{time.monotonic() - started:.1f} s",
            flush=True,
        )
    return passed


def main() -> int:
    """Parse the command line and run the parts that it names."""
    with ExitStack() as stack:
        return _run(stack)


def _run(stack: ExitStack) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--short", action="store_true", help="only the tests whose result can depend on the CPU")
    add("--no-tests", action="store_true", help="only compare models")
    add("--models", type=Path, nargs="+", default=[], metavar="DIR", help=f"default {' '.join(COMPARED)} of the tests")
    add("--cpu", action="append", metavar="NAME", help=f"default {TEST_CPU} for tests, else {' '.join(CPUS)}")
    add("--tolerance", type=float, default=1e-4, help="share of the output's range, default 1e-4")
    add("--memory-budget", default="512MB", help="for each run of a model, default 512MB")
    add("--seed", type=int, default=0)
    add("pytest_arguments", nargs="*", metavar="-- PYTEST_ARGUMENTS")
    arguments = parser.parse_args()
    passed = True
    try:
        if arguments.models and is_native():
            raise UsageError("this machine is aarch64, with no x86-64 to compare with: leave out --models")
        interpreter = prepare()
        folder = make_models(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeload-arm64-"))))
        compared = arguments.models or ([] if is_native() else [folder / name for name in COMPARED])
        if not arguments.no_tests:
            cpu = arguments.cpu[0] if arguments.cpu else TEST_CPU
            selection = SHORT_SELECTION if arguments.short else ()
            passed = run_tests(interpreter, cpu, selection, arguments.pytest_arguments)
        for directory in compared:
            options = ["--seed", str(arguments.seed), "--memory-budget", arguments.memory_budget]
            cpus = arguments.cpu or ([TEST_CPU] if arguments.short else CPUS)
            passed &= compare(interpreter, directory, options, cpus=cpus, tolerance=arguments.tolerance)
    except (PreparationError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
