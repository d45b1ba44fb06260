"""
A Gradio server for the local web pages, which stays on this machine and answers nothing but its page.

    page = new_page("Review")                       # a gradio.Blocks; build the page within `with page:`
    with serve(page, files=folder, keys={...}) as server:
        server.url; server.wait()

Every event of a page needs `queue=False`: one request, one answer, and no session in memory. What people did must be
on disk before the handler returns; what a page shows travels with each request (a hidden text box), so that a
reload, a second tab or a restarted server loses nothing. Pages with `uploads` may use Gradio's queue.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .html import FILES, keys_script
from .uploads import UPLOAD_PREFIXES, Password, UploadGuard, Uploads, refuse


if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


LOCAL_HOSTS = ("127.0.0.1", "localhost")

# All that a page asks for. Gradio answers much more (uploads, proxies, files by path), which nobody needs here.
_PATHS = frozenset(("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"))
_PREFIXES = ("/assets/", "/static/", "/gradio_api/run/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
# The browser itself then refuses to fetch anything from elsewhere. Gradio's own scripts are inline and use `eval`.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; base-uri 'self'"

_CSS = """
.gradio-container { max-width: 1400px !important; }
.gradio-container .html-container { padding: 0; }
.foreign-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; line-height: 1.5; }
.image img { width: 100%; height: 50vh; object-fit: contain; object-position: left top; margin: 0; cursor: zoom-in; }
dialog.zoom { width: 100vw; height: 100vh; max-width: none; max-height: none; padding: 0; border: 0; overflow: auto;
  background: #111; }
dialog.zoom img { display: block; margin: auto; max-width: none; cursor: zoom-in; }
dialog.zoom button { position: fixed; right: 12px; top: 12px; padding: 6px 12px; border-radius: 6px; background: #fff;
  color: #111; }
.control { border: 1px solid currentColor; border-radius: 3px; font-size: 0.75em; padding: 0 2px; }
"""


def import_gradio(extra: str = "curation") -> ModuleType:
    """
    Gradio, with its usage reports and version checks turned off.

    Raises:
        ValueError: when it is not installed; the message names the `extra` of this package that installs it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            f'this page needs Gradio, which is not installed: pip install "transformers_minigpt4[{extra}]"'
        ) from error
    return gradio


def new_page(title: str, extra: str = "curation") -> "gr.Blocks":
    """An empty page; `extra` as in [`import_gradio`]."""
    page: gr.Blocks = import_gradio(extra).Blocks(title=title, analytics_enabled=False)
    return page


class PageServer:
    """A page that is being served; closes it at the end of a `with` statement."""

    def __init__(self, page: "gr.Blocks", url: str) -> None:
        self.page, self.url = page, url

    def __enter__(self) -> "PageServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self.page.close(verbose=False)

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def serve(
    page: "gr.Blocks",
    *,
    files: "str | os.PathLike[str] | None" = None,
    keys: Mapping[str, str] | None = None,
    submit: str | None = None,
    focus: Mapping[str, str] | None = None,
    css: str = "",
    uploads: Uploads | None = None,
    credentials: str | None = None,
    host: str = LOCAL_HOSTS[0],
    port: int | None = None,
) -> PageServer:
    """
    Serves a page from a background thread: no sharing, no reports, no fonts or scripts from elsewhere.

    Args:
        page: From [`new_page`].
        files: Folder whose files [`~web.html.image_html`] shows; nothing else of the disk can be requested.
        keys: See [`~web.html.keys_script`], as `submit` and `focus`.
        submit: See [`~web.html.keys_script`].
        focus: See [`~web.html.keys_script`].
        css: Added to the page's style sheet.
        uploads: Lets people upload files, and answers be streamed through Gradio's queue.
        credentials: `USER:PASSWORD` that the page asks for.
        host: Address to listen at. With the default only this machine can see the page.
        port: Port; by default the first free one from 7860 on.

    Raises:
        OSError: when the port is taken, or the host is not an address of this machine.
        ValueError: when there is no folder `files`, or the page cannot be reached after it has started.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware
    from starlette.staticfiles import StaticFiles

    if files is not None and not Path(files).is_dir():
        raise ValueError(f"there is no folder {str(files)!r} to show images from")
    _check_address(host, port)
    images = StaticFiles(directory=Path(files)) if files is not None else None
    hosts = LOCAL_HOSTS if host in LOCAL_HOSTS else None
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to download
    script = keys_script(keys or {}, submit, focus)
    prefixes = (*_PREFIXES, *(UPLOAD_PREFIXES if uploads else ()))
    middleware = [Middleware(_OnlyThePage, images=images, hosts=hosts, prefixes=prefixes)]
    if credentials is not None:
        middleware.insert(0, Middleware(Password, credentials=credentials))
    if uploads is not None:
        middleware.append(Middleware(UploadGuard, uploads=uploads))
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        inbrowser=False,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
        max_file_size=uploads.max_bytes if uploads else 1,
        theme=gradio.themes.Base(**fonts),
        css=_CSS + css,
        head=f"<script>{script}</script>",
        app_kwargs={"middleware": middleware},
    )
    return PageServer(page, url)


def _check_address(host: str, port: int | None) -> None:
    """Gradio tries a hundred ports, whatever is wrong, and then names its own settings in the error."""
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        where = f"port {port} of {host}" if port is not None else host
        reason = str(error.strerror).partition(" (")[0]
        raise OSError(f"cannot listen at {where} ({reason}); choose another --port or --host") from error


class _OnlyThePage:
    """
    ASGI middleware that answers what a page needs and refuses the rest.

    Args:
        app: Gradio's application.
        images: Serves the files below `/files/`.
        hosts: Host names that the page answers to, or `None` for any. A page elsewhere whose name has been pointed
            at this machine (DNS rebinding) is refused, as are requests that another page makes.
        prefixes: What the paths begin with that the page asks for.
    """

    def __init__(
        self,
        app: "ASGIApp",
        images: "ASGIApp | None",
        hosts: tuple[str, ...] | None,
        prefixes: tuple[str, ...],
    ) -> None:
        self.app, self.images, self.hosts, self.prefixes = app, images, hosts, prefixes

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":  # the start and the end of the server
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        path, prefix = scope["path"], f"/{FILES}/"
        if not self._comes_from_its_page(scope):
            await refuse(send_with_policy)
        elif path.startswith(prefix) and self.images is not None:
            await self._send_image(self.images, scope, receive, send_with_policy)
        elif path in _PATHS or path.startswith(self.prefixes):
            await self.app(scope, receive, send_with_policy)
        else:
            await refuse(send_with_policy)

    def _comes_from_its_page(self, scope: "Scope") -> bool:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.hosts is not None and host.rsplit(":", 1)[0] not in self.hosts:
            return False
        return origin is None or origin.partition("://")[2] == host

    @staticmethod
    async def _send_image(images: "ASGIApp", scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.exceptions import HTTPException

        inner = {**scope, "path": scope["path"].removeprefix(f"/{FILES}"), "root_path": ""}
        try:
            await images(inner, receive, send)
        except HTTPException as error:  # no such file, or a path that leaves the folder
            await refuse(send, error.status_code)
