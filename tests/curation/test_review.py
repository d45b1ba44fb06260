"""The queue of pairs for reviewers, their decisions, and the files of the headless review."""

import csv
import json
import sqlite3
import threading

import pytest
from histories import history
from review_projects import drop, make_project, set_texts

from transformers_minigpt4.curation.agreement import Agreement, measure_agreement
from transformers_minigpt4.curation.decisions import DISAGREED, settle
from transformers_minigpt4.curation.review import ReviewQueue, wants_two
from transformers_minigpt4.curation.review_diff import mark_differences
from transformers_minigpt4.curation.review_files import FIELDS, export_pairs, import_decisions
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.web.html import escape


TEXTS = [(f"The the picture {i} is red.", f"The picture {i} is red.") for i in range(6)]


@pytest.fixture
def project(tmp_path):
    with make_project(tmp_path / "project", TEXTS) as project:
        yield project


@pytest.fixture
def queue(project):
    return ReviewQueue(project)


@pytest.fixture
def queue_for_two(tmp_path):
    with make_project(tmp_path / "project", TEXTS[:3], twice=1.0) as project:
        yield ReviewQueue(project)


def decide(queue, reviewer, action, text=None):
    pair = queue.next(reviewer)
    assert queue.decide(reviewer, pair.id, pair.text_id, action, text) == ""
    return pair


def outcomes(project):
    return {pair.key: (result.outcome, result.text) for pair, result in project.current("review")}


# --- the queue ---


def test_a_pair_comes_with_both_texts_and_stays_until_it_is_decided(queue):
    pair = queue.next("anna")
    assert (pair.key, pair.before, pair.after) == ("00000", *TEXTS[0])
    assert queue.next("anna") == pair  # a reload
    assert queue.next(" ANNA ") == pair  # the same person
    queue.decide("anna", pair.id, pair.text_id, "accepted")
    assert queue.next("anna").key == "00001"


def test_decisions_become_results(queue, project):
    decide(queue, "anna", "accepted")
    decide(queue, "anna", "edited", "A red picture.\n")
    decide(queue, "anna", "rejected")
    assert outcomes(project) == {
        "00000": ("accepted", None),
        "00001": ("edited", "A red picture."),
        "00002": ("rejected", None),
    }
    assert [(pair.key, text) for pair, text in project.accepted()] == [
        ("00000", TEXTS[0][1]),
        ("00001", "A red picture."),
    ]


def test_an_edit_that_changes_nothing_accepts(queue, project):
    decide(queue, "anna", "edited", f"{TEXTS[0][1]}\r\n")
    assert outcomes(project)["00000"] == ("accepted", None)


def test_an_edit_with_half_a_surrogate_pair_is_kept(queue, project):
    """Browsers cut emoji in halves where somebody deletes one."""
    pair = queue.next("anna")
    queue.decide("anna", pair.id, pair.text_id, "edited", "A parrot \ud83e.")
    assert {text for _, text in project.accepted()} == {"A parrot ?."}


def test_a_decision_is_on_the_disk_for_other_processes_at_once(queue, project):
    decide(queue, "anna", "rejected")
    with sqlite3.connect(f"file:{project.database}?mode=ro", uri=True) as other:
        assert other.execute("SELECT reviewer, action FROM decisions").fetchall() == [("anna", "rejected")]
    (synchronous,) = project.connection().execute("PRAGMA synchronous").fetchone()
    assert synchronous == 2  # FULL: SQLite waits for the disk


@pytest.mark.parametrize(
    "action,text,told",
    [("loved", None, "not an action"), ("edited", None, "needs its text"), ("edited", " \n", "text")],
)
def test_an_invalid_decision_is_refused(queue, action, text, told):
    pair = queue.next("anna")
    with pytest.raises(CurationError, match=told):
        queue.decide("anna", pair.id, pair.text_id, action, text)
    assert queue.progress("anna").decided == 0


def test_an_unknown_pair_and_a_name_that_is_none_are_refused(queue):
    with pytest.raises(CurationError, match="no pair 99"):
        queue.decide("anna", 99, "x", "accepted")
    with pytest.raises(ValueError, match="name"):
        queue.next("  ")


def test_two_reviewers_never_meet(queue):
    anna, bert = queue.next("anna"), queue.next("bert")
    assert anna.id != bert.id
    seen = [decide(queue, name, "accepted").id for name in ("anna", "bert") * 3]
    assert len(set(seen)) == 6 and queue.next("anna") is None and queue.next("bert") is None


def test_many_reviewers_at_once_share_the_pairs(tmp_path):
    with make_project(tmp_path / "project", [(f"a {i}", f"b {i}") for i in range(40)]) as project:
        seen = {f"reviewer {number}": [] for number in range(4)}

        def work(name):
            queue = ReviewQueue(project)
            while pair := queue.next(name):
                assert queue.decide(name, pair.id, pair.text_id, "accepted") == ""
                seen[name].append(pair.id)

        threads = [threading.Thread(target=work, args=(name,)) for name in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(pair for pairs in seen.values() for pair in pairs) == list(range(1, 41))


def test_a_claim_runs_out_but_the_late_decision_is_kept(project):
    queue = ReviewQueue(project, claim_seconds=-1)  # over as soon as it is made
    late = queue.next("anna")
    assert queue.next("bert").id == late.id
    queue.decide("bert", late.id, late.text_id, "accepted")
    assert queue.decide("anna", late.id, late.text_id, "rejected") == ""
    assert outcomes(project)[late.key] == ("rejected", None)


def test_a_second_decision_on_the_same_text_changes_nothing(queue, project):
    """Two tabs of one person, or a key pressed twice."""
    pair = decide(queue, "anna", "accepted")
    assert "before" in queue.decide("anna", pair.id, pair.text_id, "rejected")
    assert outcomes(project)[pair.key] == ("accepted", None)


# --- undo ---


def test_undo_goes_back_one_by_one_and_keeps_the_history(queue, project):
    first, second = decide(queue, "anna", "accepted"), decide(queue, "anna", "rejected")
    assert queue.undo("anna")[0] == second and queue.undo("anna")[0] == first
    assert outcomes(project) == {} and queue.progress("anna").decided == 0
    assert queue.undo("anna") == (None, "There is nothing to undo.")
    assert queue.next("anna") == first
    rows = project.connection().execute("SELECT action, undone IS NULL FROM decisions ORDER BY id").fetchall()
    assert rows == [("accepted", 0), ("rejected", 0)]
    assert [result.outcome for step, result in history(project, first.id) if step == "review"] == [
        "accepted",
        "undone",
    ]


def test_undo_is_one_s_own(queue):
    pair = decide(queue, "anna", "accepted")
    assert queue.undo("bert")[0] is None
    assert queue.next("bert").id != pair.id


def test_undo_does_not_take_the_pair_from_who_looks_at_it(queue_for_two):
    queue = queue_for_two
    pair = decide(queue, "anna", "accepted")
    assert queue.next("bert") == pair
    assert queue.undo("anna")[0] == pair
    assert queue.next("bert") == pair


def test_undo_leaves_the_other_s_decision(queue_for_two):
    queue = queue_for_two
    decide(queue, "anna", "rejected")
    decide(queue, "bert", "accepted")
    queue.undo("anna")
    assert outcomes(queue.project)["00000"] == ("accepted", None)


# --- two reviewers for a share of the pairs ---


def test_the_share_for_two_depends_on_the_keys():
    drawn = [wants_two(f"key {i}", 0.1) for i in range(5000)]
    assert 400 < sum(drawn) < 600  # 10 % +- 5 standard deviations
    assert drawn == [wants_two(f"key {i}", 0.1) for i in range(5000)]
    assert not wants_two("key", 0.0) and wants_two("key", 1.0)


def test_pairs_for_two_come_to_two_and_no_more(queue_for_two):
    queue = queue_for_two
    for name in ("anna", "bert"):
        assert [decide(queue, name, "accepted").key for _ in range(3)] == ["00000", "00001", "00002"]
    assert [queue.next(name) for name in ("anna", "bert", "carl")] == [None] * 3
    progress = queue.progress("anna")
    assert (progress.twice, progress.twice_done, progress.left) == (3, 3, 0)


@pytest.mark.parametrize(
    "first,second,verdict",
    [
        (("accepted", None), ("rejected", None), ("rejected", None)),
        (("rejected", None), ("edited", "mine"), ("rejected", None)),
        (("edited", "mine"), ("accepted", None), ("edited", "mine")),
        (("edited", "mine"), ("edited", "yours"), ("edited", "yours")),
    ],
)
def test_the_stricter_of_two_decisions_counts(queue_for_two, first, second, verdict):
    decide(queue_for_two, "anna", *first)
    decide(queue_for_two, "bert", *second)
    assert outcomes(queue_for_two.project)["00000"] == verdict
    review = queue_for_two.project.funnel().steps[-1]
    assert review.reasons == ({verdict[0]: {DISAGREED: 1}} if first[0] != second[0] else {})


def test_agreement_is_measured_on_what_two_have_seen(queue_for_two):
    for name, actions in (("anna", ["accepted", "accepted", "rejected"]), ("bert", ["accepted", "rejected"])):
        for action in actions:
            decide(queue_for_two, name, action)
    assert queue_for_two.agreement() == Agreement(2, 1, 0.5, 0.0)


def test_kappa_is_cohen_s():
    # The 2 x 2 table 20, 5, 10, 15 has kappa (0.7 - 0.5) / (1 - 0.5), from Wikipedia's article on Cohen's kappa.
    yes, no = "accepted", "rejected"
    decisions = [(yes, yes)] * 20 + [(yes, no)] * 5 + [(no, yes)] * 10 + [(no, no)] * 15
    assert measure_agreement(decisions) == Agreement(50, 35, 0.7, pytest.approx(0.4))
    assert measure_agreement([(yes, yes)] * 3).kappa is None
    assert measure_agreement([]) == Agreement(0, 0, None, None)


# --- texts and images that change meanwhile ---


def test_a_text_that_changes_after_its_review_is_asked_again(queue, project):
    pair = decide(queue, "anna", "accepted")
    set_texts(project, {pair.id: "Another text."})
    assert queue.progress("anna").decided == 0
    again = queue.next("anna")
    assert (again.id, again.after, again.again) == (pair.id, "Another text.", True)
    assert again.text_id != pair.text_id and not pair.again
    assert not queue.next("bert").again


def test_a_text_that_changes_while_somebody_looks_keeps_the_decision_and_comes_again(queue, project):
    pair = queue.next("anna")
    set_texts(project, {pair.id: "Another text."})
    assert "changed" in queue.decide("anna", pair.id, pair.text_id, "accepted")
    assert project.connection().execute("SELECT count(*) FROM decisions").fetchone() == (1,)
    assert outcomes(project) == {} and queue.next("anna").after == "Another text."


def test_a_text_that_changes_back_has_its_decision_back(queue, project):
    pair = decide(queue, "anna", "rejected")
    set_texts(project, {pair.id: "Another text."})
    decide(queue, "anna", "accepted")
    set_texts(project, {pair.id: pair.after})
    assert settle(project) == 1 and settle(project) == 0
    assert outcomes(project)[pair.key] == ("rejected", None)


def test_a_pair_that_the_filter_drops_meanwhile_is_no_more_shown(queue, project):
    first, second = queue.next("anna"), queue.next("bert")
    drop(project, first.id)
    assert "dropped" in queue.decide("anna", first.id, first.text_id, "accepted")
    assert queue.next("anna").id not in (first.id, second.id)
    pair, told = queue.undo("anna")
    assert pair is None and "dropped" in told


def test_a_pair_without_its_image_is_skipped_and_counted(queue, project):
    pair = decide(queue, "anna", "accepted")
    for key in ("00000", "00001"):
        (project.folder / "images" / f"{key}.png").unlink()
    assert queue.next("anna").key == "00002"
    assert queue.progress("anna").missing == 1  # the other one is decided
    assert queue.undo("anna") == (None, f"Undone. The image of {pair.key} is missing, so the pair cannot be shown.")


def test_why_the_repair_asks_for_a_close_look_is_shown(queue, project):
    set_texts(project, {1: "It grew."}, flag="much longer")
    assert queue.next("anna").flag == "much longer"


def test_progress_counts_what_is_done_and_what_is_left(queue):
    decide(queue, "anna", "accepted")
    decide(queue, "bert", "edited", "New.")
    decide(queue, "anna", "rejected")
    progress = queue.progress("anna")
    assert (progress.pairs, progress.decided, progress.mine, progress.left) == (6, 3, 2, 3)
    assert (progress.accepted, progress.edited, progress.rejected) == (1, 1, 1)


def test_a_reopened_project_goes_on_where_it_stood(queue, project):
    decide(queue, "anna", "accepted")
    shown = queue.next("anna")
    with Project.open(project.folder, project.config) as again:
        assert ReviewQueue(again).next("anna") == shown


# --- files ---


def read_rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_goes_out_and_comes_back_with_decisions(project, tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    assert export_pairs(project, path).pairs == 6
    rows = read_rows(path)
    assert tuple(rows[0]) == FIELDS
    assert rows[0]["image"] == "images/00000.png" and (project.folder / rows[0]["image"]).is_file()
    assert (rows[0]["text_before"], rows[0]["text_after"]) == TEXTS[0]
    rows[0]["action"], rows[1]["action"], rows[2]["action"] = "accept", "Edit", "rejected"
    rows[1]["text"] = 'Said, "so\nit is".'
    write_rows(path, rows)
    done = import_decisions(project, path, "anna")
    assert (done.accepted, done.edited, done.rejected, done.undecided, done.known) == (1, 1, 1, 3, 0)
    assert outcomes(project)["00001"] == ("edited", 'Said, "so\nit is".')
    assert import_decisions(project, path, "anna").known == 3  # again: nothing happens twice
    assert export_pairs(project, path).pairs == 3
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "change,told",
    [
        ({"pair": "99999"}, "no pair '99999'"),
        ({"action": "love"}, "'love' is not an action"),
        ({"action": "edit", "text": " "}, "needs its text"),
        ({"action": "accept", "text": "Something else."}, "write edit"),
        ({"text_id": "text-0123456789abcdef"}, "has changed since the export"),
        ({"pair": "00000"}, "keep one"),
        ({"reviewer": ""}, "who decided"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_imported(project, tmp_path, suffix, change, told):
    path = tmp_path / f"pairs.{suffix}"
    export_pairs(project, path)
    rows = [{**row, "action": "accept", "reviewer": "anna"} for row in read_rows(path)]
    rows[2].update(change)
    write_rows(path, rows)
    line = 4 if suffix == "csv" else 3
    with pytest.raises(CurationError, match=rf"^line {line} of .*{told}"):
        import_decisions(project, path)
    assert outcomes(project) == {}
    assert project.connection().execute("SELECT count(*) FROM decisions").fetchone() == (0,)


def test_the_line_is_right_behind_texts_of_several_lines(project, tmp_path):
    export_pairs(project, tmp_path / "pairs.csv")
    rows = [{**row, "action": "reject", "reviewer": "anna"} for row in read_rows(tmp_path / "pairs.csv")[:3]]
    rows[0].update(action="edit", text="One\ntwo\nthree")
    rows[2]["action"] = "?"
    with pytest.raises(CurationError, match="line 6 of"):
        import_decisions(project, write_rows(tmp_path / "pairs.csv", rows))


@pytest.mark.parametrize(
    "name,content,told",
    [
        ("a.csv", b"pair,action\n1,accept\n", "line 1 .* has no text_id"),
        ("a.csv", b"", "line 1 .* has no pair"),
        ("a.csv", b"pair,text_id,action\n1,x\n", "line 2 .* 2 cells under 3 names"),
        ("a.csv", b'pair,text_id,action\n"1,x,accept\n', "is not CSV"),
        ("a.csv", "pair,text_id,action\nä,x,accept\n".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"pair": "1"\n', "line 1 .* cannot be read"),
        ("a.jsonl", b"\n" + b"[" * 100_000 + b"\n", "line 2 .* nested"),
        ("a.jsonl", b'{"pair": "1", "text_id": "x", "action": "edit", "text": "\\ud800"}\n', "line 1 .* surrogate"),
        ("a.jsonl", b"[]\n", "line 1 .* not an object of texts"),
        ("a.jsonl", b'{"pair": "1", "action": "accept"}\n', "line 1 .* has no text_id"),
        ("a.txt", b"", r"neither \.csv nor \.jsonl"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(project, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CurationError, match=told) as caught:
        import_decisions(project, tmp_path / name, "anna")
    assert "\n" not in str(caught.value)


def test_paths_that_do_not_exist_are_reported(project, tmp_path):
    with pytest.raises(CurationError, match=r"no file .*a\.csv; write one with --export"):
        import_decisions(project, tmp_path / "a.csv", "anna")
    with pytest.raises(CurationError, match="no folder for"):
        export_pairs(project, tmp_path / "nowhere" / "a.csv")


def test_a_text_that_changed_after_the_export_is_refused(project, tmp_path):
    export_pairs(project, tmp_path / "pairs.csv")
    set_texts(project, {1: "Another text."})
    rows = [{**row, "action": "accept"} for row in read_rows(tmp_path / "pairs.csv")]
    with pytest.raises(CurationError, match=r"line 2 .* has changed since the export"):
        import_decisions(project, write_rows(tmp_path / "pairs.csv", rows), "anna")


def test_a_corrected_file_takes_the_place_of_what_it_said_before(project, tmp_path):
    export_pairs(project, tmp_path / "pairs.csv")
    rows = [{**row, "action": "accept"} for row in read_rows(tmp_path / "pairs.csv")]
    import_decisions(project, write_rows(tmp_path / "pairs.csv", rows), "anna")
    rows[0]["action"] = "reject"
    done = import_decisions(project, write_rows(tmp_path / "pairs.csv", rows), "anna")
    assert (done.rejected, done.added, done.known) == (1, 1, 5)
    assert outcomes(project)["00000"] == ("rejected", None)


def test_cells_that_spreadsheets_would_run_are_text_and_come_back_unchanged(tmp_path):
    texts = ["=1+1", "+a", "-b", "@SUM(A1)", "'quoted", "plain"]
    with make_project(tmp_path / "project", [(text, text) for text in texts]) as project:
        path = tmp_path / "pairs.csv"
        export_pairs(project, path)
        rows = read_rows(path)
        assert [row["text_after"][0] for row in rows] == ["'"] * 5 + ["p"]
        edits = [{**row, "action": "edit", "text": row["text_after"] + "!"} for row in rows]
        import_decisions(project, write_rows(path, edits), "anna")
        assert [text for _, text in outcomes(project).values()] == [f"{text}!" for text in texts]


def test_a_spreadsheet_s_semicolons_and_byte_order_mark_are_read(project, tmp_path):
    export_pairs(project, tmp_path / "pairs.csv")
    row = read_rows(tmp_path / "pairs.csv")[0]
    path = tmp_path / "saved.csv"
    path.write_text(f"\ufeffpair;text_id;action\r\n{row['pair']};{row['text_id']};reject\r\n", encoding="utf-8")
    assert import_decisions(project, path, "anna").rejected == 1


def test_an_export_for_one_reviewer_leaves_out_what_he_has_seen_and_what_has_no_image(queue_for_two, tmp_path):
    queue = queue_for_two
    decide(queue, "anna", "accepted")
    (queue.project.folder / "images" / "00001.png").unlink()
    done = export_pairs(queue.project, tmp_path / "a.csv", "Anna")
    assert (done.pairs, done.missing) == (1, ["00001"])
    (row,) = read_rows(tmp_path / "a.csv")
    assert (row["pair"], row["reviewer"]) == ("00002", "anna")
    assert export_pairs(queue.project, tmp_path / "b.csv", "bert").pairs == 2


# --- differences ---


@pytest.mark.parametrize(
    "before,after,left,right",
    [
        ("The the cat  sat", "The cat sat.", "The <del>the</del> cat  sat", "The cat sat<ins>.</ins>"),
        ("a <b> c", "a c", "a <del>&lt;b&gt;</del> c", "a c"),
        ("same", "same", "same", "same"),
        ("", "new text", "", "<ins>new text</ins>"),
    ],
)
def test_differences_are_marked_word_by_word(before, after, left, right):
    assert mark_differences(before, after, escape) == (left, right)


def test_texts_too_long_to_compare_are_marked_between_what_is_alike(tmp_path):
    old = "begin " + " ".join(f"a{i}" for i in range(1000)) + " end"
    left, right = mark_differences(old, old.replace(" a", " b"), escape)
    assert left.startswith("begin <del>a0 a1") and left.endswith("a999</del> end") and right.count("<ins>") == 1
