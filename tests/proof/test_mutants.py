"""The code of a mutant reaches those who have imported what it changes."""

from __future__ import annotations

from types import ModuleType

import pytest

pytest.importorskip("cosmic_ray")

from tests.proof.mutants import _graft

_SOURCE = """
LIMIT = 1
def function(): return 1
class Here:
    def method(self): return 1
class Public:
    __module__ = "elsewhere"
    @property
    def value(self): return 1
"""


def test_names_that_were_imported_before_run_the_code_of_the_mutant() -> None:
    module = ModuleType("planted")
    module.__file__ = "planted.py"
    exec(_SOURCE, vars(module))
    function, here, public = module.function, module.Here(), module.Public()
    _graft(module, _SOURCE.replace("1", "2"))
    assert (function(), here.method(), public.value, module.LIMIT) == (2, 2, 2, 2)
    assert isinstance(public, module.Public)
