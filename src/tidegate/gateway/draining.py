"""WebSockets that are told when the server stops, so that what is under way can end properly.

uvicorn closes every WebSocket at once when it is told to stop. `DrainingWebSockets` tells the application instead,
which closes the connection when it is done; uvicorn still waits no longer than its ``timeout_graceful_shutdown``. An
application under another server is closed as that server does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

__all__ = ["DrainingWebSockets", "told_to_stop"]

_EXTENSION: Final = "tidegate.draining"
_UNREADABLE: Final = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def told_to_stop(scope: Mapping[str, Any]) -> asyncio.Event:
    """Set when the server of this connection is told to stop; never, under a server that does not say it."""
    event = scope.get("extensions", {}).get(_EXTENSION, {}).get("event")
    return event if isinstance(event, asyncio.Event) else asyncio.Event()


class DrainingWebSockets(WebSocketsSansIOProtocol):
    """uvicorn's WebSockets; hand it to ``uvicorn.Config`` as ``ws``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stopping = asyncio.Event()

    def handle_connect(self, event: Any) -> None:
        """The application runs after this: it finds the event in its scope."""
        super().handle_connect(event)
        scope: dict[str, Any] = getattr(self, "scope", {})
        scope.get("extensions", {})[_EXTENSION] = {"event": self._stopping}

    def data_received(self, data: bytes) -> None:
        """A handshake that `websockets` cannot read (with a body, or a very long header) is answered and ended; uvicorn
        would wait for the client for ever.
        """
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.transport.is_closing():
            self.transport.write(b"".join(self.conn.data_to_send()) or _UNREADABLE)
            self.transport.close()

    async def send(self, message: Any) -> None:
        """A handshake that is refused with a response is complete with its last byte; uvicorn takes it for a fault."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    def shutdown(self) -> None:
        """Called by uvicorn when it is told to stop."""
        if self.handshake_complete and not self.close_sent:
            self._stopping.set()
        else:
            super().shutdown()
