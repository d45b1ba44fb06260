"""Checks that conversations decoded together answer as alone, and that none disturbs another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_processors import chat_processor
from tiny_models import drawn_image, save_chat_model, save_llava, save_minigpt4

from transformers_minigpt4.inference import batching
from transformers_minigpt4.inference.batching import BatchedModel
from transformers_minigpt4.inference.chat import PRESETS, Chat
from transformers_minigpt4.inference.loading import load_model_and_processor


GREEDY = {**PRESETS["greedy"], "repetition_penalty": 1.2}
QUESTIONS = ("What is this?", "And what do you see in the second of these images here?", "Why?")


@pytest.fixture(scope="module", params=["minigpt4", "qwen3", "llava"])
def loaded(request, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        save_llava(folder)
    elif request.param == "minigpt4":
        save_minigpt4(folder, golden)
    else:
        save_chat_model(folder, chat_processor(request.param))
    return load_model_and_processor(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load_model_and_processor(tiny_checkpoint, device="cpu")


@pytest.fixture
def batches(monkeypatch):
    """The number of rows of each batch that is decoded."""
    sizes = []
    join = batching._join
    monkeypatch.setattr(batching, "_join", lambda rows, length: sizes.append(len(rows)) or join(rows, length))
    return sizes


def talk(model, processor, number: int, **parameters) -> list[str]:
    """Two turns, with other images, questions and lengths for every `number`."""
    settings = {**GREEDY, "max_new_tokens": 3 + 4 * (number % 3), **parameters}
    chat = Chat(model, processor, parameters=settings, read_ahead=False)
    images = [drawn_image(number), drawn_image(number + 1)]
    return [chat.ask(QUESTIONS[(turn + number) % 3], images[turn : 1 + number % 2]) for turn in range(2)]


def talk_at_once(model, processor, count: int, **parameters) -> list[list[str]]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: talk(model, processor, number, **parameters), range(count)))


def test_answers_are_those_given_alone(loaded, batches):
    model, processor = loaded
    alone = [talk(model, processor, number) for number in range(4)]
    assert talk_at_once(BatchedModel(model, processor, batch_size=3), processor, 4) == alone
    assert 1 < max(batches) <= 3
    assert len({tuple(answers) for answers in alone}) > 1


def test_rows_with_other_settings_take_turns(tiny, batches, monkeypatch):
    monkeypatch.setattr(batching, "_TURN", 4)
    model, processor = tiny
    shared = BatchedModel(model, processor)
    penalties = [1.0, 2.0, 1.0]

    def work(number):
        return talk(shared, processor, number, repetition_penalty=penalties[number], max_new_tokens=12)

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, range(3)))
    assert together == [
        talk(model, processor, number, repetition_penalty=penalty, max_new_tokens=12)
        for number, penalty in enumerate(penalties)
    ]
    assert max(batches) <= 2


def test_a_model_that_cannot_be_batched_answers_one_after_another(tiny, batches, monkeypatch):
    model, processor = tiny
    alone = [talk(model, processor, number) for number in range(2)]
    monkeypatch.setattr(batching, "_is_plain_cache", lambda cache: False)
    assert talk_at_once(BatchedModel(model, processor), processor, 2) == alone
    monkeypatch.undo()
    monkeypatch.setattr(type(processor), "model_input_names", ["input_ids", "image_sizes"])
    assert talk_at_once(BatchedModel(model, processor), processor, 2) == alone
    assert batches == []


def test_stopping_one_and_failing_another_leaves_the_rest(tiny, monkeypatch):
    model, processor = tiny
    expected = talk(model, processor, 1, max_new_tokens=12)
    shared = BatchedModel(model, processor)
    stopped = Chat(shared, processor, parameters={**GREEDY, "max_new_tokens": 200, "min_new_tokens": 200})
    broken = Chat(shared, processor, parameters=GREEDY)

    def stop(text: str) -> None:
        stopped.stop()

    def fail(text: str) -> None:
        raise ConnectionError("hung up")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(stopped.ask, "What is this?", [drawn_image(1)], stop)
        second = pool.submit(broken.ask, "What is this?", [drawn_image(2)], fail)
        assert pool.submit(talk, shared, processor, 1, max_new_tokens=12).result(60) == expected
        assert first.result(60) and len(stopped.turns) == 1
        with pytest.raises(ConnectionError):
            second.result(60)
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **kwargs: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            Chat(shared, processor).ask("What is this?")
    assert talk(shared, processor, 1, max_new_tokens=12) == expected  # it works again


def test_nothing_runs_when_nothing_is_asked(tiny):
    model, processor = tiny
    talk(BatchedModel(model, processor), processor, 0)
    names = [thread.name for thread in threading.enumerate() if thread.name == "batched-generation"]
    for thread in threading.enumerate():
        if thread.name in names:
            thread.join(10)
            assert not thread.is_alive()
