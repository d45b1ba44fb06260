"""One bad row costs that row: it is skipped and counted, and its place is named, in every format."""

import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import caption, image_bytes, image_files, numbers, sample, shard, write_csv
from datasets import Features, Image, Value

from transformers_minigpt4.data import webdataset
from transformers_minigpt4.data.images import image_bytes as read_image
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.data.webdataset import expand_braces
from transformers_minigpt4.utils import json_files


DEEP = "[" * 100_000 + "]" * 100_000

# A record in JSON without its braces, and what the report says about it.
BAD_RECORDS = {
    "lone surrogate": ('"caption": "a \\ud83d b"', r"half of a character, \\ud83d"),
    "nested brackets": (f'"caption": "a", "tags": {DEEP}', "nested too deeply"),
    "unclosed brackets": ('"caption": "a", "tags": [', "not JSON"),
    "invalid UTF-8": (b'"caption": "caf\xe9"', "UTF-8"),
    "surrogate as bytes": (b'"caption": "\xed\xa0\xbd"', "UTF-8"),
    "huge number": (f'"caption": "a", "n": {"9" * 5000}', "thousands of digits"),
    "number as caption": (f'"caption": {"9" * 400}', "the caption is 999"),
    "not a number": ('"caption": NaN', "the caption is nan"),
    "list as caption": ('"caption": [["a"]]', "the caption is"),
    "empty caption": ('"caption": " \\n"', "the caption is"),
    "no caption": ('"captions": "a"', "no caption"),
    "a word": ("caption", "not JSON"),
}


def raw(text):
    return text if isinstance(text, bytes) else text.encode()


def record(number, rest, **fields):
    """The bytes of an object with `fields`, which name an image, and `rest`."""
    head = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in fields.items())
    return b"{" + raw(head) + b", " + raw(rest) + b"}"


def good(number):
    return f'"caption": "{caption(number)}"'


def json_lines(folder, rests):
    path = folder / "list.jsonl"
    path.write_bytes(b"\n".join(record(n, rest, image=f"{n}.png") for n, rest in enumerate(rests)))
    return f"table:{path}", "line 2"


def json_list(folder, rests):
    path = folder / "list.json"
    path.write_bytes(b"[\n" + b",\n".join(record(n, rest, image=f"{n}.png") for n, rest in enumerate(rests)) + b"\n]")
    return f"table:{path}", "line 3"


def align(folder, rests):
    image_files(folder / "image", range(3), "{}.jpg")
    notes = b",\n".join(record(n, rest, image_id=n) for n, rest in enumerate(rests))
    (folder / "filter_cap.json").write_bytes(b'{"annotations": [' + notes + b"]}")
    return f"cc_sbu_align:{folder}", "annotations 1 in line 2"


def coco(folder, rests):
    listed = json.dumps([{"id": n, "file_name": f"{n}.png"} for n in range(3)])
    notes = b",\n".join(record(n, rest, id=n + 100, image_id=n) for n, rest in enumerate(rests))
    (folder / "c.json").write_bytes(b'{"annotations": [' + notes + b'],\n"images": ' + raw(listed) + b"}")
    return f"coco:{folder}/c.json", "annotations 1 in line 2"


def narratives(folder, rests):
    image_files(folder, range(3), "{}.jpg")
    path = folder / "n.jsonl"
    path.write_bytes(b"\n".join(record(n, rest, image_id=n, dataset_id="open") for n, rest in enumerate(rests)))
    return f"locnarr:{path}", "line 2"


def image_folder(folder, rests):
    path = folder / "metadata.jsonl"
    path.write_bytes(b"\n".join(record(n, rest, file_name=f"{n}.png") for n, rest in enumerate(rests)))
    return f"imagefolder:{folder}", "metadata.jsonl line 2"


def shard_of_records(folder, rests):
    samples = {f"{n:05}": {"png": image_bytes(n), "json": record(n, rest, url="")} for n, rest in enumerate(rests)}
    shard(folder / "0.tar", samples)
    return f"wds:{folder}/0.tar", "0.tar/00001"


FORMATS = [json_lines, json_list, align, coco, narratives, image_folder, shard_of_records]


def read(source, prompt_format="stage2"):
    rows = open_rows(source, prompt_format, epochs=1, shuffle=False, max_error_rate=None)
    return list(rows.dataset), rows.skipped


def only_example(skipped):
    ((_, ((key, reason),)),) = skipped.examples.items()
    return key, reason


@pytest.mark.parametrize("bad", BAD_RECORDS)
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_bad_record_costs_itself(make, bad, tmp_path):
    image_files(tmp_path, range(3))
    rest, said = BAD_RECORDS[bad]
    source, where = make(tmp_path, [good(0), rest, good(2)])
    if bad == "unclosed brackets" and make in (json_list, align, coco):
        with pytest.raises(DataError, match=r"\.json"):  # nothing says where such an entry of a list ends
            read(source)
        return
    found, skipped = read(source)
    assert numbers(found) == [0, 2]
    key, reason = only_example(skipped)
    assert where in key and "\n" not in reason and len(reason) < 300
    assert re.search(said, reason), reason


def test_a_row_is_named_once_and_counted_in_each_epoch(tmp_path, caplog):
    image_files(tmp_path, range(3))
    source, where = json_lines(tmp_path, [good(0), BAD_RECORDS["a word"][0], good(2)])
    rows = open_rows(source, "stage2", epochs=3, shuffle=False, max_error_rate=None)
    assert numbers(list(rows.dataset)) == [0, 2] * 3
    assert rows.skipped.counts()[rows.skipped.sources[0]]["entry"] == 3
    (message,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert where in message


def conversations(folder, name, bad):
    def one(number, value):
        said = raw(f'"conversations": [{{"from": "human", "value": "<image>"}}, {{"from": "gpt", "value": {value}}}]')
        return record(number, said, id=f"id{number}", image=f"{number}.png")

    records = [one(0, '"Image 0"'), one(1, bad), one(2, '"Image 2"')]
    if name == "c.jsonl":
        (folder / name).write_bytes(b"\n".join(records))
    else:
        (folder / name).write_bytes(b"[" + b",\n".join(records) + b"]")
    return f"llava:{folder}/{name}"


@pytest.mark.parametrize("name", ["c.json", "c.jsonl"])
@pytest.mark.parametrize("bad", ['"\\udc00"', DEEP, "{'a': 1}", '["a"]', "1e999", "null"], ids=range(6))
def test_a_bad_conversation_costs_itself(name, bad, tmp_path):
    image_files(tmp_path, range(3))
    found, skipped = read(conversations(tmp_path, name, bad))
    assert numbers(found) == [0, 2]
    assert "line 2" in only_example(skipped)[0]


def test_a_list_without_an_end_names_the_entry(tmp_path):
    (tmp_path / "c.json").write_text('[{"id": 1},\n{"id": "')
    with pytest.raises(DataError, match=r"c\.json is not JSON, or was cut short: the entry in line 2 has no end"):
        read(f"llava:{tmp_path}/c.json")


TABLES = {
    "invalid UTF-8": (b"1.png,caf\xe9", "byte 0xe9 is not UTF-8"),
    "no caption": (b"1.png", "there is no caption"),
    "too many cells": (b"1.png,,x,y,z", "there is no caption"),
    "no path": (b",a cat", "no path under any of"),
    "huge field": (b"1.png," + b"x" * 200_000, "field larger than field limit"),
    "a path with NUL": (b"1\0.png,a cat", "null byte"),
    "a path that is too long": (b"1" * 5000 + b".png,a cat", "File name too long"),
}


@pytest.mark.parametrize("bad", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_bad_row_of_a_table_costs_itself(suffix, bad, tmp_path):
    image_files(tmp_path, range(3))
    row, said = TABLES[bad]
    text = b"\xef\xbb\xbfpath,caption\n0.png,Image 0\n" + row + b"\n2.png,Image 2\n"
    (tmp_path / f"t.{suffix}").write_bytes(text.replace(b",", b"\t") if suffix == "tsv" else text)
    found, skipped = read(f"table:{tmp_path}/t.{suffix}")
    assert numbers(found) == [0, 2]
    key, reason = only_example(skipped)
    assert "line 3" in key and said in reason


def test_a_line_of_many_megabytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", 1000)
    image_files(tmp_path, range(3))
    source, _ = json_lines(tmp_path, [good(0), f'"caption": "{"x" * 5000}"', good(2)])
    found, skipped = read(source)
    key, reason = only_example(skipped)
    assert numbers(found) == [0, 2] and key == "line 2" and "more than the 1,000 that" in reason


def test_a_caption_of_a_book_is_not_tokenized(tmp_path):
    image_files(tmp_path, range(3))
    source, _ = json_lines(tmp_path, [good(0), f'"caption": "{"x " * 600_000}"', good(2)])
    found, skipped = read(source)
    assert numbers(found) == [0, 2] and "1,200,003 characters" in only_example(skipped)[1]


@pytest.mark.parametrize(
    "files", [{"txt": b"caf\xe9"}, {"json": b"[1]"}, {"json": b"\0\0"}], ids=["txt", "list", "NUL"]
)
def test_bad_files_in_a_shard(files, tmp_path):
    shard(tmp_path / "0.tar", {"0": sample(0), "1": {"png": image_bytes(1), **files}, "2": sample(2)})
    found, skipped = read(f"wds:{tmp_path}/0.tar")
    assert numbers(found) == [0, 2] and only_example(skipped)[0] == "0.tar/1"


def test_a_large_file_in_a_shard_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_DOWNLOAD_BYTES", 1000)
    large = {"png": image_bytes(1) + b"\0" * 2000, "txt": b"x"}
    shard(tmp_path / "0.tar.gz", {"0": sample(0), "1": large, "2": sample(2)})
    found, skipped = read(f"wds:{tmp_path}/0.tar.gz")
    assert numbers(found) == [0, 2] and "more than 1,000" in only_example(skipped)[1]


def test_a_key_that_is_not_unicode(tmp_path):
    shard(tmp_path / "0.tar", {"caf\udce9": sample(0)})
    (row,), _ = read(f"wds:{tmp_path}/0.tar")
    assert row["key"] == "0.tar/caf\\udce9"


@pytest.mark.parametrize("column", ["caption", "id"])
def test_a_bad_text_in_a_parquet_file_costs_its_row(column, tmp_path):
    table = {"id": [b"a", b"b", b"c"], "caption": [caption(number).encode() for number in range(3)]}
    table[column][1] = b"caf\xe9"
    columns = {name: pa.array(values).view(pa.string()) for name, values in table.items()}
    schema = Features({"id": Value("string"), "caption": Value("string"), "image": Image()}).arrow_schema
    images = [{"bytes": image_bytes(number), "path": None} for number in range(3)]
    columns["image"] = pa.array(images, schema.field("image").type)
    (tmp_path / "data").mkdir()
    rows = pa.table(columns).replace_schema_metadata(schema.metadata)
    pq.write_table(rows, tmp_path / "data" / "train-00000-of-00001.parquet")
    found, skipped = read(f"dataset:{tmp_path}")
    assert numbers(found) == [0, 2]
    key, reason = only_example(skipped)
    assert key == "0/row 1" and "not UTF-8" in reason


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["table", "llava", "locnarr", "coco", "wds", "imagefolder", "cc_sbu_align"])
def test_a_pipe_is_refused(kind, tmp_path):
    """Opening it would wait for somebody to write into it."""
    name = {"wds": "x.tar", "imagefolder": "metadata.jsonl", "cc_sbu_align": "filter_cap.json"}.get(kind, "x.jsonl")
    os.mkfifo(tmp_path / name)
    path = tmp_path if kind in ("imagefolder", "cc_sbu_align") else tmp_path / name
    with pytest.raises((DataError, OSError), match=r"not a regular file|contains no|no shards"):
        read(f"{kind}:{path}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_images_and_shards_is_skipped(tmp_path):
    image_files(tmp_path, [0, 2])
    os.mkfifo(tmp_path / "1.png")
    found, skipped = read(json_lines(tmp_path, [good(0), good(1), good(2)])[0])
    assert numbers(found) == [0, 2] and "a pipe" in only_example(skipped)[1]
    with pytest.raises(OSError, match="not a regular file"):
        read_image({"bytes": None, "path": str(tmp_path / "1.png")})
    shard(tmp_path / "0.tar", {"0": sample(0)})
    os.mkfifo(tmp_path / "1.tar")
    found, skipped = read(f"wds:{tmp_path}")
    assert numbers(found) == [0] and only_example(skipped) == (f"{tmp_path}/1.tar", "it is not a regular file")


@pytest.mark.parametrize(
    "pattern", ["{0..999999999}.tar", "{0..9999}{0..9999}", "{1.." + "9" * 30 + "}", "{a,b}{0..999999}"]
)
def test_braces_are_bounded(pattern):
    """A list of all these names would fill the memory before the first shard is read."""
    with pytest.raises(DataError, match=r"stand for [\d,]+ shards, more than the limit of 1,000,000"):
        expand_braces(pattern)


def test_braces_up_to_the_bound():
    assert len(expand_braces("{0..999999}.tar")) == 1_000_000


def test_a_name_cannot_write_to_the_terminal(tmp_path, caplog):
    image_files(tmp_path, [0])
    write_csv(tmp_path / "t.csv", [{"path": name, "caption": caption(0)} for name in ("0.png", "x\x1b[31m\nx.png")])
    _, skipped = read(f"table:{tmp_path}/t.csv")
    assert r"(x\x1b[31m\nx.png)" in only_example(skipped)[0]
    assert "\x1b" not in caplog.messages[0] and "\n" not in caplog.messages[0]


def test_a_byte_order_mark(tmp_path):
    image_files(tmp_path, range(3))
    source, _ = json_lines(tmp_path, [good(0)])
    path = tmp_path / "list.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert numbers(read(source)[0]) == [0]
    write_csv(tmp_path / "t.csv", [{"path": "2.png", "caption": caption(2)}])
    assert numbers(read(f"table:{tmp_path}/t.csv")[0]) == [2]
