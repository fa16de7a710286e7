"""`/v1/models`, `/health`, `/ready` and `/metrics`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.bodies.state import Health, ModelInfo, ModelList
from pipeload.serve.models import Served
from pipeload.serve.routes.desk import Desk, DeskRoute, json_response

__all__ = ["routes"]


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [
        DeskRoute("/health", health, desk, method="GET", gives=Health),
        DeskRoute("/ready", ready, desk, method="GET", gives=Health),
        DeskRoute("/metrics", metrics, desk, method="GET"),
        DeskRoute("/v1/models", models, desk, method="GET", gives=ModelList),
        DeskRoute("/v1/models/{model:path}", model, desk, method="GET", gives=ModelInfo),
    ]


async def health(desk: Desk, _request: Request) -> Response:
    """Whether all models have been opened once: 503 until then."""
    return _state("ok" if desk.models.ready else "loading")


async def ready(desk: Desk, _request: Request) -> Response:
    """Whether a call would be taken now: 503 while models open, and while all places are taken."""
    return _state("loading" if not desk.models.ready else "busy" if desk.admission.full else "ok")


async def metrics(desk: Desk, _request: Request) -> Response:
    """All figures, for Prometheus."""
    return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(desk: Desk, _request: Request) -> Response:
    """All models, and their other names."""
    names = [*desk.models.served, *desk.models.aliases]
    return json_response(ModelList(data=[_info(name, desk.models.find(name)) for name in names]))


async def model(desk: Desk, request: Request) -> Response:
    """One model."""
    name = request.path_params["model"]
    return json_response(_info(name, desk.models.find(name)))


def _info(name: str, served: Served) -> ModelInfo:
    return ModelInfo(
        id=name,
        created=served.made,
        root=served.name,
        task=served.manifest.task,
        state="closed" if served.model is None else "open",
    )


def _state(status: str) -> Response:
    body = msgspec.json.encode(Health(status=status))  # type: ignore[arg-type]
    return Response(body, 200 if status == "ok" else 503, media_type="application/json")
