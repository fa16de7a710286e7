"""The tree of exceptions is public: programs catch by it."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pipeload import errors


def test_the_tree_is_pinned() -> None:
    tree = {name: getattr(errors, name).__bases__ for name in errors.__all__}
    assert tree == {
        "BudgetError": (errors.PipeloadError, MemoryError),
        "ClosedError": (errors.PipeloadError,),
        "ClusterError": (errors.PipeloadError,),
        "ConfigError": (errors.PipeloadError, ValueError),
        "DeadlineError": (errors.PipeloadError, TimeoutError),
        "EmbeddingWarning": (UserWarning,),
        "ExportError": (errors.PipeloadError,),
        "LoadError": (errors.PipeloadError,),
        "ManifestError": (errors.PipeloadError,),
        "PipeloadError": (Exception,),
        "RunError": (errors.PipeloadError,),
        "QuantisationWarning": (UserWarning,),
        "ShardError": (errors.PipeloadError,),
        "TruncationWarning": (UserWarning,),
    }


def test_no_exception_is_left_out_of_all() -> None:
    defined = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert defined == set(errors.__all__)


def test_the_docstring_draws_the_tree() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__


def test_a_budget_error_says_what_would_work() -> None:
    error = errors.BudgetError("too small", needed_bytes=20, budget_bytes=10)
    assert (str(error), error.needed_bytes, error.budget_bytes) == ("too small", 20, 10)


@pytest.mark.parametrize("name", errors.__all__)
def test_exceptions_travel_between_processes(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("fact", needed_bytes=2, budget_bytes=1) if name == "BudgetError" else kind("fact")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, "fact", vars(error))
