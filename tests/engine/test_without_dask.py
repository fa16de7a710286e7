"""The extra of clusters: nothing else imports its packages, and a cluster without them is one clear error."""

from __future__ import annotations

import pytest
from tests.engine.harness import EMULATED, run_python

pytestmark = pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")

PACKAGES = ("cryptography", "dask", "distributed")
_WITHOUT = f"import sys\nsys.modules |= dict.fromkeys({PACKAGES})\n"


def test_all_but_the_cluster_is_imported_without_its_packages() -> None:
    run_python(
        f"""{_WITHOUT}
from importlib import import_module
from pkgutil import walk_packages
import pipeload

extras = {{"PIL", "jinja2", "llguidance", "matplotlib", "prometheus_client", "starlette", "tokenizers", "uvicorn"}}
found = [module.name for module in walk_packages(pipeload.__path__, "pipeload.", onerror=lambda _: None)]
assert "pipeload.cluster.node" in found
for name in found:
    if not name.startswith("pipeload.cluster."):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            assert error.name.partition(".")[0] in extras | {{"pipeload_export"}}, (name, error.name)
"""
    )


def test_connecting_names_the_extra() -> None:
    run_python(
        f"""{_WITHOUT}
import pipeload
try:
    pipeload.connect("tcp://127.0.0.1:1")
except pipeload.ConfigError as error:
    assert str(error) == "A cluster needs the package distributed: pip install 'pipeload[cluster]'.", error
else:
    raise SystemExit("it connected")
"""
    )


def test_each_command_names_the_extra() -> None:
    run_python(
        f"""{_WITHOUT}
from contextlib import redirect_stderr
from io import StringIO
from pipeload.__main__ import main

address = ["--cluster", "tcp://127.0.0.1:1"]
for words, package in (
    (["node", *address, "--models", "."], "distributed"),
    (["cluster", "init", "certificates"], "cryptography"),
    (["cluster", "start"], "distributed"),
    (["cluster", "plan", "bert", *address], "distributed"),
    (["cluster", "status", *address], "distributed"),
    (["serve", *address, "--port", "0"], "distributed"),
):
    sys.argv = ["pipeload", *words]
    with redirect_stderr(StringIO()) as told:
        try:
            main()
        except SystemExit as end:
            assert end.code == 1, (words, end.code)
        else:
            raise AssertionError(words)
    assert told.getvalue() == f"error: A cluster needs the package {{package}}: pip install 'pipeload[cluster]'.\\n", (
        words, told.getvalue()
    )
"""
    )
