"""Parts of the server that need no process: public addresses, limits, hang-ups, names, and the command's errors."""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn
from huggingface_hub.utils import httpx
from served import free_port
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from transformers_minigpt4 import cli
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.serving import serve_generation, serve_requests
from transformers_minigpt4.serving.serve_addresses import is_public, public_client
from transformers_minigpt4.serving.serve_app import chat_app
from transformers_minigpt4.serving.serve_errors import ApiError
from transformers_minigpt4.serving.serve_limits import Limits
from transformers_minigpt4.serving.serve_vllm import VllmOptions, start_vllm, vllm_arguments


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        *[
            (address, False)
            for address in (
                *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254"),
                *("100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1"),
                *("::1", "::", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
                *("::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1"),
            )
        ],
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


class TestPublicClient:
    """No packet leaves this machine: names are looked up here, and connections are replaced."""

    @pytest.fixture
    def client(self, monkeypatch):
        self.asked: list[httpx.Request] = []
        self.names = {"public.example": ["93.184.216.34"], "inner.example": ["93.184.216.34", "10.0.0.1"]}
        self.answers = {"/image": httpx.Response(200, content=b"none"), "/": httpx.Response(200, content=b"none")}
        real = asyncio.BaseEventLoop.getaddrinfo

        async def look_up(loop, host, port, **kwargs):
            known = self.names.get(host)
            if known is None:
                return await real(loop, host, port, **kwargs)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]

        async def answer(transport, request):
            self.asked.append(request)
            return self.answers[request.url.path]

        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
        monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)
        return public_client()

    def test_connects_to_the_address_that_was_checked(self, client):
        with pytest.raises(ImageLoadError, match="not an image in one of the formats"):
            load_image("https://public.example/image", client=client)
        (request,) = self.asked
        assert request.url.host == "93.184.216.34" and request.headers["host"] == "public.example"
        assert request.extensions["sni_hostname"] == "public.example"

    @pytest.mark.parametrize(
        "url",
        ["http://inner.example/", "http://localhost/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/"],
    )
    def test_refuses_names_and_spellings_of_private_addresses(self, client, url):
        with pytest.raises(ImageLoadError, match="is not a public address, and this server fetches no others"):
            load_image(url, client=client)
        with pytest.raises(ImageLoadError, match="is not a public address"):  # also behind a redirect
            self.answers["/image"] = httpx.Response(302, headers={"location": url})
            load_image("http://public.example/image", client=client)
        assert len(self.asked) == 1


class TestLimits:
    @staticmethod
    def call(chunks, headers=(), hosts=None):
        """What an app gets of a request in pieces, and what the client gets."""
        seen, sent = [], []

        async def app(scope, receive, send):
            seen.append(await receive())
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def exchange():
            messages = iter(chunks)

            async def receive():
                if (body := next(messages, None)) is None:
                    await asyncio.Event().wait()
                return {"type": "http.request", "body": body, "more_body": body is not chunks[-1]}

            async def send(message):
                sent.append(message)

            await Limits(app, hosts, max_bytes=8)({"type": "http", "headers": list(headers)}, receive, send)

        asyncio.run(exchange())
        return seen, sent[0]["status"]

    def test_small_requests_pass(self):
        seen, status = self.call([b"1234", b"5678"])
        assert status == 200 and [message["body"] for message in seen] == [b"12345678"]

    def test_large_requests_do_not(self):
        assert self.call([b"1234", b"56789"]) == ([], 413)
        assert self.call([b""], [(b"content-length", b"9")]) == ([], 413)

    def test_names_of_other_hosts(self):
        for host, status in ((b"localhost:8000", 200), (b"[::1]:8000", 200), (b"evil.example:8000", 403)):
            assert self.call([b""], [(b"host", host)], ("localhost", "::1"))[1] == status
        assert self.call([b""], [], ("localhost",))[1] == 403


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_answer(tiny_checkpoint, monkeypatch, stream):
    answers = []
    monkeypatch.setattr(
        serve_generation.Answer, "__init__", lambda self, *args, init=serve_generation.Answer.__init__:
        (answers.append(self), init(self, *args))[1]
    )  # fmt: skip
    model, processor = load_model_and_processor(tiny_checkpoint, device="cpu")
    model.generation_config.eos_token_id, model.generation_config.stop_sequences = -1, []  # it never ends by itself
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(chat_app(("tiny",), model, processor), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 10_000, "stream": stream}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.Client(timeout=60) as client:
            if stream:
                with client.stream("POST", url, json=body) as response:
                    assert next(response.iter_text())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(url, json=body, timeout=0.5)
        (answer,) = answers
        while any(thread.name == "answer" for thread in threading.enumerate()):
            time.sleep(0.05)
        assert answer.total_tokens < 1500  # of about 2000 that fit into the context
        again = httpx.post(url, json={**body, "max_tokens": 2, "stream": False}, timeout=60)
        assert again.status_code == 200 and again.json()["usage"]["completion_tokens"] == 2
    finally:
        server.should_exit = True
        thread.join()


def test_images_have_limits_of_number_and_pixels(monkeypatch, pictures):
    from served import user

    monkeypatch.setattr(serve_requests, "MAX_IMAGES", 2)
    body = {"messages": [user("What?", *pictures)]}
    with pytest.raises(ApiError, match="a request may have at most 2 images; send fewer"):
        serve_requests.load_messages(body, (), None)
    monkeypatch.setattr(serve_requests, "MAX_PIXELS", 100)
    with pytest.raises(ApiError, match="may have 100 pixels together; make them smaller"):
        serve_requests.load_messages(body, (), None)


class TestCommand:
    @pytest.fixture(autouse=True)
    def loud_libraries(self):
        """Give the other tests the messages back that the command silences."""
        verbosity = transformers_logging.get_verbosity()
        yield
        transformers_logging.set_verbosity(verbosity)

    @staticmethod
    def complaint(*arguments):
        result = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and result.stdout == ""
        return result.stderr

    def test_errors_are_one_line(self, tiny_checkpoint, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"cannot listen at port {port} of 127.0.0.1" in self.complaint(tiny_checkpoint, "--port", port)
        port = ("--port", free_port())
        assert "there is no model folder" in self.complaint(tmp_path / "gone", *port)
        assert "cannot use the device 'gpu'" in self.complaint(tiny_checkpoint, "--device", "gpu", *port)
        assert "there is no use for '--seed': a server has" in self.complaint(tiny_checkpoint, "--", "--seed", 1)
        assert "name the checkpoint before `--`" in self.complaint("--engine", "vllm", "--", "--seed", 1)
        assert "vLLM is not installed" in self.complaint(tiny_checkpoint, "--engine", "vllm")

    def test_words_of_vllm(self, monkeypatch):
        plain = VllmOptions("a/b", ("a/b",), "127.0.0.1", 8000, "auto", None, None, False, False)
        words = vllm_arguments(plain)
        assert words[:4] == ["--model", "a/b", "--served-model-name", "a/b"] and "--trust-remote-code" not in words
        assert words[words.index("--allowed-media-domains") + 1] == "none.invalid"
        free = plain._replace(allow_private_urls=True, trust_remote_code=True, quantization="bnb-4bit")
        words = vllm_arguments(free)
        assert "--allowed-media-domains" not in words and "--trust-remote-code" in words
        assert words[words.index("--quantization") + 1] == "bitsandbytes"
        for wrong in (plain._replace(device="cpu"), plain._replace(quantization="bnb-8bit")):
            with pytest.raises(ValueError, match=r"leave out --device|use --quantization bnb-4bit"):
                start_vllm(wrong, [])
