"""The files in deploy/ keep their promises: a budget below the limit, no rights, probes of routes that there are."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.models import REPOSITORY

from pipeload.machine.sizes import parse_bytes

yaml = pytest.importorskip("yaml")

_DEPLOY = REPOSITORY / "deploy"
_DOCKERFILE = (_DEPLOY / "Dockerfile").read_text()
_SPARE_BYTES = 4_000_000
"""The kernel charges more than RSS to a cgroup, and a probe runs in it: a budget of its own lies this much below."""


def _compose() -> dict[str, Any]:
    (service,) = yaml.safe_load((_DEPLOY / "compose.yaml").read_text())["services"].values()
    return dict(service)


def _objects(name: str) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((_DEPLOY / name).read_text())}


def _pod() -> dict[str, Any]:
    return dict(_objects("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"])


def _unit() -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((_DEPLOY / "pipeload.service").read_text())
    return dict(parser["Service"])


def _binary(size: str) -> str:
    """`512m` and `512Mi` as the product writes them."""
    return f"{size.rstrip('iI')}iB".upper()


def _limits() -> dict[str, tuple[str, list[str]]]:
    """File -> its limit, and the arguments of the command."""
    container = _pod()["containers"][0]
    return {
        "compose.yaml": (_binary(_compose()["mem_limit"]), _compose()["command"]),
        "kubernetes.yaml": (_binary(container["resources"]["limits"]["memory"]), container["args"]),
        "pipeload.service": (_binary(_unit()["MemoryMax"]), _unit()["ExecStart"].split()[2:]),
    }


def _health() -> list[str]:
    """The command by which a container asks its own server."""
    found = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])$", _DOCKERFILE, re.S | re.M)
    assert found
    return list(json.loads(found[1]))


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml", "pipeload.service"])
def test_the_budget_follows_the_limit_or_lies_below_it(name: str) -> None:
    limit, arguments = _limits()[name]
    joined = " ".join(arguments).replace("--budget ", "--budget=")
    (budget,) = re.findall(r"--budget=(\S+)", joined)
    assert budget == "auto" or parse_bytes(budget) + _SPARE_BYTES <= parse_bytes(limit)


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml", "pipeload.service"])
def test_the_command_takes_these_arguments(name: str, tmp_path: Path) -> None:
    """It gets as far as the key or the models, which are not here."""
    arguments = [one for one in _limits()[name][1] if one != "serve"]
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    arguments = [re.sub(r"(--api-key-file=).*", rf"\g<1>{keys}", one) for one in arguments]
    host = [] if name == "pipeload.service" else ["--host", "0.0.0.0"]
    command = [sys.executable, "-m", "pipeload", "serve", *host, "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "minilm" in done.stderr


def test_requests_are_the_limits() -> None:
    resources = _pod()["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory"} <= set(resources["limits"])


def test_probes_ask_routes_that_need_no_key() -> None:
    from pipeload.serve.door import _OPEN

    container = _pod()["containers"][0]
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in _DOCKERFILE
    for probe, path in (("startupProbe", "/health"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
        assert path in _OPEN


def test_containers_and_the_unit_have_no_rights() -> None:
    service = _compose()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["memswap_limit"] == service["mem_limit"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    pod = _pod()
    rights = pod["containers"][0]["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"]["drop"] == ["ALL"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n" in _DOCKERFILE
    assert all(mount.get("readOnly") for mount in pod["containers"][0]["volumeMounts"] if mount["name"] != "tmp")
    unit = _unit()
    assert (unit["DynamicUser"], unit["ProtectSystem"], unit["NoNewPrivileges"]) == ("yes", "strict", "yes")
    assert unit["CapabilityBoundingSet"] == ""
    # The budget needs /proc/meminfo.
    assert "ProcSubset" not in unit


def test_calls_have_time_to_end() -> None:
    from pipeload.serve.settings import Settings

    drain_s = Settings(directories={}, aliases={}).drain_s
    assert _pod()["terminationGracePeriodSeconds"] > drain_s
    assert float(_compose()["stop_grace_period"].rstrip("s")) > drain_s
    assert float(_unit()["TimeoutStopSec"]) > drain_s


def test_keda_scales_what_is_deployed_and_reads_with_the_key() -> None:
    keda, deployed = _objects("keda.yaml"), _objects("kubernetes.yaml")
    assert keda["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == deployed["Deployment"]["metadata"]["name"]
    monitor = keda["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= deployed["Service"]["metadata"]["labels"].items()
    credentials = monitor["endpoints"][0]["authorization"]["credentials"]
    assert credentials["name"] == deployed["Secret"]["metadata"]["name"]
    assert credentials["key"] in deployed["Secret"]["stringData"]


@contextmanager
def _answering(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_knows_a_server_that_is_well(status: int, healthy: bool) -> None:
    with _answering(status) as port:
        command = [word.replace("/8080", f"/{port}") for word in _health()]
        done = subprocess.run(command, timeout=60, check=False)
    assert (done.returncode == 0) is healthy


def test_compose_has_the_image_s_health_check() -> None:
    # Compose writes a dollar twice.
    assert [word.replace("$$", "$") for word in _compose()["healthcheck"]["test"]] == ["CMD", *_health()]


def test_the_image_is_pinned_small_and_without_rights() -> None:
    bases = re.findall(r"^FROM (\S+)", _DOCKERFILE, re.M)
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    last = _DOCKERFILE[_DOCKERFILE.rindex("\nFROM ") :]
    assert "HEALTHCHECK" in last
    assert not re.search(r"^ADD |latest|:root", _DOCKERFILE, re.M)
    copied = set(re.findall(r"^COPY (?!--from)(.*) \S+$", _DOCKERFILE, re.M))
    ignored = (_DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert {word for line in copied for word in line.split()} == kept
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_dockerfile_passes_hadolint() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([program, _DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_knows_each_line_of_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    unit = tmp_path / "pipeload.service"
    unit.write_text((_DEPLOY / "pipeload.service").read_text().replace("/opt/pipeload/bin/pipeload", sys.executable))
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(
            ["systemd-analyze", *command, unit], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
