"""The sandbox of chat templates: Jinja's own, with bounds on a template's work and on the size of its results.

Jinja's own sandbox keeps a template from Python's internals. It bounds a single `range`, but neither loops in loops,
nor `'x' * 10**10`, nor `x ~ x` in a loop, nor lists of lists that hold the same list twice.

```
loops, calls, operators, filters   a step each, of a limited number
texts and lists that they make     a limited size each, and all together
```

The sandbox changes the syntax tree of a template so that both are counted; it measures a result that may multiply a
size before the result is made. So any rendering ends within seconds, and within some hundred megabytes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from string import Formatter
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["Sandbox"]

_STEPS, _STEPS_PER_MESSAGE = 500_000, 1_000
_LARGEST, _LARGEST_PER_INPUT = 1_000_000, 10
"""A text made by a template has at most `_LARGEST` characters, plus `_LARGEST_PER_INPUT` per character given."""
_TOTAL = 20
"""All texts together have at most this many times that size."""
_COMPARED = 16
"""Reading this many characters costs as much as making one."""
_VISITED = 10
"""Reading a value in a list costs as much as making this many characters."""
_INTEGER_BITS = 4096
_STEP, _TAKEN, _MADE, _JOIN = "(step)", "(taken)", "(made)", "(join)"
"""Filters that no template can name."""

_MULTIPLYING = frozenset(
    {"batch", "center", "format", "indent", "ljust", "rjust", "round", "slice", "tojson", "urlize", "wordwrap", "zfill"}
)
"""Filters and methods of texts whose result may be as large as the product of their arguments' sizes."""
_FORBIDDEN = frozenset({"encode", "expandtabs", "from_bytes", "maketrans", "to_bytes", "translate"})
"""Methods of texts and numbers that would need bounds as well; no known template uses them."""


class _Left(threading.local):
    """The work left to the rendering in this thread."""

    steps = size = largest = 0


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with bounds. Safe to use from several threads.

    Args:
        extensions: extensions of the language.
        filters: added to Jinja's own, or replacing those of the same name.
        functions: likewise for functions.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(
        self,
        extensions: Sequence[type[Extension]],
        filters: Mapping[str, Callable[..., Any]],
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        # Jinja would evaluate constant expressions at compile time, before counting begins.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.finalize = pass_context(lambda _context, value: self.made(value))
        self.concat = self.join  # type: ignore[method-assign]
        self.globals.update(functions, lipsum=_refuse)
        self.filters = {name: self._bounded(name, run) for name, run in {**self.filters, **filters}.items()}
        self.filters |= {_STEP: self.step, _TAKEN: self.taken, _MADE: self.made, _JOIN: self.join}
        self._left = _Left()

    def template(self, source: str) -> Template:
        """The template, compiled, with the counting in it.

        Raises:
            Exception: it is no template; Jinja, Python's compiler and numbers each have errors of their own for it.
        """
        tree = _Counting().visit(self.parse(source))
        return Template.from_code(self, self.compile(tree.set_environment(self)), {**self.globals})

    def begin(self, messages: Sequence[object], others: object) -> None:
        """Grant the rendering in this thread an amount of work that grows with its inputs.

        Args:
            messages: the messages to render.
            others: its other inputs.
        """
        given = _size((messages, others), 1 << 40)[0]
        self._left.steps = _STEPS + _STEPS_PER_MESSAGE * len(messages)
        self._left.largest = _LARGEST + _LARGEST_PER_INPUT * given
        self._left.size = _TOTAL * self._left.largest

    def step(self, _nothing: None = None) -> None:
        """Count one step."""
        self._left.steps -= 1
        if self._left.steps < 0:
            raise SecurityError("it loops on and on")

    def made(self, value: Any) -> Any:
        """Count a value that the template has made."""
        self.taken(value)
        if isinstance(value, str):
            self._spend(len(value))
        return value

    def taken(self, value: Any) -> Any:
        """Count a value that the template reads."""
        self.step()
        size, visited = (len(value), 1) if type(value) is str else _size(value, self._left.largest)
        self._check(size)
        self._spend(visited * _VISITED + size // _COMPARED)
        return value

    def join(self, pieces: Iterable[object]) -> str:
        """Join values into one text: for `~`, for blocks, and for the whole output."""
        texts: list[str] = []
        size = 0
        for piece in pieces:
            texts.append(piece if isinstance(piece, str) else str(self.taken(piece)))
            size += len(texts[-1])
            self._check(size)
        self._spend(size)
        return "".join(texts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, macro or method."""
        if isinstance(__obj, BlockReference):
            raise SecurityError("it prints a block twice")
        if not isinstance(__obj, Macro):
            __self.taken((args, kwargs))
        if isinstance(text := getattr(__obj, "__self__", None), str):
            name = __obj.__name__
            if name == "join" and args:
                args = ([*args[0]], *args[1:])
                __self._check_joined(args[0], text)
            __self._check_product(name, text, args, kwargs)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        numbers = [one for one in (left, right) if isinstance(one, int)]
        if operator == "%" and isinstance(left, str):
            self._check_format(left, re.findall(r"%[^a-zA-Z%]*", left), right)
        elif operator == "**" and len(numbers) == 2:
            self._check_integer(left.bit_length() * abs(right))
        elif operator == "*" and len(numbers) == 2:
            self._check_integer(left.bit_length() + right.bit_length())
        elif operator == "*" and numbers:
            self._check(self._size(right if isinstance(left, int) else left) * abs(numbers[0]))
        return self.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have an attribute."""
        return attr not in _FORBIDDEN and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's version of a text's method `format`, or None for anything else."""
        run = super().wrap_str_format(value)
        if run is None:
            return None

        @wraps(run)
        def bounded(*args: Any, **kwargs: Any) -> str:
            fields = [spec for _, name, spec, _ in Formatter().parse(value.__self__) if name is not None]
            self._check_format(value.__self__, [spec or "" for spec in fields], (args, kwargs))
            return run(*args, **kwargs)

        return bounded

    def _bounded(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose work is counted."""
        # Some filters take Jinja's own context before the value.
        first = 1 if hasattr(run, "jinja_pass_arg") else 0

        @wraps(run)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            own, value, rest = args[:first], args[first], args[first + 1 :]
            self.taken((value, rest, kwargs))
            if name == "join":
                value = [*value]
                self._check_joined(value, rest[0] if rest else kwargs.get("d", ""))
            self._check_product(name, value, rest, kwargs)
            return self.made(run(*own, value, *rest, **kwargs))

        return bounded

    def _size(self, value: Any) -> int:
        return _size(value, self._left.largest)[0]

    def _spend(self, size: int) -> None:
        self._left.size -= size
        if self._left.size < 0:
            raise SecurityError("it makes more and more text")

    def _check(self, size: int) -> None:
        if size > self._left.largest:
            raise SecurityError(f"it makes something larger than {self._left.largest} characters of text")

    def _check_integer(self, bits: int) -> None:
        if bits > _INTEGER_BITS:
            raise SecurityError(f"it makes a number of more than {_INTEGER_BITS} bits")

    def _check_joined(self, items: list[Any], separator: Any) -> None:
        self._check(self._size(items) + len(items) * self._size(separator))

    def _check_product(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if name == "replace" and len(given) > 1:
            text, old, new = str(value), str(given[0]), str(given[1])
            self._check(len(text) + text.count(old) * len(new))
        elif name == "format":
            self._check_format(str(value), re.findall(r"%[^a-zA-Z%]*", str(value)), given)
        elif name in _MULTIPLYING:
            factor = sum(abs(one) if isinstance(one, int) else self._size(one) for one in given)
            self._check((1 + self._size(value)) * max(1, factor))

    def _check_format(self, text: str, fields: Sequence[str], given: Any) -> None:
        """Refuse fields with a large width or with a width from an argument, and values printed too many times."""
        if any(re.search(r"\*|\{|\d{4}", field) for field in fields):
            raise SecurityError("it formats a text to a width without bounds")
        self._check(len(text) + len(fields) * self._size(given))


def _refuse(*_: object, **__: object) -> NoReturn:
    raise SecurityError("it asks for text at random")


class _Counting(NodeTransformer):
    """Adds counting to a syntax tree: of rounds of loops, of compared values, and of the results of expressions."""

    def visit(self, node: nodes.Node, *_: Any, **__: Any) -> Any:
        """The node with counting added to it and to all nodes below it."""
        self.generic_visit(node)
        match node:
            case nodes.For():
                step = _through(_STEP, nodes.Const(None, lineno=node.lineno))
                node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
                node.test = node.test and _through(_TAKEN, node.test)
            case nodes.Compare():
                node.expr = _through(_TAKEN, node.expr)
                for operand in node.ops:
                    operand.expr = _through(_TAKEN, operand.expr)
            case nodes.Test():
                node.args = [_through(_TAKEN, one) for one in node.args]
            case nodes.Concat():
                return _through(_JOIN, nodes.Tuple(node.nodes, "load", lineno=node.lineno))
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _through(_MADE, node)
        return node


def _through(name: str, value: Any) -> nodes.Filter:
    """A value passed through one of the sandbox's own functions, as a filter: Jinja calls filters directly."""
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _size(value: Any, most: int) -> tuple[int, int]:
    """The approximate size of a value's text, and the number of values in it. Counting ends at `most`."""
    size = visited = 0
    waiting = [value]
    while waiting and size <= most:
        one = waiting.pop()
        visited += 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, range):
            visited += len(one)
        elif isinstance(one, Namespace):
            waiting.append(one._Namespace__attrs)
        size += 1 + (one.bit_length() // 3 if isinstance(one, int) else 0)
    return size, visited
