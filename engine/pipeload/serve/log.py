"""The log of the server: one line for each request, as text or as JSON."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any, TextIO

import msgspec

from pipeload.errors import EmbeddingWarning, QuantisationWarning, TruncationWarning
from pipeload.machine.terminal import printable

__all__ = ["log_request", "set_up_log"]

LOGGER = logging.getLogger("pipeload.serve")

_OWN = (EmbeddingWarning, QuantisationWarning, TruncationWarning)


def log_request(method: str, route: str, status: int, seconds: float, note: Mapping[str, object]) -> None:
    """Log one request, with what its route has noted about it. No text of a request or an answer is logged.

    A page that is open asks for `/machine` each second: these lines come only where they tell of a failure.
    """
    if route == "/machine" and status < 400:
        return
    fields = {"method": method, "route": route, "status": status, "ms": round(1e3 * seconds, 1), **note}
    LOGGER.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})


def set_up_log(form: str | None) -> None:
    """Write the server's log to stderr, with pipeload's warnings as lines of it.

    Args:
        form: `text` or `json`, which is one object a line; None writes neither.
    """
    for kind in _OWN:
        warnings.simplefilter("ignore" if form is None else "default", kind)
    if form is None:
        return
    warnings.showwarning = _log_warning
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines() if form == "json" else _Text("%(asctime)s %(levelname)s %(message)s"))
    for name in ("pipeload.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    LOGGER.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,
) -> None:
    own = issubclass(category, _OWN)
    text = str(message) if own else warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    LOGGER.warning("%s", text)


class _Text(logging.Formatter):
    """One line for each record, whatever its words are; behind it the lines of its traceback, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(" ".join(super().formatMessage(record).splitlines()))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join(f"    {printable(line)}" for line in super().formatException(ei).splitlines())


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
