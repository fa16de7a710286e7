"""Bodies of HTTP requests that are made to take time or memory.

The attacker is a client of the server: one with a key, or any program and page where the server has no keys. He wants
the server to stop answering others, or to grow beyond its memory.
"""

from __future__ import annotations

from pathlib import Path

from tests.attacks.attack import HELD, SucceededError, attack, in_child, run_module

_DEPTH = """
from pipeload.serve.errors import ApiError
from pipeload.serve.reading import _check_depth
def told(data):
    try:
        _check_depth(data)
    except ApiError as error:
        return str(error)
    return "no fault"
"""


@attack
def quotes_without_an_end(_folder: Path) -> str:
    """16 MiB of escaped quotes in a text that never ends: a search from each of them would take the square of that."""
    told = in_child(_DEPTH + r"print(told(b'[' * 65 + b'\"' + b'\\\"' * (8 << 20)))")
    return f"refused: {told}" if "deeper than 64" in told else _failed(told)


@attack
def brackets_by_the_million(_folder: Path) -> str:
    """4 MiB of empty lists, of opened ones that never end, and of closed ones that never began."""
    told = in_child(_DEPTH + "\n".join(f"print(told({data}))" for data in (
        "b'[' + b'[],' * (1 << 20) + b'[]]'", "b'[' * (4 << 20)", "b']' * (4 << 20) + b'[' * 65", "b'[{' * (8 << 20)"
    )))  # fmt: skip
    lines = told.splitlines()
    # The third is no JSON at all, which the parser says.
    if [line != "no fault" for line in lines] != [False, True, False, True]:
        return _failed(told)
    return f"refused: {lines[1]}"


@attack
def brackets_in_texts(_folder: Path) -> str:
    """Brackets, quotes and backslashes in texts are no depth; behind a text that ends they are."""
    cases = {
        r'["[[[[", "\"[[", "\\", "]"]': 1,
        r'{"a": {"b": ["\\\\", "\\\""]}}': 3,
        r'["\\", [["[\\\"[", [1]]]]': 4,
    }
    for text, depth in cases.items():
        for wrapped in range(60, 67):
            data = "[" * wrapped + text + "]" * wrapped
            if _is_too_deep(data) != (depth + wrapped > 64):
                return _failed(data)
    return HELD


def _is_too_deep(text: str) -> bool:
    from pipeload.serve.errors import ApiError
    from pipeload.serve.reading import _check_depth

    try:
        _check_depth(text.encode())
    except ApiError:
        return True
    return False


def _failed(told: str) -> str:
    raise SucceededError(told)


if __name__ == "__main__":
    run_module(Path(__file__).stem)
