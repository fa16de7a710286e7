"""Models of the hub: the files fetched from it, and the messages when that is not possible. The hub here is a fake."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeload.errors import ConfigError, ExportError
from pipeload_export.source.hub import fetch_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODELS: dict[str, list[str]] = {
    "some/model": [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "modeling.py",
        "1_Pooling/config.json",
        "onnx/model.onnx",
        "README.md",
    ],
    "some/pickle": ["config.json", "pytorch_model.bin"],
}


class FakeHub(BaseHTTPRequestHandler):
    """The few answers of the hub's HTTP interface that its library asks for."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            self._answer_api("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self._send(200, parts[-1].encode(), with_body=with_body)

    def _answer_api(self, model: str, revision: str) -> None:
        if model == "some/gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif model == "some/broken":
            self._send(500, b"{}")
        elif model not in MODELS:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision != "main":
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in MODELS[model]]
            self._send(200, json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, with_body: bool = True) -> None:
        self.send_response(status)
        all_headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}
        all_headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "hub-cache")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_hub(monkeypatch, f"http://127.0.0.1:{port}", tmp_path / "hub-cache")


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    # The library reads the environment when it is imported, which an earlier test may have done.
    from huggingface_hub import _snapshot_download, constants, file_download, hf_api

    for module in (constants, file_download, hf_api, _snapshot_download):
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fetches_weights_without_code_and_what_belongs_to_them(hub: Any) -> None:
    folder, commit = fetch_checkpoint("some/model", None, with_code=False)
    assert commit == COMMIT
    assert files(folder) == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}


def test_fetches_code_when_it_is_trusted(hub: Any) -> None:
    folder, _ = fetch_checkpoint("some/model", None, with_code=True)
    assert "modeling.py" in files(folder)
    assert "pytorch_model.bin" not in files(folder)


@pytest.mark.parametrize(
    ("name", "revision", "error", "message"),
    [
        ("some/pickle", None, ConfigError, "only as pytorch_model.bin"),
        ("some/gated", None, ConfigError, "is gated. Accept its conditions at https://huggingface.co/some/gated"),
        ("some/absent", None, ConfigError, "no path 'some/absent', and the hub has no model of that name"),
        ("some/model", "v9", ConfigError, "no revision 'v9'"),
        ("some/broken", None, ExportError, "The hub failed on 'some/broken'"),
        ("some--bad..name", None, ConfigError, "nor the name of a model"),
    ],
)
def test_refused(hub: Any, name: str, revision: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fetch_checkpoint(name, revision, with_code=False)


def test_a_cache_that_cannot_be_written_is_named_as_that(
    hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    use_hub(monkeypatch, f"http://127.0.0.1:{hub.server_port}", tmp_path / "file" / "cache")
    with pytest.raises(ExportError, match=r"'some/model' cannot be stored in the hub's cache: .*/file/cache") as caught:
        fetch_checkpoint("some/model", None, with_code=False)
    assert isinstance(caught.value.__cause__, OSError)


def test_without_a_network(no_network: None) -> None:
    with pytest.raises(ExportError, match="not in the hub's cache, and the hub cannot be reached"):
        fetch_checkpoint("some/model", None, with_code=False)


def test_without_a_network_the_cache_serves(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, _ = fetch_checkpoint("some/model", "main", with_code=False)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub-cache")
    folder, commit = fetch_checkpoint("some/model", "main", with_code=False)
    assert (folder, commit) == (before, COMMIT)
