"""What holds for every request, before the server's own code sees it: its size, and that somebody still waits."""

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .serve_errors import ApiError


if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


MAX_BODY_BYTES = 50 * 2**20  # OpenAI's limit for a request with images


class Limits:
    """
    Refuses bodies that are too large and other hosts' names, and cancels a request whose client has hung up.

    Args:
        app (`ASGIApp`): answers.
        hosts (`tuple[str, ...]`, *optional*): allowed names in the header `Host`; by default all.
        max_bytes (`int`, *optional*): largest body.
    """

    def __init__(self, app: "ASGIApp", hosts: tuple[str, ...] | None = None, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.app, self.hosts, self.max_bytes = app, hosts, max_bytes

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = urlsplit(f"//{dict(scope['headers']).get(b'host', b'').decode('latin-1')}").hostname
        if self.hosts is not None and host not in self.hosts:
            await _refuse(ApiError(f"this server is not {host!r}", 403, code="wrong_host"), send)
            return
        body = await self._body(scope, receive)
        if body is None:
            limit = f"the request is larger than {self.max_bytes // 2**20} MiB; send fewer or smaller images"
            await _refuse(ApiError(limit, 413, code="request_too_large"), send)
            return
        unread = [body]

        async def received() -> "Message":
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        answering = asyncio.ensure_future(self.app(scope, received, send))
        hung_up = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((answering, hung_up), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
        finally:
            answering.cancel()
            hung_up.cancel()

    async def _body(self, scope: "Scope", receive: "Receive") -> bytes | None:
        """The body, or `None` if it is too large."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            return None
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                return None
        return bytes(body)


async def _disconnected(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(error: ApiError, send: "Send") -> None:
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
