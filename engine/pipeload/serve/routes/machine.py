"""`/machine`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.bodies.machine import Machine
from pipeload.serve.machine import machine_of
from pipeload.serve.routes.desk import Desk, DeskRoute, json_response

__all__ = ["routes"]


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [DeskRoute("/machine", machine, desk, method="GET", gives=Machine)]


async def machine(desk: Desk, _request: Request) -> Response:
    """Memory under the budget, shards, and the latest sweep of each model, now."""
    return json_response(machine_of(desk))
