"""Checks what `describe` reads: sources of training data, with and without captions, and the keys of images."""

import json
import tarfile
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value
from tiny_models import drawn_image, write_sources

from transformers_minigpt4.bulk.images import BulkImage, is_source
from transformers_minigpt4.bulk.sources import ShardError, SourceShard, open_sources
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    return write_sources(tmp_path_factory.mktemp("sources") / "data")


def images_of(*arguments: str) -> list[BulkImage]:
    files, shards = open_sources(arguments)
    return [BulkImage(file, file) for file in files] + [image for shard in shards for image in shard.images()]


def test_arguments_that_are_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a12:b.png").touch()
    for argument in ("photo.jpg", "http://host/a.png", "data:image/png;base64,aa", "-", "C:/a.png", "a12:b.png"):
        assert not is_source(argument), argument
    for argument in ("wds:a.tar", "table:a.csv", "dataset:name/set", "wds:hf://datasets/a/b/*.tar"):
        assert is_source(argument), argument


def test_sources_that_list_files_give_the_files(sources, tmp_path):
    for kind in ("cc_sbu_align", "llava", "locnarr"):
        images = images_of(sources[kind])
        assert len(images) == 12 and all(image.key == image.source and image.key.endswith(".jpg") for image in images)
        load_image(images[0].source)


def test_a_table_and_an_image_folder_need_no_captions(tmp_path):
    for name in ("a.png", "b.png"):
        drawn_image(1).save(tmp_path / name)
    (tmp_path / "list.csv").write_text("file_name\na.png\nb.png\n")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,\nb.png,a dog\n")
    expected = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert [image.key for image in images_of(f"table:{tmp_path}/list.csv")] == expected
    assert [image.key for image in images_of(f"imagefolder:{tmp_path}")] == expected
    assert open_sources([f"imagefolder:{tmp_path}", str(tmp_path)])[0] == expected  # each once


def test_tar_files_keep_the_keys_of_their_images(sources):
    images = images_of(sources["wds"])
    folder = sources["wds"].removeprefix("wds:").rpartition("/")[0]
    assert [image.key for image in images[:3]] == [f"{folder}/00000.tar/{n:06d}" for n in (0, 4, 8)]
    assert [image.stem for image in images[:3]] == ["000000", "000004", "000008"]
    assert len({image.key for image in images}) == 12
    assert load_image(images[0].source).size == drawn_image(0).size


def test_tar_files_need_no_captions(tmp_path):
    for name, text in (("none", None), ("empty", b"{}"), ("broken", b"{")):
        drawn_image(1).save(tmp_path / "a.jpg")
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / "a.jpg", "a.jpg")
            if text is not None:
                (tmp_path / "a.json").write_bytes(text)
                tar.add(tmp_path / "a.json", "a.json")
        (image,) = images_of(f"wds:{tmp_path}/{name}.tar")
        assert load_image(image.source).size == drawn_image(1).size


@pytest.mark.parametrize("columns", [("image",), ("image", "id", "caption")])
def test_datasets_with_and_without_captions(tmp_path, columns):
    rows = [{"image": drawn_image(n), "id": f"row{n}", "caption": "a dog"} for n in range(3)]
    features = {"image": Image(), "id": Value("string"), "caption": Value("string")}
    Dataset.from_list(
        [{name: row[name] for name in columns} for row in rows], Features({name: features[name] for name in columns})
    ).to_parquet(tmp_path / "a.parquet")
    source = f"dataset:{tmp_path}/a.parquet"
    images = images_of(source)
    names = [f"row{n}" for n in range(3)] if "id" in columns else ["0", "1", "2"]
    assert [image.key for image in images] == [f"{source}/0/{name}" for name in names]
    assert load_image(images[2].source).size == drawn_image(2).size


def test_rows_without_an_image_are_errors(tmp_path, sources):
    (tmp_path / "list.json").write_text(json.dumps([{"image": "a.png", "caption": "x"}, {"caption": "y"}]))
    assert [image.key for image in images_of(f"table:{tmp_path}/list.json")] == [f"{tmp_path}/a.png"]
    Dataset.from_list([{"image": None}], Features({"image": Image()})).to_parquet(tmp_path / "a.parquet")
    (image,) = images_of(f"dataset:{tmp_path}/a.parquet")
    assert isinstance(image.source, ImageLoadError) and "the row has no image" in str(image.source)


def test_a_shard_that_is_cut_short(sources, tmp_path):
    content = Path(sources["wds"].removeprefix("wds:").replace("{00000..00003}", "00000")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    _, (shard,) = open_sources([f"wds:{tmp_path}/cut.tar"])
    assert isinstance(shard, SourceShard)
    with pytest.raises(ShardError, match=r"cut.tar cannot be read to its end"):
        list(shard.images())
    *images, last = shard.images(whole=False)
    assert images and last.key == f"{tmp_path}/cut.tar" and isinstance(last.source, ImageLoadError)


@pytest.mark.parametrize("argument", ["nothing:a", "table:gone.csv", "wds:gone.tar"])
def test_sources_that_do_not_exist(argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        open_sources([argument])
