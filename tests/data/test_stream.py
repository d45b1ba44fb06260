"""The stream: order by seed, weights, split by process and worker, resume in the middle, and endless epochs."""

import inspect
import json
from collections import Counter
from itertools import islice

import pytest
from data_files import caption, image_files, numbers, sample, shard, shards, write_lines
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import _BaseExamplesIterable
from torch.utils.data import DataLoader

from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.data.stream import SourceIterable


def table(folder, count, start=0):
    image_files(folder, range(start, start + count))
    rows = [{"path": f"{number}.png", "caption": caption(number)} for number in range(start, start + count)]
    return f"table:{write_lines(folder / 'list.jsonl', rows)}"


def parquets(folder, count, files):
    (folder / "data").mkdir(parents=True)
    paths = [str(image_files(folder / "p", [number]) / f"{number}.png") for number in range(count)]
    data = Dataset.from_dict({"image": paths, "caption": list(map(caption, range(count)))})
    data = data.cast_column("image", ImageFeature())
    for place in range(files):
        data.shard(files, place).to_parquet(str(folder / "data" / f"train-{place:05}-of-{files:05}.parquet"))
    return f"dataset:{folder}"


def opened(source, **options):
    return open_rows(source, "stage2", **{"epochs": 1, "decode": False, **options}).dataset


PROTOCOL = {  # of `_BaseExamplesIterable`, which `SourceIterable` implements
    "_init_state_dict": [],
    "load_state_dict": ["state_dict"],
    "state_dict": [],
    "shuffle_data_sources": ["generator"],
    "shard_data_sources": ["num_shards", "index", "contiguous"],
    "reshard_data_sources": [],
    "split_shard_indices_by_worker": ["num_shards", "index", "contiguous"],
}


@pytest.mark.parametrize("name", PROTOCOL)
def test_the_protocol_of_datasets(name):
    """It is private to datasets, so an update may change it: see docs/architecture.md."""
    for kind in (_BaseExamplesIterable, SourceIterable):
        assert [*inspect.signature(getattr(kind, name)).parameters][1:] == PROTOCOL[name]


class TestOrder:
    @pytest.mark.parametrize("kind", ["wds", "table", "dataset"])
    def test_each_epoch_has_every_row_once_in_another_order(self, kind, tmp_path):
        make = {
            "wds": lambda f: shards(f, 4, 6),
            "table": lambda f: table(f, 24),
            "dataset": lambda f: parquets(f, 24, 4),
        }
        source = make[kind](tmp_path / "s")
        found = numbers(opened(source, epochs=3))
        epochs = [found[start : start + 24] for start in (0, 24, 48)]
        assert all(sorted(one) == list(range(24)) for one in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(24))
        assert numbers(opened(source, epochs=3)) == found
        assert numbers(opened(source, epochs=3, seed=7)) != found
        assert numbers(opened(source, shuffle=False, epochs=2)) == list(range(24)) * 2

    def test_shards_come_in_another_order_in_each_epoch(self, tmp_path):
        found = numbers(opened(shards(tmp_path, 8, 1), epochs=3))
        assert found[:8] != found[8:16] != found[16:] != found[:8]

    def test_a_buffer_smaller_than_the_shard(self, tmp_path, monkeypatch):
        from transformers_minigpt4.data import readers

        entries = list(range(100))
        drawn = list(readers.shuffled(iter(entries), [1], size=10))
        assert sorted(drawn) == entries != drawn
        assert all(number - place <= 10 for place, number in enumerate(drawn))  # none comes before it is read
        assert drawn == list(readers.shuffled(iter(entries), [1], size=10))

    def test_instructions_change_from_epoch_to_epoch(self, tmp_path):
        rows = list(opened(table(tmp_path, 8), epochs=2, shuffle=False))
        first, second = ([row["prompt"] for row in rows[start : start + 8]] for start in (0, 8))
        assert first != second and len(set(first)) > 1
        again = opened(f"table:{tmp_path}/list.jsonl", epochs=2, shuffle=False)
        assert [row["prompt"] for row in again] == first + second

    def test_set_epoch_reorders_what_is_shuffled(self, tmp_path):
        source = table(tmp_path, 24)
        for shuffle in (True, False):
            data = opened(source, shuffle=shuffle)
            first = numbers(data)
            data.set_epoch(1)
            second = numbers(data)
            assert sorted(first) == sorted(second) and (first != second) == shuffle


class TestMixture:
    def test_weights(self, tmp_path):
        laion, cc = shards(tmp_path / "laion", 2, 10), shards(tmp_path / "cc", 2, 10, start=100)
        data = opened([f"{laion}::weight=115", f"{cc}::weight=14"], epochs=None)
        found = list(islice(data, 1500))
        share = sum(number < 100 for number in numbers(found)) / 1500
        assert share == pytest.approx(115 / 129, abs=0.032)  # four standard deviations
        assert {row["source"] for row in found} == {laion, cc}
        again = opened([f"{laion}::weight=115", f"{cc}::weight=14"], epochs=None)
        assert numbers(islice(again, 200)) == numbers(found[:200])
        other = opened([f"{laion}::weight=115", f"{cc}::weight=14"], epochs=None, seed=1)
        assert numbers(islice(other, 200)) != numbers(found[:200])

    def test_kinds_mix_and_one_epoch_shows_every_row(self, tmp_path):
        sources = [shards(tmp_path / "w", 2, 3), table(tmp_path / "l", 5, start=50), parquets(tmp_path / "p", 4, 2)]
        found = numbers(opened(sources))
        assert set(found) == {*range(6), *range(50, 55)}

    def test_each_source_is_counted_by_itself(self, tmp_path):
        good, bad = shards(tmp_path / "a", 1, 4), tmp_path / "bad.jsonl"
        image_files(tmp_path, [0])
        write_lines(bad, [{"path": "0.png", "caption": caption(0)}, {"path": "0.png"}])
        rows = open_rows([good, f"table:{bad}"], "stage2", epochs=1)
        list(rows.dataset)
        counts = rows.skipped.counts()
        assert counts[good]["caption"] == 0 and counts[f"table:{bad}"]["caption"] >= 1


def loaded(data, workers):
    """What a DataLoader gives, its rows one by one."""
    return [row for batch in DataLoader(data, batch_size=2, num_workers=workers, collate_fn=list) for row in batch]


class TestSplit:
    SOURCES = {
        "as many shards as readers": (lambda folder: shards(folder, 4, 5), {}),
        "shards that do not divide": (lambda folder: shards(folder, 7, 3), {}),
        "one shard in pieces": (lambda folder: shards(folder, 1, 20), {"min_shards": 4}),
        "a list": (lambda folder: table(folder, 21), {}),
        "parquet": (lambda folder: parquets(folder, 20, 4), {}),
    }

    @pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
    @pytest.mark.parametrize("name", SOURCES)
    def test_two_processes_of_two_workers_read_every_row_once(self, name, shuffle, tmp_path):
        make, options = self.SOURCES[name]
        data = opened(make(tmp_path / "s"), shuffle=shuffle, **options)
        every = sorted(numbers(data))
        parts = [numbers(loaded(split_dataset_by_node(data, rank, 2), 2)) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == every == list(range(len(every)))
        assert min(map(len, parts)) > len(every) // 4

    def test_as_accelerate_splits(self, tmp_path):
        data = opened(shards(tmp_path, 4, 5))
        assert data.num_shards == 4
        parts = [numbers(loaded(data.shard(num_shards=2, index=rank), 2)) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == list(range(20)) and len(parts[0]) == 10

    def test_without_end_each_process_keeps_its_shards(self, tmp_path):
        data = opened(shards(tmp_path, 4, 5), epochs=None)
        parts = [numbers(islice(data.shard(num_shards=2, index=rank), 30)) for rank in range(2)]
        assert all(Counter(part) == dict.fromkeys(set(part), 3) for part in parts)
        assert set(parts[0]) | set(parts[1]) == set(range(20)) and not set(parts[0]) & set(parts[1])

    def test_a_mixture(self, tmp_path):
        sources = [f"{shards(tmp_path / 'a', 4, 5)}::weight=1", f"{table(tmp_path / 'b', 8, start=100)}::weight=1"]
        data = opened(sources)
        parts = [numbers(loaded(split_dataset_by_node(data, rank, 2), 2)) for rank in range(2)]
        assert set(parts[0]) | set(parts[1]) == {*range(20), *range(100, 108)} and not set(parts[0]) & set(parts[1])

    def test_workers_count_into_one_report(self, tmp_path):
        source = shards(tmp_path, 4, 5)
        for place in range(3):
            (tmp_path / f"{place:05}.tar").write_bytes((tmp_path / f"{place:05}.tar").read_bytes()[:2000])
        rows = open_rows(source, "stage2", epochs=1, max_error_rate=None)
        found = loaded(rows.dataset, 2)
        (seen,) = rows.skipped.counts().values()
        assert (seen["shard"], seen["shards"]) == (3, 4) and seen["rows"] == len(found)


class TestResume:
    SOURCES = {
        "shards": lambda folder: shards(folder, 3, 7),
        "list": lambda folder: table(folder, 21),
        "parquet": lambda folder: parquets(folder, 21, 3),
        "mixture": lambda folder: [
            f"{shards(folder / 'a', 3, 7)}::weight=3",
            f"{table(folder / 'b', 9, start=100)}::weight=1",
        ],
    }

    @pytest.mark.parametrize("stop", [1, 4, 12, 21, 30])
    @pytest.mark.parametrize("name", SOURCES)
    def test_resumes_at_the_exact_row(self, name, stop, tmp_path):
        source = self.SOURCES[name](tmp_path / "s")
        whole = [(row["key"], row["prompt"]) for row in islice(opened(source, epochs=None), 60)]
        data = opened(source, epochs=None)
        iterator = iter(data)
        first = [(row["key"], row["prompt"]) for row in islice(iterator, stop)]
        state = json.loads(json.dumps(data.state_dict()))
        del iterator, data
        later = opened(source, epochs=None)
        later.load_state_dict(state)
        assert first + [(row["key"], row["prompt"]) for row in islice(later, 60 - stop)] == whole

    def test_past_bad_rows(self, tmp_path):
        image_files(tmp_path, range(12))
        (tmp_path / "4.png").write_text("broken")
        lines = [
            {"path": f"{number}.png", "caption": "" if number in (2, 3, 7) else caption(number)}
            for number in range(12)
        ]
        source = f"table:{write_lines(tmp_path / 'list.jsonl', lines)}"
        whole = numbers(opened(source, shuffle=False, decode=True))
        assert whole == [0, 1, 5, 6, 8, 9, 10, 11]
        for stop in range(1, 8):
            data = opened(source, shuffle=False, decode=True)
            first = numbers(islice(iter(data), stop))
            later = opened(source, shuffle=False, decode=True)
            later.load_state_dict(data.state_dict())
            assert first + numbers(later) == whole

    def test_bad_rows_before_the_place_are_not_counted_again(self, tmp_path):
        samples = {str(number): {"txt": b"x"} for number in range(5)}
        samples.update({str(number): sample(number) for number in range(5, 10)})
        source = f"wds:{shard(tmp_path / 'a.tar', samples)}"
        first = open_rows(source, "stage2", epochs=1, shuffle=False)
        assert len(list(islice(first.dataset, 2))) == 2
        assert first.skipped.counts()[source]["image"] == 5
        later = open_rows(source, "stage2", epochs=1, shuffle=False)
        later.dataset.load_state_dict(first.dataset.state_dict())
        assert numbers(later.dataset) == [7, 8, 9] and later.skipped.counts()[source]["image"] == 0

    def test_one_process_of_two(self, tmp_path):
        source = shards(tmp_path, 4, 5)
        whole = numbers(islice(split_dataset_by_node(opened(source, epochs=None), 1, 2), 30))
        data = split_dataset_by_node(opened(source, epochs=None), 1, 2)
        first = numbers(islice(iter(data), 13))
        later = split_dataset_by_node(opened(source, epochs=None), 1, 2)
        later.load_state_dict(data.state_dict())
        assert first + numbers(islice(later, 17)) == whole


class TestWithoutEnd:
    def test_data_that_vanish_stop_the_run(self, tmp_path):
        source = shards(tmp_path, 1, 3)
        data = opened(source, epochs=None)
        (tmp_path / "00000.tar").unlink()
        with pytest.raises(DataError, match=r"no usable row among 1 shards:\nwds:.*1 shard"):
            next(iter(data))

    def test_it_reads_several_epochs(self, tmp_path):
        found = numbers(islice(opened(shards(tmp_path, 2, 3), epochs=None), 18))
        assert Counter(found) == dict.fromkeys(range(6), 3)
