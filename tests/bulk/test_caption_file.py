"""Checks the file of captions that `describe` appends to: what is on the disk, resume, and what it refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from transformers_minigpt4.bulk.caption_file import CaptionFile
from transformers_minigpt4.bulk.images import BulkImage, Description
from transformers_minigpt4.utils.files import InUseError


def described(image: str, caption: str) -> Description:
    return Description(BulkImage(image, image), caption=caption)


def failure(image: str, error: str) -> Description:
    return Description(BulkImage(image, image), error=error)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image that loads and one that does not."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 50)).save(folder / "1.png")
    (folder / "1b.jpg").write_bytes(b"not an image")
    return folder


class TestCaptionFile:
    def lines(self, path: Path) -> list[dict]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def write(self, path: Path, *images: str, prompt: str = "p", model: str = "m") -> None:
        with CaptionFile(path, prompt, model) as captions:
            for image in images:
                captions.write(described(image, "a dog"))

    def test_every_line_is_complete_in_itself(self, tmp_path):
        self.write(tmp_path / "c.jsonl", "a.png", "b.png")
        expected = [{"image": name, "caption": "a dog", "prompt": "p", "model": "m"} for name in ("a.png", "b.png")]
        assert self.lines(tmp_path / "c.jsonl") == expected

    def test_record_is_on_disk_at_once(self, tmp_path):
        with CaptionFile(tmp_path / "c.jsonl", "p", "m") as captions:
            captions.write(described("a.png", "x"))
            assert len(self.lines(tmp_path / "c.jsonl")) == 1

    def test_second_run_resumes(self, tmp_path):
        self.write(tmp_path / "c.jsonl", "a.png")
        with CaptionFile(tmp_path / "c.jsonl", "p", "m") as captions:
            assert captions.done == {"a.png"}
            captions.write(described("b.png", "x"))
        assert [line["image"] for line in self.lines(tmp_path / "c.jsonl")] == ["a.png", "b.png"]

    def test_cut_line_is_dropped_wherever_the_cut_is(self, tmp_path):
        path = tmp_path / "c.jsonl"
        self.write(path, "a.png", "ü 红.png")
        whole = path.read_bytes()
        start = whole.index(b"\n") + 1
        for end in range(start, len(whole) - 1):
            path.write_bytes(whole[:end])
            with CaptionFile(path, "p", "m") as captions:
                assert captions.done == {"a.png"}, end
                captions.write(described("ü 红.png", "a dog"))
            assert path.read_bytes() == whole

    def test_cut_line_is_gone_even_if_nothing_follows(self, tmp_path):
        path = tmp_path / "c.jsonl"
        self.write(path, "a.png")
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:-5])
        self.write(path)
        assert path.read_bytes() == whole

    def test_line_that_lacks_only_its_line_break_is_kept(self, tmp_path):
        path = tmp_path / "c.jsonl"
        self.write(path, "a.png", "b.png")
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with CaptionFile(path, "p", "m") as captions:
            assert captions.done == {"a.png", "b.png"}
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("other", [{"prompt": "q"}, {"model": "n"}])
    def test_another_prompt_or_model_is_refused(self, tmp_path, other):
        path = tmp_path / "c.jsonl"
        self.write(path, "a.png")
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"was made with .* choose another --output"):
            self.write(path, "b.png", **other)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        "content",
        [b"my notes", b"my notes\n", b'{"text": "x"}\n', b"[1]\n", b"\n", b"\xff\xfe\n", b'{"image": "a"}\n{'],
    )
    def test_foreign_file_is_refused_and_left_alone(self, tmp_path, content):
        path = tmp_path / "c.jsonl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"line 1 of .* is not a caption record"):
            self.write(path, "a.png")
        assert path.read_bytes() == content

    def test_broken_line_in_the_middle_is_refused(self, tmp_path):
        path = tmp_path / "c.jsonl"
        self.write(path, "a.png")
        path.write_bytes(path.read_bytes()[:20] + b"\n" + path.read_bytes())
        with pytest.raises(ValueError, match="line 1"):
            self.write(path, "b.png")

    def test_folder_is_created(self, tmp_path):
        self.write(tmp_path / "new" / "er" / "c.jsonl", "a.png")
        assert len(self.lines(tmp_path / "new" / "er" / "c.jsonl")) == 1
        with pytest.raises(ValueError, match=r"new/er/c.jsonl' is not a folder; choose another --output"):
            self.write(tmp_path / "new" / "er" / "c.jsonl" / "c.jsonl", "a.png")

    def test_two_runs_do_not_write_at_once(self, tmp_path):
        path, link = tmp_path / "c.jsonl", tmp_path / "link.jsonl"
        link.symlink_to(path)
        with CaptionFile(path, "p", "m") as captions:
            captions.write(described("a.png", "a dog"))
            for name in (path, link):
                with pytest.raises(InUseError, match=r"another run \(process \d+\) writes to '.*; wait for it, or"):
                    self.write(name, "b.png")
            captions.write(described("c.png", "a dog"))
        self.write(path, "b.png")
        assert [line["image"] for line in self.lines(path)] == ["a.png", "c.png", "b.png"]

    def test_a_failure_is_remembered_until_the_image_can_be_read(self, tmp_path, folder):
        path, images = tmp_path / "c.jsonl", [f"{folder}/1.png", f"{folder}/1b.jpg"]
        url = {"image": "http://localhost:9/a.png", "error": "the server is down"}
        with CaptionFile(path, "p", "m") as captions:
            assert captions.remaining(images) == (images, 0)
            captions.write(failure(images[1], "no image"))
            captions.write(failure(**url))  # which may work in the next run
        assert self.lines(captions.failures) == [{"image": images[1], "error": "no image"}]

        with CaptionFile(path, "p", "m") as captions:
            assert captions.remaining([*images, url["image"]]) == ([images[0], url["image"]], 1)
        Path(images[0]).rename(images[1])
        with CaptionFile(path, "p", "m") as captions:
            assert captions.remaining(images) == (images, 0)
            captions.write(described(images[1], "a dog"))
        assert not captions.failures.exists()

    def test_failures_whose_names_break_lines_elsewhere(self, tmp_path):
        failed = {f"{separator}.png": "no image" for separator in ("\u2028", "\x85", "\x1e", "\r", "\udc80")}
        for written in range(2):
            with CaptionFile(tmp_path / "c.jsonl", "p", "m") as captions:
                assert captions.failed == (failed if written else {})
                for image, error in failed.items():
                    captions.write(failure(image, error))

    def test_foreign_list_of_failures(self, tmp_path):
        (tmp_path / "c.jsonl.failed").write_text("my notes")
        with pytest.raises(ValueError, match="is not a list of failed images; rename or remove it"):
            self.write(tmp_path / "c.jsonl", "a.png")
        assert (tmp_path / "c.jsonl.failed").read_text() == "my notes"

    def test_not_a_file(self, tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            self.write(tmp_path, "a.png")

    def test_used_without_with(self, tmp_path):
        with pytest.raises(ValueError, match="with statement"):
            CaptionFile(tmp_path / "c.jsonl", "p", "m").write(described("a", "b"))

    def test_file_name_that_is_not_unicode(self, tmp_path):
        name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
        self.write(tmp_path / "c.jsonl", name)
        with CaptionFile(tmp_path / "c.jsonl", "p", "m") as captions:
            assert captions.done == {name}
