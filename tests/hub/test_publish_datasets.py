"""Data sets: the authors' cc_sbu_align folder in and out, parquet shards, and loading what was published."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from hub_server import Fault
from PIL import Image
from test_publish import contents, hub, minigpt4_push, run_elsewhere  # noqa: F401  hub is a fixture

from transformers_minigpt4.bulk.images import BulkImage, Description
from transformers_minigpt4.bulk.parquet_sink import ParquetSink
from transformers_minigpt4.bulk.sinks import write_shard
from transformers_minigpt4.bulk.webdataset_sink import WebdatasetSink
from transformers_minigpt4.hub import publish as publish_module
from transformers_minigpt4.hub.cards import License
from transformers_minigpt4.hub.cc_sbu_align import read_cc_sbu_align, write_cc_sbu_align
from transformers_minigpt4.hub.publish import prepare, push_to_hub


CC_BY = License("cc-by-4.0")
REPO = "somebody/cc_sbu_align"


@pytest.fixture
def align(tmp_path) -> Path:
    """Five images in the authors' format; one caption has characters that JSON and Markdown escape."""
    folder = tmp_path / "align"
    (folder / "image").mkdir(parents=True)
    annotations = []
    for number in (2, 10, 3, 77, 5):
        Image.new("RGB", (40 + number, 30), (3 * number, 80, 90)).save(folder / "image" / f"{number}.jpg", quality=80)
        annotations.append({"image_id": str(number), "caption": f'The image "{number}" | shows\na café.'})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def image_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "image").iterdir()}


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "filter_cap.json").read_text())
    change(record["annotations"])
    (folder / "filter_cap.json").write_text(json.dumps(record))


class TestFolder:
    def test_read(self, align):
        dataset = read_cc_sbu_align(align)
        assert dataset["image_id"] == ["2", "10", "3", "77", "5"]
        assert dataset[1]["image"].size == (50, 30) and "café" in dataset[1]["caption"]
        assert isinstance(dataset.features["image"], ImageFeature)

    def test_there_and_back(self, align, tmp_path):
        write_cc_sbu_align(read_cc_sbu_align(align), tmp_path / "again")
        assert image_files(tmp_path / "again") == image_files(align)
        again = json.loads((tmp_path / "again" / "filter_cap.json").read_text(encoding="utf-8"))
        assert again == json.loads((align / "filter_cap.json").read_text())

    def test_numbers_as_ids(self, align):
        edit(align, lambda rows: rows[0].update(image_id=2))
        assert read_cc_sbu_align(align)["image_id"][0] == "2"

    BAD = {
        "a missing image": (lambda rows: rows[1].update(image_id="11"), "annotation 1: there is no image"),
        "an id twice": (lambda rows: rows.append(rows[0]), "annotation 5: the id '2' occurs twice"),
        "one number in two formats": (lambda rows: rows.append({**rows[0], "image_id": 2}), "occurs twice"),
        "an empty caption": (lambda rows: rows[2].update(caption=" \n"), "caption of image '3' is empty"),
        "no caption": (lambda rows: rows[2].pop("caption"), "caption of image '3' is empty"),
        "a way out": (lambda rows: rows[0].update(image_id="../image/2"), "cannot be an image_id"),
        "no id": (lambda rows: rows[0].pop("image_id"), "cannot be an image_id"),
        "a list": (lambda rows: rows.append([1]), "annotation 5 is not an object"),
        "nothing": (lambda rows: rows.clear(), 'no list "annotations"'),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_bad_annotations(self, align, name):
        change, message = self.BAD[name]
        edit(align, change)
        with pytest.raises(ValueError, match=message):
            read_cc_sbu_align(align)

    def test_no_json(self, align):
        (align / "filter_cap.json").write_text("{")
        with pytest.raises(ValueError, match="is not JSON"):
            read_cc_sbu_align(align)
        (align / "filter_cap.json").unlink()
        with pytest.raises(ValueError, match=r"contains no filter_cap\.json"):
            read_cc_sbu_align(align)

    def test_not_an_image(self, align):
        (align / "image" / "3.jpg").write_text("not an image")
        with pytest.raises(ValueError, match=r"annotation 2: .*3\.jpg is not a readable image"):
            read_cc_sbu_align(align)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"image_id": ["1", "1"], "caption": ["a", "b"]}, "row 1: the id '1' occurs twice"),
            ({"image_id": ["1", "../2"], "caption": ["a", "b"]}, "row 1: '../2' cannot be"),
            ({"image_id": ["1", "2"], "caption": ["a", ""]}, "row 1: the caption"),
            ({"caption": ["a", "b"]}, "lacks image_id"),
        ],
    )
    def test_nothing_is_left_of_a_refused_export(self, align, tmp_path, rows, message):
        files = [str(align / "image" / f"{number}.jpg") for number in (2, 3)]
        dataset = Dataset.from_dict({"image": files, **rows}).cast_column("image", ImageFeature())
        before = set(tmp_path.iterdir())
        with pytest.raises(ValueError, match=message):
            write_cc_sbu_align(dataset, tmp_path / "out")
        assert set(tmp_path.iterdir()) == before

    def test_a_full_folder_is_kept(self, align):
        before = image_files(align)
        with pytest.raises(ValueError, match="exists and is not empty"):
            write_cc_sbu_align(read_cc_sbu_align(align), align)
        assert image_files(align) == before


class TestPush:
    def test_published_data_loads_and_exports_bit_for_bit(self, hub, align, tmp_path):  # noqa: F811
        push_to_hub(align, REPO, license=CC_BY)
        assert set(contents(hub, REPO, "datasets")) == {"README.md", "data/train-00000-of-00001.parquet"}
        original = image_files(align)
        shutil.rmtree(align)  # the shards contain the images themselves
        card = contents(hub, REPO, "datasets")["README.md"].decode()
        use, export = [part.split("```")[0] for part in card.split("```python\n")[1:]]
        assert "'image_id': '2'" in run_elsewhere(use, hub, tmp_path)
        run_elsewhere(export, hub, tmp_path, block=False)
        assert image_files(tmp_path / "cc_sbu_align") == original

    def test_same_data_same_files(self, hub, align):  # noqa: F811
        first = push_to_hub(align, REPO, license=CC_BY)
        second = push_to_hub(read_cc_sbu_align(align), REPO, license=CC_BY)
        assert second.commit == first.commit and len(hub.uploads) == 1

    def test_shards_are_replaced_in_one_commit(self, hub, align, monkeypatch):  # noqa: F811
        with monkeypatch.context() as patch:
            patch.setattr(publish_module, "SHARD_BYTES", 1000)
            push_to_hub(align, REPO, license=CC_BY)
        many = frozenset(contents(hub, REPO, "datasets"))
        assert len(many) > 3
        hub.faults.append(Fault("POST", "/commit/", "500"))
        hub.states.clear()
        published = push_to_hub(align, REPO, license=CC_BY)
        one = frozenset(contents(hub, REPO, "datasets"))
        assert one == {"README.md", "data/train-00000-of-00001.parquet"}
        assert set(published.removed) == many - one and set(hub.states) <= {many, one}

    def test_splits_and_saved_folders(self, hub, align, tmp_path):  # noqa: F811
        dataset = read_cc_sbu_align(align)
        splits = DatasetDict({"train": dataset.select(range(3)), "test": dataset.select([3, 4])})
        splits.save_to_disk(tmp_path / "saved")
        push_to_hub(tmp_path / "saved", REPO, license=CC_BY)
        files = contents(hub, REPO, "datasets")
        assert {"data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"} <= set(files)
        for name, content in files.items():
            (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "down" / name).write_bytes(content)
        # What the viewer and `load_dataset` go by: the configuration in the card.
        loaded = load_dataset(str(tmp_path / "down"), cache_dir=str(tmp_path / "cache"))
        assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 3, "test": 2}
        assert loaded["test"][0]["image_id"] == "77"

    def test_dry_run(self, hub, align):  # noqa: F811
        result = minigpt4_push(align, REPO, "--license", "cc-by-4.0", "--dry-run")
        assert result.exit_code == 0, result.exception
        assert hub.requests == []
        assert f"the dataset {REPO}" in result.stdout and "data/train-00000-of-00001.parquet" in result.stdout
        assert "dataset_info:" in result.stdout

    def test_refusals(self, align, tmp_path):
        with pytest.raises(ValueError, match="give the license of the dataset"):
            prepare(align, REPO, tmp_path)
        with pytest.raises(ValueError, match="has no base"):
            prepare(align, REPO, tmp_path, license=CC_BY, base="a/b")
        with pytest.raises(ValueError, match="0 columns of images"):
            prepare(Dataset.from_dict({"caption": ["a"]}), REPO, tmp_path, license=CC_BY)
        with pytest.raises(ValueError, match="0 rows"):
            prepare(read_cc_sbu_align(align).select([]), REPO, tmp_path, license=CC_BY)

    @pytest.mark.parametrize("sink", [ParquetSink, WebdatasetSink])
    def test_captions_of_describe(self, hub, align, tmp_path, sink):  # noqa: F811
        folder = tmp_path / "captions"
        folder.mkdir()
        images = sorted((align / "image").iterdir())[:3]
        for number in range(2):
            rows = [
                Description(
                    BulkImage(str(path), str(path), content=path.read_bytes()), caption=f"a dog in {path.name}"
                )
                for path in images[number * 2 : number * 2 + 2]
            ]
            name = f"captions-{number:05d}-of-00002{sink.suffix}"
            write_shard(folder / name, sink("What is it?", "/home/alice/models/my-model"), rows)
        push_to_hub(folder, REPO, license=CC_BY)
        files = contents(hub, REPO, "datasets")
        assert set(files) == {"README.md", "data/train-00000-of-00001.parquet"}
        card = files["README.md"].decode()
        assert "my-model" in card and "`What is it?`" in card and "alice" not in card
        (tmp_path / "a.parquet").write_bytes(files["data/train-00000-of-00001.parquet"])
        rows = Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
        assert rows["key"] == [path.name for path in images]
        assert rows["caption"] == [f"a dog in {path.name}" for path in images]
        assert set(rows["model"]) == {"my-model"}
        (folder / f"captions-00001-of-00002{sink.suffix}").unlink()
        with pytest.raises(ValueError, match=r"1 shards of captions are missing .* to finish them"):
            prepare(folder, REPO, tmp_path, license=CC_BY)

    def test_captions_without_images_are_refused(self, tmp_path):
        (tmp_path / "captions-00000-of-00001.jsonl").write_text('{"image": "a.png", "caption": "a dog"}\n')
        with pytest.raises(ValueError, match=r"captions without their images; .*--output parquet:FOLDER"):
            prepare(tmp_path, REPO, tmp_path, license=CC_BY)
