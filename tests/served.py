"""A server in a process of its own, and what clients send to it."""

import base64
import contextlib
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from processes import program


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def served(command: list[str], port: int, log: Path, seconds: float = 240, **environment: str) -> Iterator[str]:
    """Starts a server and waits until it answers; yields its URL, and ends it with Ctrl-C."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with (
        log.open("w") as output,
        program(command, stdout=output, stderr=output, env=environment, cwd=log.parent) as process,
    ):
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5).is_success:
                    break
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGINT)
        process.wait(30)


def minigpt4(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "transformers_minigpt4.cli", *map(str, arguments)]


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(text: str, *images: Image.Image | str) -> dict[str, Any]:
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
