"""Sources named by their path alone: what each format is taken for, and what cannot be told."""

import pytest
from data_files import image_files, number_of, shard, write_json, write_lines
from data_files import sample as shard_sample
from test_sources import FORMATS, dataset, json_table

from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import Source, open_rows, parse_source


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_is_recognized(make, tmp_path, caplog):
    source = make(tmp_path / "s")
    bare = source.partition(":")[2]
    parsed = parse_source(bare)
    assert str(parsed) == source and parsed == parse_source(source)
    assert parsed.guessed is not None and parse_source(source).guessed is None
    rows = open_rows(bare, "stage2", epochs=1, shuffle=False, max_error_rate=0)
    assert [number_of(row) for row in rows.dataset] == [0, 1, 2]
    assert rows.fingerprint == open_rows(source, "stage2").fingerprint
    assert [f"is read as {source}, because it is " in message for message in caplog.messages] == [True]


def test_files_and_folders_of_shards(tmp_path):
    for name in ("0.tar", "1.tar.gz"):
        shard(tmp_path / name, {"a": shard_sample(0)})
    for path in (tmp_path, tmp_path / "0.tar", tmp_path / "1.tar.gz"):
        assert parse_source(str(path)) == Source("wds", str(path))
    assert len(list(open_rows(str(tmp_path), "stage2", epochs=1).dataset)) == 2
    assert parse_source("https://x.org/{0..9}.tar::weight=2") == Source("wds", "https://x.org/{0..9}.tar", weight=2.0)


def test_a_parquet_file(tmp_path):
    dataset().to_parquet(str(tmp_path / "x[1].parquet"))
    rows = open_rows(str(tmp_path / "x[1].parquet"), "stage2", epochs=1, shuffle=False)
    assert [number_of(row) for row in rows.dataset] == [0, 1, 2] and rows.skipped.sources[0].startswith("dataset:")


def test_options_of_the_guessed_kind(tmp_path):
    bare = json_table(tmp_path).partition(":")[2]
    assert parse_source(f"{bare}::images={tmp_path}").images == str(tmp_path)
    with pytest.raises(DataError, match="is not an option of table"):
        parse_source(f"{bare}::split=x")


def unclear(folder):
    image_files(folder / "pictures", range(2))
    image_files(folder / "split" / "train", range(2))
    write_lines(folder / "split" / "train" / "metadata.jsonl", [{"file_name": "0.png", "caption": "x"}])
    write_lines(folder / "both" / "metadata.jsonl", [{"file_name": "0.png", "caption": "x"}])
    shard(folder / "both" / "0.tar", {"a": shard_sample(0)})
    write_json(folder / "filter_cap.json", {"annotations": []})
    write_json(folder / "other.json", {"a": 1})
    (folder / "empty.jsonl").touch()
    (folder / "notes.txt").write_text("x")


UNCLEAR = {
    "{}/pictures": r"cannot be guessed, it contains none of filter_cap\.json.*; write KIND:PATH, with KIND one of wds",
    "{}/split": r"imagefolder:.*/split/train, which has metadata",
    "{}/both": r"several ways; write one of imagefolder:.*both \(metadata.jsonl\), wds:.*both \(0\.tar\)",
    "{}/filter_cap.json": "write cc_sbu_align:",
    "{}/other.json": "cannot be guessed from its name and its beginning; write KIND:PATH",
    "{}/empty.jsonl": "cannot be guessed",
    "{}/notes.txt": "cannot be guessed",
    "{}/none": "is not a source; write KIND:PATH",
    "tabel:{}/notes.txt": "is not a source; write KIND:PATH",
    "wsd:{}/0.tar": "'wsd:.*is not a source; write KIND:PATH",
    "somebody/photos": r"write dataset:somebody/photos if it has columns.*, or wds:somebody/photos if",
    "https://x.org/data": "is a URL of no known kind",
}


@pytest.mark.parametrize("path", UNCLEAR)
def test_what_cannot_be_told_names_the_prefixes(path, tmp_path):
    unclear(tmp_path)
    with pytest.raises(DataError, match=UNCLEAR[path]):
        parse_source(path.format(tmp_path))
