"""What the tests of the web page share: tiny models to chat with, image files, and conversations."""

from pathlib import Path

from tiny_models import drawn_image

from transformers_minigpt4.inference.batching import BatchedModel
from transformers_minigpt4.inference.chat import PRESETS
from transformers_minigpt4.serving.web_conversations import Conversation, Served


GREEDY = {**PRESETS["greedy"], "max_new_tokens": 6}


def served_model(loaded, name: str) -> Served:
    """A model that is loaded, as the page serves it under a name."""
    model, processor = loaded
    return Served(name, f"checkpoints/{name}", BatchedModel(model, processor), processor)


def image_files(folder: Path, count: int) -> list[Path]:
    """Different images."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        drawn_image(number).save(path)
    return paths


def ask(conversation: Conversation, question: str, files=(), **parameters) -> list[str]:
    """Asks to the end; returns the answer of each model."""
    for _ in conversation.ask(question, files, {**GREEDY, **parameters}):
        pass
    return conversation.exchanges[-1].answers
