"""Finds what the assistant says in a rendered conversation: the text and the tokens that training learns."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


Span: TypeAlias = tuple[int, int]  # first character, and one after the last
Messages: TypeAlias = Sequence[Mapping[str, Any]]  # of role and content, as chat templates take them
_Render: TypeAlias = Callable[..., str]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_COMMENTS = re.compile(r"\{#.*?#\}", re.DOTALL)
_SENTINEL = "answer-{}-7b1e6f2c"  # plain words, so that a template prints them as it prints any answer


class Conversation(NamedTuple):
    """The text of a conversation, and where in it the answers are, each with what ends it."""

    text: str
    answers: list[Span]


class NoEndMarkError(ValueError):
    """A chat template that prints nothing after an answer, so that a model would never learn to stop."""


class _Layout(NamedTuple):
    """A rendered conversation, and where the contents of its assistant messages are."""

    text: str
    contents: list[Span]


def find_answers(chat_template: str, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """
    Renders a conversation and finds the answers in it.

    An answer begins where the prompt of its question ends (`add_generation_prompt=True`), and ends with the mark after
    its content, such as `<|im_end|>`. White space after this mark is not part of it, nor is what closes the text after
    the last turn. Earlier turns may look different when they are the last ones, as with Qwen3. Templates with
    `{% generation %}` marks may choose by them which answers are learned.

    Args:
        chat_template (`str`): A Jinja template.
        messages (`Sequence[Mapping]`): The conversation, with contents that the template takes.
        tokenizer (`PreTrainedTokenizerBase`): For special tokens.

    Raises:
        ValueError: for a conversation that the template refuses, and for answers that cannot be found in its text.
            A `NoEndMarkError` for a template that prints nothing after an answer.
    """
    messages = [_with_text(message, message_text(message)) for message in messages]
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def render(turns: Messages, add_generation_prompt: bool = False) -> str:
        options = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        return _rendered(turns, **options, **special_tokens)[0]

    marks = None
    if _MARKS.search(_COMMENTS.sub("", chat_template)):
        text, marks = marked_answers(chat_template, messages, tokenizer)
    # A second attempt, as a template may print the date, and midnight may pass between two renderings.
    layout = _lay_out(render, messages) or _lay_out(render, messages)
    if layout is None:
        if marks is not None:
            return Conversation(text, marks)
        raise ValueError(
            "The chat template changes the text of an answer or leaves it out, so it cannot be told which tokens to "
            f"learn: {_shown(messages)}. Mark answers in the template with {{% generation %}}, or change the row."
        )
    answers = _answers(render, messages, layout, tokenizer.get_added_vocab(), marked=marks is not None)
    if marks is not None:
        kept = [any(a < end and start < b for a, b in marks) for start, end in layout.contents]
        answers = [answer for answer, keep in zip(answers, kept) if keep]
    return Conversation(layout.text, answers)


def marked_answers(chat_template: str, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """
    Renders a conversation with a template that marks its answers by `{% generation %}`.

    Raises:
        ValueError: for a conversation that the template refuses.
    """
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    text, spans = _rendered(messages, chat_template=chat_template, return_assistant_tokens_mask=True, **special_tokens)
    return Conversation(text, spans)


def learned_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, image_token: str, image_seq_length: int
) -> tuple[list[int], list[bool]]:
    """
    Tokenizes a conversation in one piece, as its prompts are at inference.

    Args:
        conversation (`Conversation`): With one `image_token` per image.
        tokenizer (`PreTrainedTokenizerBase`): One that knows where in a text its tokens are.
        image_token (`str`): The placeholder, which is repeated for every position of an image.
        image_seq_length (`int`): Positions per image.

    Returns:
        `tuple[list[int], list[bool]]`: Ids, and whether each of them is learned.

    Raises:
        ValueError: for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens are, so answers cannot be told from "
            "questions. Take the language model's tokenizer.json."
        )
    text, grown = conversation.text, len(image_token) * (image_seq_length - 1)

    def moved(place: int) -> int:
        return place + text.count(image_token, 0, place) * grown

    spans = [(moved(start), moved(end)) for start, end in conversation.answers]
    # As `apply_chat_template`, which tokenizes prompts: <s> is added if the template does not print it.
    bos = tokenizer.bos_token
    encoded = tokenizer(
        text.replace(image_token, image_token * image_seq_length),
        add_special_tokens=bos is None or not text.startswith(bos),
        return_offsets_mapping=True,
    )
    learned = [
        any(first < stop and (last > start if last > first else first >= start) for start, stop in spans)
        and (first, last) != (0, 0)
        for first, last in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), learned


def message_text(message: Mapping[str, Any]) -> str:
    """The texts of a message, joined by spaces, as the frame around chat templates joins them."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _with_text(message: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    """An assistant message with its text in one part, or in none if it had none; other messages as they are."""
    if message["role"] != "assistant":
        return message
    structured = not isinstance(message.get("content"), (str, type(None)))
    return {**message, "content": [{"type": "text", "text": text}] if structured else text}


def _rendered(messages: Messages, **options: Any) -> tuple[str, list[Span]]:
    try:
        # Texts and marks; annotated as a text.
        rendered = cast(
            tuple[list[str], list[list[Span]]], render_jinja_template([[dict(turn) for turn in messages]], **options)
        )
    except Exception as error:  # a template is code from elsewhere and may raise anything
        raise ValueError(
            f"The chat template refuses a conversation ({error}): {_shown(messages)}. Change the row, or train on "
            "other rows."
        ) from error
    texts, marks = rendered
    return texts[0], marks[0] if marks else []


def _lay_out(render: _Render, messages: Messages) -> _Layout | None:
    """Renders a conversation as it is and with a sentinel for each answer; `None` if more than answers differ."""
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    sentinels = {i: _SENTINEL.format(i) for i in numbers}
    text = render(messages)
    rest = render([_with_text(turn, sentinels.get(i, "")) for i, turn in enumerate(messages)])
    literals = []
    for number in numbers:
        before, found, rest = rest.partition(sentinels[number])
        if not found:
            return None
        literals.append(before)
    literals.append(rest)
    if any(sentinel in literal for sentinel in sentinels.values() for literal in literals):
        return None
    if not text.startswith(literals[0]):
        return None
    contents, place = [], len(literals[0])
    for number, after in zip(numbers, literals[1:]):
        said = message_text(messages[number])
        # Templates print an answer as it is or trimmed.
        forms = (said, said.strip(), said.lstrip(), said.rstrip())
        form = next((form for form in forms if text.startswith(form + after, place)), None)
        if form is None:
            return None
        contents.append((place, place + len(form)))
        place += len(form) + len(after)
    return _Layout(text, contents) if place == len(text) else None


def _answers(
    render: _Render, messages: Messages, layout: _Layout, added_tokens: Collection[str], marked: bool
) -> list[Span]:
    """Contents, extended to the end of the prompt on one side and over the end mark on the other."""
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not numbers:
        return []
    closed = layout if numbers[-1] == len(messages) - 1 else _lay_out(render, messages[: numbers[-1] + 1])
    end = "" if closed is None else _end_mark(closed.text[closed.contents[-1][1] :], added_tokens)
    if not end:
        raise NoEndMarkError(
            "The chat template prints nothing after an answer, so a model would never learn to stop: "
            f"{_shown(messages)}. Print a mark such as eos_token after the content of assistant messages."
        )
    answers = []
    for number, (start, stop) in zip(numbers, layout.contents):
        if number and messages[number - 1]["role"] != "assistant":
            start = _start(render, messages[:number], layout.text, start, number == len(messages) - 1, marked)
        answers.append((start, stop + len(end) * layout.text.startswith(end, stop)))
    return answers


def _start(render: _Render, question: Messages, text: str, content: int, last: bool, marked: bool) -> int:
    """Where an answer begins whose content begins at `content`: after the prompt that asks for it."""
    prompt = render(question, add_generation_prompt=True)
    common = _common(prompt, text[:content])
    between = text[common:content]
    if not between.strip() and (common == len(prompt) or not last):
        return common
    if common == len(prompt) and prompt != render(question):
        return content if marked else common  # the template prints more, such as an empty thought
    if last and not marked:
        raise ValueError(
            f"The chat template asks with {prompt[-60:]!r} (add_generation_prompt=True), but before an answer it "
            f"prints {text[max(0, content - 60) : content]!r}: the prompt that is trained would never be asked. Take "
            "a template that prints both alike."
        )
    return content


def _common(first: str, second: str) -> int:
    """Characters with which both begin."""
    if second.startswith(first):
        return len(first)
    return next((place for place, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _end_mark(rest: str, added_tokens: Collection[str]) -> str:
    """The token, or else the word, that follows an answer, with white space in front of it; empty if none does."""
    marks = rest.split(maxsplit=1)
    if not marks:
        return ""
    start = len(rest) - len(rest.lstrip())
    token = max((token for token in added_tokens if rest.startswith(token, start)), key=len, default=marks[0])
    return rest[: start + len(token)]


def _shown(messages: Messages) -> str:
    text = str([f"{message['role']}: {message_text(message)}" for message in messages])
    return text if len(text) <= 200 else text[:200] + "…"
