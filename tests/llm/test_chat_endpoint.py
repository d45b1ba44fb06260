"""The endpoint's client against a real HTTP server: answers, pace, retries, budget, and every fault in plain words."""

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from scripted_endpoint import HTML_PAGE, Reply, ScriptedEndpoint, user_text

from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import KINDS, BudgetExhausted, ChatAnswer, ChatError, ChatSettings, Usage


KEY = "sk-proj-" + "0123456789abcdef" * 2


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def settings(endpoint: ScriptedEndpoint, **changes) -> ChatSettings:
    return ChatSettings("small-judge", base_url=endpoint.base_url, **{"max_retries": 1, "timeout": 5.0, **changes})


def failure(replies, key: str | None = None, **changes) -> ChatError:
    """The error of one request to an endpoint that gives these replies."""
    with ScriptedEndpoint(replies, key=key) as endpoint, open_chat_model(settings(endpoint, **changes)) as model:
        with pytest.raises(ChatError) as caught:
            model.complete(ask("Is it red?"))
        caught.value.sent = len(endpoint.requests)
        caught.value.usage = model.usage
    message = str(caught.value)
    assert "\n" not in message and "; " in message  # one line: what happened; what to do
    return caught.value


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_an_answer_with_what_it_took(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        ScriptedEndpoint([Reply(" It is red.\n", prompt_tokens=1000, completion_tokens=500)], key=KEY) as endpoint,
        open_chat_model(settings(endpoint, price_in=2.0, price_out=8.0, max_tokens=77)) as model,
    ):
        answer = model.complete(ask("Which color?"))
        assert answer == ChatAnswer("It is red.", "stop", 1000, 500, 0.006)
        assert model.usage == Usage(requests=1, prompt_tokens=1000, completion_tokens=500, cost=0.006)
        assert model.name == "small-judge"
        assert endpoint.requests == [
            {"model": "small-judge", "messages": ask("Which color?"), "temperature": 0.0, "max_tokens": 77}
        ]


def test_a_local_server_gets_no_key():
    with ScriptedEndpoint() as endpoint, open_chat_model(settings(endpoint)) as model:
        assert model.complete(ask("?")).text == "Yes."
        assert "authorization" not in endpoint.headers[0]


def test_the_key_may_be_in_another_variable(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        ScriptedEndpoint(key=KEY) as endpoint,
        open_chat_model(settings(endpoint, api_key_env="JUDGE_KEY")) as model,
    ):
        assert model.complete(ask("?")).text == "Yes."


def test_many_in_flight_but_no_more_than_asked_for_and_taken_lazily():
    drawn = []

    def questions():
        for number in range(40):
            drawn.append(number)
            yield number, ask(f"question {number}")

    with (
        ScriptedEndpoint(lambda body: Reply(user_text(body).upper(), delay=0.02)) as endpoint,
        open_chat_model(settings(endpoint, concurrency=5)) as model,
    ):
        results = model.complete_many(questions())
        key, answer = next(results)
        assert answer.text == f"QUESTION {key}" and len(drawn) <= 6
        answers = dict(results) | {key: answer}
        assert {key: answer.text for key, answer in answers.items()} == {n: f"QUESTION {n}" for n in range(40)}
        assert 2 <= endpoint.most_at_once <= 5
        assert model.usage.requests == 40


def test_one_failure_among_many_is_a_result_of_its_own():
    def respond(body):
        return Reply(status=400) if user_text(body) == "3" else "fine"

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint)) as model:
        results = dict(model.complete_many((n, ask(str(n))) for n in range(6)))
    assert isinstance(results.pop(3), ChatError)
    assert {answer.text for answer in results.values()} == {"fine"} and len(results) == 5


def test_requests_keep_their_pace():
    with (
        ScriptedEndpoint() as endpoint,
        open_chat_model(settings(endpoint, requests_per_minute=1200, concurrency=8)) as model,
    ):
        list(model.complete_many((n, ask(str(n))) for n in range(8)))
        assert endpoint.times[-1] - endpoint.times[0] > 7 * 0.05 * 0.9


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_and_heard_by_all(form):
    # A date has whole seconds, so it may stand for up to a second less.
    ask_to_wait = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    replies = [Reply(status=429, headers={"Retry-After": ask_to_wait}), Reply("fine")]
    with ScriptedEndpoint(replies) as endpoint, open_chat_model(settings(endpoint, concurrency=1)) as model:
        began = time.time()
        assert [answer.text for _, answer in model.complete_many([(1, ask("a")), (2, ask("b"))])] == ["fine", "fine"]
        waited = endpoint.times[1] - endpoint.times[0]
        assert time.time() - began < 6
        assert waited > (1.0 if form == "seconds" else 1.5)
        assert model.usage.requests == 3


def test_a_pause_holds_other_threads_back_too():
    first = threading.Event()

    def respond(body):
        if first.is_set():
            return "fine"
        first.set()
        return Reply(status=429, headers={"Retry-After": "0.6"})

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint, concurrency=2)) as model:

        def questions():
            yield 1, ask("a")
            first.wait(5)
            time.sleep(0.2)  # the first thread has heard of the pause
            yield 2, ask("b")

        assert all(answer.text == "fine" for _, answer in model.complete_many(questions()))
        assert endpoint.times[1] - endpoint.times[0] > 0.5


def test_too_long_a_pause_ends_the_run():
    error = failure([Reply(status=429, headers={"Retry-After": "3600"})])
    assert error.kind == "rate_limit" and error.fatal and error.sent == 1
    assert "3,600 s" in str(error) and "run again later" in str(error)


@pytest.mark.parametrize(
    "bad",
    [Reply(status=500), Reply(status=503), Reply(drop=True), Reply(cut=True), HTML_PAGE, Reply("")],
    ids=["500", "503", "dropped", "cut", "html", "empty"],
)
def test_what_may_pass_is_tried_again(bad):
    with ScriptedEndpoint([bad, Reply("fine")]) as endpoint, open_chat_model(settings(endpoint)) as model:
        assert model.complete(ask("?")).text == "fine"
        assert model.usage.requests == len(endpoint.requests) == 2


FAULTS = {
    "slow": (Reply(delay=3), "timeout", "did not answer within 0.3 s", "raise the time-out", 2),
    "429": (Reply(status=429), "rate_limit", "too many requests", "requests_per_minute", 2),
    "500": (Reply(status=500), "server", "status 500 (scripted fault 500)", "server's log", 2),
    "garbage": (Reply(body="{{{"), "garbage", "not a chat completion: '{{{'", "base_url", 2),
    "other JSON": (Reply(body='{"choices": []}'), "garbage", "not a chat completion", "base_url", 2),
    "a number": (Reply(body="17"), "garbage", "not a chat completion", "base_url", 2),
    "no bytes": (Reply(body=b""), "garbage", "not a chat completion", "base_url", 2),
    "text as number": (
        Reply(body='{"choices": [{"message": {"content": 3}}]}'),
        "garbage",
        "not a chat completion",
        "base_url",
        2,
    ),
    "HTML": (HTML_PAGE, "garbage", "a web page: '<!DOCTYPE html>", "ending in /v1", 2),
    "nested": (Reply(body="[" * 100_000 + "]" * 100_000), "garbage", "not a chat completion", "base_url", 2),
    "empty": (Reply(" \n"), "empty", "an empty answer", "another model", 2),
    "null": (Reply(None), "empty", "an empty answer", "another model", 2),
    "cut connection": (Reply(cut=True), "connection", "broke the connection", "server's log", 2),
    "dropped": (Reply(drop=True), "connection", "broke the connection", "server's log", 2),
    "length": (Reply("half an", finish_reason="length"), "cut_off", "was cut off at 2 tokens", "raise max_tokens", 1),
    "nothing before length": (Reply("", finish_reason="length"), "empty", "before its limit", "raise max_tokens", 2),
    "filtered": (Reply("", finish_reason="content_filter"), "filtered", "blocked the answer", "another model", 1),
    "no key": (Reply(status=401), "auth", "requires a key (status 401", "environment variable OPENAI_API_KEY", 1),
    "404": (Reply(status=404), "not_found", "404", "check base_url and the model", 1),
    "400": (Reply(status=400), "refused", "refuses the request", "check settings and prompt", 1),
    "402": (Reply(status=402), "quota", "asks for payment", "top up the account", 1),
    "quota": (
        Reply(status=429, body='{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'),
        "quota",
        "You exceeded your quota",
        "top up the account",
        1,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_says_what_happened_and_what_to_do(name):
    reply, kind, what, remedy, sent = FAULTS[name]
    error = failure([reply], timeout=0.3 if name == "slow" else 5.0)
    assert error.kind == kind and kind in KINDS, str(error)
    happened, _, to_do = str(error).rpartition("; ")
    assert what in happened and remedy in to_do, str(error)
    assert error.sent == sent and error.usage.requests == sent
    assert error.fatal == (kind in ("auth", "not_found", "quota"))
    if sent > 1:
        assert "(2 tries)" in str(error)


def test_nothing_at_the_address():
    with ScriptedEndpoint() as endpoint:
        pass
    with open_chat_model(settings(endpoint)) as model, pytest.raises(ChatError) as caught:
        list(model.complete_many((n, ask(str(n))) for n in range(1000)))
    assert caught.value.kind == "down" and caught.value.fatal
    assert "start the server, or correct base_url" in str(caught.value)
    assert model.usage.tokens == 0


def test_a_trickle_is_slow_too():
    """Each byte comes in time, the answer does not."""
    began = time.monotonic()
    assert failure([Reply(trickle=0.05)], timeout=0.5, max_retries=0).kind == "timeout"
    assert time.monotonic() - began < 2


def test_headers_that_never_end_are_slow_too():
    """Each read gets a byte in time, so that the client's own time-out never comes."""
    began = time.monotonic()
    assert failure([Reply(drip=0.05)], timeout=0.5, max_retries=0).kind == "timeout"
    assert time.monotonic() - began < 5


def test_a_connection_that_never_comes_about():
    """A server whose queue is full answers no attempt to connect; it is down, and not only slow."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as opened:
        address = server.getsockname()
        for _ in range(2):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        chosen = ChatSettings("m", f"http://127.0.0.1:{address[1]}/v1", timeout=0.5, max_retries=0)
        with open_chat_model(chosen) as model, pytest.raises(ChatError, match="start the server") as caught:
            model.complete(ask("?"))
    assert caught.value.kind == "down"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_server_is_not_followed(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ScriptedEndpoint() as other:
        error = failure([Reply(status=status, headers={"Location": f"{other.base_url}/chat/completions"})])
        assert not other.requests
    assert error.kind == "redirected" and error.fatal and error.sent == 1
    assert f"redirects elsewhere, to {other.base_url}/chat/completions" in str(error)
    assert error.usage.tokens == 0


def test_a_redirect_on_the_same_server_is_followed_a_few_times():
    again = Reply(status=307, headers={"Location": "/v1/chat/completions"})
    with ScriptedEndpoint([again, "fine"]) as endpoint, open_chat_model(settings(endpoint)) as model:
        assert model.complete(ask("?")).text == "fine"
        assert endpoint.requests[0] == endpoint.requests[1]
    error = failure([again])
    assert error.kind == "redirected" and error.fatal and error.sent == 4
    assert "redirects more than 3 times" in str(error)


def test_a_wrong_key_stops_at_once_and_is_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {'x' * 150}\x1b[31m {KEY}"}})
    with caplog.at_level("DEBUG"), ScriptedEndpoint([Reply(status=401, body=echo)]) as endpoint:
        with open_chat_model(settings(endpoint, concurrency=4)) as model, pytest.raises(ChatError) as caught:
            list(model.complete_many((n, ask(str(n))) for n in range(1000)))
        assert len(endpoint.requests) <= 4
    error = caught.value
    assert error.kind == "auth" and error.fatal and "put a valid one into" in str(error)
    assert "\x1b" not in str(error)
    shown = caplog.text + "".join(traceback.format_exception(error)) + repr(model.settings)
    assert not any(KEY[start : start + 12] in shown for start in range(len(KEY) - 12))


@pytest.mark.parametrize(("bad", "kind"), [(Reply(status=500), "server"), (HTML_PAGE, "garbage")])
def test_an_endpoint_that_only_fails_stops_the_run(bad, kind):
    with ScriptedEndpoint([bad]) as endpoint:
        with open_chat_model(settings(endpoint, max_retries=0)) as model, pytest.raises(ChatError) as caught:
            list(model.complete_many((n, ask(str(n))) for n in range(1000)))
        assert caught.value.kind == kind and len(endpoint.requests) < 30


def test_the_budget_holds_with_many_in_flight():
    """Every answer is as long as allowed; the endpoint's own count never passes the budget."""
    billed = []

    def respond(body):
        tokens = len(user_text(body)) // 4 + 50
        billed.append(tokens)
        return Reply("word", delay=0.01, prompt_tokens=tokens - 50, completion_tokens=50)

    with (
        ScriptedEndpoint(respond) as endpoint,
        open_chat_model(settings(endpoint, budget_tokens=3000, max_tokens=50, concurrency=8)) as model,
    ):
        done = []
        with pytest.raises(BudgetExhausted) as caught:
            for key, _ in model.complete_many((n, ask("x" * 200)) for n in range(100)):
                done.append(key)
        assert sum(billed) <= 3000 and model.usage.tokens == sum(billed)
        assert len(done) == len(billed)  # what was paid for was given
        # Waiting for those in flight lets it go as far as one request at a time would.
        assert sum(billed) > 3000 - (200 + 16 + 64 + 50)
    assert "raise budget_tokens" in str(caught.value) and caught.value.kind == "budget"


def test_the_budget_may_be_money_and_counts_earlier_runs():
    with ScriptedEndpoint([Reply(prompt_tokens=100, completion_tokens=100)]) as endpoint:
        chosen = settings(endpoint, budget_cost=1.0, price_in=1000.0, price_out=1000.0, max_tokens=100, concurrency=1)
        with open_chat_model(chosen, spent=Usage(cost=0.3)) as model, pytest.raises(BudgetExhausted) as caught:
            list(model.complete_many((n, ask("x" * 100)) for n in range(10)))
        # One takes up to 280 tokens, 0.28: 0.3, 0.5 and 0.7 leave room for it, 0.9 does not.
        assert len(endpoint.requests) == 3 and model.usage.cost == pytest.approx(0.6)
    assert "raise budget_cost" in str(caught.value)


def test_a_lost_answer_counts_in_full():
    error = failure([Reply(cut=True)], max_tokens=500, max_retries=0, budget_tokens=5000)
    assert error.usage.completion_tokens == 500 and error.usage.prompt_tokens > 10
    assert failure([Reply(status=504)], max_retries=0).usage.completion_tokens == 1024
    assert failure([Reply(status=500)], max_retries=0).usage.tokens == 0  # refused ones are not billed


def test_missing_and_absurd_counts_become_the_most_it_can_have_been():
    absurd = [
        Reply(body=f'{{"choices": [{{"message": {{"content": "abc"}}}}], "usage": {usage}}}')
        for usage in (
            '{"prompt_tokens": -5}',
            f'{{"prompt_tokens": {10**30}, "completion_tokens": {2**63}}}',
            '{"prompt_tokens": NaN, "completion_tokens": 1e400}',
            '{"prompt_tokens": "many", "completion_tokens": true}',
            "[1, 2]",
        )
    ]
    for reply in (Reply("abc", usage=False), *absurd):
        with ScriptedEndpoint([reply]) as endpoint, open_chat_model(settings(endpoint)) as model:
            answer = model.complete(ask("x" * 10))
            assert (answer.prompt_tokens, answer.completion_tokens) == (10 + 16 + 64, 3)


def test_half_a_surrogate_pair_becomes_a_character_that_files_can_hold(tmp_path):
    broken = Reply(body='{"choices": [{"message": {"content": "a \\ud800 b"}, "finish_reason": "\\udfff"}]}')
    with (
        ScriptedEndpoint([broken]) as endpoint,
        open_chat_model(settings(endpoint), tmp_path / "answers.sqlite") as model,
    ):
        assert model.complete(ask("\udc80 ok")).text == "a ? b"
        assert endpoint.requests[0]["messages"] == ask("? ok")


def test_newer_models_get_the_limit_under_its_newer_name():
    def respond(body):
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Reply(status=400, body=json.dumps({"error": {"message": message, "param": "max_tokens"}}))
        return f"at most {body['max_completion_tokens']}"

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint, max_tokens=9)) as model:
        assert model.complete(ask("?")).text == model.complete(ask("?")).text == "at most 9"
        assert len(endpoint.requests) == 3


def test_stopping_early_waits_for_nobody():
    with ScriptedEndpoint(lambda body: Reply(delay=0 if user_text(body) == "0" else 2)) as endpoint:
        model = open_chat_model(settings(endpoint, concurrency=4))
        began = time.monotonic()
        results = model.complete_many((n, ask(str(n))) for n in range(100))
        next(results)
        results.close()
        assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"base_url": "127.0.0.1:8000"}, "give an address such as"),
        ({"base_url": "http://user:secret@host/v1"}, "environment variable"),
        ({"base_url": "https://host/v1?key=secret"}, "environment variable"),
        ({"budget_cost": 1.0}, "price_in and price_out"),
        ({"concurrency": 0}, "set it to 1 or more"),
        ({"timeout": 0}, "above 0"),
        ({"requests_per_minute": float("nan")}, "above 0"),
        ({"temperature": -1}, "0 or more"),
        ({"model": ""}, "set `model`"),
    ],
)
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        ChatSettings(**{"model": "m", "base_url": "http://127.0.0.1:1/v1", **changes})
    assert "secret" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ChatError, match=r'pip install "transformers_minigpt4\[curation\]"'):
        open_chat_model(ChatSettings("m", base_url="http://127.0.0.1:1/v1"))


def test_a_conversation_of_another_form():
    with ScriptedEndpoint() as endpoint, open_chat_model(settings(endpoint)) as model:
        for wrong in ([], [{"role": "user"}], ["hello"], [{"role": "user", "content": [{"type": "text"}]}]):
            with pytest.raises(ValueError, match="a conversation is a list"):
                model.complete(wrong)
        assert not endpoint.requests


def test_settings_from_flat_options():
    options = {"judge_model": "m", "judge_timeout": 5, "judge_budget_tokens": None, "tasks": "all"}
    assert ChatSettings.from_options(options, "judge_") == ChatSettings("m", timeout=5.0)
    assert ChatSettings.from_options({**options, "judge_model": None}, "judge_") is None
    for change, words in (
        ({"judge_concurrency": 0}, "`judge_concurrency` is 0; set it to 1 or more"),
        ({"judge_budget_cost": 1.0}, "judge_budget_cost needs prices; set judge_price_in and judge_price_out"),
        ({"judge_max_tokens": "many"}, "judge_max_tokens is 'many', but must be of type int"),
        ({"judge_max_tokens": True}, "judge_max_tokens is True, but must be of type int"),
        ({"judge_model": ""}, "set `judge_model` to its name at the endpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            ChatSettings.from_options({**options, **change}, "judge_")
