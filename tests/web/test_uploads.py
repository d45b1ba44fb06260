"""The folder of uploads: deleted at the end, or by the next page if the process was killed."""

import os
import sys
import tempfile

import pytest
from processes import program

from transformers_minigpt4.web.uploads import upload_folder


PAGE = "from transformers_minigpt4.web.uploads import upload_folder as f\nwith f() as x: print(x, flush=True); input()"


def folders(tmp_path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_folder_of_a_killed_page_is_deleted_by_the_next(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".lock").touch()
    (tmp_path / "minigpt4-web-link").symlink_to(elsewhere)
    (tmp_path / "minigpt4-web-without-lock").mkdir()
    others = folders(tmp_path)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with program([sys.executable, "-c", PAGE], env=environment, stdin=-1) as page:
        left_over = page.stdout.readline().strip()
        assert left_over.startswith(str(tmp_path.resolve()))
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))  # long ago
        with upload_folder():
            assert os.path.isdir(left_over)  # that page is running
        page.kill()
        page.wait()
    with upload_folder() as folder:
        assert folders(tmp_path) == {*others, folder.name}
    assert folders(tmp_path) == others and (elsewhere / ".lock").is_file()
