"""The web page in a real browser, as `minigpt4 web` serves it; and what it refuses."""

import base64
import io
import json
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from tiny_models import drawn_image
from web_parts import GREEDY, image_files, served_model

from transformers_minigpt4.inference.chat import PRESETS, Chat
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.serving import web_server
from transformers_minigpt4.serving.web_images import Limits
from transformers_minigpt4.serving.web_server import WebSettings, serve_chats
from transformers_minigpt4.web import uploads


NASTY = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> ![](http://evil.example/x.png) ${1}"
BOX, FILES = "#message textarea", "#message input[type=file]"


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load_model_and_processor(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("web") / "feedback"


@pytest.fixture(scope="module")
def url(loaded, output):
    """The page with one model."""
    with serve_chats([served_model(loaded, "tiny")], WebSettings(output, greedy=True)) as server:
        yield server.url


@pytest.fixture
def blind_url(loaded, output):
    """The page with two models, whose names are hidden; only one page of a process can take uploads at a time."""
    served = [served_model(loaded, "one"), served_model(loaded, "two")]
    with serve_chats(served, WebSettings(output, greedy=True, blind=True)) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium on the PATH, and CHROMIUM names none")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", *camera]
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class Window:
    """A browser window on the page, of a person of its own."""

    def __init__(self, browser, url: str) -> None:
        self.page = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"]).new_page()
        self.page.set_default_timeout(30_000)
        self.hosts, self.errors = set(), []
        self.page.on("request", self._note_host)
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.on("response", lambda answer: answer.status >= 400 and self.errors.append(answer.url))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(url)
        self.page.wait_for_selector("#clear:enabled")

    def _note_host(self, request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.hosts.add(httpx.URL(request.url).netloc.decode())

    def choose(self, *files) -> None:
        """Adds images to the message, and waits until they are uploaded."""
        before = self.page.locator("#message .thumbnail-item").count()
        self.page.set_input_files(FILES, list(files))
        self.wait_for_thumbnails(before + len(files))

    def wait_for_thumbnails(self, count: int) -> None:
        script = "count => document.querySelectorAll('#message .thumbnail-item').length === count"
        self.page.wait_for_function(script, arg=count)

    def send(self, text: str) -> None:
        self.page.fill(BOX, text)
        self.page.press(BOX, "Enter")

    def ask(self, text: str) -> str:
        asked = len(self.answers)
        self.send(text)
        return self.wait_for_answer(asked + 1)

    def wait_for_answer(self, count: int = 1) -> str:
        """Waits until there are as many answers, and the last is complete; returns it."""
        script = """(count) => {
          const answers = document.querySelectorAll("#answers-a .bot [data-testid=bot]");
          const complete = document.querySelector("#stop").disabled && !document.querySelector("#regenerate").disabled;
          return complete && answers.length >= count && answers[count - 1].innerText.trim() !== "…";
        }"""
        self.page.wait_for_function(script, arg=count)
        return self.answers[-1]

    @property
    def answers(self) -> list[str]:
        return self.page.locator("#answers-a .bot [data-testid=bot]").all_inner_texts()

    @property
    def questions(self) -> list[str]:
        texts = self.page.locator("#answers-a .user [data-testid=user]").all_inner_texts()
        return [text for text in texts if text.strip()]

    @property
    def images(self) -> int:
        return self.page.locator("#answers-a .user img").count()

    def set_length(self, tokens: int) -> None:
        if not self.page.is_visible("#longest input[type=number]"):
            self.page.click("#parameters button")
        self.page.fill("#longest input[type=number]", str(tokens))
        self.page.press("#longest input[type=number]", "Tab")
        script = "tokens => document.querySelector('#longest input[type=range]').value === tokens"
        self.page.wait_for_function(script, arg=str(tokens))
        self.page.wait_for_timeout(300)  # until Gradio has noted it


@pytest.fixture
def open_window(browser):
    windows = []

    def open_(url):
        window = Window(browser, url)
        windows.append((window, url))
        return window

    yield open_
    for window, url in windows:
        window.page.context.close()
        assert window.hosts == {httpx.URL(url).netloc.decode()}  # nothing is asked of any other machine
        assert window.errors == []


def said(text: str) -> str:
    """A text as a browser shows it."""
    return " ".join(text.split())


def test_two_images_over_three_turns(open_window, loaded, url, tmp_path):
    """Answers are those of the chat in Python; then the last one again, an edited question, a reload, a new start."""
    chat = Chat(*loaded, parameters={**GREEDY, "max_new_tokens": 8})
    files = image_files(tmp_path, 3)
    window = open_window(url)
    window.set_length(8)
    window.choose(*files[:2])
    expected = [chat.ask("What are these?", files[:2])]
    assert said(window.ask("What are these?")) == said(expected[0])
    window.choose(files[2])
    expected.append(chat.ask(NASTY, files[2:]))
    assert said(window.ask(NASTY)) == said(expected[1])
    expected.append(chat.ask("Why?"))
    window.ask("Why?")
    assert list(map(said, window.answers)) == list(map(said, expected))
    assert window.questions == ["What are these?", NASTY, "Why?"] and window.images == 3
    assert window.page.evaluate("window.hacked") is None
    window.set_length(16)
    chat.set_parameters(max_new_tokens=16)
    longer = said(chat.regenerate())
    assert longer != said(expected[2])
    window.page.click("#regenerate")
    deadline = time.monotonic() + 60
    while said(window.answers[-1]) != longer and time.monotonic() < deadline:
        window.page.wait_for_timeout(50)
    assert list(map(said, window.answers)) == [*map(said, expected[:2]), longer]
    window.page.click("#edit-last")
    window.page.wait_for_function("document.querySelector('#message textarea').value === 'Why?'")
    assert len(window.questions) == 2
    assert said(window.ask("Why not?")) == said((chat.undo(), chat.ask("Why not?"))[1])
    window.page.reload()
    window.page.wait_for_selector("#regenerate:enabled")
    assert window.questions == ["What are these?", NASTY, "Why not?"] and window.images == 3
    window.page.click("#clear")
    window.page.wait_for_selector("#regenerate:disabled")
    assert window.questions == []


@pytest.mark.parametrize(
    "path",
    [
        *("gradio_api/file=/etc/passwd", "gradio_api/file=http://127.0.0.1/", "gradio_api/proxy=http://127.0.0.1/"),
        *("gradio_api/info", "gradio_api/runs", "docs", "openapi.json", "monitoring", "gradio_api/call/ask/x"),
    ],
)
def test_nothing_but_the_page_and_uploads_is_served(url, path):
    assert httpx.get(url + path).status_code == 404


def test_only_uploads_can_be_named(url):
    config = httpx.get(f"{url}config").text
    example = next(part for part in config.split('"') if part.endswith("example-0.png") and part.startswith("/"))
    folder = Path(example).parent
    assert folder.stat().st_mode & 0o077 == 0
    ask = next(fn["id"] for fn in json.loads(config)["dependencies"] if fn["api_name"] == "ask")

    def status(path: object) -> int:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "mime_type": "image/png"}
        data = ["key", {"text": "hi", "files": [file]}, True, 1, 0.9, 1.05, 300]
        body = {"data": data, "fn_index": ask, "session_hash": "x"}
        return httpx.post(f"{url}gradio_api/queue/join", json=body).status_code

    assert status(example) == 200
    (folder / "link.png").symlink_to("/etc/passwd")
    for path in (
        "/etc/passwd",
        f"{folder}/../../etc/passwd",
        f"{folder}/link.png",
        f"{url}x.png",
        str(folder),
        None,
        "",
    ):
        assert status(path) == 403, path
    assert httpx.get(f"{url}gradio_api/file={folder}/link.png").status_code == 404
    assert httpx.get(f"{url}gradio_api/file={example}").status_code == 200


def test_uploads_have_a_limit_and_are_no_pages(url):
    upload = f"{url}gradio_api/upload"
    assert httpx.post(upload, files={"files": ("a.png", bytes(33 * 2**20))}).status_code == 413
    assert httpx.post(upload, content=iter([b"x"])).status_code == 413  # of unknown length
    path = httpx.post(upload, files={"files": ("../../a.html", b"<script>alert(1)</script>")}).json()[0]
    assert path.endswith("/a.html")
    answer = httpx.get(f"{url}gradio_api/file={path}")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


def test_a_name_and_a_password(loaded, output, monkeypatch):
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(uploads, "sleep", pause)
    with serve_chats([served_model(loaded, "tiny")], WebSettings(output, credentials="anna:pässword:1")) as server:
        for path in ("", "config", "assets/x.js", "gradio_api/upload", "gradio_api/heartbeat/x"):
            answer = httpx.get(server.url + path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(f"{server.url}config", auth=("anna", "pässword:2")).status_code == 401
        assert pauses == [1.0]  # for the wrong one, not for those without
        assert httpx.get(f"{server.url}config", auth=("anna", "pässword:1")).status_code == 200
        assert len(pauses) == 1


# --- slow ---


@pytest.mark.slow
def test_stop_and_an_image_with_a_hostile_name(open_window, url, tmp_path):
    name = "<img src=x onerror=window.hacked=1>&#x3c;b.png"
    image = tmp_path / name
    drawn_image(1).save(image, "PNG")
    window = open_window(url)
    window.choose(image)
    window.set_length(2000)
    window.send("What is this?")
    window.page.wait_for_function("document.querySelector('#answers-a [data-testid=bot]')?.innerText.length > 20")
    window.page.click("#stop")
    before = window.wait_for_answer()
    time.sleep(1)
    assert window.answers == [before] and len(before) > 20
    assert window.page.evaluate("window.hacked") is None
    broken = tmp_path / f"broken {name}"
    broken.write_bytes(b"\x89PNG and no more")
    window.choose(broken)
    window.send("And this?")
    toast = window.page.locator(".toast-body")
    toast.wait_for()
    assert "cannot be used" in toast.inner_text()
    assert window.page.evaluate("window.hacked") is None and toast.locator("img").count() == 0
    assert window.page.input_value(BOX) == "And this?"  # to be sent again without it
    assert len(window.questions) == 1
    window.errors = [error for error in window.errors if "ERR_" not in error]


@pytest.mark.slow
def test_two_models_are_compared_and_voted_for(open_window, blind_url, output):
    window = open_window(blind_url)
    window.set_length(8)
    page = window.page
    page.click("#examples button >> nth=0")
    window.wait_for_thumbnails(1)
    assert page.is_disabled("#vote-a")
    window.ask("What is this?")
    assert page.locator("#answers-b [data-testid=bot]").all_inner_texts() == window.answers
    labels = page.locator("[data-testid=block-label]").all_inner_texts()
    assert {"Model A", "Model B"} <= {label.strip() for label in labels}
    assert "checkpoints/" not in page.content()
    page.click("#vote-b")
    page.wait_for_function("document.querySelector('#note').innerText.includes('Thank you')")
    records = (output / "feedback.jsonl").read_text().splitlines()
    vote = json.loads(records[-1])
    assert (vote["type"], vote["best"], vote["blind"]) == ("vote", "B", True)
    assert sorted(vote["models"].values()) == ["checkpoints/one", "checkpoints/two"]
    first = Path(vote["models"]["A"]).name
    assert page.locator("[data-testid=block-label]", has_text=f"A: {first}").count() == 1
    assert page.is_disabled("#vote-a")
    page.click("#report button")
    page.fill("#reason textarea", NASTY)
    page.click("#flag")
    page.wait_for_function("document.querySelector('#thanks').innerText.includes('saved')")
    flag = json.loads((output / "feedback.jsonl").read_text().splitlines()[-1])
    assert (flag["type"], flag["reason"], flag["blind"]) == ("flag", NASTY, False)
    assert len(flag["turns"]) == 1 and (output / flag["turns"][0]["images"][0]).is_file()


@pytest.mark.slow
def test_large_images(open_window, url, tmp_path):
    """20 MB of noise are taken; more than the limit is refused by the page itself."""
    side = 2650
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert 20_000_000 < (tmp_path / "noise.png").stat().st_size < 32 * 2**20
    (tmp_path / "too-large.png").write_bytes(bytes(33 * 2**20))
    window = open_window(url)
    window.set_length(8)
    window.choose(tmp_path / "noise.png")
    assert window.ask("What is this?") and window.images == 1
    assert window.page.evaluate("document.querySelector('#answers-a img').naturalWidth") == 512
    window.page.set_input_files(FILES, [tmp_path / "too-large.png"])
    window.page.locator(".toast-body").wait_for()
    assert window.page.locator("#message .thumbnail-item").count() == 0
    window.errors = []


@pytest.mark.slow
def test_images_are_pasted_dropped_and_taken_by_the_camera(open_window, url):
    window = open_window(url)
    file = io.BytesIO()
    drawn_image(2).save(file, "PNG")
    give = """([data, kind]) => {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true };
      const field = document.querySelector("#message textarea");
      field.dispatchEvent(kind === "paste" ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
        : new DragEvent("drop", { ...options, dataTransfer: transfer }));
    }"""
    data = base64.b64encode(file.getvalue()).decode()
    for count, kind in enumerate(("paste", "drop"), start=1):
        window.page.evaluate(give, [data, kind])
        window.wait_for_thumbnails(count)
    window.page.click("#camera button")
    window.page.click("#camera button:has-text('Webcam')")
    window.page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")
    window.page.click("#camera button[aria-label='capture photo']")
    window.wait_for_thumbnails(3)
    window.set_length(4)
    assert window.ask("What are these?") and window.images == 3


@pytest.mark.slow
def test_eight_people_at_once(browser, loaded, output, tmp_path, monkeypatch):
    monkeypatch.setattr(web_server, "Limits", partial(Limits, new_tokens=30))
    files = image_files(tmp_path, 8)
    with serve_chats([served_model(loaded, "tiny")], WebSettings(output, greedy=True, batch_size=5)) as server:
        windows = [Window(browser, server.url) for _ in files]
        for window, file in zip(windows, files):
            window.choose(file)
        for number, window in enumerate(windows):
            window.send(f"What is number {number}?")
        for number, (window, file) in enumerate(zip(windows, files)):
            chat = Chat(*loaded, parameters={**GREEDY, "max_new_tokens": 30})
            assert said(window.wait_for_answer()) == said(chat.ask(f"What is number {number}?", [file]))
            window.page.context.close()


@pytest.mark.slow
def test_a_closed_tab_and_a_reload_end_the_answer(open_window, url):
    window = open_window(url)
    window.set_length(2000)
    window.send("What is this?")
    window.page.wait_for_function("document.querySelector('#answers-a [data-testid=bot]')?.innerText.length > 20")
    window.page.reload()
    window.page.wait_for_selector("#regenerate:enabled")
    assert len(window.answers) == 1 and len(window.answers[0]) > 20
    window.send("And this?")
    window.page.wait_for_selector("#stop:enabled")
    window.page.close()
    window.errors = [error for error in window.errors if "abort" not in error and "rrored out" not in error]
    deadline = time.monotonic() + 30
    while any(thread.name == "batched-generation" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_parameters_apply_at_once_while_the_server_is_busy(open_window, url):
    """Requests outside the queue get no answer until the question has been sent."""
    window = open_window(url)
    page = window.page
    window.set_length(4)
    held, sent = [], []
    page.route("**/gradio_api/run/**", lambda route: held.append(route))
    page.on("request", lambda request: "queue/join" in request.url and sent.append(request.post_data_json["data"]))
    page.click("text=Sampling, as in the authors' chat")
    page.fill("#longest input[type=number]", "5")
    with page.expect_request("**/queue/join*"):
        window.send("What is this?")
    page.unroute("**/gradio_api/run/**")
    for route in held:
        route.continue_()
    window.wait_for_answer()
    authors = PRESETS["authors"]
    assert sent[0][2:] == [True, authors["temperature"], authors["top_p"], authors["repetition_penalty"], 5]


@pytest.mark.slow
def test_keyboard_and_screen_readers(open_window, url):
    window = open_window(url)
    window.set_length(4)
    page = window.page
    page.get_by_role("button", name="Example: a brown dog").click()
    window.wait_for_thumbnails(1)
    page.get_by_role("textbox", name="Message").focus()
    page.keyboard.press("Control+End")
    page.keyboard.press("Enter")
    window.page.wait_for_selector("#answers-a [data-testid=bot]")
    window.wait_for_answer()
    assert page.get_by_role("log", name="Conversation with tiny").get_attribute("aria-live") == "polite"
    assert page.get_by_role("img", name="Image 1").count() == 1
    names = ("Stop", "Regenerate", "Edit last", "Clear", "Upload a file", "Submit", "Flag this conversation")
    for name in names[:-1]:
        assert page.get_by_role("button", name=name, exact=True).count() == 1, name
    assert page.get_by_role("button", name="Share").count() == 0
    page.get_by_role("textbox", name="Message").focus()
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value(BOX) == "two\nlines"
    page.get_by_role("button", name="Edit last").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#message textarea').value.startsWith('What')")
    assert page.get_attribute("html", "lang") == "en"


@pytest.mark.slow
def test_a_phone_needs_no_scrolling_sideways(open_window, blind_url):
    window = open_window(blind_url)
    window.page.set_viewport_size({"width": 390, "height": 844})
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [window.page.locator(f"#{name}").bounding_box() for name in ("answers-a", "answers-b", "message")]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
