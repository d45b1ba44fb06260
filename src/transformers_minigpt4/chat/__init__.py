"""One client for text language models, at an endpoint or local, with a budget, a cache and plain errors."""

from .client import BudgetExhausted, ChatAnswer, ChatError, ChatModel, ChatSettings, Usage, open_chat_model


__all__ = ["BudgetExhausted", "ChatAnswer", "ChatError", "ChatModel", "ChatSettings", "Usage", "open_chat_model"]
