"""Judges: strict answers, one further try, both orders, what is kept when an endpoint dies; over real HTTP."""

from pathlib import Path

import pytest
from scripted_endpoint import Reply, ScriptedEndpoint

from transformers_minigpt4.evaluation.judging import (
    TWO_SCORES,
    YES_NO,
    JudgeStopped,
    judge_all,
    judge_in_both_orders,
    need_judge,
    parse_two_scores,
    parse_yes_no,
)
from transformers_minigpt4.evaluation.tasks import load_task
from transformers_minigpt4.evaluation.tasks.advanced import CRITERIA
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatSettings


def settings(endpoint, **more):
    return ChatSettings("judge", base_url=endpoint.base_url, **{"max_retries": 0, "timeout": 5.0, **more})


@pytest.mark.parametrize(
    "text,value",
    [
        ("yes", True),
        (" Yes.\n", True),
        ("**No**", False),
        ('"no"', False),
        ("Yes, it does.", None),
        ("It covers all of them.", None),
        ("yes no", None),
        ("", None),
    ],
)
def test_yes_or_no(text, value):
    assert parse_yes_no(text) is value


@pytest.mark.parametrize(
    "text,value",
    [
        ("8 9", (8.0, 9.0)),
        ("8.5, 7\nThe first is better.", (8.5, 7.0)),
        ("\n10 1", (10.0, 1.0)),
        ("**8 9**\n", (8.0, 9.0)),
        ("8", None),
        ("8 9 7", None),
        ("11 5", None),
        ("0 5", None),
        ("Assistant 1: 8, assistant 2: 9", None),
        ("The scores are\n8 9", None),
        ("", None),
    ],
)
def test_two_scores(text, value):
    assert parse_two_scores(text) == value


def test_an_answer_in_prose_is_asked_for_once_more():
    def respond(body):
        messages = body["messages"]
        question = messages[0]["content"]
        if len(messages) == 1:
            return "yes" if question == "plain" else "I think that it does."
        assert messages[1] == {"role": "assistant", "content": "I think that it does."}
        assert messages[2] == {"role": "user", "content": YES_NO.reminder}
        return "No." if question == "prose" else "Well, well."

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint)) as judge:
        verdicts = judge_all(judge, [(word, word) for word in ("plain", "prose", "stubborn")], YES_NO)
        assert len(endpoint.requests) == 5
    assert {key: verdict.value for key, verdict in verdicts.items()} == {
        "plain": True,
        "prose": False,
        "stubborn": None,
    }
    assert verdicts["stubborn"].text == "Well, well."


@pytest.mark.parametrize(
    "reply", [Reply(text=""), Reply(text=None), Reply(status=400), Reply(finish_reason="content_filter")]
)
def test_a_question_that_cannot_be_answered_is_counted_apart(reply):
    """Faults of one question: the others keep their verdicts, this one has none."""

    def respond(body):
        return reply if body["messages"][0]["content"] == "bad" else "no"

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint)) as judge:
        verdicts = judge_all(judge, [("a", "good"), ("b", "bad"), ("c", "good")], YES_NO)
    assert {key: verdict.value for key, verdict in verdicts.items()} == {"a": False, "b": None, "c": False}


def test_scores_count_though_the_explanation_is_cut_off():
    with (
        ScriptedEndpoint([Reply("7 9\nThe first answer is", finish_reason="length")]) as endpoint,
        open_chat_model(settings(endpoint)) as judge,
    ):
        verdicts = judge_all(judge, [("a", "?")], TWO_SCORES)
    assert verdicts["a"].value == (7.0, 9.0)


def test_the_same_question_is_paid_once_and_has_one_answer():
    """Also while its first request is under way, which the cache cannot know of."""
    words = iter(["yes", "no", "no", "no"])
    with ScriptedEndpoint(lambda body: Reply(next(words), delay=0.1)) as endpoint:
        with open_chat_model(settings(endpoint)) as judge:
            verdicts = judge_all(judge, [("a", "Is it?"), ("b", "Is it?"), ("c", "Is it?")], YES_NO)
        assert len(endpoint.requests) == 1
    assert [verdicts[key].value for key in "abc"] == [True, True, True]


def test_both_orders_cancel_a_judge_that_favours_the_first():
    """A judge that gives the first candidate two points more than it deserves."""
    worth = {"good": 8, "poor": 4}

    def respond(body):
        first, second = body["messages"][0]["content"].split(" | ")
        return f"{worth[first] + 2} {worth[second]}"

    def write(first, second):
        return f"{first} | {second}"

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint)) as judge:
        verdicts = judge_in_both_orders(judge, [("a", write, "good", "poor"), ("b", write, "poor", "good")])
        asked = sorted(body["messages"][0]["content"] for body in endpoint.requests)
    assert asked == ["good | poor", "poor | good"]  # the other order of one pair is the other pair
    assert verdicts["a"].value == (9.0, 5.0) and verdicts["b"].value == (5.0, 9.0)


def test_a_pair_read_in_one_order_alone_has_no_score():
    def respond(body):
        return "8 8" if body["messages"][0]["content"].startswith("good") else "both are fine"

    with ScriptedEndpoint(respond) as endpoint, open_chat_model(settings(endpoint)) as judge:
        verdicts = judge_in_both_orders(judge, [("a", "{} {}".format, "good", "poor")])
    assert verdicts["a"].value is None and "both are fine" in verdicts["a"].text


def test_what_was_judged_before_the_endpoint_died_is_kept(tmp_path):
    """The second run asks only what the first one did not get."""
    prompts = [(i, f"question {i}") for i in range(12)]
    with ScriptedEndpoint(["yes"] * 5 + [Reply(status=500)]) as endpoint:
        with (
            open_chat_model(settings(endpoint, concurrency=1), cache=tmp_path / "judge.sqlite") as judge,
            pytest.raises(JudgeStopped, match=r"'judge' answered 5 of 12 questions, then: .*run the same command"),
        ):
            judge_all(judge, prompts, YES_NO)
        endpoint.respond = lambda body: "yes"
        before = len(endpoint.requests)
        with open_chat_model(settings(endpoint), cache=tmp_path / "judge.sqlite") as judge:
            verdicts = judge_all(judge, prompts, YES_NO)
        assert len(endpoint.requests) - before == 7
        with open_chat_model(settings(endpoint), cache=tmp_path / "judge.sqlite") as judge:
            assert judge_all(judge, prompts, YES_NO) == verdicts
            assert judge.usage.requests == 0
        assert len(endpoint.requests) - before == 7
    assert len(verdicts) == 12 and all(verdict.value for verdict in verdicts.values())


def test_an_endpoint_that_is_gone_is_not_asked_for_ever():
    with (
        ScriptedEndpoint([Reply(status=503)]) as endpoint,
        open_chat_model(settings(endpoint, concurrency=2)) as judge,
        pytest.raises(JudgeStopped, match="answered 0 of 500"),
    ):
        judge_all(judge, [(i, f"question {i}") for i in range(500)], YES_NO)
    assert len(endpoint.requests) < 50


def test_a_wrong_key_stops_at_once(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with (
        ScriptedEndpoint(["yes"], key="right") as endpoint,
        open_chat_model(settings(endpoint, api_key_env="JUDGE_KEY", concurrency=2)) as judge,
        pytest.raises(JudgeStopped, match="answered 0 of 100") as caught,
    ):
        judge_all(judge, [(i, f"question {i}") for i in range(100)], YES_NO)
    assert "wrong" not in str(caught.value) and len(endpoint.requests) <= 4


def test_no_judge():
    with pytest.raises(ValueError, match="llava_bench is scored by a judge, but none is given"):
        need_judge(None, "llava_bench")


def test_the_docs_hold_every_prompt_word_for_word():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")
    for name in ("coco_coverage", "stage2_failures", "llava_bench"):
        for prompt in load_task(name).judge_prompts.values():
            assert prompt in page, name
    for task, criterion in CRITERIA.items():
        assert f"| {task} | {criterion} |" in page
        before, after = load_task("advanced").judge_prompts[task].split(criterion)
        assert before in page and after in page
    assert YES_NO.reminder in page and TWO_SCORES.reminder in page
