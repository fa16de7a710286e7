"""The programs of examples/ print what its page says, with real models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.models import REPOSITORY

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

_EXPORTED = REPOSITORY / "models" / "exported"
_PAGE = (REPOSITORY / "examples" / "README.md").read_text()
_PATIENCE_S = 300

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((_EXPORTED / name).is_dir() for name in ("minilm", "smollm2-135m")), reason="needs `make demo`"
    ),
]


def _commands() -> list[tuple[str, str]]:
    """The commands of the page that end by themselves, and what they print."""
    blocks = re.findall(r"^```\n\$ (.+)\n((?:.|\n)*?)^```$", _PAGE, re.MULTILINE)
    return [(command, printed) for command, printed in blocks if not command.endswith("&")]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `python` is this interpreter."""
    (tmp_path / "python").symlink_to(sys.executable)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": path}


def test_every_program_is_on_the_page() -> None:
    names = {path.name for path in (REPOSITORY / "examples").glob("*.py")}
    assert len(names) == 10
    assert set(re.findall(r"python examples/(\w+\.py)", _PAGE)) == names
    assert set(re.findall(r"\]\((\w+\.py)\)", _PAGE)) == names


@pytest.mark.parametrize(("command", "printed"), _commands(), ids=lambda text: text.partition("\n")[0])
def test_a_program_prints_what_the_page_says(environment: dict[str, str], command: str, printed: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_the_server_answers_and_refuses(environment: dict[str, str]) -> None:
    server = subprocess.Popen(
        [sys.executable, "examples/http_server.py"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        vectors = json.load(_post(url, {"texts": ["a cat", "a dog"]}))["embeddings"]
        assert [len(vector) for vector in vectors] == [384, 384]
        for wrong in ({"text": 1}, {"texts": [1]}, [1]):
            with pytest.raises(urllib.error.HTTPError) as raised:
                _post(url, wrong)
            assert raised.value.code == 400
            assert json.load(raised.value)["error"]
        server.send_signal(signal.SIGINT)
        assert server.wait(_PATIENCE_S) == 0
    finally:
        server.kill()
        server.communicate()


def _post(url: str, body: object) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=_PATIENCE_S)
