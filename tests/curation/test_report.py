"""The funnel as text and image, and report.html: what it shows, and that nothing in it acts or loads."""

import html
import io
import tomllib
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from filter_projects import TEXTS, jpeg, make_project, photograph, review
from PIL import Image

from transformers_minigpt4.curation.filter import run_filter
from transformers_minigpt4.curation.records import Result
from transformers_minigpt4.curation.report import histogram, run_report, visible
from transformers_minigpt4.curation.rules import RULES
from transformers_minigpt4.curation.status import save_status_png, status_text
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.llm.types import ChatSettings


EVIL = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted" \x1b[31mred\x07 \u202eback {{ 7 * 7 }} '
    "</p></body></html> 'end"
)


class Page(HTMLParser):
    """All elements with their attributes, and the text of paragraphs by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unclosed: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)
        if tag in ("p", "h3", "td", "figcaption"):
            self.inside = dict(attributes).get("class") or tag
            self.texts.setdefault(self.inside, []).append("")

    def handle_endtag(self, tag):
        if tag != "line" and (not self.open or self.open.pop() != tag):
            self.unclosed.append(tag)
        if tag in ("p", "h3", "td", "figcaption"):
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside][-1] += data


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Twelve pairs: the repair flagged 0 and failed on 4; 1 apologizes, 2 is evil, 3 has lost its image."""
    folder = tmp_path_factory.mktemp("report") / "my <project>"
    texts = [*TEXTS, TEXTS[0] + " again", TEXTS[1]]
    texts[2] = EVIL
    with make_project(folder, texts, repair=ChatSettings("somebody/chat")) as project:
        results = []
        for number, work in enumerate(project.pending("repair", "r")):
            facts = {"outcome": "ok", "text": work.text, "reason": ""}
            if number == 0:
                facts = {"outcome": "flagged", "reason": "adds words", "text": work.text + " It is very old indeed."}
            elif number == 1:
                facts["text"] = work.text + " I apologize for that."
            elif number == 4:
                facts = {"outcome": "failed", "reason": "timeout", "text": None}
            results.append(Result(work.pair.id, "r", work.input, **facts))
        project.record("repair", results)
        (folder / "images" / "00003.jpg").unlink()
        run_filter(project, project.config, progress=False)
        review(project, p00005="rejected", p00006="waiting", p00007="A new text about the engine.")
        yield project


@pytest.fixture(scope="module")
def page(project) -> Page:
    path = run_report(project, project.config)
    assert path == project.folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


class TestStatus:
    def test_text(self, project):
        lines = status_text(project).splitlines()
        found = {line.split("  ")[0] or line.strip(): line.split() for line in lines}
        assert found["sampled"][1:3] == ["12", "100.0%"]
        assert found["described"][1:3] == ["12", "100.0%"] and found["repaired"][1:3] == ["11", "91.7%"]
        assert found["through the filter"][3:5] == ["7", "58.3%"]
        assert found["accepted by reviewers"][3:5] == ["5", "41.7%"]
        plain = [" ".join(line.split()) for line in lines]
        for row in ("failed 1 8.3%", "timeout 1 8.3%", "flagged 1 8.3%", "adds words 1 8.3%", "dropped 4 33.3%"):
            assert row in plain, row
        for row in ("apology 1 8.3%", "no_image 1 8.3%", "rejected 1 8.3%", "edited 1 8.3%", "waiting 1 8.3%"):
            assert row in plain, row
        assert plain[-1] == "4988 of the 5000 pairs wanted have not been sampled"
        assert not any(ord(character) < 32 for line in lines for character in line)

    def test_counts_add_up(self, project):
        for step in project.funnel().steps:
            assert sum(step.outcomes.values()) + step.waiting == step.reached or step.step == "repair"

    def test_png(self, project, tmp_path):
        path = tmp_path / "funnel.png"
        path.write_bytes(b"old")
        save_status_png(project, path)
        with Image.open(path) as image:
            image.load()
            colors = Counter(image.convert("RGB").get_flattened_data())
        assert image.format == "PNG" and image.width > 800 and list(tmp_path.iterdir()) == [path]
        assert colors[(0x2A, 0x6F, 0x97)] > 5000  # the steps' bars

    def test_without_images(self, tmp_path):
        with make_project(tmp_path / "empty", []) as empty:
            assert "sampled" in status_text(empty) and " 0 " in status_text(empty)
            save_status_png(empty, tmp_path / "funnel.png")
            text = run_report(empty, empty.config).read_text(encoding="utf-8")
        assert "There are no texts yet." in text and "Nothing has been dropped" in text

    def test_reasons_of_others_are_one_plain_line(self, tmp_path):
        with make_project(tmp_path / "odd", TEXTS[:2], repair=ChatSettings("x")) as odd:
            reason = "broke\noff $\\frac{1}{2}$ \x1b[31m" + "x" * 200
            work = list(odd.pending("repair", "r"))
            odd.record("repair", [Result(one.pair.id, "r", one.input, "failed", reason) for one in work])
            assert "    broke off $\\frac{1}{2}$ [31mx" in status_text(odd)
            save_status_png(odd, tmp_path / "funnel.png")


class TestReport:
    def test_it_is_one_complete_page(self, page):
        assert page.unclosed == [] and page.open == []
        assert {tag for tag, _ in page.elements} <= {
            *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td"),
            *("div", "figure", "figcaption", "svg", "rect", "line", "text", "span", "section", "img"),
        }

    def test_nothing_acts_or_loads(self, page):
        for tag, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            for name in ("src", "href"):
                assert (attributes.get(name) or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        policy = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]

    def test_texts_come_back_as_they_were(self, page, project):
        shown = next(text for text in page.texts["text"] if "alert(1)" in text)
        assert shown == EVIL.replace("\x1b", "⟨U+001B⟩").replace("\x07", "⟨U+0007⟩").replace("\u202e", "⟨U+202E⟩")
        raw = (project.folder / "report.html").read_text(encoding="utf-8")
        assert "\x1b" not in raw and "\u202e" not in raw and "<script" not in raw
        assert "my &lt;project&gt;" in raw and html.escape("<img src=x") in raw

    def test_each_reason_has_its_samples(self, page):
        titles = [" ".join(text.split()) for text in page.texts["h3"]]
        assert titles[3:] == [
            "failed in repair: timeout 1 pair",
            "flagged in repair: adds words 1 pair",
            "dropped by filter: apology 1 pair",
            "dropped by filter: leftovers 1 pair",
            "dropped by filter: no_image 1 pair",
            "dropped by filter: unfinished 1 pair",
            "rejected in review 1 pair",
        ]
        assert "says 'i apologize'" in page.texts["why"]
        assert TEXTS[0] + " It is very old indeed." in page.texts["text"]  # after, beside before

    def test_what_is_kept_has_samples_too(self, page, project):
        titles = [" ".join(text.split()) for text in page.texts["h3"]]
        assert titles[:3] == ["accepted in review 4 pairs", "edited in review 1 pair", "kept by filter 7 pairs"]
        assert "A new text about the engine." in page.texts["text"]
        assert page.texts["label"].count("as described") >= 1  # the repair changed the first text

    def test_images(self, page):
        import base64

        images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
        assert len(images) == 6 + 4 + 1 + 6  # of what was lost, accepted, edited and kept
        for source in images:
            with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
                assert max(image.size) <= 240
        gone = [attributes for tag, attributes in page.elements if attributes.get("class") == "none"]
        assert len(gone) == 1

    def test_the_funnel_and_the_rules(self, page, project):
        cells = [" ".join(text.split()) for text in page.texts["td"] + page.texts["number"]]
        assert "through the filter" in cells and "91.7%" in cells
        assert any(cell.startswith("Apologies and admitted mistakes") for cell in cells)

    def test_lengths_before_and_after(self, page):
        captions = [" ".join(text.split()) for text in page.texts["figcaption"]]
        assert captions[0].startswith("Repair: before (11 texts, median ")
        assert captions[1].startswith("Filter: before (11 texts, median ") and "kept (7 texts" in captions[1]
        bars = [attributes["class"] for tag, attributes in page.elements if tag == "rect"]
        assert {"before", "after"} == set(bars)

    def test_another_place_and_again(self, project, tmp_path):
        path = tmp_path / "page.html"
        path.write_text("old")
        assert run_report(project, project.config, path) == path
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [path]


def test_histogram():
    chart = histogram("Words", [("before", "before", [1, 1, 2, 95]), ("after", "after", [2])])
    counted = {(bar["series"], bar["title"]) for bar in chart["bars"]}
    assert counted == {
        ("before", "before: 3 of 0 to 3 words"),
        ("before", "before: 1 of 92 to 95 words"),
        ("after", "after: 1 of 0 to 3 words"),
    }
    tallest = max(chart["bars"], key=lambda bar: bar["height"])
    assert tallest["height"] == chart["height"] and tallest["y"] == 0
    assert all(bar["x"] >= 0 and bar["x"] + bar["width"] <= chart["width"] for bar in chart["bars"])
    assert chart["series"][0]["summary"] == "4 texts, median 2 words, 1 to 95"


def test_visible():
    assert visible("a\nb\tü 犬 😀") == "a\nb\tü 犬 😀"
    assert visible("\x00\u200b\ud800\u2028") == "⟨U+0000⟩⟨U+200B⟩⟨U+D800⟩⟨U+2028⟩"


def test_the_template_is_shipped():
    from transformers_minigpt4.curation import report

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = settings["tool"]["setuptools"]["package-data"]["transformers_minigpt4"]
    template = report.TEMPLATES / "report.html.jinja"
    assert template.is_file()
    package = Path(report.__file__).parents[1]
    assert any(template in package.glob(pattern) for pattern in shipped), "add it to package-data in pyproject.toml"


def test_a_broken_image_is_reported(tmp_path):
    with make_project(tmp_path / "broken", ["Too short."], [jpeg(photograph(0))]) as broken:
        (broken.folder / "images" / "00000.jpg").write_bytes(b"no image")
        run_filter(broken, broken.config, progress=False)
        text = run_report(broken, broken.config).read_text(encoding="utf-8")
    assert "no image: " in text and "data:image" not in text


def test_what_further_rules_found(tmp_path):
    with make_project(tmp_path / "two", ["A steam engine", "A copper dome", "Too short."]) as two:
        run_filter(two, two.config, progress=False)
        page = Page(run_report(two, two.config).read_text(encoding="utf-8"))
    cells = page.texts["td"]
    rows = dict(pairwise(cells))
    assert rows["too_short"].startswith("Fewer than")
    numbers = page.texts["number"][-2 * len(RULES) :]
    counts = {rule.name: tuple(map(int, numbers[2 * i : 2 * i + 2])) for i, rule in enumerate(RULES)}
    assert counts["unfinished"] == (2, 0) and counts["too_short"] == (1, 2)
