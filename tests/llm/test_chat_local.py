"""A chat model loaded with transformers: batches, token counts, the budget, and folders without a usable model."""

import pytest
from tiny_chat_model import LANGUAGE_MODEL, save_chat_model

from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import BudgetExhausted, ChatError, ChatSettings


QUESTIONS = ["What shape is it?", "Describe a red circle.", "What color is it? There is a blue star.", "It is"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_a_batch_answers_as_one_at_a_time(chat_model, tmp_path):
    answers = {}
    for concurrency in (1, 3):
        settings = ChatSettings(chat_model, concurrency=concurrency, max_tokens=60)
        with open_chat_model(settings) as model:
            results = model.complete_many((question, ask(question)) for question in QUESTIONS)
            answers[concurrency] = {key: (answer.text, answer.completion_tokens) for key, answer in results}
            assert model.usage.requests == 4
            assert model.usage.completion_tokens == sum(count for _, count in answers[concurrency].values())
    assert answers[1] == answers[3] and list(answers[3]) == QUESTIONS
    assert answers[1]["What shape is it?"] == ("The shape is a cross.", 7)  # six tokens and the end mark
    assert "###" not in "".join(text for text, _ in answers[1].values())


def test_the_cache_and_an_answer_that_was_cut_off(chat_model, tmp_path):
    settings = ChatSettings(chat_model, max_tokens=10)
    for run in range(2):
        with open_chat_model(settings, tmp_path / "answers") as model:
            with pytest.raises(ChatError, match="cut off at 10 tokens; raise max_tokens above 10") as caught:
                model.complete(ask("Describe a red circle."))
            answer = model.complete(ask("What shape is it?"))
            assert caught.value.answer.cached == answer.cached == bool(run)
            assert caught.value.answer.text.startswith("The circle is large.")
            assert model.usage.requests == (0 if run else 2)


def test_the_budget_is_never_passed_and_smaller_batches_use_it_up(chat_model):
    with open_chat_model(ChatSettings(chat_model, concurrency=8, max_tokens=60, budget_tokens=300)) as model:
        done = []
        with pytest.raises(BudgetExhausted, match="raise budget_tokens"):
            for key, _ in model.complete_many((n, ask("What shape is it?")) for n in range(100)):
                done.append(key)
        prompt = model.usage.prompt_tokens // len(done)
        # Reserved are prompt and 60 tokens each time, used are prompt and 7.
        assert 300 - (prompt + 60) < model.usage.tokens <= 300
        assert done == list(range(len(done)))


def test_an_answer_that_is_begun_is_continued(chat_model):
    with open_chat_model(ChatSettings(chat_model, max_tokens=60)) as model:
        begun = [*ask("What shape is it?"), {"role": "assistant", "content": "The shape is"}]
        assert model.complete(begun).text == "a cross."


def test_a_prompt_that_the_model_cannot_read(chat_model):
    with open_chat_model(ChatSettings(chat_model, max_tokens=5)) as model:
        results = dict(model.complete_many([("long", ask("red " * 2000)), ("short", ask("What shape is it?"))]))
    assert results["long"].kind == "refused" and "shorten the text" in str(results["long"])
    assert results["short"].kind == "cut_off"


def test_a_conversation_that_the_template_refuses(chat_model):
    with open_chat_model(ChatSettings(chat_model)) as model:
        model.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
        with pytest.raises(ChatError, match=r"System role not supported\); choose another model") as caught:
            model.complete(ask("?"))
        assert caught.value.kind == "refused"


def test_a_prompt_near_the_limit_leaves_less_room_for_the_answer(chat_model):
    with open_chat_model(ChatSettings(chat_model, max_tokens=500)) as model:
        with pytest.raises(ChatError, match="or use a model with a longer context") as caught:
            model.complete(ask("red " * 1000))
        answer = caught.value.answer
        assert answer.prompt_tokens > 1000 and answer.prompt_tokens + answer.completion_tokens == 1024


def test_folders_without_a_chat_model(tmp_path, tiny_checkpoint):
    with pytest.raises(ValueError, match="there is no model folder"):
        open_chat_model(ChatSettings(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="as chat model"):
        open_chat_model(ChatSettings(str(tmp_path)))
    with pytest.raises(ValueError, match="has no chat template"):
        open_chat_model(ChatSettings(str(LANGUAGE_MODEL)))
    with pytest.raises(ValueError, match="as chat model"):
        open_chat_model(ChatSettings(tiny_checkpoint))
