"""A wrong argument of the facade is a ConfigError with fact, value and remedy, whatever its type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.model.loading import load

import pipeload
from pipeload.machine.sizes import format_bytes

CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "run(5)": (lambda model: model.run(5), "Inputs are arrays by name"),
    "run(None)": (lambda model: model.run(None), "Inputs are arrays by name"),
    "run_many(5)": (lambda model: list(model.run_many(5)), "items is 5"),
    "run_many([5])": (lambda model: list(model.run_many([5])), "Inputs are arrays by name"),
    "run_many(batch)": (lambda model: list(model.run_many([], batch="a")), "batch is 'a'"),
    "step(state)": (lambda model: model.step({}, None), "state is None"),
    "step(positions)": (lambda model: model.step({}, model.new_state(), positions="a"), "positions must be a whole"),
    "step(positions=0)": (lambda model: model.step({}, model.new_state(), positions=0), "positions must be at least 1"),
    "step_top(top)": (lambda model: model.step_top({}, model.new_state(), "a"), "top must be a whole number"),
    "new_state": (lambda model: model.new_state("a"), "capacity is 'a'"),
    "new_state(-1)": (lambda model: model.new_state(-1), "capacity is -1"),
    "session": (lambda model: model.session(2.5), "capacity is 2.5"),
    "generate": (lambda model: model.generate(None), "A prompt must be"),
    "embed": (lambda model: model.embed(None), "embed takes a text model"),
    "step_top(state)": (lambda model: model.step_top({}, 3, 1), "state is 3"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_names_its_wrong_argument(toy_decoder: Path, name: str) -> None:
    call, fact = CALLS[name]
    with load(toy_decoder) as model:
        with pytest.raises(pipeload.ConfigError, match=fact.replace("(", r"\(")):
            call(model)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("sizes", 5), ("sizes", "128"), ("profile", 3), ("loaders", "two"), ("threads", 0), ("progress", 5)],
)
def test_load_names_its_wrong_argument(toy: Path, argument: str, value: Any) -> None:
    with pytest.raises(pipeload.ConfigError, match=argument):
        load(toy, **{argument: value})


def test_load_names_what_is_no_path() -> None:
    with pytest.raises(pipeload.ConfigError, match="5 is no path"):
        pipeload.load(5)  # type: ignore[arg-type]


def test_an_exception_of_the_callers_own_items_passes(toy: Path) -> None:
    def items() -> Any:
        yield toys.inputs()
        raise KeyError("mine")

    with load(toy) as model, pytest.raises(KeyError, match="mine"):
        list(model.run_many(items()))


def test_a_model_shows_what_it_is(toy: Path) -> None:
    with load(toy) as model:
        budget = format_bytes(model.plan.budget_bytes)
        assert repr(model) == f"<pipeload.Model '{toy.name}' for {model.manifest.task}, {budget}>"
    assert repr(model).endswith(", closed>")
