"""The web page: conversations with images, with one model or several next to each other."""

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers_minigpt4.inference.chat import PRESETS
from transformers_minigpt4.utils.text import first_line
from transformers_minigpt4.web.html import escape
from transformers_minigpt4.web.server import new_page
from transformers_minigpt4.web.uploads import Uploads

from .web_conversations import Conversation, Conversations, letter
from .web_feedback import Feedback
from .web_images import thumbnail_of


if TYPE_CHECKING:
    import gradio as gr


CSS = """
.gradio-container .message img { max-height: 240px; width: auto; }
.message { overflow-wrap: anywhere; unicode-bidi: isolate; }
[role=log] .message-content { white-space: pre-wrap; }
#examples button img { height: 2.5em; width: auto; }
/* One would send the conversation to another machine, the other would clear no more than the view. */
[role=log] .icon-button-wrapper:has([aria-label=Share]), .wrapper > .icon-button-wrapper:has([aria-label=Clear]) {
  display: none !important;
}
"""
_PRESETS = {"authors": "Sampling, as in the authors' chat", "greedy": "Always the likeliest token"}
_WAITING = "…"
_STOPPED = "(stopped)"
# The browser keeps the key of the conversation for as long as the tab is open, so that a reload comes back to it. The
# labels for screen readers are those that Gradio's components leave out; those of messages, and what their button
# copies, would have `&lt;` for `<`.
_KNOWN_KEY = """() => {
  const label = () => {
    document.querySelector("#message textarea")?.setAttribute("aria-label", "Message");
    for (const log of document.querySelectorAll("[role=log]")) {
      const name = log.closest(".block").querySelector("[data-testid=block-label]")?.innerText.trim();
      log.setAttribute("aria-label", `Conversation with ${name}`);
      log.querySelectorAll(".user img").forEach((image, number) => { image.alt = `Image ${number + 1}`; });
      log.querySelectorAll("[data-testid]").forEach((text) => text.removeAttribute("aria-label"));
    }
  };
  const write = navigator.clipboard?.writeText.bind(navigator.clipboard), area = document.createElement("textarea");
  if (write) navigator.clipboard.writeText = (text) => { area.innerHTML = text; return write(area.value); };
  new MutationObserver(label).observe(document.body, { childList: true, subtree: true });
  label();
  return [sessionStorage.getItem("minigpt4-conversation") ?? ""];
}"""
_KEEP_KEY = """(key) => { sessionStorage.setItem("minigpt4-conversation", key); }"""


class Example(NamedTuple):
    """An image to begin with; `path` is in the folder of uploads."""

    name: str
    path: Path
    question: str


class ChatPage:
    """
    What the page does when somebody clicks.

    Args:
        conversations (`Conversations`): of everybody.
        feedback (`Feedback`): where votes go.
        uploads (`Uploads`): where images come from.
        answering (`int`): conversations that are answered at the same time; others wait in the queue.
    """

    def __init__(self, conversations: Conversations, feedback: Feedback, uploads: Uploads, answering: int) -> None:
        self.conversations, self.feedback, self.uploads = conversations, feedback, uploads
        self.answering = answering

    def load(self, key: str) -> "list[object]":
        """The page after it was opened or reloaded: the conversation of this tab, or a new one."""
        conversation = self.conversations.find(str(key))
        if conversation is None:
            conversation = self.conversations.new()
        elif conversation.is_answering:  # to the page that was left
            conversation.stop()
            conversation.wait(10)
        return [conversation.key, None, *self._shown(conversation)]

    def clear(self, key: str) -> "list[object]":
        self.conversations.forget(str(key))
        return self.load("")

    def ask(self, key: str, message: Mapping[str, Any] | None, *settings: object) -> "Iterator[list[object]]":
        text, names = _parts(message)

        def work(conversation: Conversation) -> Iterator[None]:
            if not all(map(self.uploads.has, names)):
                raise ValueError("an image is not on the server any more; choose it again")
            return conversation.ask(text, [Path(name) for name in names], _parameters(*settings))

        yield from self._answer(key, work, message)

    def regenerate(self, key: str, *settings: object) -> "Iterator[list[object]]":
        yield from self._answer(key, lambda conversation: conversation.regenerate(_parameters(*settings)))

    def _answer(
        self, key: str, work: Callable[[Conversation], Iterator[None]], message: Mapping[str, Any] | None = None
    ) -> "Iterator[list[object]]":
        """Updates of the page while it is being answered; after an error, what was asked is in the box again."""
        import gradio

        conversation = self._find(key)
        box: object = gradio.skip() if message is None else None
        try:
            for _ in work(conversation):
                yield [box, *self._shown(conversation)]
                box = gradio.skip()  # somebody may be typing
        except Exception as error:
            gradio.Warning(_one_line(error), title="Not answered")
            box = gradio.skip() if message is None else message
        self.conversations.shrink()
        if self.conversations.find(str(key)) is conversation:  # not cleared meanwhile
            yield [box, *self._shown(conversation)]

    def stop(self, key: str) -> None:
        conversation = self.conversations.find(str(key))
        if conversation is not None:
            conversation.stop()

    def take_back(self, key: str) -> "list[object]":
        """The last question, in the box again."""
        conversation = self._find(key)
        exchange = self._or_error(conversation.take_back)
        message = {"text": exchange.question, "files": [str(path) for path in exchange.files]}
        return [message, *self._shown(conversation)]

    def vote(self, key: str, choice: str) -> "list[object]":
        conversation = self._find(key)
        if not conversation.voted and not conversation.is_answering and conversation.exchanges:
            self._or_error(lambda: self.feedback.vote(conversation, choice))
            conversation.voted = conversation.revealed = True
        return self._shown(conversation)

    def flag(self, key: str, reason: str) -> "list[object]":
        import gradio

        conversation = self._find(key)
        if not conversation.exchanges or conversation.is_answering:
            raise gradio.Error("there is no answer to report", print_exception=False)
        self._or_error(lambda: self.feedback.flag(conversation, str(reason)))
        return ["", "Thank you. The conversation and its images have been saved."]

    def add_photo(self, message: Mapping[str, Any] | None, photo: str | None) -> "list[object]":
        """Moves a photo of the camera to the box."""
        import gradio

        if not photo:  # it has just been moved
            return [gradio.skip(), gradio.skip()]
        text, names = _parts(message)
        return [{"text": text, "files": [*names, photo]}, None]

    def _find(self, key: str) -> Conversation:
        import gradio

        conversation = self.conversations.find(str(key))
        if conversation is None:
            raise gradio.Error("the server has forgotten this conversation; reload the page", print_exception=False)
        return conversation

    @staticmethod
    def _or_error(work: Callable[[], Any]) -> Any:
        import gradio

        try:
            return work()
        except (ValueError, OSError, RuntimeError) as error:
            raise gradio.Error(_one_line(error), print_exception=False) from error

    def _shown(self, conversation: Conversation) -> "list[object]":
        """Columns, buttons and the line about votes."""
        import gradio

        busy, some = conversation.is_answering, bool(conversation.exchanges)
        columns = [
            gradio.update(value=_messages(conversation, number), label=_label(conversation, number))
            for number in range(len(conversation.served))
        ]
        idle = gradio.update(interactive=some and not busy)
        buttons = [gradio.update(interactive=busy), idle, idle, gradio.update(interactive=not busy), idle]
        if self.conversations.columns == 1:
            return [*columns, *buttons]
        votes = [gradio.update(interactive=some and not busy and not conversation.voted)] * (len(columns) + 2)
        note = "Which answers are better?"
        if conversation.voted:
            note = "Thank you. " + "; ".join(escape(_label(conversation, number)) for number in range(len(columns)))
        return [*columns, *buttons, *votes, note]


def _parts(message: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Text and files of the box."""
    message = message or {}
    return str(message.get("text") or ""), [str(name) for name in message.get("files") or ()]


def _parameters(*settings: object) -> dict[str, object]:
    """Parameters of `Chat` from the values of the fields, which it checks."""
    names = ("do_sample", "temperature", "top_p", "repetition_penalty", "max_new_tokens")
    return dict(zip(names, settings))


def _messages(conversation: Conversation, column: int) -> list[dict[str, object]]:
    """What a column shows; texts are texts, whatever is in them."""
    messages: list[dict[str, object]] = []
    for exchange in conversation.exchanges:
        images: list[object] = [{"path": str(thumbnail_of(path))} for path in exchange.files]
        messages.append({"role": "user", "content": [*images, _text(exchange.question)]})
        pending = _WAITING if exchange is conversation.exchanges[-1] and conversation.is_answering else _STOPPED
        messages.append({"role": "assistant", "content": [_text(exchange.answers[column] or pending)]})
    return messages


def _text(text: str) -> dict[str, str]:
    # Without Markdown, Gradio takes a text for HTML.
    return {"type": "text", "text": html.escape(text, quote=False)}


def _label(conversation: Conversation, column: int) -> str:
    name = conversation.served[column].name
    if len(conversation.served) == 1:
        return name
    return f"{letter(column)}: {name}" if conversation.revealed else f"Model {letter(column)}"


def _one_line(error: Exception) -> str:
    """An error as HTML, which Gradio's messages are."""
    known = isinstance(error, ValueError | OSError | RuntimeError)
    return escape(first_line(error) if known else f"{type(error).__name__}: {first_line(error)}")


def build_page(
    chat: ChatPage, title: str, note: str, examples: Sequence[Example], greedy: bool = False
) -> "gr.Blocks":
    """
    The page.

    Args:
        chat (`ChatPage`): what it does.
        title (`str`): its heading.
        note (`str`): a line below it, maybe empty.
        examples (`Sequence[Example]`): images to begin with.
        greedy (`bool`, *optional*, defaults to `False`): which settings it begins with.

    Raises:
        ValueError: if Gradio is not installed.
    """
    page = new_page(title, "web")
    with page:
        import gradio  # installed, or `new_page` would have failed

        gradio.Markdown(f"# {escape(title)}\n{escape(note)}")
        _fill(chat, page, examples, greedy)
    # One queue for all; answers that are generated together are decoded in one batch.
    page.queue(default_concurrency_limit=chat.answering, max_size=16 * chat.answering)
    return page


def _fill(chat: ChatPage, page: "gr.Blocks", examples: Sequence[Example], greedy: bool) -> None:
    import gradio

    compared = chat.conversations.columns > 1
    key = gradio.Textbox(visible=False)
    with gradio.Row():
        columns = [_column(letter(number)) for number in range(chat.conversations.columns)]
    votes = _vote_buttons(len(columns)) if compared else {}
    note = [gradio.Markdown(elem_id="note")] if compared else []
    box = gradio.MultimodalTextbox(
        label="Message",
        placeholder="Ask about images: drop, paste or choose them here",
        file_count="multiple",
        file_types=["image"],
        sources=["upload"],
        max_plain_text_length=chat.conversations.limits.characters,
        elem_id="message",
        autofocus=True,
    )
    with gradio.Row(elem_id="buttons"):
        names = ("Stop", "Regenerate", "Edit last", "Clear")
        stop, again, edit, clear = (
            gradio.Button(name, size="sm", min_width=100, interactive=False, elem_id=name.lower().replace(" ", "-"))
            for name in names
        )
    _example_buttons(examples, box)
    settings = _settings(chat.conversations.limits.new_tokens, greedy)
    _camera(chat, box)
    report, reason, thanks = _report()
    shown = [*columns, stop, again, edit, clear, report, *votes.values(), *note]
    quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    slow: dict[str, Any] = {
        **{"concurrency_id": "answers", "concurrency_limit": chat.answering, "api_visibility": "private"},
        **{"show_progress": "minimal", "show_progress_on": columns},
    }
    box.submit(chat.ask, [key, box, *settings], [box, *shown], **slow)
    again.click(chat.regenerate, [key, *settings], [box, *shown], **slow)
    stop.click(chat.stop, [key], None, **quick)
    edit.click(chat.take_back, [key], [box, *shown], **quick)
    report.click(chat.flag, [key, reason], [reason, thanks], **quick)
    for choice, button in votes.items():
        button.click(lambda key, choice=choice: chat.vote(key, choice), [key], shown, **quick)
    page.load(chat.load, [key], [key, box, *shown], js=_KNOWN_KEY, **quick).then(None, [key], None, js=_KEEP_KEY)
    cleared = clear.click(chat.clear, [key], [key, box, *shown], **quick)
    cleared.then(None, [key], None, js=_KEEP_KEY).then(None, None, [reason, thanks], js="() => ['', '']")


def _column(name: str) -> "gr.Chatbot":
    import gradio

    # Plain text: a model's Markdown could load images from other machines, and what people type is no markup.
    return gradio.Chatbot(
        label=name,
        elem_id=f"answers-{name.lower()}",
        height="55vh",
        min_width=300,
        render_markdown=False,
        sanitize_html=True,
        latex_delimiters=[],
        allow_tags=True,
        buttons=["copy"],
        allow_file_downloads=False,
        placeholder="Ask something about an image.",
    )


def _vote_buttons(columns: int) -> "dict[str, gr.Button]":
    """The buttons by what they say, see [`Feedback.vote`]."""
    import gradio

    degree = "best" if columns > 2 else "better"
    names = {name: f"{name} is {degree}" for name in map(letter, range(columns))}
    names |= {"tie": "Equally good", "none": "None is good"}
    with gradio.Row(elem_id="votes"):
        return {
            choice: gradio.Button(name, size="sm", min_width=60, interactive=False, elem_id=f"vote-{choice.lower()}")
            for choice, name in names.items()
        }


def _example_buttons(examples: Sequence[Example], box: "gr.MultimodalTextbox") -> None:
    import gradio

    with gradio.Row(elem_id="examples"):
        for example in examples:
            button = gradio.Button(f"Example: {example.name}", icon=str(example.path), size="sm", min_width=140)
            value = {"text": example.question, "files": [str(example.path)]}
            button.click(lambda value=value: value, None, [box], queue=False, api_visibility="private")


def _settings(new_tokens: int, greedy: bool) -> "list[gr.components.Component]":
    """The fields of the parameters, in the order of [`_parameters`]."""
    import gradio

    values = {name: _values(name) for name in PRESETS}
    first = "greedy" if greedy else "authors"
    with gradio.Accordion("Parameters", open=False, elem_id="parameters"):
        preset = gradio.Radio(
            [(text, name) for name, text in _PRESETS.items()], value=first, label="Preset", elem_id="preset"
        )
        sample, temperature, top_p, penalty = values[first]
        fields = [
            gradio.Checkbox(sample, label="Sample"),
            gradio.Slider(0.05, 2, temperature, step=0.05, label="Temperature"),
            gradio.Slider(0.05, 1, top_p, step=0.05, label="Top-p"),
            gradio.Slider(1, 2, penalty, step=0.01, label="Repetition penalty"),
        ]
        longest = gradio.Slider(
            1, new_tokens, min(300, new_tokens), step=1, label="Longest answer, in tokens", elem_id="longest"
        )
    # By the browser: a question that is sent before a busy server has answered would be asked with the old values.
    preset.change(None, [preset], fields, js=f"(name) => ({json.dumps(values)})[name]")
    return [*fields, longest]


def _values(preset: str) -> tuple[bool, float, float, float]:
    """Whether to sample, temperature, top-p and repetition penalty."""
    known = {**PRESETS["authors"], **PRESETS[preset]}
    sample, *numbers = (known[name] for name in ("do_sample", "temperature", "top_p", "repetition_penalty"))
    temperature, top_p, penalty = (float(str(number)) for number in numbers)
    return bool(sample), temperature, top_p, penalty


def _camera(chat: ChatPage, box: "gr.MultimodalTextbox") -> None:
    import gradio

    with gradio.Accordion("Camera", open=False, elem_id="camera"):
        photo = gradio.Image(label="Photo for the next message", sources=["webcam"], type="filepath", height=320)
    photo.change(chat.add_photo, [box, photo], [box, photo], queue=False, api_visibility="private")


def _report() -> "tuple[gr.Button, gr.Textbox, gr.Markdown]":
    import gradio

    with gradio.Accordion("Report a problem", open=False, elem_id="report"):
        reason = gradio.Textbox(label="What is wrong?", max_length=2000, elem_id="reason")
        button = gradio.Button("Flag this conversation", size="sm", interactive=False, elem_id="flag")
        return button, reason, gradio.Markdown(elem_id="thanks")
