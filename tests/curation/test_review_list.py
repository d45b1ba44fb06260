"""Reasons to reject, pairs chosen from the list, decisions that are changed, and the way out of the review."""

import csv
import json

import pytest
from review_projects import make_project, set_texts
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.decisions import DISAGREED
from transformers_minigpt4.curation.report import run_report
from transformers_minigpt4.curation.review import ReviewQueue
from transformers_minigpt4.curation.review_files import export_pairs, import_decisions
from transformers_minigpt4.curation.review_list import ROWS, all_reasons, list_pairs
from transformers_minigpt4.curation.review_screen import Reviewing, parse_shown, what_next
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.status import status_text


TEXTS = [(f"The the picture {i} is red.", f"The picture {i} is red.") for i in range(6)]


@pytest.fixture
def queue(tmp_path):
    with make_project(tmp_path / "project", TEXTS) as project:
        yield ReviewQueue(project)


@pytest.fixture
def queue_for_two(tmp_path):
    with make_project(tmp_path / "project", TEXTS[:3], twice=1.0) as project:
        yield ReviewQueue(project)


def decide(queue, reviewer, action, text=None, reason="", pair=None):
    pair = pair or queue.next(reviewer)
    return queue.decide(reviewer, pair.id, pair.text_id, action, text, reason, pair.decision)


def states(queue, reviewer, **filters):
    return {pair.id: (pair.state, *pair.reasons) for pair in list_pairs(queue, reviewer, **filters).rows}


def test_a_reason_is_counted_and_belongs_to_rejected_pairs(queue):
    decide(queue, "anna", "rejected", reason=" not in\nthe image ")
    decide(queue, "anna", "rejected")
    decide(queue, "anna", "accepted", reason="not in the image")
    (review,) = (step for step in queue.project.funnel().steps if step.step == "review")
    assert review.reasons == {"rejected": {"not in the image": 1}}
    assert "    not in the image" in status_text(queue.project)
    _, result = next(iter(queue.project.current("review")))
    assert result.details == {"decisions": [["anna", "rejected", "not in the image"]]}


def test_the_report_says_who_rejected_and_why(queue):
    decide(queue, "anna", "rejected", reason="repetitive")
    page = run_report(queue.project, queue.project.config).read_text()
    assert "rejected in review: repetitive" in page and "anna: rejected, repetitive" in page


def test_reasons_of_two_reviewers(queue_for_two):
    decide(queue_for_two, "anna", "rejected", reason="repetitive")
    decide(queue_for_two, "bert", "rejected", reason="bad English")
    decide(queue_for_two, "anna", "rejected", reason="repetitive")
    decide(queue_for_two, "bert", "accepted")
    assert [result.reason for _, result in queue_for_two.project.current("review")] == ["bad English", DISAGREED]


def test_the_list_by_state_reason_and_text(queue):
    set_texts(queue.project, {6: "The picture 5 is Red, and a bird."}, "added facts, ballooned")
    decide(queue, "anna", "accepted")
    decide(queue, "anna", "edited", "A scarlet picture.")
    decide(queue, "bert", "rejected", reason="repetitive")
    assert states(queue, "anna") == {
        **{1: ("accepted",), 2: ("edited",), 3: ("rejected", "repetitive"), 4: ("to do",), 5: ("to do",)},
        6: ("to do", "added facts", "ballooned"),
    }
    assert [*states(queue, "anna", state="to do")] == [4, 5, 6]
    assert [*states(queue, "anna", reason="repetitive")] == [3]
    assert [*states(queue, "anna", reason="ballooned", state="to do")] == [6]
    assert [*states(queue, "anna", search="RED,")] == [6]
    assert [*states(queue, "anna", search="scarlet")] == [2]  # as it was edited
    assert [*states(queue, "anna", search="00003")] == [4]
    assert [*states(queue, "anna", search=" 4 ")] == [4, 5]  # its number, and a 4 in its text
    assert states(queue, "anna", search="no such text") == {}
    assert all_reasons(queue) == [*queue.project.config.review_reasons, "added facts", "ballooned", DISAGREED]
    listing = list_pairs(queue, "anna", page=99)
    assert (listing.found, listing.page, listing.pages) == (6, 1, 1)


def test_the_list_has_pages(tmp_path):
    with make_project(tmp_path / "project", TEXTS * 10) as project:
        queue = ReviewQueue(project)
        pages = [list_pairs(queue, "anna", page=page) for page in (0, 1, 2, 3)]
    assert [len(page.rows) for page in pages] == [ROWS, ROWS, ROWS, 60 - 2 * ROWS]
    assert [page.page for page in pages] == [1, 1, 2, 3]


def test_the_list_does_not_tell_the_second_reviewer_what_the_first_one_said(queue_for_two):
    decide(queue_for_two, "anna", "rejected", reason="repetitive")
    assert states(queue_for_two, "anna")[1] == ("rejected", "repetitive")
    assert states(queue_for_two, "bert")[1] == ("to do",)
    decide(queue_for_two, "bert", "accepted")
    assert states(queue_for_two, "bert")[1] == ("rejected", DISAGREED)


def test_a_chosen_pair_is_claimed_and_the_queue_continues_behind(queue):
    queue.next("anna")
    pair, message = queue.open("anna", 4)
    assert (pair.id, message) == (4, "")
    assert queue.next("bert").id == 1 and queue.next("anna").id == 4
    assert decide(queue, "anna", "accepted", pair=pair) == ""
    assert queue.next("anna").id == 2


def test_a_decision_is_changed_by_who_made_and_saw_it(queue):
    decide(queue, "anna", "rejected", reason="repetitive")
    decide(queue, "anna", "accepted")
    waiting = queue.next("anna")
    pair, message = queue.open("anna", 1)
    assert message == "You have rejected this pair: repetitive. If you decide again, that replaces it."
    assert queue.next("anna") == waiting  # the pair that was being looked at is still theirs
    assert "undo that first" in queue.decide("anna", 1, pair.text_id, "accepted")  # a window that has not seen it
    assert decide(queue, "anna", "edited", "Better.", pair=pair) == ""
    assert "undo that first" in decide(queue, "anna", "rejected", pair=pair)
    assert queue.progress("anna").edited == 1 and queue.progress("anna").rejected == 0
    other, message = queue.open("bert", 1)
    assert message == "" and other.decision == 0  # what others said stays theirs


def test_a_pair_that_cannot_be_opened(queue):
    assert "not due for review" in queue.open("anna", 99)[1]
    (queue.project.folder / "images" / "00001.png").unlink()
    assert "missing" in queue.open("anna", 2)[1]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_decisions_are_exported_and_come_back_as_they_were(queue, tmp_path, suffix):
    decide(queue, "anna", "rejected", reason="repetitive")
    decide(queue, "bert", "edited", "=1+1")
    decide(queue, "anna", "accepted")
    path = tmp_path / f"decided.{suffix}"
    assert export_pairs(queue.project, path, "anna", decided=True).pairs == 2
    assert export_pairs(queue.project, path, decided=True).pairs == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()] if suffix == "jsonl" else []
    if suffix == "csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    assert [(row["action"], row["reason"], row["reviewer"]) for row in rows] == [
        *(("reject", "repetitive", "anna"), ("edit", "", "bert"), ("accept", "", "anna")),
    ]
    assert import_decisions(queue.project, path).known == 3
    with make_project(tmp_path / "other", TEXTS) as other:
        assert import_decisions(other, path).added == 3
        assert [(r.outcome, r.reason, r.text) for _, r in other.current("review")] == [
            *(("rejected", "repetitive", None), ("edited", "", "=1+1"), ("accepted", "", None)),
        ]


def test_a_reason_in_a_file_is_for_rejected_pairs(queue, tmp_path):
    export_pairs(queue.project, tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    for action, count in (("reject", "rejected"), ("accept", "")):
        (tmp_path / "b.jsonl").write_text(json.dumps({**row, "action": action, "reason": "too dark"}))
        if count:
            assert getattr(import_decisions(queue.project, tmp_path / "b.jsonl", "anna"), count) == 1
        else:
            with pytest.raises(CurationError, match=r"line 1 .* and a reason; leave it empty"):
                import_decisions(queue.project, tmp_path / "b.jsonl", "anna")
    assert list_pairs(queue, "anna").rows[0].reasons == ("too dark",)


@pytest.mark.parametrize(
    "reasons", [["a"] * 2, [str(n) for n in range(10)], [""], [3], ["two\nlines"], ["x" * 61], [" a"], ["\ud800"]]
)
def test_reasons_that_are_no_labels_are_refused(reasons):
    with pytest.raises(CurationError, match="review_reasons has"):
        CurationConfig("imagefolder:x", "x", review_reasons=reasons)


@pytest.mark.parametrize("shown", ["", "x", "-1", "1" * 30, "1 \ud800", "1 x y z", "٣"])
def test_requests_of_others_pages_do_no_harm(queue, shown):
    reviewing = Reviewing(queue)
    assert parse_shown(shown).pair < 10**18
    reviewing.reject("anna", shown)
    reviewing.jump("anna", shown)
    reviewing.listed("anna", "no state", "no reason", "\ud800", shown)
    assert all(result.text is None for _, result in queue.project.current("review"))


def test_what_comes_after_the_review(queue, monkeypatch):
    folder = queue.project.folder
    assert what_next(queue.project, queue.progress()) == (
        f"6 of 6 pairs still need a decision; `minigpt4 curate review {folder}` resumes"
    )
    for _ in range(6):
        decide(queue, "anna", "rejected")
    assert what_next(queue.project, queue.progress()).endswith(
        f"none is accepted; `minigpt4 curate status {folder}` shows why"
    )
    queue.undo("anna")
    decide(queue, "anna", "accepted")
    expected = f"all 6 pairs are decided; `minigpt4 curate run {folder}` builds the dataset (1 accepted)"
    assert what_next(queue.project, queue.progress()) == expected


def test_ctrl_c_ends_the_page_with_the_next_command(queue, monkeypatch):
    from transformers_minigpt4.web.server import PageServer

    folder = queue.project.folder
    (folder / "curation.yaml").write_text("source: imagefolder:x\ncheckpoint: x\nrepair_model: x\nreview_twice: 0\n")
    monkeypatch.setattr(PageServer, "wait", lambda self: None)  # as after Ctrl-C
    result = CliRunner().invoke(app, ["curate", "review", str(folder)])
    assert result.exit_code == 130
    assert (
        result.stderr == f"minigpt4: 6 of 6 pairs still need a decision; `minigpt4 curate review {folder}` resumes\n"
    )
    for _ in range(6):
        decide(queue, "anna", "accepted")
    result = CliRunner().invoke(app, ["curate", "review", str(folder)])
    assert result.exit_code == 0 and "`minigpt4 curate run" in result.stderr
