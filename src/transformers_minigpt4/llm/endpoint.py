"""A chat model at any OpenAI-compatible endpoint: retries, pace, time-outs, and errors that say what to do."""

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from transformers_minigpt4.processing.deadline_minigpt4 import run_within

from .cache import AnswerCache
from .client import ChatModel, Key
from .responses import read_completion, retry_after_seconds, used_tokens
from .types import ChatAnswer, ChatError, ChatSettings, Message, Usage, checked_messages


if TYPE_CHECKING:
    from httpx2 import Response
    from openai import APIStatusError

# Faults that a retry may resolve. Those of the second line cost tokens each time, and seldom go away by themselves.
_TRANSPORT = ("connection", "down", "rate_limit", "server", "timeout")
_CONTENT, _CONTENT_RETRIES = ("empty", "garbage"), 2
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds; doubled at each try, then cut at random to 50-100 %
_LONGEST_RETRY_AFTER = 300.0  # seconds; if an endpoint asks for more, it is better to run again later
_FAILURES_IN_A_ROW = 10  # requests without an answer, retries included, after which the endpoint counts as broken
_LARGEST_QUOTED = 4096  # bytes; longer answers are cut before they are quoted
_LARGEST_ANSWER = 16 << 20  # bytes; no text model writes as much, a wrong address may
# Prompt tokens of a chat template: role and end tokens of each message, and a date or system text that it adds.
_TOKENS_PER_MESSAGE, _TOKENS_PER_REQUEST = 16, 64
_DETAIL_LENGTH = 200  # characters of an endpoint's own words that an error quotes
# From a gateway that did not wait for the server behind it, which may have finished nevertheless.
_MAYBE_BILLED = (408, 502, 504, 524)
_MAX_REDIRECTS = 3  # on the same server, such as from /v1 to /api/v1
_SHORTEST_KEY = 8  # characters; what is shorter is a placeholder for a local server, such as "none"


class EndpointChatModel(ChatModel):
    """
    See [`ChatModel`]. The key is read from the environment once and appears in no message.

    Raises:
        ChatError: if the `openai` package is missing (`kind="missing"`).
    """

    def __init__(self, settings: ChatSettings, cache: AnswerCache | None = None, spent: Usage | None = None) -> None:
        super().__init__(settings, cache, spent)
        try:
            import openai
        except ImportError as error:
            raise ChatError(
                "missing",
                "a model at an endpoint needs the openai package: "
                'pip install "transformers_minigpt4[curation]" (or [evaluation])',
                fatal=True,
            ) from error
        self._openai = openai
        self._key = os.environ.get(settings.api_key_env, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ChatError(
                "auth",
                f"the key in the environment variable {settings.api_key_env} holds characters that keys do not have; "
                "set it again",
                fatal=True,
            )
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",
            # Retries are counted, paced and paid for in this class.
            max_retries=0,
            # Connecting takes its time out before the complete exchange does, and has another message.
            timeout=openai.Timeout(settings.timeout, connect=0.9 * settings.timeout),
            http_client=openai.DefaultAsyncHttpxClient(
                max_redirects=_MAX_REDIRECTS, event_hooks={"response": [self._check_redirect]}
            ),
        )
        self._headers = {} if self._key else {"Authorization": openai.omit}
        self._gate = _Gate(settings.requests_per_minute)
        # OpenAI's newer models refuse `max_tokens`; most other servers know only that.
        self._limit_name = "max_tokens"
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._last_success = -1.0

    def identity(self) -> str:
        return str(self.settings.base_url).rstrip("/")

    def close(self) -> None:
        run_within(self.settings.timeout, self._client.close())
        super().close()

    def complete_many(
        self, requests: Iterable[tuple[Key, list[Message]]]
    ) -> Iterator[tuple[Key, ChatAnswer | ChatError]]:
        source = iter(requests)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="chat")
        running: dict[Future[ChatAnswer], Key] = {}
        fatal: ChatError | None = None
        try:
            while True:
                while fatal is None and len(running) < self.settings.concurrency:
                    item = next(source, None)
                    if item is None:
                        break
                    running[pool.submit(self._complete, item[1], stop)] = item[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    result = _result(future)
                    if isinstance(result, ChatError) and (result.fatal or result.kind == "stopped"):
                        # Requests in flight are finished, because they are paid for; their retries and waits end.
                        stop.set()
                        fatal = fatal if fatal is not None or result.kind == "stopped" else result
                    else:
                        yield key, result
            if fatal is not None:
                raise fatal
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, messages: list[Message], stop: threading.Event) -> ChatAnswer:
        """One answer, from the cache or after as many tries as it takes."""
        messages = checked_messages(messages)
        cached = self.from_cache(messages)
        if cached is not None:
            return cached
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                answer = self._try_once(messages, stop)
            except _Fault as fault:
                if fault.fatal or tries > self._retries(fault.kind):
                    # Without the cause, whose words may repeat the key.
                    raise self._failed(fault, tries, began) from None
                self._wait_to_retry(fault, tries, stop)
            else:
                with self._lock:
                    self._failures_in_a_row, self._last_success = 0, time.monotonic()
                return self.keep(messages, answer)

    def _retries(self, kind: str) -> int:
        if kind in _TRANSPORT:
            return self.settings.max_retries
        return min(_CONTENT_RETRIES, self.settings.max_retries) if kind in _CONTENT else 0

    def _wait_to_retry(self, fault: "_Fault", tries: int, stop: threading.Event) -> None:
        delay = min(_FIRST_DELAY * 2 ** min(tries - 1, 20), _LONGEST_DELAY) * random.uniform(0.5, 1.0)
        if fault.retry_after is not None:
            # It holds for all threads. The delay is added, so that they do not return at the same moment.
            self._gate.close_for(fault.retry_after)
            delay += fault.retry_after
        if stop.wait(delay):
            raise ChatError("stopped", f"given up after {tries} tries: {fault.what}")

    def _failed(self, fault: "_Fault", tries: int, began: float) -> ChatError:
        """The error for a request that is given up; fatal if the endpoint rather than the request is at fault."""
        fatal = fault.fatal
        if fault.kind in (*_TRANSPORT, "garbage"):
            with self._lock:
                self._failures_in_a_row += 1
                fatal = fatal or self._failures_in_a_row >= _FAILURES_IN_A_ROW
                fatal = fatal or (fault.kind == "down" and self._last_success < began)
        count = f" ({tries} tries)" if tries > 1 else ""
        where = f"{self.identity()} (model {self.name})"
        return ChatError(fault.kind, f"{where} {fault.what}{count}; {fault.remedy}", fatal=fatal)

    def _quote(self, text: str) -> str:
        """One short line of an endpoint's message, without control characters and the key, which some repeat."""
        if len(self._key) >= _SHORTEST_KEY:
            text = text.replace(self._key, "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= _DETAIL_LENGTH else line[: _DETAIL_LENGTH - 1] + "…"

    def _try_once(self, messages: list[Message], stop: threading.Event) -> ChatAnswer:
        """Sends one request; what it used is counted whatever the outcome."""
        most = sum(len(m["content"].encode(errors="replace")) + _TOKENS_PER_MESSAGE for m in messages)
        reservation = self.ledger.reserve(most + _TOKENS_PER_REQUEST, stop=stop)
        # An answer that got lost may be billed.
        used = reservation.prompt_tokens, reservation.completion_tokens
        sent = False
        try:
            self._gate.pass_through(stop)
            sent = True
            payload = self._send(messages)
            completion = read_completion(payload)
            if completion is None:
                raise self._garbage(payload)
            used = used_tokens(completion, reservation)
            if not completion.text and completion.finish_reason != "content_filter":
                raise _empty(completion.finish_reason, used)
        except _Fault as fault:
            used = fault.used if fault.used is not None else used
            raise
        finally:
            cost = self.ledger.settle(reservation, *used) if sent else self.ledger.release(reservation)
        return ChatAnswer(completion.text, completion.finish_reason, *used, cost, received=completion.received)

    def _send(self, messages: list[Message]) -> bytes:
        """
        The bytes of one answer.

        Raises:
            _Fault: for everything that can go wrong.
        """
        openai = self._openai
        try:
            return run_within(self.settings.timeout, self._exchange(messages))
        except TimeoutError as error:
            raise self._timed_out() from error
        except openai.APITimeoutError as error:
            connected = type(error.__cause__).__name__ != "ConnectTimeout"
            raise (self._timed_out() if connected else self._unreachable(error)) from error
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        except openai.APIConnectionError as error:
            raise self._unreachable(error) from error
        except openai.OpenAIError as error:
            raise _Fault("refused", f"could not be asked: {self._quote(str(error))}", "check the settings") from error
        except _Fault:
            raise
        except Exception as error:
            # Reading the body goes past the client's own translation of httpx's errors.
            if "Timeout" in type(error).__name__:
                raise self._timed_out() from error
            if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise self._unreachable(error) from error
            raise

    async def _exchange(self, messages: list[Message]) -> bytes:
        settings = self.settings
        arguments: dict[str, Any] = {
            "model": settings.model,
            "messages": messages,
            "temperature": settings.temperature,
            self._limit_name: settings.max_tokens,
            "extra_headers": self._headers,
        }
        received = bytearray()
        # As a stream, to stop an answer that is too long.
        async with self._client.chat.completions.with_streaming_response.create(**arguments) as response:
            async for chunk in response.iter_bytes():
                received += chunk
                if len(received) > _LARGEST_ANSWER:
                    raise self._garbage(bytes(received))
        return bytes(received)

    async def _check_redirect(self, response: "Response") -> None:
        """
        Lets redirects on the same server pass.

        Raises:
            _Fault: for another server, which was not named to get the conversation and the key.
        """
        if not response.has_redirect_location:
            return
        target = response.url.join(response.headers["location"])
        if (target.scheme, target.host, target.port) != (response.url.scheme, response.url.host, response.url.port):
            raise _Fault(
                "redirected",
                f"redirects elsewhere, to {self._quote(str(target))}",
                "if you trust that server, set base_url to its address",
                fatal=True,
                used=(0, 0),
            )

    def _garbage(self, payload: bytes) -> "_Fault":
        text = payload[:_LARGEST_QUOTED].decode(errors="replace").lstrip("\ufeff").lstrip()
        what = "a web page" if text[:1] == "<" else "what is not a chat completion"
        return _Fault(
            "garbage",
            f"answered with {what}: {self._quote(text)!r}",
            "check that base_url is the address of an OpenAI-compatible endpoint, usually ending in /v1",
        )

    def _timed_out(self) -> "_Fault":
        return _Fault(
            "timeout",
            f"did not answer within {self.settings.timeout:g} s",
            "raise the time-out, or lower the concurrency",
        )

    def _unreachable(self, error: Exception) -> "_Fault":
        reason = self._quote(str(error.__cause__ or error))
        if "TooManyRedirects" in (type(error).__name__, type(error.__cause__).__name__):
            what = f"redirects more than {_MAX_REDIRECTS} times"
            return _Fault("redirected", what, "correct base_url", fatal=True, used=(0, 0))
        cause: BaseException | None = error
        while cause is not None:
            if type(cause).__name__ in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol"):
                remedy = "start the server, or correct base_url"
                return _Fault("down", f"cannot be reached ({reason})", remedy, used=(0, 0))
            cause = cause.__cause__
        return _Fault("connection", f"broke the connection ({reason})", "see the server's log, then run again")

    def _refusal(self, error: "APIStatusError") -> "_Fault":
        """What an HTTP status of 400 or more means."""
        status = error.status_code
        said = self._quote(str(error.message).removeprefix(f"Error code: {status} - "))
        fault = self._refusal_of(status, said, error)
        if status not in _MAYBE_BILLED:
            fault.used = 0, 0
        return fault

    def _refusal_of(self, status: int, said: str, error: "APIStatusError") -> "_Fault":
        variable = f"the environment variable {self.settings.api_key_env}"
        if status in (401, 403) and not self._key:
            return _Fault("auth", f"requires a key (status {status}: {said})", f"put one into {variable}", fatal=True)
        if status in (401, 403):
            return _Fault(
                "auth", f"refuses the key (status {status}: {said})", f"put a valid one into {variable}", fatal=True
            )
        if status == 402 or error.code == "insufficient_quota":
            return _Fault("quota", f"asks for payment (status {status}: {said})", "top up the account", fatal=True)
        if status == 404:
            return _Fault(
                "not_found",
                f"has no such address or model (status 404: {said})",
                "check base_url and the model",
                fatal=True,
            )
        if status in (408, 409, 429) or status >= 500:
            return self._passing(status, said, retry_after_seconds(error.response.headers))
        if error.param == "max_tokens" and "max_completion_tokens" in said and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return _Fault("server", "requires max_completion_tokens", "run again", retry_after=0.0)
        return _Fault("refused", f"refuses the request (status {status}: {said})", "check settings and prompt")

    def _passing(self, status: int, said: str, retry_after: float | None) -> "_Fault":
        if retry_after is not None and retry_after > _LONGEST_RETRY_AFTER:
            what = f"asks to wait {retry_after:,.0f} s (status {status}: {said})"
            kind = "rate_limit" if status == 429 else "server"
            return _Fault(kind, what, "run again later; what was finished is kept", fatal=True)
        if status == 429:
            remedy = "set requests_per_minute, or lower the concurrency"
            return _Fault("rate_limit", f"gets too many requests (429: {said})", remedy, retry_after=retry_after)
        remedy = "see the server's log, then run again"
        return _Fault("server", f"failed with status {status} ({said})", remedy, retry_after=retry_after)


class _Fault(Exception):
    """Why one try failed: what the endpoint did, what to do, how long it asks to wait, what the try has used."""

    def __init__(
        self,
        kind: str,
        what: str,
        remedy: str,
        *,
        fatal: bool = False,
        retry_after: float | None = None,
        used: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(what)
        self.kind, self.what, self.remedy = kind, what, remedy
        self.fatal, self.retry_after, self.used = fatal, retry_after, used


class _Gate:
    """Lets requests through at their pace, and none while the endpoint has asked for a pause."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def close_for(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def pass_through(self, stop: threading.Event) -> None:
        """
        Waits for this thread's turn.

        Raises:
            ChatError: if `stop` was set meanwhile (`kind="stopped"`).
        """
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._interval
                    return
                pause = self._next - now
            # In short waits: the gate may close for longer meanwhile.
            if stop.wait(min(pause, 1.0)):
                raise ChatError("stopped", "given up while waiting to send")


def _result(future: Future[ChatAnswer]) -> ChatAnswer | ChatError:
    try:
        return future.result()
    except ChatError as error:
        return error


def _empty(finish_reason: str, used: tuple[int, int]) -> _Fault:
    why = " before its limit of tokens" if finish_reason == "length" else ""
    remedy = "try another model or prompt, or raise max_tokens for a model that thinks first"
    return _Fault("empty", f"gave an empty answer{why}", remedy, used=used)
