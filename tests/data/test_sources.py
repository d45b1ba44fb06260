"""Every format, read from tiny real files: good ones, broken ones, and sources that cannot be opened."""

import fsspec
import pytest
from data_files import (
    caption,
    image_bytes,
    image_files,
    number_of,
    numbers,
    shards,
    write_csv,
    write_json,
    write_lines,
)
from datasets import Dataset
from datasets import Image as ImageFeature

from transformers_minigpt4.data.schema import DataError, validate_row
from transformers_minigpt4.data.sources import Source, open_rows, parse_source


def conversation(number, *turns, **fields):
    sides = ("human", "gpt")
    values = turns or ("<image>\nWhat is it?", caption(number))
    said = [{"from": sides[place % 2], "value": value} for place, value in enumerate(values)]
    return {"id": f"id{number}", "image": f"{number}.png", "conversations": said, **fields}


def llava(folder):
    image_files(folder / "images", range(3))
    write_json(folder / "chat.json", [conversation(number) for number in range(3)])
    return f"llava:{folder}/chat.json::images={folder}/images"


def llava_next_to_images(folder):
    image_files(folder, range(3))
    return f"llava:{write_lines(folder / 'chat.jsonl', map(conversation, range(3)))}"


def align(folder):
    image_files(folder / "image", range(3), "{}.jpg")
    notes = [{"image_id": str(number) if number else 0, "caption": caption(number)} for number in range(3)]
    write_json(folder / "filter_cap.json", {"annotations": notes})
    return f"cc_sbu_align:{folder}"


def narratives(folder):
    image_files(folder / "open", range(2), "{}.jpg")
    image_files(folder / "open", [2], "{:012}.jpg")
    records = [{"dataset_id": "open_images", "image_id": str(n), "annotator_id": 5, "traces": []} for n in range(2)]
    records.append({"dataset_id": "mscoco_train2017", "image_id": "2", "annotator_id": 5})
    path = write_lines(folder / "n.jsonl", [{**r, "caption": caption(int(r["image_id"]))} for r in records])
    return f"locnarr:{path}::images={folder}/open"


def coco(folder):
    image_files(folder / "val", range(3), "{:012}.jpg")
    listed = [{"id": number, "file_name": f"{number:012}.jpg"} for number in range(3)]
    notes = [{"id": 100 + number, "image_id": number, "caption": caption(number)} for number in range(3)]
    path = write_json(folder / "captions.json", {"images": listed, "annotations": notes})
    return f"coco:{path}::images={folder}/val"


def csv_table(folder):
    image_files(folder, range(3))
    rows = [{"path": f"{number}.png", "caption": caption(number)} for number in range(3)]
    return f"table:{write_csv(folder / 'list.csv', rows)}"


def json_table(folder):
    image_files(folder / "p", range(3))
    rows = [{"image": str(folder / "p" / f"{number}.png"), "text": caption(number)} for number in range(3)]
    return f"table:{write_lines(folder / 'list.jsonl', rows)}"


def image_folder(folder):
    image_files(folder, range(3))
    write_csv(folder / "metadata.csv", [{"file_name": f"{n}.png", "text": caption(n)} for n in range(3)])
    return f"imagefolder:{folder}"


def dataset(count=3, **columns):
    images = [{"bytes": image_bytes(number), "path": None} for number in range(count)]
    table = {"image": images, "image_id": list(map(str, range(count))), "caption": list(map(caption, range(count)))}
    return Dataset.from_dict({**table, **columns}).cast_column("image", ImageFeature())


def parquet(folder):
    (folder / "data").mkdir(parents=True)
    for place in range(2):
        path = folder / "data" / f"train-{place:05}-of-00002.parquet"
        dataset().shard(2, place).to_parquet(str(path))
    return f"dataset:{folder}"


def saved(folder):
    dataset().save_to_disk(str(folder))
    return f"dataset:{folder}"


def webdataset(folder):
    return shards(folder, 1, 3)


FORMATS = [
    llava,
    llava_next_to_images,
    align,
    narratives,
    coco,
    csv_table,
    json_table,
    image_folder,
    parquet,
    saved,
    webdataset,
]


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
class TestEveryFormat:
    def test_its_rows(self, make, tmp_path):
        rows = open_rows(make(tmp_path / "s"), "stage2", epochs=1, shuffle=False, max_error_rate=0)
        found = list(rows.dataset)
        for row in found:
            validate_row(row)
            assert row["prompt"].startswith("###Human: <Img><ImageHere></Img> ") and row["images"][0].mode == "RGB"
        assert numbers(found) == [0, 1, 2] and len({row["key"] for row in found}) == 3
        (seen,) = rows.skipped.counts().values()
        assert seen["rows"] == 3 and not any(seen[kind] for kind in seen if kind not in ("rows", "shards"))

    def test_undecoded_in_stage_1(self, make, tmp_path):
        rows = list(open_rows(make(tmp_path / "s"), "stage1", epochs=1, shuffle=False, decode=False).dataset)
        assert [row["completion"] for row in rows] == [f"image {number}\n" for number in range(3)]
        assert all(row["images"][0].keys() == {"bytes", "path"} for row in rows)
        for row in rows:
            validate_row(row)

    def test_as_messages(self, make, tmp_path):
        for row in open_rows(make(tmp_path / "s"), "messages", epochs=1).dataset:
            validate_row(row)
            assert row["messages"][0]["content"][0] == {"type": "image"}


class TestLlava:
    def read(self, tmp_path, records, prompt_format="messages", **options):
        image_files(tmp_path, range(3))
        path = write_json(tmp_path / "chat.json", records)
        rows = open_rows(f"llava:{path}", prompt_format, epochs=1, shuffle=False, max_error_rate=None, **options)
        return list(rows.dataset), rows.skipped

    def test_several_turns(self, tmp_path):
        record = conversation(1, "What?\n<image>", "A dog.", "Sure?", "Yes.")
        found, _ = self.read(tmp_path, [record])
        image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
        assert [(m["role"], m["content"]) for m in found[0]["messages"]] == [
            ("user", [image, text("What?")]),
            ("assistant", [text("A dog.")]),
            ("user", [text("Sure?")]),
            ("assistant", [text("Yes.")]),
        ]

    def test_text_only(self, tmp_path):
        record = conversation(1, "Hello", "Hi")
        del record["image"]
        found, _ = self.read(tmp_path, [record])
        assert found[0]["images"] == [] and found[0]["messages"][0]["content"] == [{"type": "text", "text": "Hello"}]

    def test_several_turns_are_no_caption(self, tmp_path):
        records = [conversation(0), conversation(1, "<image> a", "b", "c", "d")]
        found, skipped = self.read(tmp_path, records, "stage2")
        assert numbers(found) == [0]
        ((_, reason),) = skipped.examples[skipped.sources[0], "prompt_format"]
        assert "use 'messages'" in reason

    BAD = {
        "no placeholder": (conversation(1, "What?", "A dog."), "image"),
        "two placeholders": (conversation(1, "<image>", "A dog.", "<image>", "A cat."), "image"),
        "one image for two": ({**conversation(1), "image": ["0.png", "1.png"]}, "image"),
        "number as image": (conversation(1, image=3), "image"),
        "missing file": (conversation(9), "unreadable_image"),
        "placeholder in the answer": (conversation(1, "What?", "<image>"), "entry"),
        "answer first": ({**conversation(1), "conversations": [{"from": "gpt", "value": "x"}]}, "entry"),
        "no answer": (conversation(1, "<image>"), "entry"),
        "empty answer": (conversation(1, "<image>", "  "), "caption"),
        "no conversation": ({"id": 1}, "entry"),
        "a string": ("x", "entry"),
        "unknown side": ({**conversation(1), "conversations": [{"from": "me", "value": "x"}]}, "entry"),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_bad_conversations(self, name, tmp_path):
        record, kind = self.BAD[name]
        found, skipped = self.read(tmp_path, [conversation(0), record, conversation(2)])
        assert [row["key"] for row in found] == ["id0", "id2"]
        (seen,) = skipped.counts().values()
        assert (seen[kind], seen["rows"]) == (1, 3) and skipped.examples.keys() == {(skipped.sources[0], kind)}


class TestBadRows:
    def test_are_counted_logged_and_skipped(self, tmp_path, caplog):
        image_files(tmp_path, range(6))
        (tmp_path / "1.png").write_bytes(image_bytes(1)[:45])
        (tmp_path / "2.png").write_text("not an image")
        lines = [{"path": f"{number}.png", "caption": caption(number)} for number in range(6)]
        lines[3]["caption"] = " "
        lines += ["{", "[1]", {"caption": "x"}, {"path": "gone.png", "caption": "x"}]
        source = f"table:{write_lines(tmp_path / 'list.jsonl', lines)}"
        rows = open_rows(source, "stage2", epochs=1, shuffle=False)
        assert numbers(rows.dataset) == [0, 4, 5]
        (seen,) = rows.skipped.counts().values()
        assert seen == {
            "rows": 10,
            "shards": 10,
            "shard": 0,
            "entry": 2,
            "image": 1,
            "unreadable_image": 3,
            "caption": 1,
            "prompt_format": 0,
        }
        expected = {
            *(("unreadable_image", f"line {number + 1} ({number}.png)") for number in (1, 2)),
            ("unreadable_image", "line 10 (gone.png)"),
            ("caption", "line 4 (3.png)"),
            *(("entry", f"line {number}") for number in (7, 8)),
            ("image", "line 9"),
        }
        assert len(caplog.messages) == len(expected) == 7
        for kind, key in expected:
            assert any(f"skipped {key} ({kind}): " in line for line in caplog.messages)
        assert rows.skipped.report().endswith("10 rows read, skipped: 2 entry, 1 image, 3 unreadable_image, 1 caption")

    def test_too_many_stop_the_run(self, tmp_path):
        image_files(tmp_path, [0])
        lines = [{"path": "0.png", "caption": "" if number % 10 == 9 else caption(0)} for number in range(400)]
        source = f"table:{write_lines(tmp_path / 'list.jsonl', lines)}"
        found = []
        with pytest.raises(
            DataError, match=r"20 of the first 200 rows of table:.* max_error_rate, 5\.0%; the last was"
        ):
            for row in open_rows(source, "stage2", epochs=1, shuffle=False).dataset:
                found.append(row)
        assert len(found) == 180  # not before 200 rows, nine of ten of which are good
        assert len(list(open_rows(source, "stage2", epochs=1, max_error_rate=0.1).dataset)) == 360

    def test_a_parquet_with_holes(self, tmp_path):
        (tmp_path / "data").mkdir()
        images = [
            None,
            *({"bytes": image_bytes(number), "path": None} for number in (1, 2)),
            {"bytes": b"x", "path": None},
        ]
        broken = dataset(4, caption=["a", "Image 1", None, "Image 3"], image=images)
        broken.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
        rows = open_rows(f"dataset:{tmp_path}", "stage2", epochs=1)
        assert numbers(rows.dataset) == [1]
        (seen,) = rows.skipped.counts().values()
        assert (seen["image"], seen["caption"], seen["unreadable_image"]) == (1, 1, 1)

    def test_images_of_another_file_system(self, monkeypatch):
        """As the image folders of the Hub have them: the path is a URL, and the bytes are not there."""
        fsspec.filesystem("memory").pipe("/images/0.png", image_bytes(0))
        images = [{"bytes": None, "path": f"memory://images/{number}.png"} for number in (0, 1)]
        streamed = dataset(2, image=images).to_iterable_dataset()
        monkeypatch.setattr("transformers_minigpt4.data.sources.load_dataset", lambda *_, **__: streamed)
        rows = open_rows("dataset:my/images", "stage2", epochs=1)
        assert numbers(rows.dataset) == [0]
        ((kind, examples),) = rows.skipped.examples.items()
        assert kind[1] == "unreadable_image" and examples[0][0].endswith("/1")

    def test_a_parquet_cut_short(self, tmp_path):
        source = parquet(tmp_path)
        second = tmp_path / "data" / "train-00001-of-00002.parquet"
        second.write_bytes(second.read_bytes()[:-30])
        rows = open_rows(source, "stage2", epochs=1, shuffle=False)
        assert numbers(rows.dataset) == [0, 1]
        (seen,) = rows.skipped.counts().values()
        assert (seen["shard"], seen["shards"], seen["rows"]) == (1, 2, 2)


class TestSourcesThatCannotBeOpened:
    SPECS = {
        "": "is not a source; write KIND:PATH",
        "wds": "is not a source",
        "wds:": "is not a source",
        "web:/data": "with KIND one of wds, dataset, llava",
        "wds:/data::images=/x": "'images=/x' in .* is not an option of wds, whose options are weight",
        "wds:/data::weight": "is not an option",
        "wds:/data::weight=-1": "must be a number above zero",
        "wds:/data::weight=0": "must be a number above zero",
        "wds:/data::weight=1::weight=2": "weight is given twice",
    }

    @pytest.mark.parametrize("text", SPECS)
    def test_specifications(self, text):
        with pytest.raises(DataError, match=self.SPECS[text]):
            parse_source(text)

    def test_a_specification_and_back(self):
        text = "llava:/my data/a,b.json::images=/p::weight=115"
        source = parse_source(text)
        assert source == Source("llava", "/my data/a,b.json", images="/p", weight=115.0) and str(source) == text
        assert parse_source("wds:hf://datasets/a/b/{1..2}.tar").path == "hf://datasets/a/b/{1..2}.tar"

    def content(self, tmp_path):
        write_json(tmp_path / "list.json", [])
        write_json(tmp_path / "dict.json", {"images": 3, "annotations": []})
        (tmp_path / "cut.json").write_text('[{"id": 1,')
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty.jsonl").write_text("\n")
        write_csv(tmp_path / "columns.csv", [{"a": "1", "caption": "2"}])
        (tmp_path / "latin.csv").write_bytes(b"path,caption\na,\xe9\xff\n")
        write_json(tmp_path / "align" / "filter_cap.json", {"notes": []})
        write_lines(tmp_path / "nothing.jsonl", [{"path": "1.png", "caption": ""}, "{"])

    OPEN = {
        "wds:{}/none": "no shards found",
        "wds:{}/empty": "no shards found",
        "wds:{}/*.tar": "no shards found",
        "wds:{}/{{3..1}}.tar": "is reversed",
        "llava:{}/none.json": "there is no ",
        "llava:{}/empty": "is a folder; name the file in it",
        "llava:{}/cut.json": "is not JSON, or was cut short",
        "llava:{}/dict.json": "dict.json does not contain a list; LLaVA's format is a list",
        "llava:{}/list.json": "lists no images",
        "llava:{}/list.json::images={}/none": "images=.*none is not a folder",
        "coco:{}/list.json": 'no list "images"',
        "coco:{}/dict.json": 'no list "images"',
        "cc_sbu_align:{}/list.json": "is not a folder",
        "cc_sbu_align:{}/empty": "contains no filter_cap.json",
        "cc_sbu_align:{}/align": 'no list "annotations"',
        "table:{}/empty.jsonl": "lists no images",
        "table:{}/columns.csv": "needs a column file_name or image or path .*; it has a, caption",
        "table:{}/latin.csv": r"1 entry; line 2: .* byte 0xe9 is not UTF-8",
        "imagefolder:{}/empty": "contains no metadata.jsonl",
        "dataset:{}/empty": "cannot be opened as a dataset",
        "table:{}/nothing.jsonl": r"no usable row in .*: 2 rows read, skipped: 1 entry, 1 caption; "
        r"line 1 \(1\.png\): there",
    }

    @pytest.mark.parametrize("spec", OPEN)
    def test_content(self, spec, tmp_path):
        self.content(tmp_path)
        with pytest.raises(DataError, match=self.OPEN[spec]):
            open_rows(spec.format(tmp_path, tmp_path), "stage2")

    def test_a_data_set_without_captions(self, tmp_path):
        (tmp_path / "data").mkdir()
        dataset().remove_columns("caption").to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
        with pytest.raises(DataError, match=r"column `caption` or `text`; it has image \(Image\), image_id \(Value\)"):
            open_rows(f"dataset:{tmp_path}", "stage2")

    def test_arguments(self, tmp_path):
        source = csv_table(tmp_path)
        for sources, message in (
            ([], "at least one source"),
            ([source, source], "named twice"),
            ([source, "wds:/x::weight=1"], "all sources a weight or none"),
        ):
            with pytest.raises(DataError, match=message):
                open_rows(sources, "stage2")
        with pytest.raises(DataError, match="unknown prompt format 'stage3'"):
            open_rows(source, "stage3")
        with pytest.raises(DataError, match="epochs and min_shards must be 1 or more"):
            open_rows(source, "stage2", epochs=0)
        with pytest.raises(DataError, match="must be between 0 and 1"):
            open_rows(source, "stage2", max_error_rate=5)


def test_the_fingerprint_follows_the_data(tmp_path):
    def fingerprint(source):
        return open_rows(source, "stage2").fingerprint

    first = coco(tmp_path / "a")
    assert fingerprint(first) == fingerprint(first)
    before = fingerprint(first)
    path = tmp_path / "a" / "captions.json"
    path.write_text(path.read_text().replace("Image 2", "Image 1"))
    assert fingerprint(first) != before
    second = shards(tmp_path / "b", 1, 2)
    before = fingerprint(second)
    shards(tmp_path / "b", 1, 20)
    assert fingerprint(second) != before


def test_number_of_sees_the_wrong_image(tmp_path):
    """The tests above would notice images with another's caption."""
    image_files(tmp_path, [40])
    rows = open_rows(f"table:{write_lines(tmp_path / 'l.jsonl', [{'path': '40.png', 'text': caption(1)}])}", "stage2")
    with pytest.raises(AssertionError):
        number_of(next(iter(rows.dataset)))
