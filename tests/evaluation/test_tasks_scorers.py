"""The scored tasks: official files, prompts to the letter, scores as the official scripts have them, and bad input."""

import json
import re
from pathlib import Path

import pytest
from judged_files import write_coco, write_image, write_lines

from transformers_minigpt4.evaluation.results import complete_records, data_fingerprint, summarize
from transformers_minigpt4.evaluation.scorers import caption_metrics
from transformers_minigpt4.evaluation.tasks import load_task
from transformers_minigpt4.evaluation.tasks.chair import _LISTS, CHAIR


GOLDEN = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in (Path(__file__).parent / "golden").glob("*.json")
}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_aokvqa(folder, rows=None, images=True):
    rows = GOLDEN["aokvqa"]["annotations"] if rows is None else rows
    write_json(folder / "aokvqa_v1p0_val.json", rows)
    for row in rows if images else ():
        write_image(folder / "val2017" / f"{row['image_id']:012}.jpg")
    return folder


def write_gqa(folder, questions=None):
    questions = GOLDEN["gqa"]["questions"] if questions is None else questions
    write_json(folder / "testdev_balanced_questions.json", questions)
    for row in questions.values():
        write_image(folder / "images" / f"{row['imageId']}.jpg")
    return folder


def write_pope(folder, rows=None):
    rows = GOLDEN["pope"]["rows"] if rows is None else rows
    for sampling in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": n,
                "image": "COCO_val2014_000000000001.jpg",
                "text": f"Is there a {n}?",
                "label": row["label"],
            }
            for n, row in enumerate(rows, start=1)
        ]
        write_lines(folder / f"coco_pope_{sampling}.json", lines)
    write_image(folder / "val2014" / "COCO_val2014_000000000001.jpg")
    return folder


def write_chair(folder):
    golden = GOLDEN["chair"]
    write_json(folder / "annotations" / "captions_val2014.json", golden["captions"])
    write_json(folder / "annotations" / "instances_val2014.json", golden["instances"])
    (folder / "synonyms.txt").write_text(golden["synonyms"])
    for image in golden["captions"]["images"]:
        write_image(folder / "val2014" / image["file_name"])
    return folder


def write_scienceqa(folder, problems=None):
    problems = GOLDEN["scienceqa"]["problems"] if problems is None else problems
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", GOLDEN["scienceqa"]["pid_splits"])
    for pid, problem in problems.items():
        if problem.get("image"):
            write_image(folder / "test" / pid / "image.png")
    return folder


WRITERS = {
    "aokvqa": write_aokvqa,
    "gqa": write_gqa,
    "pope": write_pope,
    "chair": write_chair,
    "scienceqa": write_scienceqa,
}


def scored(name, questions, answers, judge=None):
    """Records and the summary of a task, which must be JSON."""
    task = load_task(name)
    records = complete_records(task, questions, task.score(questions, answers, judge), answers)
    json.dumps(records)
    return records, summarize(task, questions, records)


def test_prompts_and_arguments_to_the_letter():
    """Those of Table 5 are the paper's, the others ours; a change here makes results incomparable."""
    tasks = {name: load_task(name) for name in (*WRITERS, "scienceqa_short", "captions")}
    choices = "Options: {options}\nAnswer with the option's letter from the given choices directly."
    assert {name: (dict(task.prompts), dict(task.generation), task.primary) for name, task in tasks.items()} == {
        "aokvqa": (
            {
                "multiple_choice": f"Question: {{question}}\n{choices}",
                "direct_answer": "Question: {question}\nAnswer the question with a single word or a short phrase.",
            },
            {"max_new_tokens": 50},
            "multiple_choice",
        ),
        "gqa": (
            {"question": "{question}\nAnswer the question with a single word or a short phrase."},
            {"max_new_tokens": 20},
            "accuracy",
        ),
        "pope": ({"question": "{text}"}, {"max_new_tokens": 50}, "f1"),
        "chair": (
            {
                "long": "Please describe this image as detailed as possible.",
                "short": "Please describe the image shortly and precisely, in less than 20 words.",
            },
            {"max_new_tokens": 300},
            "chair_i/long",
        ),
        "scienceqa": (
            {"question": "{question}\nContext: {context}\nOptions: {options}"},
            {"max_new_tokens": 1024},
            "accuracy",
        ),
        "scienceqa_short": (
            {"question": f"Context: {{context}}\nQuestion: {{question}}\n{choices}"},
            {"max_new_tokens": 50},
            "accuracy",
        ),
        "captions": ({"caption": "Describe this image in one short sentence."}, {"max_new_tokens": 50}, "cider"),
    }


@pytest.mark.parametrize("name", [*WRITERS, "captions"])
def test_every_prompt_stands_in_the_documentation(name):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")
    section = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    task = load_task(name)
    for prompt in (*task.prompts.values(), *task.judge_prompts.values()):
        assert f"```text\n{prompt}\n```" in section, prompt
    assert f"{task.generation['max_new_tokens']} tokens" in " ".join(section.split())


@pytest.mark.parametrize("name", WRITERS)
def test_questions_are_the_same_from_another_folder(name, tmp_path):
    task = load_task(name)
    first, second = (task.questions(WRITERS[name](tmp_path / folder)) for folder in ("one", "two"))
    assert data_fingerprint(first) == data_fingerprint(second)
    assert [question.prompt for question in task.questions(tmp_path / "one", limit=3)] == [
        question.prompt for question in (first if name != "pope" else [first[0], first[20], first[40]])[:3]
    ]
    assert all(Path(image).is_file() for question in first for image in question.images)


@pytest.mark.parametrize("name", WRITERS)
def test_questions_without_answer_are_failures_and_never_right(name, tmp_path):
    questions = load_task(name).questions(WRITERS[name](tmp_path))
    _, summary = scored(name, questions, {})
    assert summary["failures"] == len(questions)
    best = [metric for metric, value in summary["metrics"].items() if summary["higher_is_better"][metric] and value]
    assert best == [] and summary["metrics"].get("unparsed") is None


def test_aokvqa_as_the_official_script(tmp_path):
    golden = GOLDEN["aokvqa"]
    questions = load_task("aokvqa").questions(write_aokvqa(tmp_path))
    assert [question.id for question in questions][-3:] == [
        "q3/multiple_choice",
        "q3/direct_answer",
        "q4/multiple_choice",
    ]
    assert questions[0].prompt == (
        "Question: What keeps the man warm?\nOptions: (A) scarf (B) fire (C) coat (D) dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    answers = {q.id: golden["predictions"][q.id.partition("/")[0]][q.groups["setting"]] for q in questions}
    records, summary = scored("aokvqa", questions, answers)
    for record in records:
        key, _, setting = record["id"].partition("/")
        column = "choice_correct" if setting == "multiple_choice" else "direct_score_as_given"
        assert record[column] == pytest.approx(golden["scores"][key][setting]), record
    assert summary["metrics"]["multiple_choice"] == pytest.approx(golden["multiple_choice"])
    assert summary["metrics"]["direct_answer/as_given"] == pytest.approx(golden["direct_answer"])
    # By hand: "coat" and "the coat" are 3 of 10; "four" is 4 in all ten; "Breakfast." is breakfast.
    assert summary["metrics"]["direct_answer"] == pytest.approx(100)
    assert summary["metrics"]["unparsed"] == 0


def test_aokvqa_letters_and_talk(tmp_path):
    questions = load_task("aokvqa").questions(write_aokvqa(tmp_path))
    said = {"q1": "(C)", "q2": "The answer is B.", "q3": "I see a table with eggs on it.", "q4": "B"}
    answers = {q.id: said[q.id[:2]] for q in questions if q.groups["setting"] == "multiple_choice"}
    _, summary = scored("aokvqa", questions, answers)
    assert summary["metrics"]["multiple_choice"] == 50 and summary["metrics"]["unparsed"] == 25


def test_gqa_as_the_official_script(tmp_path):
    golden = GOLDEN["gqa"]
    questions = load_task("gqa").questions(write_gqa(tmp_path))
    assert [question.id for question in questions] == list(golden["official_scores"])  # balanced ones alone
    records, summary = scored("gqa", questions, golden["answers"])
    assert {record["id"]: record["correct_as_given"] for record in records} == golden["official_scores"]
    assert {record["id"]: record["correct"] for record in records} == golden["normalised_scores"]
    metrics = summary["metrics"]
    assert metrics["accuracy/as_given"] == pytest.approx(golden["accuracy"])
    # By hand: all but the fifth.
    assert metrics["accuracy"] == pytest.approx(500 / 6)
    assert (metrics["accuracy/open"], metrics["accuracy/binary"]) == (100, 75)
    assert metrics["accuracy/structural/logical"] == metrics["accuracy/semantic/obj"] == 0


def test_pope_as_the_official_script(tmp_path):
    golden = GOLDEN["pope"]
    questions = load_task("pope").questions(write_pope(tmp_path))
    said = [row["answer"] for row in golden["rows"]]
    answers = {q.id: said[int(q.id.partition("/")[2]) - 1] for q in questions if q.groups["sampling"] == "popular"}
    answers |= {q.id: q.reference["label"] for q in questions if q.groups["sampling"] == "random"}
    records, summary = scored("pope", questions, answers)
    popular = [record for record in records if record["sampling"] == "popular"]
    counts = [sum(row[key] for row in popular) for key in ("hit", "false_alarm", "miss")]
    assert counts == [golden["TP"], golden["FP"], golden["FN"]]
    metrics = summary["metrics"]
    for name, key in (
        ("accuracy", "acc"),
        ("f1", "f1"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("yes", "yes_ratio"),
    ):
        assert metrics[f"{name}/popular"] == pytest.approx(100 * golden[key]), name
        assert metrics[f"{name}/random"] == (50 if name == "yes" else 100)
    # The third set failed: nothing of it is right, and there is no share of yes.
    assert metrics["accuracy/adversarial"] == metrics["recall/adversarial"] == 0
    assert {"precision/adversarial", "yes/adversarial"} <= set(summary["without_value"])


def test_chair_as_the_official_script(tmp_path):
    golden = GOLDEN["chair"]
    task = load_task("chair")
    questions = task.questions(write_chair(tmp_path))
    assert [(q.id, q.reference["objects"]) for q in questions[:2]] == [
        ("1/long", ["horse", "person"]),
        ("1/short", ["horse", "person"]),
    ]
    # The script scores several captions of an image; here each becomes the one of a question of its own.
    first = {question.id: question for question in questions}
    rows = [
        (type(first["1/long"])(f"row{n}", "", (), first[f"{row['image_id']}/long"].reference, {"length": "long"}), row)
        for n, row in enumerate(golden["rows"])
    ]
    answers = {question.id: row["caption"] for question, row in rows}
    records, summary = scored("chair", [question for question, _ in rows], answers)
    assert [record["hallucinated_words"] for record in records] == [row["hallucinated"] for _, row in rows]
    metrics = summary["metrics"]
    assert metrics["chair_i/long"] == pytest.approx(100 * golden["chair_i"])
    assert metrics["chair_s/long"] == pytest.approx(100 * golden["chair_s"])
    assert metrics["words/long"] == pytest.approx(sum(len(row["caption"].split()) for _, row in rows) / len(rows))
    assert "chair_i/short" in summary["without_value"]


def test_chair_needs_its_list(tmp_path):
    questions = CHAIR().questions(write_chair(tmp_path))
    _LISTS.clear()
    with pytest.raises(ValueError, match="list of synonyms that these questions were made with has not been read"):
        CHAIR().score(questions, {})


def test_scienceqa_as_the_official_scripts(tmp_path):
    golden = GOLDEN["scienceqa"]
    questions = load_task("scienceqa").questions(write_scienceqa(tmp_path))
    assert questions[0].prompt == ("Which is farthest north?\nContext: N/A\nOptions: (A) Ohio (B) Maine (C) Texas")
    assert load_task("scienceqa_short").questions(tmp_path)[0].prompt == (
        "Context: N/A\nQuestion: Which is farthest north?\nOptions: (A) Ohio (B) Maine (C) Texas\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [len(question.images) for question in questions] == [1, 0, 0, 1, 1, 0]
    records, summary = scored("scienceqa", questions, golden["answers"])
    metrics = summary["metrics"]
    assert metrics["accuracy/llava_script"] == golden["scores"]["acc_average"] == 50
    # By hand: beyond that script, "(B)" and the sentence said twice name a letter; only "B. freeze water" is wrong.
    assert [record["correct"] for record in records] == [1, 1, 0, 1, 1, 1]
    expected = {"subject/natural": 200 / 3, "subject/social": 100, "subject/language": 100, "context/text": 200 / 3}
    expected |= {"context/image": 100, "context/none": 100, "grade/1_6": 100, "grade/7_12": 200 / 3}
    assert {name: metrics[f"accuracy/{name}"] for name in expected} == pytest.approx(expected)
    assert "ensemble/judge" in summary["without_value"]


def test_scienceqa_groups_as_the_official_script(tmp_path):
    """With answers that all readings read alike, every group's accuracy is the official one."""
    golden = GOLDEN["scienceqa"]
    questions = load_task("scienceqa").questions(write_scienceqa(tmp_path))
    answers = {pid: "ABCDE"[number] if number >= 0 else "?" for pid, number in golden["llava_reads"].items()}
    metrics = scored("scienceqa", questions, answers)[1]["metrics"]
    names = {"natural": "subject/natural", "social": "subject/social", "language": "subject/language"}
    names |= {"has_text": "context/text", "has_image": "context/image", "no_context": "context/none"}
    names |= {"grade_1_6": "grade/1_6", "grade_7_12": "grade/7_12"}
    official = {f"accuracy/{ours}": golden["scores"][f"acc_{theirs}"] for theirs, ours in names.items()}
    assert {name: metrics[name] for name in official} == pytest.approx(official, abs=0.005)
    assert metrics["unparsed"] == pytest.approx(100 * 2 / 6)


@pytest.mark.skipif("all" in caption_metrics.missing_tools(), reason="no Java or pycocoevalcap")
def test_captions_by_pycocoevalcap(tmp_path):
    golden = GOLDEN["captions"]
    data = write_coco(tmp_path, {int(key): texts for key, texts in golden["references"].items()})
    questions = load_task("captions").questions(data)
    _, summary = scored("captions", questions, golden["captions"])
    metrics = summary["metrics"]
    assert [metrics[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx([100 * value for value in golden["bleu"]])
    assert metrics["cider"] == pytest.approx(100 * golden["cider"])
    assert metrics["meteor"] == pytest.approx(100 * golden["meteor"])
    assert ("spice" in summary["without_value"]) == ("spice" in caption_metrics.missing_tools())


def test_captions_without_java_say_so_before_a_model_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="captions cannot be scored here: "):
        load_task("captions").questions(tmp_path)


# Bad input: what is changed in good data, and what the one error says.


def drop(field):
    return lambda row: row.pop(field)


def put(field, value):
    return lambda row: row.__setitem__(field, value)


@pytest.mark.parametrize(
    "change,said",
    [
        (drop("question_id"), "record 1 .* has no field 'question_id'"),
        (drop("correct_choice_idx"), "'q1' .* has no field 'correct_choice_idx'; .* split with answers"),
        (drop("direct_answers"), "'q1' .* has no field 'direct_answers'"),
        (put("question_id", "q2"), "holds the id 'q2' twice"),
        (put("choices", "abcd"), "'choices' of 'q1' .* is a str"),
        (put("correct_choice_idx", 4), "the right one is number 4"),
    ],
)
def test_aokvqa_bad_rows(tmp_path, change, said):
    rows = json.loads(json.dumps(GOLDEN["aokvqa"]["annotations"]))
    change(rows[0])
    with pytest.raises(ValueError, match=said):
        load_task("aokvqa").questions(write_aokvqa(tmp_path, rows))


def test_aokvqa_images_of_another_split(tmp_path):
    write_aokvqa(tmp_path, images=False)
    write_image(tmp_path / "val2017" / "000000999999.jpg")
    with pytest.raises(ValueError, match=r"none of the 4 images .* 'aokvqa_v1p0_val.json'|of the same split"):
        load_task("aokvqa").questions(tmp_path)


@pytest.mark.parametrize("content,said", [("{}", "holds a dict, not a list"), ("[1", "is not JSON")])
def test_aokvqa_other_files(tmp_path, content, said):
    (tmp_path / "aokvqa_v1p0_val.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        load_task("aokvqa").questions(tmp_path)


@pytest.mark.parametrize("name", [*WRITERS, "captions"])
def test_empty_folder(name, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_task(name).questions(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_gqa_ids_twice(tmp_path):
    path = write_gqa(tmp_path) / "testdev_balanced_questions.json"
    path.write_text(path.read_text().replace('"02":', '"01":'))
    with pytest.raises(ValueError, match="holds the id '01' twice"):
        load_task("gqa").questions(tmp_path)


@pytest.mark.parametrize(
    "change,said", [(drop("answer"), "no field 'answer'"), (put("types", {}), "no field 'structural'")]
)
def test_gqa_bad_rows(tmp_path, change, said):
    questions = json.loads(json.dumps(GOLDEN["gqa"]["questions"]))
    change(questions["03"])
    with pytest.raises(ValueError, match=f"'03' .* has {said}"):
        load_task("gqa").questions(write_gqa(tmp_path, questions))


def test_pope_bad_files(tmp_path):
    task = load_task("pope")
    write_pope(tmp_path, [{"label": "yes"}, {"label": "maybe"}])
    with pytest.raises(ValueError, match=r"label of '2' .* is 'maybe'"):
        task.questions(tmp_path)
    write_pope(tmp_path)
    lines = (tmp_path / "coco_pope_random.json").read_text().splitlines(keepends=True)
    (tmp_path / "coco_pope_random.json").write_text("".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="holds the id '1' twice"):
        task.questions(tmp_path)
    (tmp_path / "coco_pope_random.json").unlink()
    with pytest.raises(ValueError, match=re.escape("holds 0 files *pope*_random.json")):
        task.questions(tmp_path)
    assert len(task.questions(tmp_path / "coco_pope_popular.json")) == 20
    with pytest.raises(ValueError, match="does not say which"):
        task.questions((tmp_path / "coco_pope_popular.json").rename(tmp_path / "pope.json"))


def test_chair_annotations_of_another_split(tmp_path):
    folder = write_chair(tmp_path) / "annotations"
    instances = json.loads((folder / "instances_val2014.json").read_text())
    (folder / "instances_val2014.json").rename(folder / "instances_train2014.json")
    with pytest.raises(ValueError, match=r"there is no 'instances_val2014.json'"):
        load_task("chair").questions(tmp_path)
    for image in instances["images"]:
        image["id"] += 1000
    write_json(folder / "instances_val2014.json", instances)
    with pytest.raises(ValueError, match=r"6 of the 6 images of 'captions_val2014.json' are not in"):
        load_task("chair").questions(tmp_path)
    instances["annotations"][0].pop("category_id")
    for image in instances["images"]:
        image["id"] -= 1000
    write_json(folder / "instances_val2014.json", instances)
    with pytest.raises(ValueError, match=r"is not a COCO instances file .*category_id"):
        load_task("chair").questions(tmp_path)
    write_json(folder / "instances_val2014.json", {"images": []})
    with pytest.raises(ValueError, match="has no field 'annotations'"):
        load_task("chair").questions(tmp_path)


def test_chair_without_list(tmp_path):
    (write_chair(tmp_path) / "synonyms.txt").unlink()
    with pytest.raises(ValueError, match=r"holds none of synonyms.txt"):
        load_task("chair").questions(tmp_path)


def test_scienceqa_files_of_different_releases(tmp_path):
    problems = dict(GOLDEN["scienceqa"]["problems"])
    del problems["8"]
    with pytest.raises(ValueError, match=r"1 of the 6 ids of the split 'test' .* '8'"):
        load_task("scienceqa").questions(write_scienceqa(tmp_path, problems))
    problems["8"] = {**GOLDEN["scienceqa"]["problems"]["8"], "answer": 2}
    with pytest.raises(ValueError, match=r"'8' .* the right one is number 2"):
        load_task("scienceqa").questions(write_scienceqa(tmp_path, problems))


def test_one_missing_image_fails_only_its_own_questions(tmp_path):
    folder = write_gqa(tmp_path)
    (folder / "images" / "n1.jpg").unlink()
    questions = load_task("gqa").questions(folder)
    assert [Path(question.images[0]).is_file() for question in questions] == [False, False, True, True, True, True]
