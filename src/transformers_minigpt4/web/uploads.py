"""Uploads of a local web page: a private folder, limits, and no way to name a file elsewhere; and a password."""

import base64
import contextlib
import hmac
import json
import os
import shutil
import stat
import tempfile
import time
from asyncio import sleep
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_minigpt4.utils.files import LOCK_FILE, InUseError, folder_lock


if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_API = "/gradio_api/"
# What a page with uploads and streamed answers asks for, besides what every page does.
UPLOAD_PREFIXES = (f"{_API}upload", f"{_API}file=", f"{_API}queue/join", f"{_API}queue/data")
# Texts and settings; images are uploads.
_MAX_REQUEST = 1024 * 1024
_FOLDER_VARIABLE = "GRADIO_TEMP_DIR"  # where Gradio looks, at every request
_FOLDER_PREFIX = "minigpt4-web-"
_NEW = 60  # seconds in which a folder may not be locked yet
_WRONG_PASSWORD = 1.0  # seconds until the answer


@dataclass(frozen=True)
class Uploads:
    """
    Where a page's uploads are, and what they may be.

    Args:
        folder (`Path`): from [`upload_folder`].
        max_bytes (`int`): of one file.
        max_files (`int`): that are uploaded at once.
        max_total (`int`): bytes of the folder, above which uploads are refused.
    """

    folder: Path
    max_bytes: int
    max_files: int
    max_total: int

    def has(self, path: str) -> bool:
        """Whether a path is a file in the folder, after all links and dots in it."""
        try:
            found = Path(path).resolve()
            return found.is_relative_to(self.folder) and found.is_file()
        except (OSError, ValueError):  # too long, or with a null character
            return False


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """
    A new folder that only this user can read, and that Gradio puts uploads into; it is deleted at the end.

    Folders of pages that were killed are deleted too.

    Gradio has one such folder for all pages of a process: while a second is open, the first page refuses its uploads.
    """
    before = os.environ.get(_FOLDER_VARIABLE)
    with tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        with folder_lock(folder, "the folder of uploads is in use by {owner}"):
            _delete_left_over(folder)
            os.environ[_FOLDER_VARIABLE] = str(folder)
            try:
                yield folder
            finally:
                if before is None:
                    os.environ.pop(_FOLDER_VARIABLE, None)
                else:
                    os.environ[_FOLDER_VARIABLE] = before


def _delete_left_over(own: Path) -> None:
    """Deletes this user's upload folders that no running page has locked."""
    for folder in own.parent.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError, InUseError):
            status = folder.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == own.stat().st_uid
            if is_ours and time.time() - status.st_mtime > _NEW and (folder / LOCK_FILE).is_file():
                with folder_lock(folder, "in use"):
                    shutil.rmtree(folder, ignore_errors=True)


class UploadGuard:
    """
    ASGI middleware that refuses uploads beyond the limits, and every request that names a file outside the folder.

    Gradio takes a file of an earlier upload by its path, and would fetch a path that is a URL.
    """

    def __init__(self, app: "ASGIApp", uploads: Uploads) -> None:
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        path: str = scope.get("path", "")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif path.startswith(f"{_API}file="):
            if self.uploads.has(path.removeprefix(f"{_API}file=")):
                await self.app(scope, receive, send)
            else:
                await refuse(send)
        elif scope["method"] == "POST" and path.rstrip("/") == f"{_API}upload":
            length = _headers(scope).get("content-length", "")
            most = self.uploads.max_files * self.uploads.max_bytes + _MAX_REQUEST
            if not length.isdecimal() or int(length) > most:
                await refuse(send, 413, b"too large")
            elif int(length) + _size(self.uploads.folder) > self.uploads.max_total:
                await refuse(send, 507, b"no room for uploads at the moment")
            else:
                await self.app(scope, receive, send)
        elif scope["method"] == "POST":
            await self._pass_checked(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _pass_checked(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Reads a request of JSON, and passes it on if all paths in it are uploads."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _MAX_REQUEST:
                await refuse(send, 413, b"too large")
                return
        try:
            allowed = all(map(self.uploads.has, _paths(json.loads(body))))
        except (ValueError, RecursionError):
            await refuse(send, 400, b"not JSON")
            return
        if not allowed:
            await refuse(send, 403, b"not an upload")
            return
        given: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def receive_again() -> "Message":
            nonlocal given
            message, given = given, None
            return message if message is not None else await receive()

        await self.app(scope, receive_again, send)


class Password:
    """
    ASGI middleware that answers nothing without a name and password (HTTP Basic) but Gradio's own check at the start.

    The answer to a wrong one comes a second later. Attempts are not counted: choose a long password.

    Args:
        app: What it protects, all of it.
        credentials (`str`): `USER:PASSWORD`.
    """

    def __init__(self, app: "ASGIApp", credentials: str) -> None:
        self.app = app
        self._expected = base64.b64encode(credentials.encode("utf-8"))

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan" or scope["path"] == f"{_API}startup-events":
            await self.app(scope, receive, send)
            return
        kind, _, given = _headers(scope).get("authorization", "").partition(" ")
        if kind.lower() == "basic" and hmac.compare_digest(given.strip().encode("latin-1"), self._expected):
            await self.app(scope, receive, send)
            return
        if given:
            await sleep(_WRONG_PASSWORD)
        challenge = (b"www-authenticate", b'Basic realm="minigpt4", charset="UTF-8"')
        await refuse(send, 401, b"name and password, please", challenge)


async def refuse(send: "Send", status: int = 404, reason: bytes = b"not here", *headers: tuple[bytes, bytes]) -> None:
    """Answers a request with an error."""
    headers = ((b"content-type", b"text/plain"), *headers)
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": reason})


def _headers(scope: "Scope") -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _paths(value: object) -> Iterator[str]:
    """Everything in a JSON value that Gradio might take for the path of a file."""
    if isinstance(value, dict):
        if "path" in value:
            yield str(value["path"])
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _paths(item)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            total += path.stat().st_size
    return total
