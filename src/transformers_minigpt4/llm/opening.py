"""Opens the chat model that settings name, at an endpoint or local."""

from pathlib import Path

from .cache import AnswerCache
from .client import ChatModel
from .endpoint import EndpointChatModel
from .local import LocalChatModel
from .types import ChatSettings, Usage


def open_chat_model(settings: ChatSettings, cache: Path | None = None, spent: Usage | None = None) -> ChatModel:
    """
    Opens the model that the settings name: at an endpoint if they have a `base_url`, else here with transformers.

    Args:
        settings: See [`ChatSettings`].
        cache: SQLite file for answers, created if it does not exist; several processes may share it.
        spent: What earlier runs have used of the same budget.

    Raises:
        ValueError: if a local model cannot be loaded or the cache is not such a file.
        ChatError: if the `openai` package is missing (`kind="missing"`).

    Example:

    ```python
    >>> from transformers_minigpt4.llm.opening import open_chat_model
    >>> from transformers_minigpt4.llm.types import ChatSettings

    >>> settings = ChatSettings("llama-3.1-8b", base_url="http://127.0.0.1:8000/v1", concurrency=4)
    >>> with open_chat_model(settings) as model:  # doctest: +SKIP
    ...     print(model.complete([{"role": "user", "content": "Say yes."}]).text)
    ```
    """
    model_class: type[ChatModel] = EndpointChatModel if settings.base_url is not None else LocalChatModel
    answers = AnswerCache(cache) if cache is not None else None
    try:
        return model_class(settings, answers, spent)
    except BaseException:
        if answers is not None:
            answers.close()
        raise
