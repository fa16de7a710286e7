"""The OpenAPI file of the server, made from the bodies of its routes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

import pipeload
from pipeload.serve.errors import ErrorAnswer
from pipeload.serve.routes.desk import DeskRoute

__all__ = ["openapi"]


def openapi(routes: Sequence[DeskRoute]) -> dict[str, Any]:
    """The description of all routes, by OpenAPI 3.1."""
    kinds = [kind for one in routes for kind in (one.takes, one.gives) if kind is not None]
    schemas, components = msgspec.json.schema_components(
        [*kinds, ErrorAnswer], ref_template="#/components/schemas/{name}"
    )
    found = iter(schemas)
    fault = {"description": "The request failed.", "content": _json(schemas[-1])}
    paths: dict[str, dict[str, Any]] = {}
    for one in routes:
        operation: dict[str, Any] = {"summary": one.summary, "operationId": one.name}
        if one.takes is not None:
            operation["requestBody"] = {"required": True, "content": _json(next(found))}
        given = {"description": "The answer."}
        if one.gives is not None:
            given["content"] = _json(next(found))  # type: ignore[assignment]
        operation["responses"] = {"200": given, "default": fault}
        path = one.path.replace(":path", "")
        names = re.findall(r"{(\w+)}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        paths.setdefault(path, {})[one.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "pipeload", "version": pipeload.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
