"""The filter step: reasons of drops, re-runs that touch only what changes, missing images, one process at a time."""

import pytest
from filter_projects import TEXTS, add, jpeg, make_project, photograph, review
from histories import history

from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.filter import run_filter
from transformers_minigpt4.curation.records import Result
from transformers_minigpt4.curation.review import ReviewQueue
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.store import Project


def config(**rules) -> CurationConfig:
    return CurationConfig(source="imagefolder:x", checkpoint="some/model", rules=rules)


def run(project: Project, **rules):
    return run_filter(project, config(**rules), progress=False)


def verdicts(project: Project) -> dict[str, str]:
    return {pair.key: result.reason or result.outcome for pair, result in project.current("filter")}


def histories(project: Project) -> dict[str, int]:
    """Number of the filter's entries in each pair's history."""
    return {p.key: sum(step == "filter" for step, _ in history(project, p.id)) for p in project.pairs()}


def describe(project: Project, pair_id: int, text: str) -> None:
    """What another prompt or checkpoint does: a new description of the same image."""
    digest = next(pair.sha256 for pair in project.pairs() if pair.id == pair_id)
    project.record("generate", [Result(pair_id, "s", digest, "ok", text=text)])


@pytest.fixture
def project(tmp_path):
    """Ten pairs: 1 apologizes, 3 has the words of 2, 5 the image of 4 in small, 7 is short and has no end."""
    texts = list(TEXTS)
    texts[1] += " I'm sorry I made a mistake, it is a dog."
    texts[3] = texts[2].replace(". ", ".  ").replace("cherries", "cherries,")
    texts[7] = "A steam engine"
    images = [jpeg(photograph(number)) for number in range(10)]
    images[5] = jpeg(photograph(4).resize((100, 75)), quality=60)
    with make_project(tmp_path / "project", texts, images) as project:
        yield project


EXPECTED = {f"{number:05d}": "kept" for number in range(10)} | {
    "00001": "apology",
    "00003": "duplicate_text",
    "00005": "duplicate_image",
    "00007": "unfinished",
}


def test_every_drop_keeps_its_reason(project):
    summary = run(project)
    assert verdicts(project) == EXPECTED
    assert summary.kept == 6 and summary.written == 10 and sum(summary.reasons.values()) == 4
    details = {pair.key: result.details for pair, result in project.current("filter")}
    assert details["00001"]["why"] == 'says "i\'m sorry"'
    assert details["00003"]["of"] == "00002" and details["00005"]["of"] == "00004"
    assert details["00007"]["also"] == {"too_short": "3 words"}
    assert "6 of 10 pairs kept (60.0%)" in str(summary) and "1  apology" in str(summary)
    filtered = next(step for step in project.funnel().steps if step.step == "filter")
    assert filtered.reasons["dropped"] == summary.reasons and filtered.waiting == 0
    assert list(project.pending("filter", run_settings(project))) == []


def run_settings(project: Project) -> str:
    return next(result.settings for _, result in project.current("filter"))


def test_again_writes_nothing(project):
    run(project)
    before = histories(project)
    assert run(project).written == 0
    assert histories(project) == before and verdicts(project) == EXPECTED


def test_a_changed_rule_touches_what_it_affects(project):
    run(project)
    before, first = histories(project), run_settings(project)
    # The rule drops 1 no more; of 7 one of two reasons is left.
    assert run(project, apology=False, unfinished=False).written == 2
    assert verdicts(project) == EXPECTED | {"00001": "kept", "00007": "too_short"}
    assert histories(project) == before | {"00001": 2, "00007": 2}
    # All verdicts hold under the new settings, the old ones too.
    assert {result.settings for _, result in project.current("filter")} == {run_settings(project)} != {first}
    assert run(project).written == 2 and verdicts(project) == EXPECTED


def test_what_a_dropped_original_leaves(project):
    """Where a rule drops the first of two duplicates, the second is one no more."""
    run(project)
    changed = run(project, apology={"also": ["spoon"]}, self_reference={"also": ["robot", "market stall"]})
    now = verdicts(project)
    assert now["00002"] == now["00003"] == "apology"
    assert now["00004"] == "self_reference" and now["00005"] == "kept" and now["00008"] == "self_reference"
    assert changed.written == 5


def test_after_an_error_it_resumes(project, monkeypatch):
    from transformers_minigpt4.curation import filter as module

    monkeypatch.setattr(module, "_BATCH", 4)
    record, calls = project.record, []

    def fail_later(step, results):
        calls.append(step)
        if len(calls) == 2:
            raise CurationError("the disk is full")
        record(step, results)

    monkeypatch.setattr(project, "record", fail_later)
    with pytest.raises(CurationError, match="full"):
        run(project)
    assert len(verdicts(project)) == 4
    assert run(project).written == 6 and verdicts(project) == EXPECTED
    assert set(histories(project).values()) == {1}


def test_new_pairs_and_changed_texts(project):
    run(project)
    before = histories(project)
    add(project, ["The picture shows an owl. It sits on a branch of an oak tree and looks at a mouse.", TEXTS[0]])
    assert run(project).written == 2
    assert verdicts(project) == EXPECTED | {"00010": "kept", "00011": "duplicate_text"}
    assert histories(project) == before | {"00010": 1, "00011": 1}


def test_review_stays_where_the_verdict_stays(project):
    run(project)
    review(project, p00000="rejected")
    assert project.funnel().accepted == 5
    run(project, too_short={"min_words": 8})
    assert project.funnel().accepted == 5


def test_a_text_that_comes_back_brings_its_decisions(project):
    run(project)
    queue = ReviewQueue(project)
    pair = queue.next("anna")
    queue.decide("anna", pair.id, pair.text_id, "accepted")
    describe(project, pair.id, "Another picture shows nothing of that, but a green door with a brass handle.")
    run(project)
    other = queue.next("anna")
    queue.decide("anna", other.id, other.text_id, "rejected")
    assert other.id == pair.id and project.funnel().accepted == 0
    describe(project, pair.id, pair.after)
    run(project)
    assert project.funnel().accepted == 1


def test_images_that_are_gone_or_broken(project):
    (project.folder / "images" / "00000.jpg").unlink()
    (project.folder / "images" / "00006.jpg").write_bytes(b"no image")
    summary = run(project)
    gone = {"00000": "no_image", "00006": "no_image"}
    assert verdicts(project) == EXPECTED | gone
    assert summary.no_image == ["00000", "00006"] and "no readable image: 00000, 00006" in str(summary)
    (project.folder / "images" / "00000.jpg").write_bytes(jpeg(photograph(0)))
    assert run(project).written == 1 and verdicts(project)["00000"] == "kept"
    # An image that goes later is noticed although what it is compared by is kept.
    (project.folder / "images" / "00008.jpg").unlink()
    assert run(project).no_image == ["00006", "00008"]


def test_hashes_of_images_are_made_once(project, monkeypatch):
    from transformers_minigpt4.curation import filter as module

    run(project)
    made = []
    monkeypatch.setattr(module, "near_duplicate_hash", lambda path: made.append(path) or b"\0" * 224)
    add(project, ["The picture shows an owl. It sits on a branch of an oak tree and looks at a mouse."])
    run(project, too_short=False)
    assert [path.name for path in made] == ["00010.jpg"]


def test_an_unknown_rule(project):
    with pytest.raises(CurationError, match="no rule 'to_short'"):
        run(project, to_short={})
    assert verdicts(project) == {}


def test_one_process_at_a_time(project):
    with project.writer("repair"), pytest.raises(CurationError, match="another process works on"):
        run(project)


def test_nothing_to_filter(tmp_path):
    with make_project(tmp_path / "empty", []) as project:
        summary = run(project)
    assert summary.pairs == summary.kept == 0 and "0 of 0 pairs kept" in str(summary)
