"""Checks the engines: batches, the order of requests, and what the one with vLLM refuses; test_vllm.py runs it."""

from itertools import count, islice

import pytest
from tiny_models import drawn_image
from transformers import GenerationConfig

from transformers_minigpt4.inference.chat import Chat
from transformers_minigpt4.inference.engines import Request, TransformersEngine, answer_items
from transformers_minigpt4.inference.loading import load_engine
from transformers_minigpt4.inference.vllm_engine import _devices, sampling_settings
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError


class Echo:
    """An engine that answers with the prompt, two requests at a time, and counts how many it has taken."""

    processor = device = dtype = None
    batch_size = 2

    def __init__(self):
        self.taken = 0

    def answers(self, requests, **settings):
        while batch := list(islice(requests, self.batch_size)):
            self.taken += len(batch)
            yield from (request.prompt for request in batch)


def request_of(number: int) -> Request:
    if number % 3 == 1:
        raise ImageLoadError(str(number), "it is broken", "mend it")
    return Request([], str(number))


class TestAnswerItems:
    def test_items_keep_their_order_and_errors_their_place(self):
        found = list(answer_items(range(8), request_of, Echo()))
        assert [item for item, _ in found] == list(range(8))
        for number, answer in found:
            assert isinstance(answer, ImageLoadError) if number % 3 == 1 else answer == str(number)

    def test_errors_only(self):
        found = list(answer_items([1, 4, 7], request_of, Echo()))
        assert [number for number, answer in found if isinstance(answer, ImageLoadError)] == [1, 4, 7]

    def test_endless_items_are_taken_as_needed(self):
        engine = Echo()
        assert [answer for _, answer in islice(answer_items(count(step=3), request_of, engine), 4)] == [*"0369"]
        assert engine.taken == 4

    def test_other_errors_are_raised(self):
        with pytest.raises(ZeroDivisionError):
            list(answer_items([1], lambda number: number / 0, Echo()))


def test_batches_have_requests_with_the_same_number_of_images(tiny_checkpoint):
    engine = load_engine("transformers", tiny_checkpoint, device="cpu", batch_size=2)
    sizes = []
    generate = engine.model.generate
    engine.model.generate = lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    images = [drawn_image(0)]
    requests = [Request(images, "a"), Request([], "b"), Request([], "c"), Request([], "d"), Request(images * 2, "e")]
    answers = list(engine.answers(requests, do_sample=False, max_new_tokens=3))
    assert sizes == [1, 2, 1, 1]
    alone = [next(engine.answers([request], do_sample=False, max_new_tokens=3)) for request in requests]
    assert answers == alone


def test_earlier_turns_are_read(tiny_checkpoint):
    engine = load_engine("transformers", tiny_checkpoint, device="cpu", batch_size=2)
    shown = [drawn_image(0)]
    requests = [Request(shown, "Go on.", [("What is it?", said)]) for said in ("A dog.", "Two cats on a mat.", "")]
    answers = list(engine.answers(requests, do_sample=False, max_new_tokens=3))
    chat = Chat(engine.model, engine.processor, parameters={"do_sample": False, "max_new_tokens": 3})
    chat.ask("What is it?", shown)
    again = Request(shown, "Go on.", [("What is it?", chat.turns[0].answer)])
    assert list(engine.answers([again], do_sample=False, max_new_tokens=3)) == [chat.ask("Go on.")]
    assert len(set(answers)) > 1
    engine.processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template and takes one turn only"):
        list(engine.answers(requests))


def test_a_batch_needs_a_request():
    with pytest.raises(ValueError, match="batch_size is 0"):
        TransformersEngine(None, None, 0)


class TestVllm:
    def test_it_is_not_installed(self, tiny_checkpoint):
        with pytest.raises(ValueError, match="needs vLLM, which is not installed in this environment"):
            load_engine("vllm", tiny_checkpoint)

    def test_quantization_while_loading_is_refused(self, tiny_checkpoint):
        with pytest.raises(ValueError, match="does not quantize in bnb-4bit while it loads"):
            load_engine("vllm", tiny_checkpoint, quantization="bnb-4bit")

    @pytest.mark.parametrize(
        ("config", "arguments", "expected"),
        [
            ({}, {}, {"max_tokens": 300, "temperature": 0.0}),
            ({"max_new_tokens": 7}, {"do_sample": False}, {"max_tokens": 7, "temperature": 0.0}),
            (
                {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.05, "min_new_tokens": 1},
                {"do_sample": False, "max_new_tokens": 5},
                {"max_tokens": 5, "min_tokens": 1, "repetition_penalty": 1.05, "temperature": 0.0},
            ),
            (
                {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
                {"num_beams": 1},
                {"max_tokens": 300, "top_p": 0.9, "temperature": 0.7, "top_k": 50},
            ),
            ({"do_sample": True, "top_k": 9}, {}, {"max_tokens": 300, "top_k": 9}),
        ],
    )
    def test_settings_of_generate(self, config, arguments, expected):
        assert sampling_settings(GenerationConfig(**config), arguments) == expected

    @pytest.mark.parametrize(
        ("config", "arguments", "message"),
        [
            ({}, {"num_beams": 4}, "does not support num_beams=4; use the engine transformers"),
            ({"num_beams": 5}, {}, "num_beams=5 of the checkpoint's generation config"),
            ({}, {"streamer": object()}, "does not know the setting 'streamer'"),
            ({}, {"num_return_sequences": 2}, "num_return_sequences=2"),
        ],
    )
    def test_other_settings_are_refused(self, config, arguments, message):
        with pytest.raises(ValueError, match=message):
            sampling_settings(GenerationConfig(**config), arguments)

    @pytest.mark.parametrize(
        ("device", "kind", "expected"),
        [(None, "cuda", {}), ("cuda", "cuda", {}), ("cpu", "cpu", {}), ("auto", "cpu", {})],
    )
    def test_devices(self, device, kind, expected):
        assert _devices(device, kind) == expected

    def test_other_devices_are_refused(self):
        with pytest.raises(ValueError, match="choose it by CUDA_VISIBLE_DEVICES=1"):
            _devices("cuda:1", "cuda")
        with pytest.raises(ValueError, match="runs on 'cpu', not on 'cuda'"):
            _devices("cuda", "cpu")
