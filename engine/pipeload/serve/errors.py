"""Failures as answers, in the shape of OpenAI's interface, with the engine's own message."""

from __future__ import annotations

import logging

import msgspec
from starlette.responses import Response

from pipeload.errors import BudgetError, ClosedError, ClusterError, ConfigError, PipeloadError

__all__ = ["ApiError", "ErrorAnswer", "api_error", "error_response"]

LOGGER = logging.getLogger("pipeload.serve")
"""What happens to models and failures that are no fault of a client."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorBody(msgspec.Struct, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct, kw_only=True):
    """The answer to a request that failed."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: the fact, the value and the remedy.
        code: a word for programs.
        param: the field that is wrong.
        retry_after_s: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def answer(self) -> ErrorAnswer:
        """The body of the answer."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return ErrorAnswer(error=ErrorBody(message=str(self), type=kind, param=self.param, code=self.code))


def api_error(error: BaseException) -> ApiError:
    """What the client is told of a failure; one that no rule expects is logged, and its details stay here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, BudgetError):
        return ApiError(400, str(error), code="memory_budget_exceeded")
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="closed", retry_after_s=1)
    if isinstance(error, ClusterError):
        LOGGER.warning("The cluster failed: %s", error)
        return ApiError(503, str(error), code="cluster_unavailable", retry_after_s=5)
    LOGGER.error("A request failed: %s", error, exc_info=None if isinstance(error, PipeloadError) else error)
    if isinstance(error, PipeloadError):
        return ApiError(500, str(error), code=type(error).__name__)
    return ApiError(500, "The server failed at this request; its log says why.", code="internal_error")


def error_response(error: BaseException) -> Response:
    """The answer to a request that failed."""
    told = api_error(error)
    headers = {"Retry-After": str(told.retry_after_s)} if told.retry_after_s is not None else {}
    if told.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if told.status in (408, 431) or told.code == "two_lengths":
        # The rest of the request must not be taken for another one, and its headers go with the connection.
        headers["Connection"] = "close"
    return Response(msgspec.json.encode(told.answer), told.status, headers, "application/json")
