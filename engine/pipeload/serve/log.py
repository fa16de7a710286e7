"""The log of the server: one line for each request, as text or as JSON."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import msgspec

__all__ = ["log_request", "set_up_log"]

LOGGER = logging.getLogger("pipeload.serve")


def log_request(method: str, route: str, status: int, seconds: float, note: Mapping[str, object]) -> None:
    """Log one request, with what its route has noted about it. No text of a request or an answer is logged.

    A page that is open asks for `/machine` each second: these lines come only where they tell of a failure.
    """
    if route == "/machine" and status < 400:
        return
    fields = {"method": method, "route": route, "status": status, "ms": round(1e3 * seconds, 1), **note}
    LOGGER.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})


def set_up_log(form: str) -> None:
    """Write the server's log to stderr.

    Args:
        form: `text` or `json`, which is one object a line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("pipeload.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    LOGGER.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
        }
        fields |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()
