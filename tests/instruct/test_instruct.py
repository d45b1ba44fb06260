"""A project from COCO's files to LLaVA's: asking, asking again, check, review, build, and kills between."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
from datasets import load_from_disk
from instruct_projects import good_answer, is_again, kind_of, make_config, make_project, scene_of, spoiled
from scripted_endpoint import Reply, ScriptedEndpoint
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.curation.review import ReviewQueue
from transformers_minigpt4.curation.review_screen import what_next
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.spending import used_so_far
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.hub.cards import License
from transformers_minigpt4.hub.publish import prepare
from transformers_minigpt4.instruct.build import run_build
from transformers_minigpt4.instruct.check import run_check, write_page
from transformers_minigpt4.instruct.config import SETTINGS
from transformers_minigpt4.instruct.generate import run_generate
from transformers_minigpt4.instruct.plan import read_plan
from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, DETAIL
from transformers_minigpt4.instruct.store import InstructProject
from transformers_minigpt4.llm.types import BudgetExhausted, ChatError


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def generate(project, config=None, **options):
    return run_generate(project, config or project.config, progress=False, **options)


def check(project, config=None):
    return run_check(project, config or project.config, progress=False)


HOSTILE = "Question:\nWhy?\n===\nAnswer:\n<script>alert(1)</script> As an AI language model I cannot say."
BAD = {
    f"1/{CONVERSATION}": "Question:\nWhat?",
    f"2/{COMPLEX}": Reply("Question:\nWhy?\n===\nAnswer:\nBecause the", finish_reason="length"),
    f"3/{DETAIL}": "The caption says that there is a bench.",
    f"4/{CONVERSATION}": "Sure! Here are some questions.",
    f"4/{CONVERSATION}/again": "I'm sorry, I made a mistake.",
    f"5/{COMPLEX}": HOSTILE,
    f"5/{COMPLEX}/again": HOSTILE,
}


def test_from_captions_to_llavas_format(tmp_path):
    kinds = {CONVERSATION: 1, DETAIL: 1, COMPLEX: 1}
    with ScriptedEndpoint(spoiled(BAD)) as endpoint:
        project = make_project(tmp_path, endpoint, kinds=kinds, similarity=0.95, price_in=1.0, price_out=2.0)
        said = []
        done = generate(project, say=said.append)
        assert done.answered == 36 and not done.failed and "36 requests" in said[0] and "cost about" in said[0]
        assert done.refused == {
            "cut off": 1,
            "question without answer": 1,
            "betrays its source": 1,
            "broken blocks": 1,
            "refusal": 1,
        }
        assert done.mended == 3 and done.usage.requests == 41 == len(endpoint.requests)
        asked = next(body for body in endpoint.requests if is_again(body) and scene_of(body) == 2)
        assert (
            asked["messages"][-2]["content"].endswith("Because the") and "cut off" in asked["messages"][-1]["content"]
        )
        checked = check(project)
        assert checked.reasons == {"refusal": 1, "broken blocks": 1} and sum(checked.kept.values()) == 34
        assert generate(project).asked == 0 and check(project).written == 0
        assert used_so_far(project).requests == 41 and used_so_far(project).cost > 0
    built = run_build(project, project.config)
    assert built.kinds == {CONVERSATION: 11, DETAIL: 12, COMPLEX: 11} and built.unreviewed == 34 and not built.missing
    rows = json.loads((built.folder / "llava_instruct.json").read_text())
    assert len(rows) == 34 and {len(row["conversations"]) for row in rows} == {2, 4}
    firsts = [row["conversations"][0] for row in rows]
    assert {turn["from"] for turn in firsts} == {"human"} and all(
        turn["value"].count("<image>") == 1 for turn in firsts
    )
    placed = [turn["value"].startswith("<image>\n") for turn in firsts]
    assert 0 < sum(placed) < 34 and all(turn["value"].endswith("\n<image>") != at for turn, at in zip(firsts, placed))
    dataset = load_from_disk(str(built.folder / "dataset"))
    assert dataset[0]["images"][0].size == (64, 48) and dataset[0]["messages"][0]["content"][0]["type"] == "image"
    assert set(dataset["kind"]) == set(kinds)
    source = f"llava:{built.folder / 'llava_instruct.json'}::images={tmp_path / 'pictures'}"
    read = list(open_rows(source, "messages", epochs=1, shuffle=False).dataset)
    assert len(read) == 34
    card = (built.folder / "README.md").read_text()
    for words in (
        "| conversation | 11 |",
        "check, dropped, refusal | 1",
        "41 requests",
        "answers: m",
        "You are an AI visual",
    ):
        assert words in card, words
    assert str(tmp_path) not in card + (built.folder / "run.json").read_text()
    publication = prepare(built.folder, "me/data", tmp_path, license=License("cc-by-4.0"))
    assert set(publication.files) == {"llava_instruct.json", "run.json", "README.md"} and "me/data" in publication.card
    page = write_page(project, project.config).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "dropped by filter: refusal" in page
    project.close()


def test_a_row_without_an_answer_is_tried_again(tmp_path):
    faults = {f"1/{CONVERSATION}": Reply(status=400), f"2/{CONVERSATION}": Reply(text=None)}
    with ScriptedEndpoint(spoiled(faults)) as endpoint:
        project = make_project(tmp_path, endpoint, images=4, kinds={CONVERSATION: 1})
        done = generate(project)
        assert done.answered == 2 and {kind: count for kind, (count, _) in done.failed.items()} == {
            "refused": 1,
            "empty": 1,
        }
        faults.clear()
        assert generate(project).answered == 2 and sum(check(project).kept.values()) == 4
        project.close()


def test_longer_answers_are_asked_for_where_they_were_cut_off(tmp_path):
    def respond(body):
        short = body["max_tokens"] < 100 and scene_of(body) == 1
        return Reply("Question:\nWhat is", finish_reason="length") if short else good_answer(body)

    with ScriptedEndpoint(respond) as endpoint:
        project = make_project(tmp_path, endpoint, images=3, kinds={CONVERSATION: 1}, max_tokens=50)
        assert generate(project).refused == {"cut off": 1} and check(project).reasons == {"cut off": 1}
        longer = replace(project.config, chat=replace(project.config.chat, max_tokens=500))
        assert generate(project, longer).usage.requests == 1
        assert check(project, longer).reasons == {} and generate(project, longer).asked == 0
        project.close()


def test_near_duplicates_and_what_people_reviewed(tmp_path):
    same = "Question:\nWhat is it?\n===\nAnswer:\nIt is an old bridge over the river in the middle of a green town."
    with ScriptedEndpoint(lambda body: same if scene_of(body) < 4 else good_answer(body)) as endpoint:
        project = make_project(tmp_path, endpoint, images=6, kinds={CONVERSATION: 1})
        generate(project)
        assert check(project).reasons == {"near-duplicate": 2}
        queue = ReviewQueue(project)
        assert "`minigpt4 instruct review" in what_next(project, queue.progress())
        pair = queue.next("anna")
        with pytest.raises(CurationError, match=r"cannot be used \(broken blocks"):
            queue.decide("anna", pair.id, pair.text_id, "edited", "It is a bridge.")
        edited = pair.after.replace("What is it?", "What is this?").replace("What happens", "Who is")
        assert not queue.decide("anna", pair.id, pair.text_id, "edited", edited)
        other = queue.next("anna")
        queue.decide("anna", other.id, other.text_id, "rejected", reason="too vague")
        assert check(project).written == 0
        built = run_build(project, project.config)
        assert sum(built.kinds.values()) == 3 and built.unreviewed == 2
        assert sum(run_build(project, project.config, unreviewed=False).kinds.values()) == 1
        project.close()


def test_a_larger_limit_continues_and_another_source_is_refused(tmp_path):
    with ScriptedEndpoint(good_answer) as endpoint:
        project = make_project(tmp_path, endpoint, limit=5)
        assert generate(project).answered == 5 and generate(project).sampled.total == 5
        more = replace(project.config, limit=9)
        assert generate(project, more).answered == 4 and len(endpoint.requests) == 9
        with pytest.raises(CurationError, match="other captions, instances, seed or kinds"):
            generate(project, replace(more, seed=1, limit=20))
        project.close()


def test_the_plan_sends_and_writes_nothing(tmp_path):
    with ScriptedEndpoint(good_answer) as endpoint:
        config = make_config(tmp_path, endpoint.base_url, limit=6, price_in=10.0, price_out=30.0)
        folder = tmp_path / "project"
        folder.mkdir()
        (folder / "instruct.yaml").write_text(SETTINGS.text(config))
        assert SETTINGS.read(folder / "instruct.yaml") == config
        plan = read_plan(folder)
        assert len(plan.requests) == 3 and plan.estimate.requests == 6 and 0 < plan.estimate.cost < plan.estimate.most
        assert [path.name for path in folder.iterdir()] == ["instruct.yaml"] and not endpoint.requests
        with InstructProject.create(folder) as project:
            generate(project)
        sent = [json.dumps(body["messages"]) for body in endpoint.requests]
        assert all(json.dumps(messages) in sent for _, messages in plan.requests)
        assert read_plan(folder).estimate.requests == 0 and read_plan(folder, limit=8).estimate.requests == 2


def test_budget_and_dead_endpoint_stop_in_one_line(tmp_path):
    with ScriptedEndpoint(good_answer) as endpoint:
        project = make_project(tmp_path, endpoint, concurrency=1, budget_tokens=25_000, max_tokens=300)
        with pytest.raises(BudgetExhausted, match=r"instruct\.yaml; the \d+ texts of this run are kept") as error:
            generate(project)
        assert "\n" not in str(error.value) and 0 < used_so_far(project).tokens <= 25_000
        asked = len(endpoint.requests)
        assert asked > 0
        done = generate(project, replace(project.config, chat=replace(project.config.chat, budget_tokens=None)))
        assert done.answered > 0 and done.answered + asked == len(endpoint.requests)
        project.close()
    project = make_project(tmp_path / "dead", endpoint)
    with pytest.raises(ChatError, match="cannot be reached"):
        generate(project)
    project.close()


def _run(folder) -> None:
    with InstructProject.create(folder) as project:
        generate(project)


def test_a_kill_at_any_moment_loses_no_answer_that_was_paid_for(tmp_path):
    def respond(body):
        again = is_again(body)
        bad = not again and scene_of(body) % 3 == 0
        return Reply("Question:\nWhat?" if bad else good_answer(body), delay=0.02)

    with ScriptedEndpoint(respond) as endpoint:
        folder = tmp_path / "project"
        folder.mkdir()
        config = make_config(tmp_path, endpoint.base_url, kinds={CONVERSATION: 1}, images=30, concurrency=2)
        (folder / "instruct.yaml").write_text(SETTINGS.text(config))
        context = multiprocessing.get_context("fork")
        for stop_after in (8, 20, 34):
            process = context.Process(target=_run, args=(folder,))
            process.start()
            while len(endpoint.requests) < stop_after and process.is_alive():
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        with InstructProject.create(folder) as project:
            generate(project)
            assert sum(check(project).kept.values()) == 30
            # Of each killed run, at most what was in flight is asked again.
            sent = [json.dumps(body["messages"]) for body in endpoint.requests]
            assert len(set(sent)) == 40 and len(sent) <= 40 + 3 * 2
            assert used_so_far(project).requests >= len(sent)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("limit: 0", "limit is 0"),
        ("kinds: {poem: 1}", "no kind 'poem'"),
        ("kinds: {conversation: 0}", "all shares are 0"),
        ("kinds: {conversation: x}", "share of conversation is 'x'"),
        ("language: Klingon", "choose one of English"),
        ("similarity: 2", "between 0 and 1"),
        ("unknown: 1", "unknown keys unknown"),
        ("instances: x.json", "boxes in each line"),
        ("temperature: -1", "temperature"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, line, words):
    (tmp_path / "instruct.yaml").write_text(f"captions: a.jsonl\nmodel: m\n{line}\n")
    with pytest.raises(CurationError, match=words) as error:
        InstructProject(tmp_path)
    assert "\n" not in str(error.value)


def test_the_commands(tmp_path):
    def run(*words) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["instruct", *map(str, words)])
        return result.exit_code, result.stdout, result.stderr

    with ScriptedEndpoint(good_answer) as endpoint:
        make_config(tmp_path, endpoint.base_url)
        files = ("--captions", tmp_path / "captions_tiny.json", "--instances", tmp_path / "instances_tiny.json")
        images = ("--images", tmp_path / "pictures")
        model = ("--model", "m", "--base-url", endpoint.base_url)
        project = tmp_path / "p"
        status, _, err = run("init", project, *files, *images, *model, "--kind", "poem=1")
        assert status == 1 and "no kind 'poem'" in err and not project.exists()
        assert run("init", project, *files, *images, *model, "--kind", "conversation=1", "--limit", 4)[0] == 0
        assert "already exists" in run("init", project, *files, *model)[2]
        assert "holds no curation.sqlite" in run("check", project)[2]
        status, out, _ = run("generate", project, "--dry-run")
        assert status == 0 and out.count("=== request ") == 3 and "4 requests, about" in out and not endpoint.requests
        assert "4 rows answered" in run("generate", project)[2]
        assert "check comes before" in run("build", project)[2].replace("`", "")
        status, _, err = run("check", project)
        assert status == 0 and "4 of 4 rows kept" in err and (project / "report.html").is_file()
        assert "4 pending pairs" in run("review", project, "--export", tmp_path / "pending.csv")[2]
        assert run("build", project)[0] == 0
        assert "passed the check" in run("status", project)[1]
        assert "llava_instruct.json" in run("push", project, "me/x", "--license", "mit", "--dry-run")[1]
    assert {kind_of(body) for body in endpoint.requests} == {CONVERSATION}
