"""The review's page in a real browser, served as `minigpt4 curate review` serves it, with 5,000 pairs."""

import os
import shutil
import sys

import httpx
import pytest
from review_projects import make_project

from transformers_minigpt4.curation.review import ReviewQueue
from transformers_minigpt4.curation.review_page import serve_review
from transformers_minigpt4.curation.review_screen import Reviewing
from transformers_minigpt4.web.server import import_gradio


PAIRS = 5000
STATUS = "document.querySelector('#status')?.innerText"
NASTY = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> ${window.hacked = 3} {{hacked}} \x07"
)
TEXTS = [(f"The the picture {i} is red.", f"The picture {i} is red.") for i in range(PAIRS)]
TEXTS[3] = (NASTY, f"A sign says {NASTY}")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("review") / "project"
    with make_project(folder, TEXTS) as project, serve_review(project) as server:
        yield project, server


@pytest.fixture
def project(served):
    """The project as nobody has reviewed it."""
    project, _ = served
    with project.transaction() as connection:
        for table in ("decisions", "claims"):
            connection.execute(f"DELETE FROM {table}")
        for table in ("results", "history"):
            connection.execute(f"DELETE FROM {table} WHERE step = 'review'")
    return project


@pytest.fixture
def url(served):
    return served[1].url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium on the PATH, and CHROMIUM names none")
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = running.chromium.launch(executable_path=path, args=flags)
        yield browser.new_context()  # one for all windows: they share cookies, storage and cache
        browser.close()


class Window:
    """A browser window on the page."""

    def __init__(self, browser, url):
        self.page = browser.new_page()
        self.page.set_default_timeout(15_000)
        self.hosts, self.errors = set(), []
        self.page.on("request", lambda request: self.hosts.add(httpx.URL(request.url).netloc.decode()))
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(url)
        self.wait_until_loaded()

    def wait_until_loaded(self):
        self.page.wait_for_function(f"!({STATUS} ?? 'Loading').includes('Loading')")

    def start(self, name):
        self.page.fill("#name textarea, #name input", name)
        self.page.click("#start")
        self.wait_for_pair("")

    @property
    def shown(self):
        return self.page.input_value("#shown textarea, #shown input")

    @property
    def text(self):
        return self.page.input_value("#text textarea")

    @property
    def status(self):
        return self.page.inner_text("#status")

    def wait_for_pair(self, old):
        """Until another pair than `old` is shown; returns the number of its image."""
        script = "old => document.querySelector('#shown textarea, #shown input')?.value != old"
        self.page.wait_for_function(script, arg=old)
        return self.number

    def wait_for_status(self, words):
        self.page.wait_for_function(f"words => ({STATUS} ?? '').includes(words)", arg=words)

    @property
    def number(self):
        return int(self.page.get_attribute("#image img", "alt").split()[-1])

    def press(self, key):
        old = self.shown
        self.page.keyboard.press(key)
        return self.wait_for_pair(old)

    def click(self, name):
        old = self.shown
        self.page.click(f"#{name}")
        return self.wait_for_pair(old)


@pytest.fixture
def open_window(browser, project, url):
    windows = []

    def open_(name=None, address=url):
        window = Window(browser, address)
        windows.append(window)
        if name:
            window.start(name)
        return window

    yield open_
    for window in windows:
        window.page.close()
        assert window.hosts == {httpx.URL(url).netloc.decode()}  # nothing is asked of any other machine
        assert window.errors == []


def decisions(project):
    query = "SELECT reviewer, pair_id - 1, action, text FROM decisions WHERE undone IS NULL ORDER BY id"
    return project.connection().execute(query).fetchall()


def test_buttons_accept_edit_reject_and_undo(open_window, project):
    window = open_window("Anna")
    assert window.number == 0 and window.text == TEXTS[0][1]
    assert window.page.inner_text("#before del") == "the"
    assert window.page.evaluate("document.querySelector('#image img').naturalWidth") == 64
    assert window.click("accept") == 1
    window.page.fill("#text textarea", "A red picture.")
    assert window.click("save") == 2
    assert window.click("reject") == 3
    assert decisions(project) == [
        ("anna", 0, "accepted", None),
        ("anna", 1, "edited", "A red picture."),
        ("anna", 2, "rejected", None),
    ]
    assert "3 of 5000 pairs decided · 1 accepted, 1 edited, 1 rejected" in window.page.inner_text("#progress")
    assert window.click("undo") == 2 and "rejected" in window.status
    assert window.click("undo") == 1 and window.text == TEXTS[1][1]
    assert decisions(project) == [("anna", 0, "accepted", None)]


def test_keys_do_what_the_buttons_do_and_nothing_while_somebody_types(open_window, project):
    window = open_window("Anna")
    assert window.press("a") == 1
    window.page.keyboard.press("e")
    window.page.keyboard.press("Control+End")
    window.page.keyboard.type(" aru")
    assert window.text == f"{TEXTS[1][1]} aru" and window.number == 1
    assert window.press("Control+Enter") == 2
    assert window.press("r") == 3  # the field has let go of the keyboard
    assert [(action, text) for _, _, action, text in decisions(project)] == [
        ("accepted", None),
        ("edited", f"{TEXTS[1][1]} aru"),
        ("rejected", None),
    ]
    assert window.press("u") == 2
    assert len(decisions(project)) == 2


def test_a_decision_is_on_the_disk_before_the_next_pair_appears(open_window, project):
    window = open_window("Anna")
    for count in range(1, 4):
        window.click("accept") if count % 2 else window.press("r")
        assert len(decisions(project)) == count


def test_a_reload_in_the_middle_comes_back_to_the_pair(open_window, project):
    window = open_window("Anna")
    window.press("a")
    before = window.shown
    window.page.fill("#text textarea", "half an ed")
    window.page.reload()
    window.wait_until_loaded()
    assert window.shown == before and window.text == TEXTS[1][1]
    assert window.press("a") == 2
    assert [reviewer for reviewer, *_ in decisions(project)] == ["anna", "anna"]


def test_two_windows_of_two_people_never_show_the_same_pair(open_window, project):
    anna, bert = open_window("Anna"), open_window("Bert")
    assert (anna.number, bert.number) == (0, 1)
    assert (anna.press("a"), bert.press("r"), anna.press("r"), bert.press("a")) == (2, 3, 4, 5)
    assert [(who, number) for who, number, *_ in decisions(project)] == [
        ("anna", 0),
        ("bert", 1),
        ("anna", 2),
        ("bert", 3),
    ]


def test_two_windows_of_one_person_decide_once(open_window, project):
    first, second = open_window("Anna"), open_window("anna ")
    assert first.shown == second.shown
    first.press("a")
    assert second.press("r") == 1
    assert "accepted this pair before" in second.status
    assert decisions(project) == [("anna", 0, "accepted", None)]


def test_a_key_pressed_twice_decides_on_one_pair(open_window, project):
    window = open_window("Anna")
    old = window.shown
    window.page.evaluate("document.querySelector('#accept').click(); document.querySelector('#accept').click()")
    assert window.wait_for_pair(old) == 1
    assert window.press("r") == 2
    assert [decision[1:3] for decision in decisions(project)] == [(0, "accepted"), (1, "rejected")]


def test_markup_and_control_characters_are_text(open_window, project):
    window = open_window("Anna")
    for _ in range(3):
        window.press("a")
    assert window.number == 3
    shown = NASTY.replace("\x07", "U+0007")
    assert window.page.inner_text("#before .foreign-text") == shown
    assert window.page.inner_text("#after .foreign-text") == f"A sign says {shown}"
    assert window.text == TEXTS[3][1]
    window.page.fill("#text textarea", f"Edited: {TEXTS[3][1]}")
    window.press("Control+Enter")
    assert decisions(project)[-1][3] == f"Edited: {TEXTS[3][1]}"
    assert window.press("u") == 3
    assert window.page.evaluate("window.hacked") is None
    assert window.page.locator("#before script, #after script, #before img, #after img").count() == 0


def test_accepting_a_changed_text_and_saving_an_empty_one_wait_for_the_person(open_window, project):
    window = open_window("Anna")
    window.page.fill("#text textarea", "Changed.")
    window.page.click("#accept")
    window.wait_for_status("You changed the text")
    window.page.fill("#text textarea", " ")
    window.page.click("#save")
    window.wait_for_status("needs its text")
    assert window.number == 0 and decisions(project) == []


def test_an_image_deleted_meanwhile_is_skipped_and_counted(open_window, project):
    window = open_window("Anna")
    image = project.folder / "images" / "00001.png"
    image.unlink()
    try:
        assert window.press("a") == 2
        assert "1 left out, because their image is missing" in window.page.inner_text("#progress")
    finally:
        image.hardlink_to(image.with_name("first.png"))


def test_an_invalid_name_is_reported(open_window):
    window = open_window()
    window.page.fill("#name textarea, #name input", "")
    window.page.click("#start")
    window.wait_for_status("Give your name")
    window.page.fill("#name textarea, #name input", "<b>" * 30)
    window.page.click("#start")
    window.wait_for_status("too long")


def test_the_end_is_announced(tmp_path, browser):
    with make_project(tmp_path / "project", TEXTS[:2]) as project, serve_review(project) as server:
        other = ReviewQueue(project).next("bert")
        window = Window(browser, server.url)
        window.start("Anna")
        window.page.keyboard.press("a")
        window.wait_for_status("with other reviewers")
        ReviewQueue(project).decide("bert", other.id, other.text_id, "accepted")
        window.page.reload()
        window.wait_until_loaded()
        window.wait_for_status("seen all pairs")
        assert "2 of 2 pairs decided" in window.page.inner_text("#progress")
        following = f"All 2 pairs are decided; minigpt4 curate run {project.folder} builds the dataset (2 accepted)."
        assert window.page.inner_text("#next") == following
        window.page.close()


def test_an_open_page_outlives_the_server(tmp_path, browser):
    with make_project(tmp_path / "project", TEXTS[:3]) as project:
        with serve_review(project) as server:
            window = Window(browser, server.url)
            window.start("Anna")
        with serve_review(project, port=httpx.URL(server.url).port):
            assert window.press("a") == 1
            assert decisions(project) == [("anna", 0, "accepted", None)]
            window.page.close()


def test_title_and_guideline_are_shown(open_window, project):
    window = open_window()
    assert window.page.inner_text("#title h1") == "Review of captions: project"
    assert project.config.review_guideline in window.page.inner_text("#title")


def test_pairs_are_rejected_with_a_reason_by_key_and_by_click(open_window, project):
    window = open_window("Anna")
    window.press("2")
    window.click("reason-1")
    window.press("r")
    query = "SELECT action, reason FROM decisions WHERE undone IS NULL ORDER BY id"
    assert project.connection().execute(query).fetchall() == [
        ("rejected", "too little detail"),
        ("rejected", "not in the image"),
        ("rejected", ""),
    ]
    assert project.funnel().steps[-1].reasons == {"rejected": {"not in the image": 1, "too little detail": 1}}


class List:
    """The list of all pairs in a window."""

    def __init__(self, window):
        self.page = window.page
        self.page.click("#list button")
        self.page.wait_for_selector(".pairs button")

    @property
    def numbers(self):
        return [int(number) for number in self.page.locator(".pairs button > span:first-child").all_inner_texts()]

    def choose(self, name, option):
        self.page.click(f"#{name} input")
        self.page.click(f"#{name} [role=option]:has-text('{option}')")

    def wait_for(self, words):
        self.page.wait_for_function("w => document.querySelector('.turns')?.innerText.includes(w)", arg=words)


def test_the_list_filters_and_opens_pairs(open_window, project):
    window = open_window("Anna")
    for key in ("a", "1", "a", "2"):
        window.press(key)
    found = List(window)
    found.wait_for("5,000 pairs, page 1 of 200")
    assert found.numbers == list(range(1, 26))
    window.page.click(".turns button")
    found.wait_for("page 2 of 200")
    assert found.numbers[0] == 26
    found.choose("state", "rejected")
    found.wait_for("2 pairs, page 1 of 1")
    assert found.numbers == [2, 4]
    found.choose("reason", "too little detail")
    found.wait_for("1 pair,")
    assert found.numbers == [4]
    old = window.shown
    window.page.click(".pairs button")
    assert window.wait_for_pair(old) == 3
    assert "You have rejected this pair: too little detail. If you decide again" in window.status
    assert window.press("a") == 4  # the next one that is due
    assert [decision[1:3] for decision in decisions(project)] == [
        *((0, "accepted"), (1, "rejected"), (2, "accepted"), (3, "accepted")),
    ]
    found.wait_for("0 pairs")  # the list shows what has just been decided
    found.choose("reason", "any")
    found.wait_for("1 pair,")
    found.choose("state", "to do")
    found.wait_for("4,996 pairs")
    window.page.fill("#search textarea, #search input", "PICTURE 4321")
    found.wait_for("1 pair,")
    old = window.shown
    window.page.click(".pairs button")
    assert window.wait_for_pair(old) == 4321
    window.page.reload()
    window.wait_until_loaded()
    assert window.number == 4321  # it is claimed, as any pair that somebody looks at
    assert window.press("a") == 4


def test_the_image_can_be_enlarged(open_window, project):
    window = open_window("Anna")
    zoomed = "document.querySelector('dialog.zoom img')?.getBoundingClientRect().width"
    window.page.click("#image img")
    window.page.wait_for_function(f"{zoomed} >= innerWidth / 2")
    fitting = window.page.evaluate(zoomed)
    window.page.mouse.wheel(0, -100)
    window.page.wait_for_function(f"{zoomed} > {fitting}")
    window.page.keyboard.press("r")  # keys are for the image now
    window.page.keyboard.press("Escape")
    window.page.wait_for_function("!document.querySelector('dialog.zoom')")
    window.page.keyboard.press("z")
    window.page.wait_for_selector("dialog.zoom img")
    window.page.keyboard.press("z")
    window.page.wait_for_function("!document.querySelector('dialog.zoom')")
    assert window.number == 0 and decisions(project) == []


def test_the_name_is_remembered(open_window):
    open_window("Berta B.")
    window = open_window()
    window.page.wait_for_function("document.querySelector('#name textarea, #name input')?.value == 'Berta B.'")
    window.page.click("#start")
    window.page.wait_for_selector("#image img")
    assert "you, berta b. (change)" in window.page.inner_text("#progress")
    assert not window.page.is_visible("#start")


def test_a_phone_shows_the_buttons_below_the_text(open_window):
    window = open_window("Anna")
    window.page.set_viewport_size({"width": 390, "height": 844})
    for name in ("accept", "save", "reject", "undo"):
        box = window.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 390


# --- without a browser ---


@pytest.mark.parametrize(
    "path",
    [
        *("files/../curation.sqlite", "files/%2e%2e/curation.sqlite", "files//etc/passwd", "files/none.png"),
        *("gradio_api/file=/etc/passwd", "gradio_api/file=http://127.0.0.1/", "gradio_api/info", "gradio_api/runs"),
        *("docs", "openapi.json", "gradio_api/upload", "monitoring", "gradio_api/queue/data"),
    ],
)
def test_nothing_but_the_page_and_the_images_is_served(url, path):
    assert httpx.get(url + path).status_code in (404, 405)


def test_images_are_served_by_name(url):
    answer = httpx.get(f"{url}files/00007.png")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_link_out_of_the_folder_is_not_followed(project, url):
    link = project.folder / "images" / "link.png"
    link.symlink_to("/etc/passwd")
    try:
        assert httpx.get(f"{url}files/link.png").status_code == 404
    finally:
        link.unlink()


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}])
def test_other_pages_cannot_speak_to_it(project, url, headers):
    answer = httpx.post(f"{url}gradio_api/run/start", json={"data": ["anna"]}, headers=headers)
    assert answer.status_code == 404


def test_it_listens_on_this_machine_alone_and_does_not_report(served, url):
    page = served[1].page
    assert url.startswith("http://127.0.0.1:")
    assert page.share is False and page.analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_disk_that_fills_leaves_the_pair_where_it_is(project):
    """SQLite's own limit on the size of the file plays the full disk."""
    reviewing = Reviewing(ReviewQueue(project))
    screen = reviewing.start("anna")
    connection = project.connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (limit,) = connection.execute("PRAGMA max_page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    try:
        told = reviewing.save("anna", screen.shown, "word " * 20_000)
    finally:
        connection.execute(f"PRAGMA max_page_count = {limit}")
    assert "disk full" in told.status and decisions(project) == []
    assert reviewing.accept("anna", screen.shown, screen.text).status.endswith("></div>")


def test_a_missing_gradio_is_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'pip install "transformers_minigpt4\[evaluation\]"'):
        import_gradio("evaluation")


def test_a_taken_port_is_reported(served, tmp_path):
    port = httpx.URL(served[1].url).port
    with (
        make_project(tmp_path / "project", TEXTS[:1]) as project,
        pytest.raises(OSError, match=f"port {port} of .* another --port"),
    ):
        serve_review(project, port=port)
