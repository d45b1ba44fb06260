"""The page on which people accept, edit or reject pairs, one at a time, by mouse or keyboard."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.web.html import escape, keep_name, known_name
from transformers_minigpt4.web.server import LOCAL_HOSTS, PageServer, new_page, serve

from .review import ReviewQueue
from .review_list import STATES, all_reasons
from .review_screen import JUMP, TURN, Reviewing, Screen
from .store import AnyProject


if TYPE_CHECKING:
    import gradio as gr
    from gradio.events import Dependency


KEYS = {"a": "accept", "r": "reject", "u": "undo"}  # `elem_id`s of the buttons; digits are added for reasons
_NAME = "reviewer"  # query parameter of the page's address
_WELCOME = "Give your name and press Start."
_HELP = "A accepts · E edits the text, Ctrl-Enter saves it, Esc leaves it · R rejects{} · U undoes · Z zooms"
_PRESSED = "(...values) => [...values.slice(0, -1), window.pressed]"  # by a row of the list, see `web.html.press_html`
_TO_TOP = "(...values) => { window.scrollTo(0, 0); return [...values.slice(0, -1), window.pressed]; }"
_CSS = """
#title h1 { font-size: 1.3rem; margin: 0 0 4px; }
#title summary { cursor: pointer; } #title p { margin: 4px 0 0; max-width: 70em; white-space: pre-line; }
#before del { background: #fbd0d0; color: #7a0b0b; }
#after ins { background: #c9efcf; color: #0b4d17; }
#status { min-height: 1.6em; font-weight: 600; }
#progress a { text-decoration: underline; margin: 0; padding: 0; }
.bar { height: 6px; border-radius: 3px; background: #8884; margin-bottom: 4px; }
.bar div { height: 100%; border-radius: 3px; background: #2f9e44; }
#next { padding: 12px; border: 1px solid #2f9e44; border-radius: 8px; font-size: 1.1em; overflow-wrap: anywhere; }
#reasons { gap: 6px; } #reasons button { flex: 0 1 auto; min-width: 0; }
.turns { display: flex; gap: 16px; align-items: center; margin: 4px 0; }
#rows button { background: none; font: inherit; color: inherit; border-radius: 0; margin: 0; padding: 5px 2px; }
#rows .turns button { text-decoration: underline; }
#rows .pairs button { display: grid; grid-template-columns: 3.5em 5.5em 1fr; gap: 8px; width: 100%; text-align: left;
  border-top: 1px solid #8884; overflow-wrap: anywhere; }
#rows button:hover, #rows button:focus-visible { background: #8882; }
.pairs .state { font-weight: 600; }
.pairs .accepted, .pairs .edited { color: #2f9e44; } .pairs .rejected { color: #d9480f; } .pairs i { opacity: 0.75; }
@media (max-width: 640px) {
  .image img { height: auto; max-height: 38vh; }
  #actions { position: fixed; left: 0; right: 0; bottom: 0; z-index: 10; padding: 6px; gap: 6px; flex-wrap: nowrap;
    background: var(--body-background-fill); border-top: 1px solid #8884; }
  #actions button { min-width: 0 !important; padding: 10px 2px; font-size: 0.85rem; white-space: nowrap; }
  #list { margin-bottom: 72px; }
  #rows .pairs button { grid-template-columns: 2em 5.4em 1fr; }
}
"""


def build_page(queue: ReviewQueue) -> "gr.Blocks":
    """The page; [`serve_review`] serves it."""
    reviewing = Reviewing(queue)
    config, project = queue.project.config, escape(queue.project.folder.resolve().name)
    page = new_page(f"Review of {queue.project.what}s")
    import gradio as gr  # installed, or `new_page` would have failed

    with page:
        gr.HTML(
            f"<h1>Review of {queue.project.what}s: {project}</h1>"
            f"<details open><summary>Guideline</summary><p>{escape(config.review_guideline)}</p></details>",
            elem_id="title",
        )
        with gr.Row(equal_height=True) as who:
            hint = "Your name, to record who decided"
            name = gr.Textbox(placeholder=hint, elem_id="name", max_lines=1, container=False, scale=4)
            start = gr.Button("Start", elem_id="start", scale=1)
        status = gr.HTML('<div role="status">Loading …</div>', elem_id="status")
        progress = gr.HTML("", elem_id="progress")
        with gr.Row():
            with gr.Column():
                image = gr.HTML("", elem_id="image")
                with gr.Row(elem_id="actions"):
                    accept = gr.Button("Accept (A)", elem_id="accept", variant="primary", min_width=80)
                    save = gr.Button("Save edit", elem_id="save", min_width=80)
                    reject = gr.Button("Reject (R)", elem_id="reject", variant="stop", min_width=80)
                    undo = gr.Button("Undo (U)", elem_id="undo", min_width=80)
                with gr.Row(elem_id="reasons"):
                    reasons = [
                        (gr.Button(f"{number} Reject: {reason}", elem_id=f"reason-{number}", size="sm"), reason)
                        for number, reason in enumerate(config.review_reasons, start=1)
                    ]
                gr.HTML(f"<small>{_HELP.format(f', 1 to {len(reasons)} with a reason' if reasons else '')}</small>")
            with gr.Column():
                before = gr.HTML("", elem_id="before")
                after = gr.HTML("", elem_id="after")
                text = gr.Textbox(label="Text to keep", elem_id="text", lines=6, max_lines=20)
        shown = gr.Textbox(visible="hidden", elem_id="shown")
        reviewer = gr.Textbox(visible="hidden", elem_id="reviewer")
        refresh = _build_list(queue, reviewing, reviewer)

        screen = [who, status, progress, image, before, after, text, shown, reviewer]
        plain: JsonObject = {"outputs": screen, "queue": False, "show_progress": "hidden"}

        def load(request: gr.Request) -> Screen:
            known = request.query_params.get(_NAME, "") if request else ""
            return reviewing.start(known) if known else reviewing.blank(_WELCOME)

        page.load(load, None, api_name="load", **plain)
        page.load(None, None, [name], js=known_name(_NAME))
        for event in (start.click, name.submit):
            refresh(event(reviewing.start, [name], js=keep_name(_NAME), api_name="start", **plain))
        refresh(accept.click(reviewing.accept, [reviewer, shown, text], api_name="accept", **plain))
        refresh(save.click(reviewing.save, [reviewer, shown, text], api_name="save", **plain))
        refresh(reject.click(reviewing.reject, [reviewer, shown], api_name="reject", **plain))
        for number, (button, reason) in enumerate(reasons, start=1):
            decide = partial(reviewing.reject, reason=reason)
            refresh(button.click(decide, [reviewer, shown], api_name=f"reason-{number}", **plain))
        refresh(undo.click(reviewing.undo, [reviewer], api_name="undo", **plain))
        jump = gr.Button(visible="hidden", elem_id=JUMP)
        target = gr.Textbox(visible="hidden")
        jump.click(reviewing.jump, [reviewer, target], js=_TO_TOP, api_name="jump", **plain)
    return page


def _build_list(queue: ReviewQueue, reviewing: Reviewing, reviewer: "gr.Textbox") -> "Callable[[Dependency], object]":
    """The list of all pairs; returns what refreshes it after an event, if it is open."""
    import gradio as gr

    with gr.Accordion("All pairs: list, filter, jump", open=False, elem_id="list") as accordion:
        with gr.Row():
            state = gr.Dropdown(list(STATES), value=STATES[0], label="State", elem_id="state", filterable=False)
            known: list[str | tuple[str, str]] = [("any", ""), *all_reasons(queue)]
            reason = gr.Dropdown(known, value="", label="Reason or flag", elem_id="reason", filterable=False)
            search = gr.Textbox(label="Search texts, keys and numbers", elem_id="search", max_lines=1)
        rows = gr.HTML("", elem_id="rows")
    page, is_open, pressed = (gr.Textbox(visible="hidden") for _ in range(3))
    turn = gr.Button(visible="hidden", elem_id=TURN)
    filters = [reviewer, state, reason, search]
    plain: JsonObject = {"outputs": [rows, page], "queue": False, "show_progress": "hidden"}

    def first(reviewer: str, state: str, reason: str | None, search: str) -> tuple[str, str]:
        return reviewing.listed(reviewer, state, reason, search, "1")

    def again(is_open: str, reviewer: str, state: str, reason: str | None, search: str, page: str) -> object:
        return reviewing.listed(reviewer, state, reason, search, page) if is_open else (gr.skip(), gr.skip())

    opened = accordion.expand(lambda: "yes", None, [is_open], queue=False, show_progress="hidden")
    opened.then(first, filters, api_name="list", **plain)
    accordion.collapse(lambda: "", None, [is_open], queue=False, show_progress="hidden")
    for event in (state.change, reason.change, search.change):
        event(first, filters, trigger_mode="always_last", **plain)
    turn.click(reviewing.listed, [*filters, pressed], js=_PRESSED, **plain)
    return lambda event: event.then(again, [is_open, *filters, page], **plain)


def serve_review(project: AnyProject, host: str = LOCAL_HOSTS[0], port: int | None = None) -> PageServer:
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
    reasons = range(1, len(project.config.review_reasons) + 1)
    return serve(
        page,
        files=project.images,
        keys={**KEYS, **{str(number): f"reason-{number}" for number in reasons}},
        submit="save",
        focus={"e": "text"},
        css=_CSS,
        host=host,
        port=port,
    )
