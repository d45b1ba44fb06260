"""Held-out rows: the same ones wherever and however rows are read, never among those that are trained on."""

from itertools import islice

import pytest
from data_files import caption, image_files, numbers, shards, write_csv, write_lines
from PIL import Image

from transformers_minigpt4.data.held_out import Selection
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import open_rows


ROWS = 200


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    image_files(folder, range(ROWS))
    rows = [{"image": f"{number}.png", "caption": caption(number)} for number in range(ROWS)]
    return f"table:{write_csv(folder / 'rows.csv', rows)}"


def read(source, share, held_out, **options):
    return numbers(open_rows(source, "stage2", epochs=1, selection=Selection(share, held_out), **options).dataset)


def test_every_row_is_on_one_side(table):
    held, others = read(table, 0.2, True), read(table, 0.2, False)
    assert sorted(held + others) == list(range(ROWS))
    assert 20 < len(held) < 60  # 40 are expected


def test_neither_order_nor_seed_nor_format_decides(table, tmp_path):
    held = set(read(table, 0.2, True))
    assert set(read(table, 0.2, True, seed=7)) == held == set(read(table, 0.2, True, shuffle=False, decode=False))
    assert set(read(shards(tmp_path, 4, ROWS // 4), 0.2, True)) == held  # the same images, in another kind of source
    assert held < set(read(table, 0.4, True))


def test_processes_and_workers_share_the_others(table):
    others = set(read(table, 0.2, False))
    dataset = open_rows(table, "stage2", epochs=1, min_shards=4, selection=Selection(0.2, False)).dataset
    found = [number for rank in range(4) for number in numbers(dataset.shard(4, rank))]
    assert sorted(found) == sorted(others)


def test_an_endless_stream_gives_only_its_side_and_resumes(table):
    others = read(table, 0.2, False)
    dataset = open_rows(table, "stage2", selection=Selection(0.2, False)).dataset
    seen, state = [], None
    for row in islice(dataset, 3 * len(others)):
        seen += numbers([row])
        if len(seen) == 50:
            state = dataset.state_dict()
    assert set(seen) == set(others)
    resumed = open_rows(table, "stage2", selection=Selection(0.2, False)).dataset
    resumed.load_state_dict(state)
    assert numbers(islice(resumed, 40)) == seen[50:90]


def test_all_texts_about_an_image_are_on_one_side(tmp_path):
    image_files(tmp_path, range(20))
    image_files(tmp_path, range(20), "copy of {}.png")
    names = [name.format(number) for number in range(20) for name in ("{}.png", "copy of {}.png")]
    rows = [{"image": name, "caption": caption(int(name.split()[-1][:-4]))} for name in names]
    held = read(f"table:{write_csv(tmp_path / 'rows.csv', rows)}", 0.3, True)
    assert held and all(held.count(number) == 2 for number in held)


def test_rows_without_images_are_split_by_their_text(tmp_path):
    turns = [
        {"id": str(number), "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"{number}"}]}
        for number in range(100)
    ]
    source = f"llava:{write_lines(tmp_path / 'chat.jsonl', turns)}"
    sides = [
        [
            row["messages"][1]["content"][0]["text"]
            for row in open_rows(source, "messages", epochs=1, selection=s).dataset
        ]
        for s in (Selection(0.2, True), Selection(0.2, False))
    ]
    assert sides[0] and not set(sides[0]) & set(sides[1]) and len(sides[0] + sides[1]) == 100


def test_complete_rows():
    rows = [{"images": [Image.new("RGB", (2, 2), (n, 0, 0))], "prompt": "", "completion": "a"} for n in range(100)]
    held = [Selection(0.2, True).selects_row(row) for row in rows]
    assert 5 < sum(held) < 40
    assert [Selection(0.2, False).selects_row(row) for row in rows] == [not side for side in held]
    again = {**rows[held.index(True)], "completion": "another text"}
    assert Selection(0.2, True).selects_row(again)


@pytest.mark.parametrize("share", [0, -0.1, 0.51, 2, float("nan")])
def test_an_impossible_share(share):
    with pytest.raises(DataError, match=r"above 0 and at most 0\.5"):
        Selection(share, True)


def test_a_share_that_leaves_nothing(tmp_path):
    image_files(tmp_path, [1])
    table = f"table:{write_csv(tmp_path / 'rows.csv', [{'image': '1.png', 'caption': caption(1)}])}"
    sides = []
    for held_out in (True, False):
        try:
            sides.append(read(table, 0.02, held_out))
        except DataError as error:
            assert "none of them" in str(error) and "1 rows read" in str(error)
    assert sides == [[1]]


def test_a_missing_image_is_skipped(tmp_path):
    image_files(tmp_path, range(20))
    rows = [{"image": f"{number}.png", "caption": caption(number)} for number in range(22)]
    source = f"table:{write_csv(tmp_path / 'rows.csv', rows)}"
    opened = open_rows(source, "stage2", epochs=1, selection=Selection(0.3, False))
    assert set(numbers(opened.dataset)) < set(range(20))
    assert next(iter(opened.skipped.counts().values()))["unreadable_image"] == 2
