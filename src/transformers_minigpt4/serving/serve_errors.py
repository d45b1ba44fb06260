"""Errors as OpenAI's API writes them."""

from typing import Any

from transformers_minigpt4.utils.text import without_surrogates


class ApiError(Exception):
    """
    What is wrong with a request, or with answering it.

    Args:
        message (`str`): What was given, why it cannot be, and what to do.
        status (`int`, *optional*, defaults to 400): HTTP status.
        param (`str`, *optional*): The field of the request.
        code (`str`, *optional*): A word for programs, one of OpenAI's where it has one.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`"""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = without_surrogates(self.message)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}
