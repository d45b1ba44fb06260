"""
What this package's local web pages share: a Gradio page that stays on this machine, keys for buttons, escaped text.

    page = new_page("Review")                       # a gradio.Blocks; build the page within `with page:`
    keys_script({"a": "accept"}, submit="save")     # keys that press the buttons with these `elem_id`s
    escape(text), picture_html(name, alt)           # HTML for gradio.HTML in which foreign text is text alone
    person_name(text)                               # one spelling for each person
    with serve(page, files=folder, keys={...}) as server:
        server.url; server.wait()

Every event of a page needs `queue=False`: one request, one answer, and nothing of a session in memory. What people did
belongs on disk before the handler returns; what a page shows travels with each request (a hidden text box), so that a
reload, a second tab or a restarted server loses nothing.
"""

import contextlib
import html
import json
import os
import re
import socket
import threading
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote


if TYPE_CHECKING:
    import gradio as gr


LOCAL_HOSTS = ("127.0.0.1", "localhost")
MAX_NAME = 64  # characters of a person's name
FILES = "files"  # where pictures stand below the page's address

# All that a page asks for. Gradio answers much more (uploads, proxies, files by path), which nobody needs here.
_PATHS = frozenset(("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"))
_PREFIXES = ("/assets/", "/static/", "/gradio_api/run/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
# The browser itself then refuses to fetch anything from elsewhere. Gradio's own scripts are inline and use `eval`.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; base-uri 'self'"

_CSS = """
.gradio-container { max-width: 1400px !important; }
.gradio-container .html-container { padding: 0; }
.foreign-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; line-height: 1.5; }
.picture img { width: 100%; height: 50vh; object-fit: contain; object-position: left top; margin: 0; }
.control { border: 1px solid currentColor; border-radius: 3px; font-size: 0.75em; padding: 0 2px; }
"""

_KEYS = """
(() => {
  const keys = __KEYS__, submit = __SUBMIT__, focus = __FOCUS__;
  const press = (id) => {
    const button = document.getElementById(id);
    if (button && !button.disabled) button.click();
  };
  const typing = (node) => node && (node.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(node.tagName));
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.isComposing) return;
    if (submit && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault(); event.stopPropagation();
      if (document.activeElement) document.activeElement.blur();
      press(submit);
      return;
    }
    if (event.key === "Escape" && typing(document.activeElement)) { document.activeElement.blur(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const key = event.key.toLowerCase();
    if (focus[key]) {
      const field = document.querySelector("#" + focus[key] + " textarea, #" + focus[key] + " input");
      if (field) { event.preventDefault(); field.focus(); }
    } else if (keys[key]) { event.preventDefault(); press(keys[key]); }
  }, true);
})();
"""


def import_gradio(extra: str = "curation") -> ModuleType:
    """
    Gradio, with its usage reports and its question for new versions turned off.

    Raises:
        ValueError: when it is not installed; the message names the `extra` of this package that brings it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            f'this page needs Gradio, which is not installed; `pip install "transformers_minigpt4[{extra}]"` brings it'
        ) from error
    return gradio


def new_page(title: str, extra: str = "curation") -> "gr.Blocks":
    """An empty page; `extra` as in [`import_gradio`]."""
    return import_gradio(extra).Blocks(title=title, analytics_enabled=False)


def person_name(text: str) -> str:
    """
    One spelling for each person, so that `Anna` and ` anna` are not two.

    Raises:
        ValueError: for an empty name, one of more than 64 characters, or one with control characters.
    """
    name = " ".join(unicodedata.normalize("NFKC", str(text)).casefold().split())
    if not name:
        raise ValueError("give your name; it tells whose decisions these are")
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters is too long; choose one of at most {MAX_NAME}")
    if _hidden(name):
        raise ValueError(f"the name {name!r} holds characters that cannot be seen; use letters and digits")
    return name


def escape(text: str) -> str:
    """
    HTML that shows a text as it is: markup as characters, and characters that cannot be seen by their code points.

    `{`, `}` and `$` become entities too, because Gradio's HTML has templates.
    """
    return "".join(
        f'<span class="control">U+{ord(character):04X}</span>' if is_hidden(character) else character
        for character in _entities(text.replace("\r\n", "\n"))
    )


def _entities(text: str) -> str:
    return re.sub(r"[{}$]", lambda match: f"&#{ord(match[0])};", html.escape(text))


def is_hidden(character: str) -> bool:
    """Control and format characters, among them those that turn the direction of writing; not line feed and tab."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def _hidden(text: str) -> bool:
    return any(is_hidden(character) for character in text)


def image_html(name: str, alt: str) -> str:
    """The picture `name` of the folder that [`serve`] got as `files`."""
    return f'<div class="image"><img src="{FILES}/{quote(name, safe="")}" alt="{_entities(alt)}"></div>'


def keys_script(keys: Mapping[str, str], submit: str | None = None, focus: Mapping[str, str] | None = None) -> str:
    """
    A script that presses buttons by key.

    Args:
        keys: `elem_id` of the button for each key, in lower case. They do nothing while somebody types in a field.
        submit: `elem_id` of the button that Ctrl-Enter (Cmd-Enter) presses, within fields too. Escape leaves a field.
        focus: `elem_id` of the text box that a key puts the cursor in.
    """
    script = _KEYS.replace("__KEYS__", json.dumps(dict(keys))).replace("__SUBMIT__", json.dumps(submit))
    return script.replace("__FOCUS__", json.dumps(dict(focus or {})))


class PageServer:
    """A page that is being served; closes it at the end of a `with` statement."""

    def __init__(self, page: "gr.Blocks", url: str) -> None:
        self.page, self.url = page, url

    def __enter__(self) -> "PageServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    files: str | os.PathLike | None = None,
    keys: Mapping[str, str] | None = None,
    submit: str | None = None,
    focus: Mapping[str, str] | None = None,
    css: str = "",
    host: str = LOCAL_HOSTS[0],
    port: int | None = None,
) -> PageServer:
    """
    Serves a page from a thread of its own: no sharing, no reports, no fonts or scripts from elsewhere.

    Args:
        page: What [`new_page`] began.
        files: Folder whose files [`picture_html`] shows; nothing else of the disk can be asked for.
        keys: See [`keys_script`], as `submit` and `focus`.
        submit: See [`keys_script`].
        focus: See [`keys_script`].
        css: Added to the page's style.
        host: Address to listen at. With the default only this machine can see the page.
        port: Port; by default the first free one from 7860 on.

    Raises:
        OSError: when the port is taken, or the host no address of this machine.
        ValueError: when there is no folder `files`, or the page cannot be reached after it has started.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware
    from starlette.staticfiles import StaticFiles

    if files is not None and not Path(files).is_dir():
        raise ValueError(f"there is no folder {str(files)!r} to show pictures from")
    _check_address(host, port)
    images = StaticFiles(directory=Path(files)) if files is not None else None
    hosts = LOCAL_HOSTS if host in LOCAL_HOSTS else None
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to download
    script = keys_script(keys or {}, submit, focus)
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
        max_file_size=1,
        theme=gradio.themes.Base(**fonts),
        css=_CSS + css,
        head=f"<script>{script}</script>",
        app_kwargs={"middleware": [Middleware(_OnlyThePage, images=images, hosts=hosts)]},
    )
    return PageServer(page, url)


def _check_address(host: str, port: int | None) -> None:
    """Gradio tries a hundred ports, whatever is wrong, and then speaks of its own settings."""
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
        pictures: Serves the files below `/files/`.
        hosts: Names by which the page may be called, or `None` for any. A page elsewhere whose name has been pointed
            at this machine (DNS rebinding) is refused by it, as are requests that another page makes.
    """

    def __init__(self, app: Any, images: Any, hosts: tuple[str, ...] | None) -> None:
        self.app, self.images, self.hosts = app, images, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # the start and the end of the server
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        path, prefix = scope["path"], f"/{FILES}/"
        if not self._is_asked_by_its_page(scope):
            await _refuse(send_with_policy)
        elif path.startswith(prefix) and self.images is not None:
            await self._send_image(scope, receive, send_with_policy)
        elif path in _PATHS or path.startswith(_PREFIXES):
            await self.app(scope, receive, send_with_policy)
        else:
            await _refuse(send_with_policy)

    def _is_asked_by_its_page(self, scope: Any) -> bool:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.hosts is not None and host.rsplit(":", 1)[0] not in self.hosts:
            return False
        return origin is None or origin.partition("://")[2] == host

    async def _send_image(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.exceptions import HTTPException

        inner = {**scope, "path": scope["path"].removeprefix(f"/{FILES}"), "root_path": ""}
        try:
            await self.images(inner, receive, send)
        except HTTPException as error:  # no such file, or a path that leaves the folder
            await _refuse(send, error.status_code)


async def _refuse(send: Any, status: int = 404) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"not here"})
