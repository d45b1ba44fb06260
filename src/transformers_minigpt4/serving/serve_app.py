"""The OpenAI-compatible server: the app of `transformers serve`, for one model, with checked requests."""

import asyncio
import json
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import ProcessorMixin
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.server import build_server

from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.utils.models import GenerativeModel
from transformers_minigpt4.utils.text import first_line

from .serve_addresses import public_client
from .serve_errors import ApiError
from .serve_generation import BatchedGeneration, OneModel
from .serve_limits import Limits
from .serve_requests import check_settings, load_messages


# `transformers serve` has others, which load whatever model a request names, or unload this one.
_ROUTES = ("/v1/chat/completions", "/health")


def chat_app(
    names: tuple[str, ...],
    model: GenerativeModel,
    processor: ProcessorMixin,
    allow_private_urls: bool = False,
    hosts: tuple[str, ...] | None = None,
) -> FastAPI:
    """
    The server's app.

    Args:
        names (`tuple[str, ...]`): what requests may call the model; the first is listed.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family whose processor has a
            chat template.
        allow_private_urls (`bool`, *optional*, defaults to `False`): whether image URLs may lead to this machine and
            its network.
        hosts (`tuple[str, ...]`, *optional*): the names by which clients reach the server; by default any. With those
            of this machine, a web page whose own name was made to lead here is refused.

    Raises:
        ValueError: for a processor without chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so this checkpoint cannot be served; use one with a "
            "chat template, or ask single questions with `minigpt4 describe`"
        )
    manager, generation = OneModel(names[0], model, processor), BatchedGeneration(model, processor)
    handler = ChatHandler(names, manager, generation, allow_private_urls)
    others: Any = None
    app = build_server(manager, handler, others, others, others, others, generation)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]
    listed = {"id": names[0], "object": "model", "created": int(time.time()), "owned_by": "transformers_minigpt4"}

    @app.get("/v1/models")
    def models() -> JsonObject:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> JsonObject:
        handler.check_name(name)
        return listed

    app.add_exception_handler(ApiError, _show_error)
    app.add_exception_handler(HTTPException, _show_error)
    app.add_exception_handler(RequestValidationError, _show_error)
    app.add_exception_handler(Exception, _show_error)
    app.add_middleware(Limits, hosts=hosts)
    return app


class ChatHandler(ChatCompletionHandler):
    """
    Checks a chat request and loads its images, then leaves it to transformers.

    Args:
        names (`tuple[str, ...]`), allow_private_urls (`bool`): as for [`chat_app`].
        manager (`OneModel`), generation (`BatchedGeneration`): the model, and what generates with it.
    """

    def __init__(
        self, names: tuple[str, ...], manager: OneModel, generation: BatchedGeneration, allow_private_urls: bool
    ) -> None:
        super().__init__(manager, generation)
        self.names = names
        self.client = None if allow_private_urls else public_client()
        self.ends: list[str] = list(getattr(manager.model.generation_config, "stop", None) or ())

    def check_name(self, name: object) -> None:
        """
        Refuses the name of another model.

        Raises:
            ApiError: for any other name.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                f"there is no model {str(name)[:200]!r}; this server has {self.names[0]!r} only",
                404,
                param="model",
                code="model_not_found",
            )

    async def handle_request(self, body: JsonObject, request_id: str) -> StreamingResponse | JSONResponse:
        """Answers a request, as `transformers serve` does."""
        self.check_name(body.get("model"))
        check_settings(body)
        # In a thread, because images may come from slow servers.
        messages = await asyncio.to_thread(load_messages, body, self.ends, self.client)
        checked = {**body, "model": self.names[0], "messages": messages}
        try:
            response = await super().handle_request(checked, request_id)
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            # Before anything is generated: the chat template or the processor cannot take such messages.
            raise ApiError(f"these messages cannot be read: {first_line(error)}", param="messages") from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = _completed(response.body_iterator)
        return response


async def _completed(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The events of a stream, and the last one that OpenAI's streams have; an error is one as well."""
    try:
        async with aclosing(aiter(events)) as open_events:  # type: ignore[type-var]  # a generator
            async for event in open_events:
                yield event
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    yield "data: [DONE]\n\n"


def _show_error(request: Request, error: Exception) -> JSONResponse:
    """Any error as OpenAI's JSON."""
    if isinstance(error, RequestValidationError):
        error = ApiError("the body must be a JSON object, with the header Content-Type: application/json")
    elif isinstance(error, HTTPException):
        status = 400 if error.status_code == 422 else error.status_code
        error = ApiError(f"{request.method} {request.url.path}: {error.detail}", status)
    elif not isinstance(error, ApiError):
        error = ApiError(f"the server failed: {type(error).__name__}", 500)
    return JSONResponse(error.body, error.status)
