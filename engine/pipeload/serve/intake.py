"""The bodies of all requests that are in the server now, bounded together.

Bodies are read before a call gets a place, so places do not bound them: a hundred clients that send 16 MiB each would
fill the memory of the machine.
"""

from __future__ import annotations

from starlette.types import Message, Receive

from pipeload.serve.errors import ApiError
from pipeload.serve.settings import LIMITS

__all__ = ["Intake", "Share"]

_RETRY_S = 5


class Intake:
    """Counts the bytes of all bodies beyond those that each request may have.

    Attributes:
        nbytes: that requests have now.
    """

    def __init__(self) -> None:
        self.nbytes = 0


class Share:
    """A request's part of it. `end` gives it back.

    Args:
        intake: of the server.
        receive: brings the request.
    """

    def __init__(self, intake: Intake, receive: Receive) -> None:
        self._intake, self._receive = intake, receive
        self._nbytes = self._taken = 0

    async def receive(self) -> Message:
        """The next part of the request.

        Raises:
            ApiError: bodies of other requests take the memory.
        """
        message = await self._receive()
        self._nbytes += len(message.get("body", b""))
        more = max(0, self._nbytes - LIMITS.beside_bytes) - self._taken
        if more > 0 and self._intake.nbytes + more > LIMITS.bodies_bytes:
            raise ApiError(
                503,
                "Other requests have too much text for this one now. Try again, or send less at once.",
                code="bodies_too_large",
                retry_after_s=_RETRY_S,
            )
        self._taken += more
        self._intake.nbytes += more
        return message

    def end(self) -> None:
        """Give it back."""
        self._intake.nbytes -= self._taken
        self._taken = 0
