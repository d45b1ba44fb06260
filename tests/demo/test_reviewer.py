"""The program that plays the person in the toy world's curation."""

import csv

import pytest

from transformers_minigpt4.demo.reviewer import judge, main, review, shown_scene
from transformers_minigpt4.demo.scoring import failure, right_attributes
from transformers_minigpt4.demo.world import Scene, all_scenes


SCENE = Scene("red", "circle", "large", "top", "left")
RIGHT = "The picture shows a large red circle. It is in the top left of the image. The background is plain."


@pytest.mark.parametrize(
    "text,decision",
    [
        (RIGHT, ("accept", "")),
        (RIGHT.replace("red", "blue"), ("edit", RIGHT)),
        (
            RIGHT.replace("a large", "an orange large").replace(" red", ""),
            ("edit", RIGHT.replace("large red", "red large")),
        ),
        (RIGHT.replace("top left", "center"), ("edit", RIGHT)),
        (f"{RIGHT} The background is plain.", ("edit", RIGHT)),
        (f"{RIGHT} The background is", ("edit", RIGHT)),
        (RIGHT.replace("red circle", "blue square"), ("reject", "")),
        (RIGHT.replace("large ", ""), ("reject", "")),
        ("A large red", ("reject", "")),
        ("", ("reject", "")),
    ],
)
def test_right_texts_are_accepted_near_ones_edited_and_others_rejected(text, decision):
    assert judge(text, SCENE) == decision
    if decision[0] == "edit":
        assert failure(decision[1], SCENE) is None and all(right_attributes(decision[1], SCENE).values())


def test_an_orange_shape_gets_its_article():
    assert judge(RIGHT.replace("large red", "red"), Scene("orange", "circle", "large", "top", "left"))[0] == "reject"
    text = "There is a red circle in this picture. It is large. It is in the top left of the image."
    edited = judge(text, Scene("orange", "circle", "large", "top", "left"))[1]
    assert edited.startswith("There is an orange circle")


@pytest.mark.parametrize("key", ["large-red-circle-top-left", "0007_top_left_red_large_circle.png"])
def test_a_key_says_what_its_image_shows(key):
    assert shown_scene(key) == SCENE


def test_every_scene_can_be_read_from_its_words():
    for scene in all_scenes():
        assert shown_scene("-".join((scene.size, scene.colour, scene.shape, *scene.place.split()))) == scene


@pytest.mark.parametrize("key", ["00007", "large-red-circle", "large-red-blue-circle-top-left"])
def test_other_keys_are_refused(key):
    with pytest.raises(ValueError, match="toy world"):
        shown_scene(key)


def test_it_reads_an_export_and_writes_decisions(tmp_path):
    rows = [
        ("0-large-red-circle-top-left", RIGHT),
        ("1-large-blue-circle-top-left", RIGHT),
        ("2-small-blue-star-center", RIGHT),
    ]
    with open(tmp_path / "export.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", "text_after", "text_id"])
        writer.writerows((key, text, f"text-{i}") for i, (key, text) in enumerate(rows))
    assert review(tmp_path / "export.csv", tmp_path / "decisions.csv") == {"accept": 1, "edit": 1, "reject": 1}
    with open(tmp_path / "decisions.csv", newline="") as file:
        decisions = [tuple(row.values()) for row in csv.DictReader(file)]
    assert decisions == [
        (rows[0][0], "text-0", "accept", "", "demo reviewer"),
        (rows[1][0], "text-1", "edit", RIGHT.replace("red", "blue"), "demo reviewer"),
        (rows[2][0], "text-2", "reject", "", "demo reviewer"),
    ]


def test_the_command_says_what_it_is_and_what_is_wrong(tmp_path, capsys):
    export, decisions = tmp_path / "export.csv", tmp_path / "decisions.csv"
    export.write_text(f"pair,text_after,text_id\nlarge-red-circle-top-left,{RIGHT},text-0\n")
    main([str(export), str(decisions)])
    assert "1 pairs decided by rule, no person involved: 1 to accept" in capsys.readouterr().out
    decisions.unlink()
    export.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="has no column pair, text_after, text_id; export the pairs as CSV"):
        main([str(export), str(decisions)])
    assert not decisions.exists()
    with pytest.raises(SystemExit, match=r"^usage: "):
        main([])
