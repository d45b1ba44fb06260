"""`minigpt4 data check`: counts, skipped with their keys, histogram, contact sheet, exit status."""

import json
import re

import pytest
from data_files import caption, color, image_files, shards, write_lines
from PIL import Image
from training_runs import model_folder
from transformers import AutoProcessor
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.data_check import check_source, histogram, save_contact_sheet


def table(folder, broken=()):
    image_files(folder, range(6))
    for number in broken:
        (folder / f"{number}.png").write_text("broken")
    rows = [{"path": f"{number}.png", "caption": caption(number) + " word" * number} for number in range(6)]
    return f"table:{write_lines(folder / 'list.jsonl', rows)}"


def run(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_report(tmp_path):
    sheet = tmp_path / "sheet.png"
    done = run(table(tmp_path, [1]), "--output", sheet, "--images", 4)
    assert done.exit_code == 0, done.output
    for line in ("shards           6", "rows             6 read, all of them", "median 5, minimum 2, maximum 7"):
        assert line in done.output
    assert "unreadable_image 1: an image that is missing" in done.output
    assert "line 2 (1.png): cannot load image" in done.output
    with Image.open(sheet) as image:
        # Four of the usable images are side by side; the broken one is not among them.
        found = [image.getpixel((10 + place * 202 + 4, 10 + 192 - 3)) for place in range(4)]
        assert found == [color(number) for number in (0, 2, 3, 4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_by_itself(tmp_path, workers):
    done = run(table(tmp_path), "--throughput", 0.1, "--workers", workers)
    found = re.search(
        rf"loader           (\d+) rows/s, decoded and resized to 224 x 224, {workers} worker processes", done.output
    )
    assert done.exit_code == 0 and found and int(found[1]) > 0, done.output


def test_nothing_usable(tmp_path):
    done = run(table(tmp_path, range(6)), table(tmp_path / "b"))
    assert done.exit_code == 1 and "no usable row in table:" in done.stderr
    assert (
        "usable           0" in done.output and "usable           6" in done.output
    )  # the second is looked at all the same


def test_the_limit_counts_bad_rows_too(tmp_path):
    source = table(tmp_path, [0, 1, 2, 3])
    found = check_source(source, limit=5)
    assert len(found.words) == 1 and found.skipped.counts()[source]["rows"] == 5 and not found.complete
    assert "5 read, up to the limit" in found.report()
    assert check_source(source, limit=None).complete


def test_a_truncated_shard(tmp_path):
    source = shards(tmp_path, 2, 3)
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:3000])
    assert "shard            1: a file of many rows" in check_source(source).report()


def test_several_sheets_and_a_random_order(tmp_path):
    done = run(table(tmp_path / "a"), table(tmp_path / "b"), "--shuffle", "--output", tmp_path / "s.png")
    assert done.exit_code == 0 and (tmp_path / "s-0.png").is_file() and (tmp_path / "s-1.png").is_file()
    first, second = (
        check_source(f"table:{tmp_path}/a/list.jsonl", limit=3, shuffle=shuffle).words for shuffle in (True, False)
    )
    assert first != second == [2, 3, 4]


def test_conversations_count_the_answers(tmp_path):
    assert check_source(table(tmp_path), "messages").words == [2, 3, 4, 5, 6, 7]


ROW = [
    "  row              line 3 (2.png)",
    "  image            8 x 6 pixels",
    "  text             ###Human: <Img><ImageHere></Img> Take a look at this image and describe what you notice. "
    "###Assistant:  [Image 2 word word###]",
]


def test_rows_as_text(tmp_path):
    done = run(table(tmp_path, [1]), "--rows", 2)
    assert done.output.splitlines()[-3:] == ROW and done.output.count("  row  ") == 2
    assert "tokens           not counted, and neither is what is cut: name the model with --model" in done.output
    assert "  row  " not in run(table(tmp_path), "--rows", 0).output
    done = run(table(tmp_path), "--prompt-format", "messages", "--rows", 1)
    assert re.search(r"text +user: <image> [A-Z].*[.?] assistant: \[Image 0\]$", done.output, re.MULTILINE)


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    config = {"model_type": "other", "auto_map": {"AutoConfig": "other.OtherConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.py").write_text("raise SystemExit('code was run')")
    done = run(table(tmp_path), "--model", tmp_path)
    assert done.exit_code == 1 and "contains custom code" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "config.json").write_text("[]")
    assert f"{tmp_path}/config.json is [], not a JSON object" in run(table(tmp_path), "--model", tmp_path).stderr


def test_rows_as_the_model_reads_them(tmp_path):
    """The same tokens and labels as the collator gives to training, cut as there."""
    model = model_folder("minigpt4")
    source = table(tmp_path)
    done = run(source, "--model", model, "--max-completion-length", 9, "--rows", 6)
    assert done.exit_code == 0, done.output
    processor = AutoProcessor.from_pretrained(model)
    collator = ImageTextCollator(processor, 9)
    full = ImageTextCollator(processor)
    cut = 0
    shown = [line.split(maxsplit=1)[1] for line in done.output.splitlines() if line.startswith("  text ")]
    for row, text in zip(open_rows(source, "stage2", epochs=1, shuffle=False).dataset, shown, strict=True):
        batch = collator([row])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        inside = text[text.index(" [") + 2 : -1].split()
        assert inside == processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
        assert f"tokens           {len(ids)}, {len(inside)} of them learned" in done.output
        assert "<ImageHere> x 8" in text and text.startswith("<s> ▁###")
        cut += full([row])["input_ids"].shape[1] > len(ids)
    assert 0 < cut < 6 and f"cut              {cut} of 6 rows ({cut / 6:.1%}) have an answer of more" in done.output


def test_a_guessed_kind_is_named(tmp_path):
    source = table(tmp_path)
    done = run(source.partition(":")[2], "--rows", 0)
    assert done.exit_code == 0 and f"is read as {source}, because it is a file with path and caption" in done.stderr
    done = run(tmp_path / "none")
    assert done.exit_code == 1 and "write KIND:PATH" in done.stderr and done.stderr.count("\n") == 1


def test_a_caption_cannot_write_to_the_terminal(tmp_path):
    image_files(tmp_path, [0])
    path = write_lines(tmp_path / "l.jsonl", [{"path": "0.png", "caption": "a\x1b]0;b\x07\nc" + "d" * 5000}])
    done = run(path)
    assert done.exit_code == 0 and "\x1b" not in done.output and r"a\x1b]0;b\nc" in done.output
    assert "characters)" in done.output and len(done.output) < 4000


def test_errors_are_plain(tmp_path):
    with pytest.raises(DataError, match="is not a source"):
        check_source("nothing")
    with pytest.raises(ValueError, match="no image for the contact sheet"):
        save_contact_sheet(tmp_path / "x.png", [])


def test_histogram():
    assert histogram([1, 1, 1, 1, 3])[1:] == [
        "        0        0",
        "        1        4 " + "#" * 40,
        "        2        0",
        "        3        1 " + "#" * 10,
    ]
    lines = histogram([0, 100])
    assert len(lines) <= 14 and lines[-1].split()[1] == "1"


def test_long_texts_fit_the_sheet(tmp_path):
    tall = [(Image.new("RGB", (20, 190)), "word " * 300), (Image.new("RGB", (190, 20)), "x")]
    save_contact_sheet(tmp_path / "x.png", tall)
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (2 * 202 + 10, 192 + 10 + 8 * 15 + 10)
