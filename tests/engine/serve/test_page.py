"""`/` and its files: they need no key, name nothing that lies elsewhere, and may run nothing but themselves."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tests.engine.serve.client import Client, settings, with_server

import pipeload
from pipeload.serve.routes.page import PATHS

_FOLDER = Path(pipeload.__file__).parent / "serve" / "page"
_FILES = {path.name: path.read_text() for path in _FOLDER.iterdir() if path.is_file()}
_NAMESPACE = "http://www.w3.org/2000/svg"
"""A name, which no browser asks for."""
_KEYS = {"keys": (b"first-key", b"second-key")}


def test_the_page_and_its_files_are_served_with_headers_that_keep_others_out(embedder: Path) -> None:
    async def ask(client: Client) -> dict[str, Any]:
        return {path: await client.get(path) for path in sorted(PATHS)}

    found = with_server(settings(embedder), ask)
    assert found.keys() - {"/"} == {f"/page/{name}" for name in _FILES}
    assert found["/"].body == found["/page/index.html"].body
    for path, answer in found.items():
        assert answer.status == 200, path
        assert answer.body.decode() == _FILES[path.rpartition("/")[2] or "index.html"]
        headers = answer.headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy.pop("default-src") == "'none'"
        assert set(policy.values()) == {"'self'", "'none'"}
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    kinds = {path.rpartition(".")[2]: answer.headers["content-type"] for path, answer in found.items()}
    assert kinds["js"].startswith("text/javascript")
    assert kinds["css"].startswith("text/css")
    assert kinds["html"] == "text/html; charset=utf-8"


def test_the_page_needs_no_key_and_what_it_asks_for_does(embedder: Path) -> None:
    async def ask(client: Client) -> None:
        for path in PATHS:
            assert (await client.get(path)).status == 200, path
        for path in ("/machine", "/v1/models", "/page", "/page/", "/page/door.py", "/page//page.js"):
            assert (await client.get(path)).status == 401, path
        for key in (b"first-key", b"second-key"):
            answer = await client.get("/machine", headers={"authorization": f"Bearer {key.decode()}"})
            assert answer.status == 200

    with_server(settings(embedder, **_KEYS), ask)


@pytest.mark.parametrize("name", ["nothing.js", "../door.py", "..%2fdoor.py", "__init__.py", ""])
def test_no_other_file_is_served(embedder: Path, name: str) -> None:
    async def ask(client: Client) -> None:
        answer = await client.get(f"/page/{name}")
        assert answer.status == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"

    with_server(settings(embedder), ask)


def test_the_page_answers_to_its_own_host_only_and_takes_no_post(embedder: Path) -> None:
    async def ask(client: Client) -> None:
        assert (await client.get("/", headers={"host": "evil.example"})).status == 403
        assert (await client.post("/", {})).status == 405

    with_server(settings(embedder), ask)


@pytest.mark.parametrize("name", sorted(_FILES))
def test_the_files_name_nothing_that_lies_elsewhere(name: str) -> None:
    text = _FILES[name].replace(_NAMESPACE, "")
    assert not re.findall(r"\w+://", text)
    assert not re.findall(r"""["'(=]\s*//\w""", text), "an address without a scheme"
    assert "@import" not in text


@pytest.mark.parametrize("name", sorted(name for name in _FILES if name.endswith(".js")))
def test_texts_never_become_markup_or_programs(name: str) -> None:
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|DOMParser|\beval\b|new Function", _FILES[name]
    )


def test_the_markup_has_no_program_and_no_style_within() -> None:
    text = _FILES["index.html"]
    assert re.findall(r"<script\b[^>]*>", text) == ['<script type="module" src="/page/page.js">']
    assert not re.findall(r"""<style\b|\sstyle=|\son\w+=|javascript:""", text)


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"""(?:src|href)="([^"]+)\"""", _FILES["index.html"]))
    modules = {name for text in _FILES.values() for name in re.findall(r"""from "\./([^"]+)\"""", text)}
    assert named | {f"/page/{name}" for name in modules} | {"/page/index.html", "/"} == PATHS


def test_every_element_that_a_module_asks_for_is_in_the_markup() -> None:
    there = set(re.findall(r'\bid="([^"]+)"', _FILES["index.html"]))
    asked = {name for text in _FILES.values() for name in re.findall(r'\bid\("([^"]+)"\)', text)}
    assert asked
    assert asked <= there
    labelled = re.findall(r'aria-(?:controls|labelledby|describedby)="([^"]+)"|\bfor="([^"]+)"', _FILES["index.html"])
    assert {one or other for one, other in labelled} <= there


def test_what_the_page_asks_each_second_leaves_no_line_in_the_log(
    embedder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(client: Client) -> None:
        await client.get("/machine", headers={"authorization": "Bearer first-key"})
        await client.get("/machine")
        await client.get("/page/page.js")

    with caplog.at_level(logging.INFO, "pipeload.serve"):
        with_server(settings(embedder, **_KEYS), ask)
    lines = [record.getMessage() for record in caplog.records if "route=" in record.getMessage()]
    assert [line.rpartition(" ms=")[0] for line in lines] == [
        "method=GET route=/machine status=401",
        "method=GET route=/page/{file} status=200",
    ]
