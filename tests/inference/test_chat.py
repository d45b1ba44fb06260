"""Checks conversations: every turn equals reading everything anew; images in any turn, stopping, files, threads."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from chat_processors import chat_processor
from PIL import Image
from tiny_models import drawn_image, save_blip2, save_chat_model, save_llava, save_minigpt4
from transformers.cache_utils import DynamicSlidingWindowLayer

from transformers_minigpt4.inference.chat import PRESETS, Chat
from transformers_minigpt4.inference.generation import decode_answers
from transformers_minigpt4.inference.loading import load_model_and_processor


GREEDY = {**PRESETS["greedy"], "max_new_tokens": 12}
# Questions with the images that come with them.
TURNS = [
    ("What is this?", [drawn_image(1)]),
    ("And what are these two?", [drawn_image(2), drawn_image(3)]),
    ("Which do you like?", []),
    ("Here is another. Same as before?", [drawn_image(1)]),
]


@pytest.fixture(scope="module", params=["vicuna_v0", "llama_2", "qwen2_5", "qwen3", "vicuna_v1", "llava"])
def loaded(request, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        save_llava(folder)
    elif request.param == "vicuna_v0":
        save_minigpt4(folder, golden)
    else:
        save_chat_model(folder, chat_processor(request.param))
    return load_model_and_processor(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load_model_and_processor(tiny_checkpoint, device="cpu")


@contextmanager
def reads(model):
    """What a model reads meanwhile: the positions of each call, and the images."""
    positions, images = [], []
    hooks = [
        model.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        ),
        model.model.vision_tower.register_forward_pre_hook(lambda module, args: images.extend(args[0])),
    ]
    try:
        yield positions, images
    finally:
        for hook in hooks:
            hook.remove()


def read_anew(chat: Chat, question: str, images: list) -> list[int]:
    """Ids of the answer by plain transformers, from the complete conversation."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    inputs = chat.processor.apply_chat_template(
        [*chat.messages(), {"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = chat.model.generate(**inputs, **chat.parameters, num_beams=1)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def ids_of_answers(chat: Chat, monkeypatch) -> list[list[int]]:
    """A list that gets the ids of each answer."""
    found = []

    def noted(processor, sequences):
        found.append(sequences[0].tolist())
        return decode_answers(processor, sequences)

    monkeypatch.setattr("transformers_minigpt4.inference.chat.decode_answers", noted)
    return found


@pytest.mark.parametrize("read_ahead", [True, False])
def test_every_turn_equals_reading_all_anew(loaded, monkeypatch, read_ahead):
    chat = Chat(*loaded, parameters=GREEDY, read_ahead=read_ahead)
    given = ids_of_answers(chat, monkeypatch)
    for question, images in TURNS:
        expected = read_anew(chat, question, images)
        answer = chat.ask(question, images)
        assert given[-1] == expected
        assert answer == decode_answers(chat.processor, torch.tensor([expected]))[0]
    assert [turn.question for turn in chat.turns] == [question for question, _ in TURNS]


def test_changes_of_earlier_turns_are_read_anew(loaded, monkeypatch):
    chat = Chat(*loaded, parameters=GREEDY)
    given = ids_of_answers(chat, monkeypatch)
    for question, images in TURNS[:2]:
        chat.ask(question, images)
    before = given[-1]
    chat.regenerate()
    assert given[-1] == before
    taken = chat.undo()
    assert taken.question == TURNS[1][0] and len(chat.turns) == 1
    other = [drawn_image(5), drawn_image(6)]  # the same ids as before, with other images
    expected = read_anew(chat, TURNS[1][0], other)
    chat.ask(TURNS[1][0], other)
    assert given[-1] == expected
    chat.reset()
    expected = read_anew(chat, *TURNS[3])
    chat.ask(*TURNS[3])
    assert given[-1] == expected and len(chat.turns) == 1


def test_a_new_turn_reads_only_what_is_new(loaded):
    chat = Chat(*loaded, parameters={**GREEDY, "max_new_tokens": 1})
    for question, images in TURNS[:2]:
        chat.ask(question, images)
    complete = len(chat._prefix)
    with reads(chat.model) as (positions, images):
        chat.ask("And now?")
    assert not images and 0 < positions[0] < complete / 3
    with reads(chat.model) as (positions, images):
        chat.ask("And this?", [drawn_image(4)])
    assert len(images) == 1


def test_a_cache_that_cannot_be_cut_is_not_kept(tiny, monkeypatch):
    monkeypatch.setattr("transformers_minigpt4.inference.prefix_cache.DynamicLayer", DynamicSlidingWindowLayer)
    chat = Chat(*tiny, parameters=GREEDY)
    given = ids_of_answers(chat, monkeypatch)
    for question, images in TURNS[:2]:
        expected = read_anew(chat, question, images)
        chat.ask(question, images)
        assert given[-1] == expected and len(chat._prefix) == 0


def test_conversation_longer_than_the_context(tiny):
    chat = Chat(*tiny, parameters=GREEDY)
    chat.ask(*TURNS[0])
    context = chat.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"but the language model was trained with {context}"):
        chat.ask("why " * context)
    assert len(chat.turns) == 1


class TestAnswers:
    @contextmanager
    def saying(self, model, ids: list[int]):
        """Makes the model say these ids, the last one for ever."""
        left = list(ids)

        def force(module, args, output):
            output.logits[:, -1] = -100.0
            output.logits[:, -1, left.pop(0) if len(left) > 1 else left[0]] = 100.0

        hook = model.register_forward_hook(force)
        try:
            yield
        finally:
            hook.remove()

    @pytest.mark.parametrize("mark", [0, 1])
    def test_both_forms_of_the_end_mark(self, tiny, mark):
        tokenizer = tiny[1].tokenizer
        one = tokenizer.encode("a ###", add_special_tokens=False)[-1:]
        two = tokenizer.encode("a###", add_special_tokens=False)[-2:]
        words = tokenizer.encode("two birds on the table", add_special_tokens=False)
        tokens = words + [one, two][mark]
        assert tokenizer.decode(one).strip() == tokenizer.decode(two).strip() == "###"
        pieces = []
        chat = Chat(*tiny, parameters={**GREEDY, "max_new_tokens": 60}, read_ahead=False)
        with self.saying(tiny[0], [*tokens, *words]), reads(tiny[0]) as (positions, _):
            answer = chat.ask("What is this?", [drawn_image(1)], pieces.append)
        assert len(positions) == len(tokens)
        assert answer == tokenizer.decode(words).strip() == "".join(pieces)

    def test_streams_word_by_word_and_stops_when_closed(self, tiny):
        chat = Chat(*tiny, parameters={**GREEDY, "max_new_tokens": 60, "min_new_tokens": 60})
        assert "".join(chat.stream(*TURNS[0])) == chat.turns[0].answer
        complete = chat.undo().answer
        stream = chat.stream(*TURNS[0])
        first = next(stream)
        stream.close()
        assert complete.startswith(first) and complete.startswith(chat.turns[0].answer) and chat.turns[0].answer
        assert chat.turns[0].answer != complete
        assert chat.ask(*TURNS[2])

    def test_ctrl_c_keeps_what_was_said(self, tiny, monkeypatch):
        chat = Chat(*tiny, parameters={**GREEDY, "max_new_tokens": 60, "min_new_tokens": 60})
        said = []

        def interrupt(text):
            said.append(text)
            if len(said) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            chat.ask(*TURNS[0], on_text=interrupt)
        assert chat.turns[0].answer == "".join(said).strip()
        given = ids_of_answers(chat, monkeypatch)
        expected = read_anew(chat, *TURNS[1])
        chat.ask(*TURNS[1])
        assert given == [expected]

    def test_an_answer_without_words(self, tiny):
        chat = Chat(*tiny, parameters={**GREEDY, "min_new_tokens": 0})
        with self.saying(tiny[0], [tiny[1].tokenizer.eos_token_id]):
            assert chat.ask(*TURNS[0]) == ""
        assert chat.ask(*TURNS[1])


class TestParameters:
    def test_presets(self, tiny):
        chat = Chat(*tiny, parameters=PRESETS["authors"])
        assert chat.parameters == {
            **{"do_sample": True, "top_p": 0.9, "top_k": 50, "temperature": 1.0},
            **{"repetition_penalty": 1.05, "max_new_tokens": 300, "min_new_tokens": 1},
        }
        chat.set_parameters(temperature="0.5", max_new_tokens="7", do_sample="no")
        assert chat.parameters["temperature"] == 0.5 and chat.parameters["max_new_tokens"] == 7
        assert chat.parameters["do_sample"] is False

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("temperature", value) for value in (0, -1.0, "warm", "nan", "inf", True, None)),
            *(("top_p", value) for value in (0, 1.1)),
            *(("max_new_tokens", value) for value in (0, 2.5, "2.5", [])),
            *(("do_sample", "maybe"), ("num_beams", 4)),
        ],
    )
    def test_values_that_cannot_be(self, tiny, name, value):
        chat = Chat(*tiny)
        with pytest.raises(ValueError, match=name):
            chat.set_parameters(top_k=3, **{name: value})
        assert chat.parameters == {}


class TestFiles:
    def test_saved_and_loaded_conversations_go_on_equally(self, tiny, tmp_path, monkeypatch):
        path = tmp_path / "picture.jpg"
        drawn_image(7).save(path)
        buffer = io.BytesIO()
        drawn_image(8).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        chat = Chat(*tiny, system="Look closely.", parameters=GREEDY)
        chat.ask("What are these?", [path, str(path), url, drawn_image(9)])
        chat.save(tmp_path / "chat.json")
        path.unlink()
        again = Chat.load(tmp_path / "chat.json", *tiny)
        assert again.system == "Look closely." and again.parameters == chat.parameters
        assert [image.tobytes() for image in again.turns[0].images] == [
            image.tobytes() for image in chat.turns[0].images
        ]
        given = ids_of_answers(chat, monkeypatch)
        assert chat.ask(*TURNS[1]) == again.ask(*TURNS[1]) and given[0] == given[1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "not a conversation"),
            ({"system": 3}, "system must be"),
            ({"parameters": {"num_beams": 2}}, "no parameter 'num_beams'"),
            ({"turns": [3]}, "a turn cannot be"),
            ({"turns": [{"question": " ", "images": [], "answer": ""}]}, "a turn has a question"),
            ({"turns": [{"question": "a", "images": ["/etc/passwd"], "answer": ""}]}, "only images embedded"),
            (
                {"turns": [{"question": "a", "images": ["http://127.0.0.1/a.png"], "answer": ""}]},
                "only images embedded",
            ),
            (
                {"turns": [{"question": "a", "images": ["data:image/png;base64,AAAA"], "answer": ""}]},
                "cannot load image",
            ),
        ],
    )
    def test_files_of_others(self, tiny, tmp_path, change, message):
        path = tmp_path / "chat.json"
        Chat(*tiny).save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=message) as error:
            Chat.load(path, *tiny)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


class TestThreads:
    def test_many_conversations_on_one_model(self, tiny):
        side = tiny[1].tokenizer.padding_side

        def talk(number: int) -> list[str]:
            chat = Chat(*tiny, parameters=GREEDY)
            return [chat.ask(f"{question} {number}", [drawn_image(number), *images]) for question, images in TURNS[:3]]

        one_by_one = [talk(number) for number in range(6)]
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(talk, range(6))) == one_by_one
        assert tiny[1].tokenizer.padding_side == side

    def test_one_conversation_answers_one_question_at_a_time(self, tiny):
        chat = Chat(*tiny, parameters=GREEDY)
        refused = []

        def ask_meanwhile(text):
            for call in (lambda: chat.ask("And?"), chat.undo, chat.reset, lambda: list(chat.stream("And?"))):
                with pytest.raises(RuntimeError, match="answering already"):
                    call()
                refused.append(text)

        answer = chat.ask(*TURNS[0], on_text=ask_meanwhile)
        assert refused and chat.turns[0].answer == answer and len(chat.turns) == 1

    def test_stop_from_another_thread(self, tiny):
        chat = Chat(*tiny, parameters={**GREEDY, "max_new_tokens": 200, "min_new_tokens": 200})
        spoke = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(chat.ask, *TURNS[0], lambda text: spoke.set())
            assert spoke.wait(30)
            chat.stop()
        assert chat.turns[0].answer == answer.result()
        assert len(tiny[1].tokenizer(answer.result())["input_ids"]) < 200


class TestRefusals:
    def test_nothing_to_take_back(self, tiny):
        for call in (Chat(*tiny).undo, Chat(*tiny).regenerate):
            with pytest.raises(ValueError, match="nothing has been asked"):
                call()

    @pytest.mark.parametrize(
        ("question", "images", "message"),
        [
            (" ", [], "question is empty"),
            ("What?", ["gone.png"], "gone.png"),
            ("<ImageHere>", [], "image placeholder"),
        ],
    )
    def test_questions(self, tiny, question, images, message):
        chat = Chat(*tiny)
        with pytest.raises(ValueError, match=message):
            chat.ask(question, images)
        assert chat.turns == []

    def test_processor_without_chat_template(self, tmp_path):
        save_blip2(tmp_path)
        with pytest.raises(ValueError, match=r"Blip2Processor has no chat template.*describe --prompt"):
            Chat(*load_model_and_processor(str(tmp_path), device="cpu"))


def test_images_are_upright_rgb(tiny):
    chat = Chat(*tiny, parameters=GREEDY)
    chat.ask("What is this?", [Image.new("LA", (4, 4))])
    assert chat.turns[0].images[0].mode == "RGB"
