"""Checks comparisons: paired differences, permutation test, Holm's correction, refusals, tables, charts and page."""

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation_files import Letters, write_letters
from PIL import Image

from transformers_minigpt4.evaluation.answering import AnswerStore
from transformers_minigpt4.evaluation.compare import (
    COLUMNS,
    Difference,
    _corrected,
    _what_differs,
    compare_results,
    comparison_tables,
    markdown,
    markdown_table,
    permutation_p,
    results_table,
)
from transformers_minigpt4.evaluation.compare_page import write_charts, write_page
from transformers_minigpt4.evaluation.evaluator import mean, ratio
from transformers_minigpt4.evaluation.results import complete_records, describe_task, summarize, write_results
from transformers_minigpt4.evaluation.tasks import TASKS, load_task


def keep(folder: Path, data: Path, name: str, texts, **changes) -> Path:
    """Results as a run leaves them, of a model that answers `texts`; `None` stands for a failed question."""
    task = Letters()
    questions = task.questions(data)
    answers = {question.id: text for question, text in zip(questions, texts) if text is not None}
    records = complete_records(task, questions, task.score(questions, answers), answers)
    rows = []
    for question, record in zip(questions, records):
        said = {"answer": answers[question.id]} if question.id in answers else {"error": "cannot load image"}
        rows.append(
            {
                **{"id": question.id, "key": question.id, "prompt": question.prompt, "images": question.images},
                **{"reference": question.reference, **said, "record": record},
            }
        )
    AnswerStore(folder / "answers", "letters").finish(rows)
    entry = {**describe_task(task, questions, "data", None), **summarize(task, questions, records), **changes}
    write_results(folder, {"id": name, "fingerprint": name}, {"letters": entry})
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two models over 40 questions: A is right on 4, B on 30."""
    data = write_letters(tmp_path / "data", rows=40)
    right = lambda i: "ex" if i % 2 == 0 else "e"  # noqa: E731
    wrong = lambda i: right(i + 1)  # noqa: E731
    a = keep(tmp_path / "a", data, "first", [right(i) if i < 4 else wrong(i) for i in range(40)])
    b = keep(tmp_path / "b", data, "<b>second</b>", [right(i) if i < 30 else wrong(i) for i in range(40)])
    return a, b


def test_differences_are_paired(pair):
    comparison = compare_results(pair, [Letters()])
    assert [run.name for run in comparison.runs] == ["first", "<b>second</b>"]
    found = {difference.metric: difference for difference in comparison.differences}
    assert found.keys() == {"accuracy", "accuracy/even", "share"}
    accuracy = found["accuracy"]
    a, b = (json.loads((folder / "results.json").read_text())["tasks"]["letters"]["metrics"] for folder in pair)
    assert accuracy.value == pytest.approx(b["accuracy"] - a["accuracy"]) and abs(accuracy.value) == 65
    low, high = accuracy.interval
    # All 26 questions that differ do so in one direction: sqrt(0.65 * 0.35 / 40) * 1.96 is 14.8 points.
    assert accuracy.value - 18 < low < accuracy.value - 11 and accuracy.value + 11 < high < accuracy.value + 18
    assert accuracy.p == pytest.approx(1 / 2001) and accuracy.significant


def test_a_model_does_not_differ_from_itself(pair, tmp_path):
    twin = shutil.copytree(pair[0], tmp_path / "twin")
    comparison = compare_results([pair[0], twin], [Letters()])
    assert [run.name for run in comparison.runs] == ["a", "twin"]  # one checkpoint id: what differs in their paths
    for difference in comparison.differences:
        assert (difference.value, difference.interval, difference.p) == (0, (0, 0), 1)
        assert not difference.significant


def test_folders_of_one_checkpoint_name_are_told_apart_by_what_differs():
    paths = [Path("/r/standard/stage1"), Path("/r/standard/checkpoint"), Path("/r/no_qformer/checkpoint")]
    assert _what_differs(paths) == ["standard/stage1", "standard/checkpoint", "no_qformer/checkpoint"]
    assert _what_differs(paths[1:]) == ["standard", "no_qformer"]
    assert _what_differs([Path("/r"), Path("/r/b")]) == [".", "b"]


def test_permutations_give_what_the_sign_test_gives():
    """On right and wrong answers the permutation test is McNemar's exact test: a fair coin for those that differ."""
    rng = np.random.default_rng(0)
    first = {"correct": (rng.random(300) < 0.5).astype(float)}
    flipped = rng.random(300) < 0.15
    other = {"correct": np.where(flipped & (rng.random(300) < 0.7), 1.0, first["correct"])}
    other["correct"][:6] = 1 - first["correct"][:6]
    won = int(((other["correct"] == 1) & (first["correct"] == 0)).sum())
    lost = int(((other["correct"] == 0) & (first["correct"] == 1)).sum())
    n = won + lost
    exact = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(won - n / 2)) / 2**n
    assert 0.0005 < exact < 0.9
    p = permutation_p(mean("correct"), first, other, permutations=20_000)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))


def test_any_statistic_can_be_permuted():
    rng = np.random.default_rng(1)
    first, other = ({"x": rng.random(40) + shift, "y": rng.random(40)} for shift in (0, 0.1))
    fast = permutation_p(ratio("x", "y"), first, other, permutations=300)
    slow = permutation_p(lambda c: c["x"].sum() / c["y"].sum(), first, other, permutations=300)
    assert fast == slow and 0 < fast < 1
    assert np.isnan(permutation_p(mean("absent"), first, other))


def test_false_alarms_are_as_rare_as_promised():
    """Of 200 comparisons of two equal models, about 5 % have p below 0.05 (binomial: 3 to 18)."""
    rng = np.random.default_rng(2)
    draw = lambda: {"correct": (rng.random(100) < 0.4).astype(float)}  # noqa: E731
    found = [permutation_p(mean("correct"), draw(), draw(), permutations=300, seed=i) for i in range(200)]
    assert 3 <= sum(p < 0.05 for p in found) <= 18


def test_holm():
    differences = [Difference("t", str(i), "b", 1, None, p) for i, p in enumerate([0.03, 0.005, np.nan, 0.04, 0.012])]
    # 0.005 < 0.05 / 4 and 0.012 < 0.05 / 3, but 0.03 > 0.05 / 2, and then 0.04 fails too.
    assert [d.significant for d in _corrected(differences)] == [False, True, False, False, True]


class TestRefusals:
    def change(self, folder: Path, **changes) -> None:
        results = json.loads((folder / "results.json").read_text())
        results["tasks"]["letters"] |= changes
        (folder / "results.json").write_text(json.dumps(results))

    def test_another_revision_of_the_data(self, pair, tmp_path):
        other = write_letters(tmp_path / "revised", rows=39)
        keep(pair[1], other, "second", ["e"] * 39)
        with pytest.raises(
            ValueError, match=r"first and second were asked 'letters' with different questions \(another rev"
        ):
            compare_results(pair, [Letters()])

    @pytest.mark.parametrize(
        "changes,words",
        [
            ({"prompts": {"one": "Say it."}}, "with different prompts"),
            ({"judge_prompts": {"one": "Right?"}}, "prompts for the judge"),
            ({"generation": {"max_new_tokens": 5}}, "arguments of generate"),
            ({"judge": {"model": "strict"}}, "judged on 'letters' by nobody and strict"),
            ({"metrics": {"accuracy": 99.0}}, "scored by another version"),
            ({"samples": 41}, "holds 40 answers, but results.json says 41"),
        ],
    )
    def test_other_conditions(self, pair, changes, words):
        self.change(pair[1], **changes)
        with pytest.raises(ValueError, match=words) as error:
            compare_results(pair, [Letters()])
        assert "\n" not in str(error.value)

    def test_no_results(self, pair, tmp_path):
        with pytest.raises(ValueError, match=r"there is no .*gone"):
            compare_results([pair[0], tmp_path / "gone"], [Letters()])
        with pytest.raises(ValueError, match="two folders"):
            compare_results(pair[:1], [Letters()])
        with pytest.raises(ValueError, match="named twice"):
            compare_results([pair[0], pair[0]], [Letters()])
        (pair[1] / "results.json").write_text('{"stages": []}')
        with pytest.raises(ValueError, match="not a results file of `minigpt4 evaluate`"):
            compare_results(pair, [Letters()])

    def test_no_task_in_common(self, pair, tmp_path):
        write_results(tmp_path / "other", {"id": "other", "fingerprint": "o"}, {"gqa": {}})
        with pytest.raises(ValueError, match=r"no task in common \(first: letters; other: gqa\)"):
            compare_results([pair[0], tmp_path / "other"])
        with pytest.raises(ValueError, match="other has no results of 'letters', only of gqa"):
            compare_results([pair[0], tmp_path / "other"], [Letters()])


def test_tables_are_in_the_papers_form(pair):
    text = markdown(comparison_tables(compare_results(pair, [Letters()])))
    lines = text.splitlines()
    assert lines[0] == "MiniGPT-4, Table 4"
    header = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert header == ["", "letters accuracy ↑ (%)", "letters accuracy/even ↑ (%)", "letters share ↓ (%)"]
    row = [cell.strip() for cell in lines[4].strip("|").split("|")]
    results = json.loads((pair[0] / "results.json").read_text())
    entry = results["tasks"]["letters"]
    low, high = entry["intervals"]["accuracy"]
    assert row[:2] == ["first", f"{entry['metrics']['accuracy']:.4g} [{low:.4g}, {high:.4g}]"]
    assert "0.0005*" in text and "Holm" in text
    shown = results_table(results, ["letters"])
    assert "| letters | accuracy " in shown and shown.endswith("\nno value: letters never")
    assert markdown_table(["a|b"], [["c"]]).splitlines() == ["| a\\|b |", "| ---- |", "| c    |"]


def test_answers_without_any_verdict_are_shown_side_by_side(pair, tmp_path):
    """As two models' answers to `advanced`, before people have judged them."""
    task = Letters()
    task.metrics = tuple(metric for metric in task.metrics if metric.name == "never")
    comparison = compare_results(pair, [task])
    assert [metric.name for _, metric in comparison.tables["MiniGPT-4, Table 4"]] == ["never"]
    assert markdown(comparison_tables(comparison)).count("no value") == 3  # two models, and their difference
    assert write_page(comparison, tmp_path / "page", examples=40).read_text().count("<article>") == 40 - 14
    (path,) = write_charts(comparison, tmp_path / "charts")
    assert path.is_file()


def test_charts(pair, tmp_path):
    (path,) = write_charts(compare_results(pair, [Letters()]), tmp_path / "charts")
    assert path.name == "minigpt-4-table-4.png"
    with Image.open(path) as chart:
        assert chart.format == "PNG" and chart.width > 600
        blue = np.asarray(chart.convert("RGB")) == (0x4A, 0x7A, 0xB5)
    assert blue.all(axis=2).sum() > 2000  # the bars


class Page(HTMLParser):
    """Collects tags and texts, and fails on nothing: what was escaped comes back as text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_page_shows_answers_side_by_side(pair, tmp_path):
    evil = "<script>alert('x')</script> & \"more\" e"
    keep(pair[1], tmp_path / "data", "<b>second</b>", [evil] * 20 + [None] * 20)
    (tmp_path / "data" / "7-0.png").unlink()
    comparison = compare_results(pair, [Letters()])
    path = write_page(comparison, tmp_path / "page", examples=40)
    page = Page(path.read_text())
    assert "script" not in page.tags and "b" in page.tags  # the prompts are bold
    assert page.tags.count("article") == 40 and page.tags.count("img") == 39
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)  # nothing from other sites
    assert page.texts.count(evil) == 20
    assert page.texts.count("<b>second</b>") == 40 + 1 + 3  # and a row of the table, and three differences
    assert sum("cannot load image" in text for text in page.texts) == 21  # 20 failed questions, and image 7 here
    tables = comparison_tables(comparison)
    assert page.tags.count("table") == 40 + len(tables) and "pre" not in page.tags
    cells = {cell for table in tables for row in [table.header, *table.rows] for cell in row if cell}
    assert cells <= set(page.texts)
    few = write_page(comparison, tmp_path / "few", examples=3, seed=1).read_text()
    assert few.count("<article>") == 3
    assert few == write_page(comparison, tmp_path / "again", examples=3, seed=1).read_text()
    assert few != write_page(comparison, tmp_path / "again", examples=3, seed=2).read_text()


@pytest.mark.parametrize("name", TASKS)
def test_columns_are_metrics(name):
    names = [metric.name for metric in load_task(name).metrics]
    assert set(COLUMNS[name]) <= set(names) and COLUMNS[name]
    assert len(set(COLUMNS[name])) == len(COLUMNS[name])
