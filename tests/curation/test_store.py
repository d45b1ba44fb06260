"""The project's database: what waits for a step, what is stale, kills, full disks, two processes, other versions."""

import itertools
import os
import resource
import signal
import sqlite3
import threading
from dataclasses import replace

import pytest
from histories import history

from transformers_minigpt4.curation import store
from transformers_minigpt4.curation.config import CONFIG_FILE, SETTINGS, CurationConfig
from transformers_minigpt4.curation.database import DATABASE, SCHEMA_VERSION, erase_result
from transformers_minigpt4.curation.records import Result
from transformers_minigpt4.curation.repair import repair_digest
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.llm.types import ChatSettings


CONFIG = CurationConfig("imagefolder:somewhere", "checkpoint", repair=ChatSettings("model"))


def make(folder, count=3, config=CONFIG):
    folder.mkdir(exist_ok=True)
    project = Project.create(folder, config)
    rows = [(f"{n:05d}", f"images/{n:05d}.png", f"digest {n}", {"key": n}) for n in range(1, count + 1)]
    project.add_pairs(rows, config.source)
    return project


def run(project, step, settings="s", outcome="ok", say=None, reason=""):
    """A step that says the same about every pair; returns the ids that it looked at."""
    works = list(project.pending(step, settings))
    texts = [say(work) if say else None for work in works]
    project.record(
        step,
        [
            Result(work.pair.id, settings, work.input, outcome, reason if outcome != "ok" else "", text)
            for work, text in zip(works, texts)
        ],
    )
    return [work.pair.id for work in works]


def run_all(project):
    run(project, "generate", say=lambda work: f"raw {work.pair.id}")
    run(project, "repair", say=lambda work: work.text.replace("raw", "repaired"))
    run(project, "filter", outcome="kept")
    return run(project, "review", outcome="accepted")


def in_child(action):
    """Runs `action` in another process; returns its last words, and its status."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = action()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, str(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return said, os.waitpid(child, 0)[1]


def test_each_step_reads_the_text_of_the_one_before(tmp_path):
    project = make(tmp_path)
    assert not list(project.pending("repair", "s"))
    assert run_all(project) == [1, 2, 3]
    assert [text for _, text in project.texts("repair")] == ["raw 1", "raw 2", "raw 3"]
    assert [(pair.key, text) for pair, text in project.accepted()] == [
        (f"0000{n}", f"repaired {n}") for n in (1, 2, 3)
    ]
    for step in ("generate", "repair", "filter", "review"):
        assert not list(project.pending(step, "s"))


def test_a_changed_rule_touches_what_it_affects_and_no_more(tmp_path):
    project = make(tmp_path)
    run_all(project)
    assert [work.pair.id for work in project.pending("filter", "other rules")] == [1, 2, 3]
    assert not list(project.pending("repair", "s"))
    # The same verdict on the same text: people need not look again.
    run(project, "filter", "other rules", "kept")
    assert not list(project.pending("review", "s")) and len(list(project.accepted())) == 3
    # A repair that changes one text of three.
    run(project, "repair", "other", say=lambda work: "anew" if work.pair.id == 2 else f"repaired {work.pair.id}")
    assert [work.text for work in project.pending("filter", "other rules")] == ["anew"]
    assert [pair.id for pair, _ in project.accepted()] == [1, 3]
    assert [step.waiting for step in project.funnel().steps] == [0, 0, 1, 0]
    run(project, "filter", "other rules", "kept")
    assert [work.pair.id for work in project.pending("review", "s")] == [2]
    steps = [(step, result.text) for step, result in history(project, 2)]
    assert steps == [
        *(("generate", "raw 2"), ("repair", "repaired 2"), ("filter", None), ("review", None)),
        *(("filter", None), ("repair", "anew"), ("filter", None)),
    ]


def test_what_failed_is_tried_again_and_goes_no_further(tmp_path):
    project = make(tmp_path)
    run(project, "generate", outcome="failed", reason="missing image")
    assert not list(project.pending("repair", "s"))
    assert len(list(project.pending("generate", "s"))) == 3
    (generate, *_) = project.funnel().steps
    assert (generate.outcomes, generate.reasons) == ({"failed": 3}, {"failed": {"missing image": 3}})


def test_without_repair_the_filter_reads_the_description(tmp_path):
    project = make(tmp_path, config=replace(CONFIG, repair=None))
    run(project, "generate", say=lambda work: "raw")
    assert run(project, "filter", outcome="kept") == [1, 2, 3]
    assert [step.step for step in project.funnel().steps] == ["generate", "filter", "review"]


def test_the_funnel(tmp_path):
    project = make(tmp_path, 5)
    project.add_skipped(CONFIG.source, ("x", "image", "broken"))
    run(project, "generate", say=lambda work: f"raw {work.pair.id}")
    works = list(project.pending("repair", "s"))
    project.record("repair", [Result(w.pair.id, "s", w.input, "ok", text="fine") for w in works[:3]])
    project.record("repair", [Result(works[3].pair.id, "s", works[3].input, "flagged", "longer", "long")])
    works = list(project.pending("filter", "s"))
    outcomes = [("kept", ""), ("kept", ""), ("dropped", "apology"), ("dropped", "too_short")]
    project.record("filter", [Result(w.pair.id, "s", w.input, o, r) for w, (o, r) in zip(works, outcomes)])
    funnel = project.funnel()
    assert (funnel.wanted, funnel.sampled, funnel.skipped, funnel.accepted) == (5000, 5, {"image": 1}, 0)
    generate, repair, filtered, review = funnel.steps
    assert (generate.reached, generate.outcomes, generate.waiting) == (5, {"ok": 5}, 0)
    assert (repair.reached, repair.outcomes, repair.waiting) == (5, {"ok": 3, "flagged": 1}, 1)
    assert repair.reasons == {"flagged": {"longer": 1}}
    assert filtered.reasons == {"dropped": {"apology": 1, "too_short": 1}}
    assert (review.reached, review.waiting) == (2, 2)
    assert len(list(project.accepted(unreviewed=True))) == 2


def test_erased_results_stay_in_the_history(tmp_path):
    project = make(tmp_path, 1)
    run_all(project)
    with project.transaction() as connection:
        erase_result(connection, "review", 1, "undone by anna")
    assert not list(project.accepted())
    last, result = history(project, 1)[-1]
    assert (last, result.outcome, result.reason) == ("review", "undone", "undone by anna")


def test_more_pairs_than_one_page(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PAGE", 10)
    project = make(tmp_path, 25)
    for work in itertools.islice(project.pending("generate", "s"), 11):  # records while it reads
        project.record("generate", [Result(work.pair.id, "s", work.input, "ok", text="t")])
    assert len(list(project.pending("generate", "s"))) == 14


def test_odd_texts_come_back_as_they_were(tmp_path):
    project = make(tmp_path, 1)
    text = "<script>alert(1)</script> \x00 \u202e 🦜 'quoted' --"
    project.record("generate", [Result(1, "s", "digest 1", "ok", text=text, details={"odd": "\ud800"})])
    ((_, found),) = project.texts("repair")
    assert found == text
    ((_, result),) = project.current("generate")
    assert result.details == {"odd": "\ud800"}
    # Half a surrogate pair is no valid Unicode, which SQLite refuses.
    project.record("generate", [Result(1, "s", "digest 1", "ok", "\udc80", "a \ud800 b")])
    ((_, result),) = project.current("generate")
    assert (result.text, result.reason) == ("a ? b", "?") and result.input == "digest 1"
    assert [text for _, text in project.texts("repair")] == ["a ? b"]


def test_a_kill_leaves_complete_transactions(tmp_path):
    make(tmp_path, 60).close()

    def work():
        with Project.open(tmp_path, CONFIG) as project, project.writer("generate"):
            for count, work in enumerate(project.pending("generate", "s")):
                if count == 40:  # in the middle of a transaction of ten
                    with project.transaction() as connection:
                        connection.execute("UPDATE results SET text = 'half written'")
                        connection.execute("DELETE FROM pairs WHERE id = 60")
                        os.kill(os.getpid(), signal.SIGKILL)
                project.record("generate", [Result(work.pair.id, "s", work.input, "ok", text=f"t{work.pair.id}")])

    _, status = in_child(work)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with Project.open(tmp_path, CONFIG) as project, project.writer("generate"):  # the dead process holds no lock
        assert [text for _, text in project.texts("repair")] == [f"t{n}" for n in range(1, 41)]
        assert run(project, "generate", say=lambda work: "later") == list(range(41, 61))
        assert project.connection().execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_kill_while_the_database_is_made(tmp_path, monkeypatch):
    def work():
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        Project.create(tmp_path, CONFIG)

    _, status = in_child(work)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / DATABASE).exists()
    with Project.create(tmp_path, CONFIG) as project:
        assert list(project.pairs()) == []


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(tmp_path):
    with make(tmp_path, 3) as project:
        run(project, "generate", say=lambda work: "before")
        project.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def work():
        size = (tmp_path / DATABASE).stat().st_size + 40_000
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with Project.open(tmp_path, CONFIG) as project:
            run(project, "repair", say=lambda work: "x" * 1_000_000)

    said, _ = in_child(work)
    assert said.startswith("CurationError: cannot write to") and "is the disk full? Free some space" in said
    with Project.open(tmp_path, CONFIG) as project:
        assert [text for _, text in project.texts("repair")] == ["before"] * 3
        assert len(run(project, "repair", say=lambda work: "after")) == 3


def test_two_processes_take_turns(tmp_path):
    with make(tmp_path) as project, project.writer("repair"):

        def work():
            with Project.open(tmp_path, CONFIG) as other, other.writer("filter"):
                return "both"

        said, _ = in_child(work)
        assert f"another process works on {tmp_path} (repair, process {os.getpid()}), so filter cannot" in said
    assert in_child(work)[0] == "both"


def test_threads_have_connections_of_their_own(tmp_path):
    project = make(tmp_path, 20)
    run(project, "generate", say=lambda work: "raw")
    works = list(project.pending("repair", "s"))

    def record(part):
        for work in works[part::4]:
            project.record("repair", [Result(work.pair.id, "s", work.input, "ok", text=f"by {part}")])

    threads = [threading.Thread(target=record, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text for _, text in project.texts("filter")) == [f"by {n}" for n in range(4) for _ in range(5)]
    project.close()


@pytest.mark.parametrize(("version", "age"), [(SCHEMA_VERSION - 1, "an older"), (SCHEMA_VERSION + 1, "a newer")])
def test_other_schema_versions_are_reported(tmp_path, version, age):
    make(tmp_path).close()
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    for opening in (Project.open, Project.create):
        with pytest.raises(CurationError, match=f"made by {age} version of this package .schema {version}"):
            opening(tmp_path, CONFIG)


def test_files_that_are_not_a_project(tmp_path):
    with pytest.raises(CurationError, match=r"holds no curation.sqlite yet; run `minigpt4 curate generate`"):
        Project.open(tmp_path, CONFIG)
    with pytest.raises(CurationError, match=r"there is no .*curation.yaml; create a project"):
        Project.open(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"no database" * 100)
    with pytest.raises(CurationError, match="is damaged or not a project"):
        Project.open(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "holds no settings"),
        ("source: [", "is not YAML"),
        ("source: " + "[" * 100_000, "nested too deeply"),
        ('source: x\ncheckpoint: "\\ud800"', "checkpoint contains half a surrogate pair"),
        ("source: x", "lacks checkpoint"),
        ("source: x\ncheckpoint: y\nimage: 5", "unknown keys image; it may have source"),
        ("source: x\ncheckpoint: y\nimages: many", "must be of type int"),
        ("source: x\ncheckpoint: y\nimages: true", "must be of type int"),
        ("source: x\ncheckpoint: y\nimages: 0", "set it to a whole number of 1 or more"),
        ("source: x\ncheckpoint: y\nseed: -1", "seed is -1"),
        ("source: x\ncheckpoint: y\nrepair_timeout: soon", "repair_timeout is 'soon', but must be of type float"),
        ("source: x\ncheckpoint: y\nrepair_model: m\nrepair_timeout: 0", "`repair_timeout` is 0.0; set it to"),
        (
            "source: x\ncheckpoint: y\nrepair_model: m\nrepair_budget_cost: 1",
            "set repair_price_in and repair_pri",
        ),
        ("source: x\ncheckpoint: y\nreview_twice: 2", "a share between 0 and 1"),
        ("source: x\ncheckpoint: ' '", "checkpoint is empty"),
        ("source: x\ncheckpoint: y\ncontinue_prompt: <ImageHere>", "one image, once"),
        ("source: x\ncheckpoint: y\nprompt: Describe it.", "write `continue_prompt: Continue`"),
    ],
)
def test_bad_settings_are_reported(tmp_path, text, message):
    path = tmp_path / CONFIG_FILE
    path.write_text(text)
    with pytest.raises(CurationError, match=message):
        SETTINGS.read(path)


def test_good_settings(tmp_path):
    path = tmp_path / CONFIG_FILE
    text = "source: x:y\ncheckpoint: z\nrules:\nrepair_timeout: 5\nrepair_model: m\ndevice: null\n"
    path.write_text(text)
    config = SETTINGS.read(path)
    assert (config.rules, config.repair.timeout, config.repair.model) == ({}, 5, "m")
    path.write_text(f"{text}repair_temperature: 0\n")
    assert repair_digest(SETTINGS.read(path)) == repair_digest(config)
