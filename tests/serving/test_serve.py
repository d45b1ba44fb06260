"""`minigpt4 serve` as a process of its own, asked by OpenAI's client."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import openai
import pytest
from conftest import build_processor
from golden_model import golden_model
from served import data_url, free_port, minigpt4, served, user
from tiny_models import drawn_image

from transformers_minigpt4.inference.chat import Chat
from transformers_minigpt4.inference.loading import load_model_and_processor


QUESTION = "What is in this picture?"
GREEDY = {"do_sample": False, "max_new_tokens": 16}


class Server(NamedTuple):
    url: str
    client: openai.OpenAI
    chat: Chat  # the same model, asked here
    stop: str  # what ends its answers
    free: str  # the answer to QUESTION about drawn_image(1), if nothing ended it

    def ask(self, *messages, **settings):
        settings = {"temperature": 0, "max_tokens": 16, **settings}
        return self.client.chat.completions.create(model="stopping", messages=messages, **settings)

    def text(self, *messages, **settings):
        return self.ask(*messages, **settings).choices[0].message.content


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory):
    """A model whose answers end as those of Vicuna do at `###`, which random models never say: at two tokens."""
    folder = tmp_path_factory.mktemp("serve") / "stopping"
    model, processor = golden_model(golden["config"]), build_processor()
    model.generation_config = processor.get_generation_config()
    chat = Chat(model, processor, parameters=GREEDY)
    free = chat.ask(QUESTION, [drawn_image(1)])
    ids = processor.tokenizer.encode(free, add_special_tokens=False)
    stop = processor.tokenizer.decode(ids[6:8]).strip()
    processor = build_processor(stop_strings=[stop])
    model.generation_config = processor.get_generation_config(stop_sequences=[ids[6:8]])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, stop, free


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    folder, stop, free = checkpoint
    home = tmp_path_factory.mktemp("home")
    port = free_port()
    command = minigpt4("serve", folder, "--port", port, "--device", "cpu")
    with served(command, port, home / "log.txt", HF_HOME=str(home / "missing")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        loaded = load_model_and_processor(str(folder), device="cpu")
        yield Server(url, client, Chat(*loaded, parameters=GREEDY), stop, free)


def test_models(server):
    (model,) = server.client.models.list().data
    assert model.id == "stopping" == server.client.models.retrieve("stopping").id
    for path in ("/docs", "/openapi.json", "/v1/responses", "/load_model", "/reset"):
        found = httpx.post(f"{server.url}{path}", json={"model": "other"})
        assert found.status_code == 404 and found.json()["error"]["type"] == "invalid_request_error"


def test_three_turns_with_one_and_two_images(server):
    chat, messages = server.chat, []
    chat.reset()
    for question, images in ((QUESTION, [1]), ("And these?", [2, 3]), ("Why?", [])):
        pictures = [drawn_image(number) for number in images]
        messages.append(user(question, *pictures))
        answer = server.ask(*messages)
        assert answer.choices[0].message.content == chat.ask(question, pictures)
        assert answer.model == "stopping" and answer.usage.total_tokens > answer.usage.completion_tokens > 0
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})


def test_answers_end_before_the_stop_string(server):
    question = user(QUESTION, drawn_image(1))
    ended = server.ask(question)
    answer = ended.choices[0].message.content
    assert answer == server.free.split(server.stop)[0].strip() != server.free
    assert ended.choices[0].finish_reason == "stop"

    *chunks, last = server.ask(question, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert last.choices[0].finish_reason == "stop" and last.usage == ended.usage

    history = [{"role": "assistant", "content": text} for text in (answer, answer + server.stop)]
    clean, doubled = (server.ask(question, said, user("Why?")) for said in history)
    assert clean.usage.prompt_tokens == doubled.usage.prompt_tokens
    assert clean.choices[0].message == doubled.choices[0].message


def test_stop_of_a_request(server):
    question = user(QUESTION, drawn_image(1))
    answer = server.text(question)
    stop = answer[len(answer) // 2 :][:4]
    expected = answer.split(stop)[0]
    assert server.text(question, stop=stop) == expected
    chunks = server.ask(question, stop=["no such text", stop], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    cut = server.ask(question, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


TEXT = {"role": "user", "content": "What?"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (user("What?", "data:image/png;base64,AAAA"), "invalid_image", "not an image in one of the formats"),
        (user("What?", data_url(drawn_image(1))[:200]), "invalid_image", "cannot load image"),
        (user("What?", "http://127.0.0.1:9/x.png"), "invalid_image", "not a public address"),
        (user("What?", "http://2130706433/x.png"), "invalid_image", "not a public address"),
        (user("What?", "file:///etc/hostname"), "invalid_image_url", "reads no files"),
        (user("What?", "/etc/hostname"), "invalid_image_url", "reads no files"),
        (user("What? " * 3000), "context_length_exceeded", "the model's context is"),
        (user("<ImageHere>"), None, "image placeholder"),
        ({"role": "wizard", "content": "What?"}, "invalid_value", "role is one of system"),
        (
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "http://a"}}]},
            "invalid_value",
            "must be",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_messages_that_cannot_be(server, message, code, reason, stream):
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        server.ask(message, stream=stream)
    assert caught.value.code == code and caught.value.type == "invalid_request_error"
    assert caught.value.param.startswith("messages")


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 2},
        {"temperature": 3},
        {"max_tokens": 0},
        {"stop": [""]},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
        {"extra_body": {"generation_config": json.dumps({"num_beams": 100})}},
        {"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}},
        {"extra_body": {"unknown": 1}},
    ],
    ids=str,
)
def test_settings_that_cannot_be(server, settings):
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(TEXT, **settings)
    assert caught.value.type == "invalid_request_error" and "\n" not in caught.value.message


def test_another_model_is_not_loaded(server):
    with pytest.raises(
        openai.NotFoundError, match="there is no model 'gpt2'; this server has 'stopping' only"
    ) as caught:
        server.client.chat.completions.create(model="gpt2", messages=[TEXT])
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, {"content": b"{not JSON", "headers": {"content-type": "application/json"}}),
        (400, {"content": b"{}", "headers": {"content-type": "text/plain"}}),  # what a web page may send unasked
        (400, {"json": []}),
        (400, {"json": {"messages": "What?"}}),
        (403, {"json": {"messages": [TEXT]}, "headers": {"host": "example.com"}}),
    ],
)
def test_requests_that_cannot_be(server, status, request_):
    found = httpx.post(f"{server.url}/v1/chat/completions", **request_)
    assert found.status_code == status
    assert found.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_concurrent_requests(server):
    def ask(number):
        return server.text(user(QUESTION, drawn_image(number % 4)), stop=None if number % 2 else "zzz")

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone * 3 and len(set(alone)) > 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answer(server):
    settings = {"temperature": 1.5, "top_p": 0.99, "stop": []}
    first, again, other = (server.text(TEXT, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again != other


WITHOUT_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_minigpt4":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from transformers.cli.transformers import main
main()
"""


@pytest.mark.slow
def test_transformers_serve_without_the_package(checkpoint, tmp_path):
    """The checkpoint's own code ends answers before the stop string, also where the server decodes token by token."""
    folder, stop, free = checkpoint
    script, port = tmp_path / "serve.py", free_port()
    script.write_text(WITHOUT_THE_PACKAGE)
    command = [sys.executable, script, "serve", folder, "--trust-remote-code", "--port", port, "--device", "cpu"]
    environment = {"PYTHONPATH": "", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    with served([str(word) for word in command], port, tmp_path / "log.txt", **environment) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        settings = {"model": str(folder), "messages": [user(QUESTION, drawn_image(1))], "temperature": 0}
        answer = client.chat.completions.create(**settings, max_tokens=16).choices[0].message.content
        chunks = client.chat.completions.create(**settings, max_tokens=16, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert answer.strip() == streamed.strip() == free.split(stop)[0].strip()
