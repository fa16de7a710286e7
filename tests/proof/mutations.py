"""All mutants of a module: its source with one small fault in it, by operators of cosmic-ray and some for threads."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators import (
    binary_operator_replacement,
    boolean_replacer,
    break_continue,
    comparison_operator_replacement,
    exception_replacer,
    number_replacer,
    remove_decorator,
    unary_operator_replacement,
    zero_iteration_for_loop,
)
from cosmic_ray.operators.operator import Example, Operator

__all__ = ["Mutant", "mutants_of"]


class RemoveStatement(Operator):
    """A call, an assignment, a return or a raise is forgotten."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "simple_stmt" and node.children[0].type not in ("import_from", "import_name", "string"):
            scope = node.search_ancestor("funcdef", "classdef")
            if scope is not None and scope.type == "funcdef":
                yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[0] = parso.parse(f"{node.children[0].get_first_leaf().prefix}pass")
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return (Example("def f():\n    g()\n", "def f():\n    pass\n"),)


class RemoveOperand(Operator):
    """One side of `and` and `or` is forgotten."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type in ("and_test", "or_test"):
            for operand in node.children[::2]:
                yield operand.start_pos, operand.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        # With the operator behind it, or before the last one.
        begin = 2 * index if 2 * index + 1 < len(node.children) else 2 * index - 1
        del node.children[begin : begin + 2]
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return (Example("a or b or c", " b or c"), Example("a or b", "a", 1))


_SWAPS = {"+=": "-=", "-=": "+=", "all": "any", "max": "min", "min": "max", "notify_all": "notify", "popleft": "pop"}


class SwapName(Operator):
    """One function or operator is taken for its neighbour; of several threads that wait, only one is woken."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type in ("name", "operator") and node.value in _SWAPS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = _SWAPS[node.value]
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return (Example("changed.notify_all()", "changed.notify()"), Example("a += 1", "a -= 1"))


def _comparisons() -> Iterator[type[Operator]]:
    """Values are compared in another way, or identity is denied; which of two equal numbers it is does not matter."""
    for kind in comparison_operator_replacement.operators():
        _, old, new = kind.__name__.rsplit("_", 2)
        if old.startswith("Is") == new.startswith("Is"):
            yield kind


def _arithmetic() -> Iterator[type[Operator]]:
    """Numbers and sets are joined by an operator of the same kind."""
    numbers, sets = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"}, {"BitOr", "BitAnd", "BitXor", "Sub"}
    for kind in binary_operator_replacement.operators():
        _, old, new = kind.__name__.rsplit("_", 2)
        if {old, new} <= numbers or {old, new} <= sets:
            yield kind


OPERATORS: tuple[type[Operator], ...] = (
    RemoveStatement,
    RemoveOperand,
    SwapName,
    boolean_replacer.AddNot,
    boolean_replacer.ReplaceTrueWithFalse,
    boolean_replacer.ReplaceFalseWithTrue,
    boolean_replacer.ReplaceAndWithOr,
    boolean_replacer.ReplaceOrWithAnd,
    break_continue.ReplaceBreakWithContinue,
    break_continue.ReplaceContinueWithBreak,
    exception_replacer.ExceptionReplacer,
    number_replacer.NumberReplacer,
    remove_decorator.RemoveDecorator,
    zero_iteration_for_loop.ZeroIterationForLoop,
    *unary_operator_replacement.operators(),
    *_comparisons(),
    *_arithmetic(),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A module with one fault.

    Attributes:
        source: the module's text.
        line: where it differs.
        before: the lines that differ, without their indentation, joined by spaces.
        after: what they have become.
        inside: the fault is in the body of a function.
    """

    source: str
    line: int
    before: str
    after: str
    inside: bool


def mutants_of(source: str) -> list[Mutant]:
    """The mutants that differ in what runs (annotations do not), each once, in the order of their lines."""
    tree = get_ast(source)
    original, found = _run_part(source), {}
    for kind in OPERATORS:
        operator = kind()
        count = sum(len(list(operator.mutation_positions(node))) for node in ast_nodes(tree))
        for occurrence in range(count):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is not None and (part := _run_part(mutated)) not in (None, original):
                found.setdefault(part, mutated)
    return sorted((_mutant(source, mutated) for mutated in found.values()), key=lambda one: (one.line, one.after))


def _run_part(source: str, *, bodies: bool = True) -> str | None:
    """The syntax tree without annotations, and perhaps without the bodies of functions; None where it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body = node.body if bodies else []
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _mutant(source: str, mutated: str) -> Mutant:
    old, new = source.splitlines(), mutated.splitlines()
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    before = [line.strip() for _, begin, end, _, _ in changes for line in old[begin:end]]
    after = [line.strip() for _, _, _, begin, end in changes for line in new[begin:end]]
    inside = _run_part(source, bodies=False) == _run_part(mutated, bodies=False)
    return Mutant(source=mutated, line=changes[0][1] + 1, before=" ".join(before), after=" ".join(after), inside=inside)
