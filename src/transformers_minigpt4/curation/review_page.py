"""The page on which people accept, edit or reject pairs, one at a time, by mouse or keyboard."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.web.html import escape, image_html, keep_name, person_name
from transformers_minigpt4.web.server import LOCAL_HOSTS, PageServer, import_gradio, new_page, serve

from .config import CurationError
from .decisions import same_text
from .records import IMAGES
from .review import Progress, ReviewPair, ReviewQueue
from .review_diff import mark_differences
from .store import Project


if TYPE_CHECKING:
    import gradio as gr


KEYS = {"a": "accept", "r": "reject", "u": "undo"}  # `elem_id`s of the buttons
_WELCOME = "Give your name and press Start."
_HELP = "A accepts · E edits the text, Ctrl-Enter saves it, Esc leaves it · R rejects · U undoes"
_CSS = """
#before del { background: #fbd0d0; color: #7a0b0b; }
#after ins { background: #c9efcf; color: #0b4d17; }
#status { min-height: 1.6em; font-weight: 600; }
.bar { height: 6px; border-radius: 3px; background: #d4d4d8; margin-bottom: 4px; }
.bar div { height: 100%; border-radius: 3px; background: #2f9e44; }
"""


class Screen(NamedTuple):
    """What the page shows, in the order of its elements: HTML, except for the last three, which are text."""

    status: object
    progress: object
    image: object
    before: object
    after: object
    text: object
    shown: object  # pair and text that the buttons are about, as `ID TEXT_ID`
    reviewer: object


class Reviewing:
    """
    Answers the page's buttons. It has no state but the queue: what is shown travels with each request.

    Args:
        queue: The queue.
    """

    def __init__(self, queue: ReviewQueue) -> None:
        self.queue = queue

    def start(self, name: str) -> Screen:
        """Somebody gave a name, or came back with it."""
        try:
            reviewer = person_name(name)
        except ValueError as error:
            return self.blank(str(error).capitalize() + ".")
        return self._next(reviewer, "")

    def accept(self, reviewer: str, shown: str, text: str) -> Screen:
        """Accepts the pair, unless the text in the box has been changed."""
        pair_id, text_id = _parse(shown)
        with_text = self.queue.current(self.queue.project.connection(), pair_id) if pair_id else None
        if with_text is not None and with_text["text_id"] == text_id and not same_text(text, with_text["after"]):
            return self._stay("You changed the text. Save the edit (Ctrl-Enter), or restore the text to accept it.")
        return self._decide(reviewer, shown, "accepted")

    def save(self, reviewer: str, shown: str, text: str) -> Screen:
        """Accepts the pair with the text in the box."""
        return self._decide(reviewer, shown, "edited", text)

    def reject(self, reviewer: str, shown: str) -> Screen:
        """Rejects the pair."""
        return self._decide(reviewer, shown, "rejected")

    def undo(self, reviewer: str) -> Screen:
        """Brings back the pair that the reviewer decided on last."""
        if not reviewer:
            return self.start(reviewer)
        try:
            pair, message = self.queue.undo(reviewer)
        except CurationError as error:
            return self._stay(str(error))
        return self._next(reviewer, message) if pair is None else self._show(reviewer, pair, message)

    def _decide(self, reviewer: str, shown: str, action: str, text: str | None = None) -> Screen:
        if not reviewer:
            return self.start(reviewer)
        pair_id, text_id = _parse(shown)
        if not pair_id:
            return self._next(reviewer, "")
        try:
            message = self.queue.decide(reviewer, pair_id, text_id, action, text)
        except CurationError as error:  # an empty edit, a full disk: the pair stays
            return self._stay(str(error))
        return self._next(reviewer, message)

    def _next(self, reviewer: str, message: str) -> Screen:
        try:
            pair = self.queue.next(reviewer)
        except CurationError as error:
            return self._stay(str(error))
        if pair is not None:
            return self._show(reviewer, pair, message)
        progress = self.queue.progress(reviewer)
        end = "You have seen all pairs that are due for you."
        if progress.left:
            end = f"The last pairs ({progress.left}) are with other reviewers; reload later, in case they leave some."
        return self.blank(f"{message} {end}".strip(), reviewer, progress)

    def _show(self, reviewer: str, pair: ReviewPair, message: str) -> Screen:
        before, after = mark_differences(pair.before, pair.after, escape)
        flag = f'<p id="flag"><b>The repair asks you to look closely:</b> {escape(pair.flag)}</p>' if pair.flag else ""
        changed = "You decided on this pair before; its text has changed since." if pair.again else ""
        return Screen(
            _status(message or changed),
            self._progress(self.queue.progress(reviewer)),
            image_html(Path(pair.image).name, f"Image {pair.key}"),
            f'<b>As the model wrote it</b><div class="foreign-text">{before}</div>',
            f'<b>To decide on</b>{flag}<div class="foreign-text">{after}</div>',
            pair.after,
            f"{pair.id} {pair.text_id}",
            reviewer,
        )

    def blank(self, message: str, reviewer: str = "", progress: Progress | None = None) -> Screen:
        """A page without a pair."""
        return Screen(_status(message), self._progress(progress) if progress else "", "", "", "", "", "", reviewer)

    @staticmethod
    def _stay(message: str) -> Screen:
        same = import_gradio().skip()
        return Screen(_status(message), *[same] * (len(Screen.__annotations__) - 1))

    def _progress(self, progress: Progress) -> str:
        parts = [
            f"{progress.decided} of {progress.pairs} pairs decided",
            f"{progress.accepted} accepted, {progress.edited} edited, {progress.rejected} rejected",
            f"you: {progress.mine} decided, {progress.left} to come",
        ]
        if progress.twice:
            parts.append(f"seen by two: {progress.twice_done} of {progress.twice}")
        agreement = self.queue.agreement()
        if agreement.raw is not None:
            kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
            parts.append(f"agreement {agreement.raw:.0%} on {agreement.pairs}, kappa {kappa}")
        if progress.missing:
            parts.append(f"<b>{progress.missing} left out, because their image is missing</b>")
        done = 100 * progress.decided / max(1, progress.pairs)
        return f'<div class="bar"><div style="width: {done:.2f}%"></div></div><div>{" · ".join(parts)}</div>'


def _status(message: str) -> str:
    return f'<div role="status">{escape(message)}</div>'


def _parse(shown: str) -> tuple[int, str]:
    """The pair and text that a request is about; `(0, "")` for none."""
    pair_id, _, text_id = shown.partition(" ")
    return (int(pair_id), text_id) if pair_id.isascii() and pair_id.isdigit() else (0, "")


def build_page(queue: ReviewQueue) -> "gr.Blocks":
    """The page; [`serve_review`] serves it."""
    reviewing = Reviewing(queue)
    page = new_page("Review of captions")
    import gradio as gr  # installed, or `new_page` would have failed

    with page:
        with gr.Row(equal_height=True):
            hint = "Your name, to record who decided"
            name = gr.Textbox(placeholder=hint, elem_id="name", max_lines=1, container=False, scale=4)
            start = gr.Button("Start", elem_id="start", scale=1)
        status = gr.HTML(_status("Loading …"), elem_id="status")
        progress = gr.HTML("", elem_id="progress")
        with gr.Row():
            with gr.Column():
                image = gr.HTML("", elem_id="image")
                with gr.Row():
                    accept = gr.Button("Accept (A)", elem_id="accept", variant="primary", min_width=80)
                    save = gr.Button("Save edit", elem_id="save", min_width=80)
                    reject = gr.Button("Reject (R)", elem_id="reject", variant="stop", min_width=80)
                    undo = gr.Button("Undo (U)", elem_id="undo", min_width=80)
                gr.HTML(f"<small>{_HELP}</small>")
            with gr.Column():
                before = gr.HTML("", elem_id="before")
                after = gr.HTML("", elem_id="after")
                text = gr.Textbox(label="Text to keep", elem_id="text", lines=6, max_lines=20)
        shown = gr.Textbox(visible="hidden", elem_id="shown")
        reviewer = gr.Textbox(visible="hidden", elem_id="reviewer")

        screen = [status, progress, image, before, after, text, shown, reviewer]
        plain: JsonObject = {"outputs": screen, "queue": False, "show_progress": "hidden"}

        def load(request: gr.Request) -> Screen:
            known = request.query_params.get("reviewer", "") if request else ""
            return reviewing.start(known) if known else reviewing.blank(_WELCOME)

        page.load(load, None, api_name="load", **plain)
        for event in (start.click, name.submit):
            event(reviewing.start, [name], js=keep_name("reviewer"), api_name="start", **plain)
        accept.click(reviewing.accept, [reviewer, shown, text], api_name="accept", **plain)
        save.click(reviewing.save, [reviewer, shown, text], api_name="save", **plain)
        reject.click(reviewing.reject, [reviewer, shown], api_name="reject", **plain)
        undo.click(reviewing.undo, [reviewer], api_name="undo", **plain)
    return page


def serve_review(project: Project, host: str = LOCAL_HOSTS[0], port: int | None = None) -> PageServer:
    """
    Serves the review of a project; use it in a `with` statement, see [`PageServer`].

    Args:
        project: The project; it stays open as long as the page.
        host: Address to listen at. With the default only this machine can see the page; with another, whoever reaches
            it can review.
        port: Port; by default the first free one from 7860 on.

    Raises:
        ValueError: when Gradio is not installed, or the project has no folder of images.
        OSError: when the port is taken.
    """
    page = build_page(ReviewQueue(project))
    return serve(
        page,
        files=project.folder / IMAGES,
        keys=KEYS,
        submit="save",
        focus={"e": "text"},
        css=_CSS,
        host=host,
        port=port,
    )
