"""Answers on disk: running again costs nothing, and two processes share one file."""

import contextlib
import sqlite3
import subprocess
import sys

import pytest
from processes import program
from scripted_endpoint import Reply, ScriptedEndpoint, user_text

from transformers_minigpt4.llm.cache import AnswerCache
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatAnswer, ChatError, ChatSettings


# Writes and reads along with another process, as soon as that one is ready too.
WRITER = """
import sys
from transformers_minigpt4.llm.cache import AnswerCache
from transformers_minigpt4.llm.types import ChatAnswer
print("ready", flush=True)
sys.stdin.readline()
cache = AnswerCache(sys.argv[1])
for number in range(200):
    cache.put(f"shared {number}", ChatAnswer(sys.argv[2], "stop", 1, 1, 0.0))
    cache.put(f"{sys.argv[2]} {number}", ChatAnswer("own", "stop", 1, 1, 0.0))
    assert cache.get(f"shared {number}").text in ("a", "b")
cache.close()
"""


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_running_again_costs_nothing(tmp_path):
    cache = tmp_path / "made" / "answers.sqlite"
    with ScriptedEndpoint(lambda body: user_text(body).upper()) as endpoint:
        settings = ChatSettings("m", base_url=endpoint.base_url, price_in=1.0, price_out=1.0)
        for run in range(2):
            with open_chat_model(settings, cache) as model:
                answers = dict(model.complete_many((n, ask(f"word {n}")) for n in range(10)))
                assert [answers[n].text for n in range(10)] == [f"WORD {n}" for n in range(10)]
                assert all(answer.cached == bool(run) and (answer.cost > 0) != run for answer in answers.values())
                usage = model.usage
        assert len(endpoint.requests) == 10
        assert (usage.requests, usage.cached, usage.tokens, usage.cost) == (0, 10, 0, 0.0)


def test_whatever_decides_the_answer_is_part_of_the_question(tmp_path):
    with ScriptedEndpoint() as endpoint, ScriptedEndpoint() as other:
        base = {"model": "m", "base_url": endpoint.base_url}
        changes = [{}, {"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}, {"base_url": other.base_url}]
        for change in [*changes, {"timeout": 7.0, "concurrency": 2}]:
            with open_chat_model(ChatSettings(**{**base, **change}), tmp_path / "answers") as model:
                model.complete(ask("?"))
        assert len(endpoint.requests) + len(other.requests) == len(changes)


def test_failures_are_asked_again_and_answers_cut_off_are_not(tmp_path):
    def settings(endpoint):
        return ChatSettings("m", base_url=endpoint.base_url, max_retries=0)

    with ScriptedEndpoint([Reply(status=500), Reply("half", finish_reason="length"), "never"]) as endpoint:
        for kind in ("server", "cut_off", "cut_off"):
            with open_chat_model(settings(endpoint), tmp_path / "answers") as model:
                with pytest.raises(ChatError) as caught:
                    model.complete(ask("?"))
                assert caught.value.kind == kind
        assert caught.value.answer.text == "half" and caught.value.answer.cached
        assert len(endpoint.requests) == 2


def test_the_white_space_of_an_answer_is_kept_for_those_who_need_it(tmp_path):
    with ScriptedEndpoint([" 8 9\n"]) as endpoint:
        settings = ChatSettings("m", base_url=endpoint.base_url)
        for _ in range(2):
            with open_chat_model(settings, tmp_path / "answers") as model:
                answer = model.complete(ask("?"))
                assert (answer.text, answer.received) == ("8 9", " 8 9\n")
        assert answer.cached


def test_another_temperature_is_another_question(tmp_path):
    with (
        ScriptedEndpoint(["cold", "warm"]) as endpoint,
        open_chat_model(ChatSettings("m", base_url=endpoint.base_url), tmp_path / "answers") as model,
    ):
        assert model.complete(ask("?")).text == "cold"
        with model.at_temperature(0.2):
            assert model.complete(ask("?")).text == "warm"
        assert model.complete(ask("?")).text == "cold"
        assert [request["temperature"] for request in endpoint.requests] == [0, 0.2]


def test_two_processes_share_one_file(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "answers")]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(program([*command, name], stdin=subprocess.PIPE)) for name in "ab"]
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    cache = AnswerCache(tmp_path / "answers")
    assert all(cache.get(f"{name} {number}").text == "own" for name in "ab" for number in range(200))
    cache.close()


def test_files_that_are_not_a_cache(tmp_path):
    text, folder, later = tmp_path / "text", tmp_path / "folder", tmp_path / "later"
    text.write_text("not a database, but long enough to be one" * 100)
    folder.mkdir()
    connection = sqlite3.connect(later)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ValueError, match="is not a cache of answers"):
        AnswerCache(text)
    with pytest.raises(OSError, match="cannot open the cache"):
        AnswerCache(folder)
    with pytest.raises(ValueError, match="later version of this package"):
        AnswerCache(later)


def test_a_full_disk_says_so_and_keeps_what_is_there(tmp_path):
    cache = AnswerCache(tmp_path / "answers")
    answer = ChatAnswer("x" * 100_000, "stop", 1, 1, 0.0)
    cache.put("first", answer)
    pages = cache._connection.execute("PRAGMA page_count").fetchone()[0]
    cache._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to play a full disk
    with pytest.raises(OSError, match="full; free some space"):
        cache.put("second", answer)
    assert cache.get("first") == answer and cache.get("second") is None
    cache.close()
