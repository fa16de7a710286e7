"""An exception of a library becomes an error of pipeload, with its cause."""

from __future__ import annotations

import pytest

from pipeload.errors import ClosedError, ConfigError, LoadError, ManifestError, RunError, ShardError
from pipeload.foreign import chain, first_line, foreign_errors, shortage_in


class PanicException(BaseException):
    """The exception of a panic in a library written in Rust."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("deep"), OSError(24, "Too many open files"), PanicException("index 3")]
)
def test_a_foreign_exception_is_the_cause_of_an_error_with_fact_and_remedy(error: BaseException) -> None:
    with pytest.raises(ConfigError, match=r"^The file is odd: .*\. Mend it\.$") as raised:
        with foreign_errors(ConfigError, "The file is odd", "Mend it."):
            raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("kind", [ConfigError, ManifestError, ShardError])
def test_a_process_without_memory_is_no_fault_of_a_file_or_an_argument(kind: type[Exception]) -> None:
    error = MemoryError("Unable to allocate 9 GB")
    with pytest.raises(RunError, match=r"^The process has no memory left: Unable to allocate 9 GB\. ") as raised:
        with foreign_errors(kind, "The file is odd", "Mend it."):
            raise error
    assert raised.value.__cause__ is error
    with pytest.raises(LoadError, match="The shard was not loaded: Unable to allocate 9 GB"):
        with foreign_errors(LoadError, "The shard was not loaded", "Mend it."):
            raise error


@pytest.mark.parametrize("error", [ClosedError("closed"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_errors_of_pipeload_and_signals_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        with foreign_errors(ConfigError, "The file is odd", "Mend it."):
            raise error
    assert raised.value is error


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert first_line(StopIteration()) == "StopIteration"
    assert first_line(OSError(28, "No space left on device", "/tmp/x")) == "No space left on device"
    assert first_line(RuntimeError("First.\nSecond.")) == "First"


def test_the_root_of_an_error_is_found_in_a_circle_of_causes_too() -> None:
    root = MemoryError()
    first, second = LoadError("a shard"), RunError("a pass")
    first.__cause__, second.__cause__ = second, root
    assert shortage_in(first) == "no memory is left to it"
    first.__context__ = OSError(24, "Too many open files")
    assert shortage_in(first) == "no memory is left to it", "contexts are no causes"
    root.__cause__ = first
    assert shortage_in(first) == "no memory is left to it"
    second.__cause__ = second
    assert shortage_in(second) is None
    assert [*chain(first)] == [first, first.__context__, second]
