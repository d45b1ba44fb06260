"""The demo's stand-in for a repairing language model: what its rules mend, and that it serves the package's client."""

import json
import signal
import sys
import threading
import urllib.error
import urllib.request

import pytest
from processes import program

from transformers_minigpt4.demo import endpoint
from transformers_minigpt4.demo.endpoint import MODEL, NOTICE, make_server, repair
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatError, ChatSettings


@pytest.fixture(scope="module")
def base_url():
    with make_server(0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


@pytest.mark.parametrize(
    "text,mended",
    [
        ("The image shows a The image shows a yellow ring.", "The image shows a yellow ring."),
        ("It is red. The ring is large. It is red.", "It is red. The ring is large."),
        ("It is red red red. it is RED", "It is red."),
        ("The ring is large. It lies in the top left of the", "The ring is large. It lies in the top left."),
        ("The ring is large. The ring", "The ring is large."),
        ("The ring is large. It", "The ring is large."),
        ("small red circle on a", "There is a small red circle."),
        ("orange star icon", "There is an orange star icon."),
        ("The ring is large.###Human: What? ###Assistant: It is", "The ring is large."),
        ("The <Img>ring</Img> is large .", "The ring is large."),
        ("The ring is large. black ring. it, the picture.", "The ring is large."),
        ("The star are clear. The edges are clear.", "The star is clear. The edges are clear."),
        ("The ring 是 is \x00large.", "The ring is large."),
        ("the ring is large", "The ring is large."),
        ("###", ""),
        ("...", ""),
        ("", ""),
    ],
)
def test_rules(text, mended):
    assert repair(text) == mended
    assert repair(mended) == mended


def test_good_texts_stay_as_they_are():
    from random import Random

    from transformers_minigpt4.demo.texts import detailed_description
    from transformers_minigpt4.demo.world import all_scenes

    rng = Random(0)
    for scene in all_scenes():
        text = detailed_description(scene, rng)
        assert repair(text) == text


def test_it_serves_the_client(base_url, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = ChatSettings(MODEL, base_url=base_url, max_retries=0, max_tokens=8)
    with open_chat_model(settings) as model:
        answer = model.complete([{"role": "user", "content": "Fix the error.\n\nIt is red. It is red."}])
        assert answer.text == "It is red."
        assert (answer.prompt_tokens, answer.completion_tokens) == (9, 3)
        with pytest.raises(ChatError, match="cut off at 8 tokens"):
            model.complete(
                [{"role": "user", "content": "Fix.\n\nThe large red ring is in the top left of the image."}]
            )
        with pytest.raises(ChatError, match="this server only repairs"):
            model.complete([{"role": "user", "content": "Is it red?"}])


def test_it_says_what_it_is(base_url):
    with urllib.request.urlopen(f"{base_url}/models") as response:
        assert json.load(response)["data"][0]["id"] == MODEL
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(base_url)
    assert caught.value.code == 404 and NOTICE in json.load(caught.value)["error"]["message"]
    for body in (b"{", b"[]", b'{"messages": [{"content": 3}]}'):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{base_url}/chat/completions", data=body)
        assert caught.value.code == 400


def test_a_port_that_is_taken(base_url):
    port = int(base_url.split(":")[2].split("/")[0])
    with pytest.raises(OSError, match="choose another one with --port"):
        make_server(port)


def test_the_command_prints_its_address_and_ends_with_ctrl_c():
    # As a file: it needs the standard library alone, and the package would bring torch.
    command = [sys.executable, endpoint.__file__, "--port", "0"]
    with program(command) as process:
        address = process.stdout.readline().split()[0]
        assert process.stdout.readline().strip() == NOTICE
        with urllib.request.urlopen(f"{address}/models") as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in errors
