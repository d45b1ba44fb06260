"""A stand-in for the repairing language model: a local OpenAI-compatible server that repairs texts by plain rules."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypedDict


MODEL = "demo-rules"
DEFAULT_PORT = 8765
NOTICE = (
    "This is not a language model. It repairs texts of the toy world by plain rules, without seeing an image, so that "
    "curation can be tried without a key or a network: it removes repeated words, phrases and sentences, template "
    "marks and characters that English does not use, and completes or drops what was left unfinished."
)

_MAX_BODY = 1 << 20  # bytes
_TEMPLATE = re.compile(r"###.*|\b(?:Human|Assistant):.*|</?\w+[^<>]*>", re.DOTALL)
_NOT_ENGLISH = re.compile(r"[^A-Za-z0-9 .,;:!?'\"()%&/-]")
_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_VERBS = {"is", "are", "was", "were", "has", "have", "can", "sits", "lies", "show", "shows", "contains", "appears"}
_VERBS |= {"find", "finds", "see", "sees", "seen"}
# Words that a sentence cannot end with.
_DANGLING = {"a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "or", "that", "which", "is", "are", "it"}
_DANGLING |= {"its", "there", "we"}
_SPACE_BEFORE_MARK = re.compile(r"\s+([.,;:!?])")
_ONE_ARE = re.compile(r"^((?:The|the|This|this|That|that|It|it) ?(?:\w*[^\Ws])?) are\b")
_LONGEST_PHRASE, _FEWEST_WORDS = 12, 4


def repair(text: str) -> str:
    """
    Repairs a paragraph by rules; it knows nothing of the image, so wrong facts stay.

    Args:
        text: What a model wrote.

    Returns:
        `str`: complete sentences, each once; `""` if nothing is left.
    """
    text = _NOT_ENGLISH.sub(" ", _TEMPLATE.sub(" ", text))
    found = [_without_repeats(sentence.split()) for sentence in _SENTENCE.findall(text)]
    sentences: list[str] = []
    seen: list[list[str]] = []
    for words in filter(None, found):
        ended = words[-1].endswith((".", "!", "?"))
        if not ended:
            words = _trimmed(words)
        bare = [_bare(word) for word in words if _bare(word)]
        again = any(other[: len(bare)] == bare for other in seen)
        fragment = _VERBS.isdisjoint(bare) or (not ended and len(bare) < _FEWEST_WORDS)
        if not bare or again or (fragment and sentences):
            continue
        seen.append(bare)
        sentences.append(_finished(words, bare))
    return " ".join(sentences)


def _bare(word: str) -> str:
    return word.lower().strip(".,;:!?'\"()%&/-")


def _without_repeats(words: list[str]) -> list[str]:
    """Words without immediate repetitions, from long phrases to single words; the last occurrence stays."""
    for length in range(_LONGEST_PHRASE, 0, -1):
        place = 0
        while place + 2 * length <= len(words):
            first, second = words[place : place + length], words[place + length : place + 2 * length]
            if list(map(_bare, first)) == list(map(_bare, second)):
                del words[place : place + length]
            else:
                place += 1
    return words


def _trimmed(words: list[str]) -> list[str]:
    while words and (_bare(words[-1]) in _DANGLING or not _bare(words[-1])):
        words = words[:-1]
    return words


def _finished(words: list[str], bare: list[str]) -> str:
    if _VERBS.isdisjoint(bare):
        article = [] if bare[0] in ("a", "an", "the", "one") else ["an" if bare[0][0] in "aeiou" else "a"]
        words = ["There", "is", *article, words[0].lower(), *words[1:]]
    sentence = _SPACE_BEFORE_MARK.sub(r"\1", " ".join(words)).lstrip(".,;:!?- ")
    sentence = _ONE_ARE.sub(r"\1 is", sentence)
    if not sentence.endswith((".", "!", "?")):
        sentence = sentence.rstrip(",;:-") + "."
    return sentence[0].upper() + sentence[1:]


Write = Callable[[Sequence[str]], str | None]


class Completion(TypedDict):
    """A chat completion in OpenAI's format, as far as clients read it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, object]]
    usage: dict[str, int]


def answer(request: Any, write: Write | None = None) -> Completion:
    """
    A chat completion for a request to repair.

    Args:
        request: `{"messages": …}` whose last message is a prompt, an empty line, and the paragraph.
        write: Answers other requests, given the contents of their messages, or returns `None`.

    Returns:
        `dict`: in OpenAI's format. A token is a word here.

    Raises:
        ValueError: for any other request.
    """
    try:
        texts = [str(message["content"]) for message in request["messages"]]
        content = texts[-1]
        written = write(texts) if write is not None else None
        prompt, line, paragraph = content.partition("\n\n")
    except (KeyError, IndexError, TypeError, AttributeError):
        content, line, written = "", "", None
    if written is None and (not line or not prompt.strip()):
        raise ValueError("this server only repairs: send a prompt, an empty line, and the paragraph as one message")
    words = (written if written is not None else repair(paragraph)).split(" ")
    limit = request.get("max_tokens") or len(words)
    kept = words[:limit]
    usage = {"prompt_tokens": len(content.split()), "completion_tokens": len(kept)}
    message = {"role": "assistant", "content": " ".join(kept)}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if len(kept) == len(words) else "length"}
    return {
        "id": "demo",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """One line per request would bury the notice."""

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "demo"}]})
        else:
            self._send(404, _error(f"nothing is served at {self.path}; use /v1/chat/completions. {NOTICE}"))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            self.close_connection = True
            self._send(413, _error(f"a request needs a Content-Length of at most {_MAX_BODY} bytes"))
            return
        body = self.rfile.read(int(length))
        if self.path.rstrip("/") != "/v1/chat/completions":
            self._send(404, _error(f"nothing is served at {self.path}; post to /v1/chat/completions"))
            return
        try:
            self._send(200, answer(json.loads(body), self.server.write))
        except ValueError as error:  # JSON's own errors are such
            self._send(400, _error(str(error)))

    def _send(self, status: int, content: Mapping[str, object]) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def _error(message: str) -> dict[str, dict[str, str]]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    write: Write | None = None


def make_server(port: int = DEFAULT_PORT, write: Write | None = None) -> ThreadingHTTPServer:
    """
    The server, on 127.0.0.1 only; `serve_forever` starts it.

    Args:
        port: 0 for any free one; see `server_address`.
        write: As for [`answer`].

    Raises:
        OSError: if the port is taken.
    """
    try:
        server = _Server(("127.0.0.1", port), _Handler)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on port {port} of 127.0.0.1: {error}; choose another one with --port") from error
    server.write = write
    return server


def main(arguments: list[str] | None = None, write: Write | None = None) -> None:
    """Serves until Ctrl-C; its first line of output is the address for `repair_base_url`."""
    parser = argparse.ArgumentParser(prog="python -m transformers_minigpt4.demo.endpoint", description=NOTICE)
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"0 for any free one; {DEFAULT_PORT} by default"
    )
    try:
        server = make_server(parser.parse_args(arguments).port, write)
    except OSError as error:
        parser.exit(1, f"{error}\n")
    with server:
        print(f"http://127.0.0.1:{server.server_address[1]}/v1 (model {MODEL}; Ctrl-C ends it)", flush=True)
        print(NOTICE, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
