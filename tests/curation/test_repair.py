"""Repair of texts by a language model at a real endpoint: what is flagged, what is kept, what is asked again."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
from histories import history
from scripted_endpoint import HTML_PAGE, Reply, ScriptedEndpoint, user_text
from tiny_chat_model import save_chat_model

from transformers_minigpt4.curation.config import REPAIR_PROMPT, CurationConfig
from transformers_minigpt4.curation.records import Result
from transformers_minigpt4.curation.repair import run_repair
from transformers_minigpt4.curation.repair_checks import added_words, flags
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.spending import used_so_far
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.llm.types import BudgetExhausted, ChatError, ChatSettings


SOURCE = "The picture shows a large red circle. The picture shows a large red circle. It lies in the top left of"
REPAIRED = "The picture shows a large red circle. It lies in the top left."


def text_of(body: dict) -> str:
    prompt, _, text = user_text(body).partition("\n\n")
    assert prompt == REPAIR_PROMPT
    return text


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def make_project(folder, endpoint: ScriptedEndpoint, texts: list[str], **settings) -> tuple[Project, CurationConfig]:
    """A project whose model wrote these texts; the settings are those of the model that repairs."""
    settings = {"max_retries": 0, "timeout": 5.0, **settings}
    config = CurationConfig("somewhere", "x", repair=ChatSettings("m", endpoint.base_url, **settings))
    folder.mkdir(exist_ok=True)
    project = Project.create(folder, config)
    rows = [(f"{n}", f"images/{n}.png", f"digest {n}", {"key": f"{n}"}) for n in range(len(texts))]
    project.add_pairs(rows, "somewhere")
    write(project, dict(enumerate(texts, start=1)))
    return project, config


def changed(config: CurationConfig, **settings) -> CurationConfig:
    return replace(config, repair=replace(config.repair, **settings))


def write(project: Project, texts: dict[int, str]) -> None:
    inputs = {work.pair.id: work.input for work in project.pending("generate", "new")}
    project.record("generate", [Result(i, "old", inputs[i], "ok", text=text) for i, text in texts.items()])


def results(project: Project) -> dict[int, Result]:
    return {pair.id: result for pair, result in project.current("repair")}


def test_texts_are_repaired_and_running_again_asks_nothing(tmp_path):
    texts = [SOURCE, REPAIRED, "", "A small blue star. A small blue star."]
    answers = {SOURCE: REPAIRED, REPAIRED: f'"{REPAIRED}"', texts[3]: "A small blue star."}
    with ScriptedEndpoint(lambda body: answers[text_of(body)]) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, texts, price_in=1.0, price_out=2.0)
        summary = run_repair(project, config, progress=False)
        assert summary.outcomes == {"ok": 4} and summary.changed == 2 and summary.usage.requests == 3
        assert [text for _, text in project.texts("filter")] == [REPAIRED, REPAIRED, "", "A small blue star."]
        details = results(project)[1].details
        assert details["model"] == "m" and details["cost"] > 0 and not details["cached"] and details["flags"] == {}
        assert used_so_far(project) == summary.usage == summary.total
        again = run_repair(project, config, progress=False)
        assert again.outcomes == {} and "nothing to do" in str(again) and again.total == summary.usage
        assert len(endpoint.requests) == 3
        assert endpoint.requests[0]["temperature"] == 0.0


def test_only_what_changed_is_asked_again(tmp_path):
    with ScriptedEndpoint(lambda body: user_text(body).partition("\n\n")[2]) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, [f"A small star number {n}." for n in range(5)])
        run_repair(project, config, progress=False)
        write(project, {2: "A large circle."})
        assert run_repair(project, config, progress=False).outcomes == {"ok": 1}
        assert len(endpoint.requests) == 6
        # Another address and a longer limit change no answer; another prompt does.
        elsewhere = changed(config, base_url=endpoint.base_url + "/", max_tokens=2000)
        assert run_repair(project, elsewhere, progress=False).outcomes == {}
        assert run_repair(project, replace(config, repair_prompt="Mend this."), progress=False).usage.requests == 5
        assert [result.settings for step, result in history(project, 2) if step == "repair"] != []
        # And the old prompt's answers are still known.
        back = run_repair(project, config, progress=False)
        assert back.outcomes == {"ok": 5} and back.usage.requests == 0 and back.usage.cached == 5


BAD_ANSWERS = {
    "added facts": "The picture shows a large red circle and 3 birds. It lies in the top left.",
    "other language": "Das Bild zeigt einen großen roten Kreis. Er liegt oben links und ist sehr schön.",
    "ballooned": REPAIRED + " It is a large circle, a red circle, in the picture." * 3,
    "collapsed": "A circle.",
    "markup": f"<p>{REPAIRED}</p>",
    "leftovers": f"Here is the corrected paragraph: {REPAIRED}",
    "refusal": "I'm sorry, but I cannot see the picture with the large red circle in the top left.",
}


def test_what_a_model_should_not_do_is_flagged_and_goes_on_to_review(tmp_path):
    texts = [f"{SOURCE}{'!' * n}" for n in range(len(BAD_ANSWERS) + 1)]
    answers = dict(zip(texts, [*BAD_ANSWERS.values(), Reply("The picture shows a large", finish_reason="length")]))
    with ScriptedEndpoint(lambda body: answers[text_of(body)]) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, texts)
        summary = run_repair(project, config, progress=False)
        assert summary.outcomes == {"flagged": len(texts)}
        found = results(project)
        for number, name in enumerate([*BAD_ANSWERS, "cut off"], start=1):
            assert name in found[number].reason.split(", "), (name, found[number])
            assert found[number].details["flags"][name]
        assert found[8].text == "The picture shows a large"
        assert len(list(project.texts("filter"))) == len(texts)
        # Raising the limit concerns those alone that it cut off.
        endpoint.respond = lambda body: REPAIRED
        longer = run_repair(project, changed(config, max_tokens=2048), progress=False)
        assert longer.outcomes == {"ok": 1} and results(project)[8].text == REPAIRED


def test_failed_texts_are_tried_again_and_do_not_go_on(tmp_path):
    texts = [f"A small star number {n}." for n in range(6)]
    faults = [Reply(status=500), HTML_PAGE, Reply(""), Reply(body="{"), Reply(cut=True)]
    broken = dict(zip(texts, faults))
    with ScriptedEndpoint(lambda body: broken.get(text_of(body), text_of(body))) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, texts)
        summary = run_repair(project, config, progress=False)
        assert summary.outcomes == {"ok": 1, "failed": 5} and "are tried again" in str(summary)
        assert "2  garbage, such as: " in str(summary) and "ending in /v1" in str(summary)
        reasons = [results(project)[n].reason for n in range(1, 6)]
        assert reasons == ["server", "garbage", "empty", "garbage", "connection"]
        assert all("; " in results(project)[n].details["error"] for n in range(1, 6))
        assert [text for _, text in project.texts("filter")] == texts[5:]
        broken.clear()
        assert run_repair(project, config, progress=False).outcomes == {"ok": 5}
        assert [text for _, text in project.texts("filter")] == texts


def test_a_run_in_which_every_text_fails_is_a_failure(tmp_path):
    with ScriptedEndpoint([Reply(status=400)]) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, [f"A star number {n}." for n in range(3)])
        for _ in range(2):
            summary = run_repair(project, config, progress=False)
            assert summary.outcomes == {"failed": 3}
            with pytest.raises(CurationError, match="the repair failed for all 3 texts"):
                summary.check()
        endpoint.respond = lambda body: Reply(status=400) if "number 0" in text_of(body) else text_of(body)
        run_repair(project, config, progress=False).check()
        # What is hopeless fails again and again, and must not keep the others from the next step.
        again = run_repair(project, config, progress=False)
        assert again.outcomes == {"failed": 1}
        again.check()
        write(project, {2: "A new text."})
        endpoint.respond = [Reply(status=400)]
        with pytest.raises(CurationError, match="for all 2 texts"):
            run_repair(project, config, progress=False).check()


def test_absurd_answers_are_stored(tmp_path):
    """Token counts that SQLite cannot hold, and halves of surrogate pairs, which it cannot encode."""
    usage = {"prompt_tokens": 10**30, "completion_tokens": -1}
    choice = {"message": {"content": "A star. \ud800"}, "finish_reason": "\udfff"}
    reply = Reply(body=json.dumps({"choices": [choice], "usage": usage}))
    with ScriptedEndpoint([reply]) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, ["A star."], price_in=1.0, price_out=1.0)
        summary = run_repair(project, config, progress=False)
        assert summary.usage == used_so_far(project) and 0 < summary.usage.tokens < 10_000
        assert results(project)[1].text == "A star. ?"


def test_an_exhausted_budget_stops_and_keeps_what_is_done(tmp_path):
    texts = [f"A small star number {n}." for n in range(20)]
    budget = {"budget_tokens": 3000, "max_tokens": 100, "concurrency": 2}
    with ScriptedEndpoint(lambda body: Reply(text_of(body), prompt_tokens=400, completion_tokens=20)) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, texts, **budget)
        with pytest.raises(BudgetExhausted, match="raise repair_budget_tokens") as caught:
            run_repair(project, config, progress=False)
        done = len(results(project))
        assert done == len(endpoint.requests) > 3 and used_so_far(project).tokens == 420 * done <= 3000
        assert f"the {done} texts of this run are kept and {20 - done} are left" in str(caught.value)
        assert "\n" not in str(caught.value)
        # The budget is the project's: running again does not start it anew.
        with pytest.raises(BudgetExhausted):
            run_repair(project, config, progress=False)
        assert len(endpoint.requests) == done
        run_repair(project, changed(config, budget_tokens=100_000), progress=False)
        assert len(results(project)) == 20 == len(endpoint.requests)


def test_a_wrong_key_and_a_dead_endpoint_stop_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-wrong-wrong")
    with ScriptedEndpoint(key="right") as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, ["A star."] * 50)
        with pytest.raises(ChatError, match="put a valid one into the environment variable OPENAI_API_KEY") as caught:
            run_repair(project, config, progress=False)
        assert "sk-wrong" not in str(caught.value) and len(endpoint.requests) <= 8
        assert b"sk-wrong" not in b"".join(path.read_bytes() for path in (tmp_path / "p").iterdir() if path.is_file())
    with pytest.raises(ChatError, match=r"start the server, or correct repair_base_url \(settings in curation.yaml"):
        run_repair(project, config, progress=False)
    assert results(project) == {}


def test_a_kill_at_any_moment_loses_no_answer_that_was_paid_for(tmp_path):
    texts = [f"A small star number {n}." for n in range(60)]
    with ScriptedEndpoint(lambda body: Reply(text_of(body), delay=0.01)) as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, texts, concurrency=3)
        project.close()

        def work():
            run_repair(Project.open(tmp_path / "p", config), config, progress=False)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        deadline = time.monotonic() + 30
        while len(results(project)) < 10 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done = len(results(project))
        assert 10 <= done < 60
        summary = run_repair(project, config, progress=False)
        assert summary.outcomes == {"ok": 60 - done}
        assert [text for _, text in project.texts("filter")] == texts
        assert len(endpoint.requests) <= 60 + 3
        # What was in flight may be billed, so the next run has counted it in full.
        assert used_so_far(project).requests >= len(endpoint.requests)
        assert used_so_far(project).completion_tokens > 3 * config.repair.max_tokens
        assert all(len([r for step, r in history(project, n) if step == "repair"]) == 1 for n in range(1, 61))


def test_a_local_model_repairs_too(tmp_path):
    """This one writes of other images, which is noticed."""
    with ScriptedEndpoint() as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, ["A small star.", "A large ring."])
        model = save_chat_model(tmp_path / "model")
        local = changed(config, base_url=None, model=model, max_tokens=60)
        summary = run_repair(project, local, progress=False)
        assert not endpoint.requests
    assert summary.outcomes == {"flagged": 2} and summary.usage.requests == 2
    assert summary.usage.completion_tokens == sum(r.details["completion_tokens"] for r in results(project).values())
    assert all("added facts" in result.reason and result.text for result in results(project).values())
    assert "nothing to do" in str(run_repair(project, local, progress=False))


def test_two_processes_take_turns(tmp_path):
    with ScriptedEndpoint() as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, ["A star."])
        with project.writer("filter"), pytest.raises(CurationError, match="another process works on"):
            run_repair(project, config, progress=False)
        assert not endpoint.requests


def test_without_a_model_there_is_no_repair(tmp_path):
    with ScriptedEndpoint() as endpoint:
        project, config = make_project(tmp_path / "p", endpoint, ["A star."])
        with pytest.raises(CurationError, match="set repair_model in"):
            run_repair(project, replace(config, repair=None), progress=False)


@pytest.mark.parametrize(
    "source,repaired,added",
    [
        ("A dog is sitting on the grass.", "A dog sits on the grass.", []),
        ("Two dogs stands near buildngs.", "2 dogs stand near buildings.", []),
        ("The image shows a man's shoes", "In this photo, the shoes of a man are visible.", []),
        ("The man wears a hat and", "The man wears a hat and a coat.", ["coat"]),
        ("There is a dog.", "There is no dog.", ["no"]),
        ("There are two dogs.", "There are three dogs at 5.", ["three", "5"]),
        ("A bed.", "A red bed.", ["red"]),
        ("A tree for a child.", "A forest for a child.", ["forest"]),
        ("A house.", "A horse.", ["horse"]),
        ("A cat in a box.", "A cat under a box.", ["under"]),
        ("Ein Haus.", "A house.", ["house"]),
        ("", "", []),
    ],
)
def test_added_words(source, repaired, added):
    assert added_words(source, repaired) == added


@pytest.mark.parametrize(
    "source,repaired",
    [
        (SOURCE, REPAIRED),
        (REPAIRED, REPAIRED),
        ("a red a red a red a red a red circle " * 20, "A red circle."),  # long by repetition alone
        ("I'm sorry, I made a mistake. It is a red circle.", "I'm sorry, I made a mistake. It is a red circle."),
        ("The sign <b> says that 2 < 3 & more.", "The sign <b> says that 2 < 3 & more."),
        ("Sure enough, a red circle: large.", "Sure enough, a red circle: large."),
        ("Das ist ein roter Kreis und er ist sehr groß.", "Das ist ein roter Kreis und er ist sehr groß."),
    ],
)
def test_good_repairs_are_not_flagged(source, repaired):
    assert flags(source, repaired, REPAIR_PROMPT) == {}


@pytest.mark.parametrize(
    "answer,flag",
    [
        (f"**{REPAIRED}**", "markup"),
        (f"```\n{REPAIRED}\n```", "markup"),
        (f"- {REPAIRED}", "markup"),
        (f"{REPAIRED} Tom &amp; Co", "markup"),
        (f"Sure, here you go: {REPAIRED}", "leftovers"),
        (f"Remove unnecessary repetition. {REPAIRED}", "leftovers"),
        (f"{REPAIRED} ###", "leftovers"),
        ("На картинке изображён большой красный круг слева вверху.", "other language"),
        ("As an AI language model, I can tell that the large red circle lies top left.", "refusal"),
        ("", "collapsed"),
    ],
)
def test_more_that_is_flagged(answer, flag):
    assert flag in flags(SOURCE, answer, REPAIR_PROMPT)
    assert flag not in flags(SOURCE, REPAIRED, REPAIR_PROMPT)


def test_a_prompt_of_ones_own_is_recognised_too():
    assert "leftovers" in flags(SOURCE, "Please polish my prose a bit. " + REPAIRED, "Please polish my prose a bit.")
