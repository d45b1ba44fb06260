"""The local page on which people judge answers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from transformers_minigpt4.web.html import escape, image_html, keep_name, person_name
from transformers_minigpt4.web.server import PageServer, new_page, serve

from .human_judging import IMAGES, Item, Sheet


if TYPE_CHECKING:
    import gradio as gr

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PERSON = "person"  # parameter of the page's address
QUESTION = "Does the answer satisfy the request?"


def judging_page(sheet: Sheet) -> "gr.Blocks":
    """
    The page of a sheet: one answer at a time with its image and the request, without the model's name.

    Args:
        sheet: What to judge.

    Raises:
        ValueError: if Gradio is not installed.
    """
    page = new_page("Judge answers", "evaluation")
    import gradio  # installed, or `new_page` would have failed

    def show(person: str, item: Item | None) -> list[object]:
        decided = sheet.decisions().get(person, {})
        progress = f"{len(decided)} of {len(sheet.asked)} judged by **{escape(person)}** ([someone else?](?))"
        fixed = gradio.update(value=person, interactive=False)
        off = gradio.update(interactive=False)
        if item is None:
            end = "<p>That was the last one. Thank you.</p>"
            return ["", "", end, progress, off, off, gradio.update(interactive=bool(decided)), person, fixed, off]
        before = f" You said {'yes' if decided[item.id] else 'no'}." if item.id in decided else ""
        text = f'<h3>{escape(item.prompt)}</h3><div class="foreign-text" id="answer">{escape(item.answer or "")}</div>'
        on = gradio.update(interactive=True)
        shown = [item.id, image_html(item.image, "the image"), text, progress + "." + before]
        return [*shown, on, on, gradio.update(interactive=bool(decided)), person, fixed, off]

    def start(name: str) -> list[object]:
        person = _or_error(person_name, name)
        return show(person, sheet.next_for(person))

    def load(request: gradio.Request) -> list[object]:
        known = request.query_params.get(PERSON, "") if request else ""
        return start(known) if known else [gradio.skip()] * len(shown)

    def decide(person: str, key: str, success: bool) -> list[object]:
        _or_error(sheet.decide, key, person, success)
        return show(person, sheet.next_for(person))

    def back(person: str, key: str) -> list[object]:
        order = list(sheet.decisions().get(person, {}))
        earlier = order[: order.index(key)] if key in order else order
        return show(person, sheet.item(earlier[-1]) if earlier else sheet.next_for(person))

    with page:
        gradio.Markdown(f"# Judge answers\n{QUESTION} The model is not shown. Keys: y, n, and b for back.")
        with gradio.Row():
            name = gradio.Textbox(label="Your name", elem_id="name", max_length=64)
            begin = gradio.Button("Start", elem_id="start")
        progress = gradio.Markdown(elem_id="progress")
        with gradio.Row():
            image = gradio.HTML()
            text = gradio.HTML()
        with gradio.Row():
            yes = gradio.Button("Yes (y)", elem_id="yes", interactive=False)
            no = gradio.Button("No (n)", elem_id="no", interactive=False)
            return_ = gradio.Button("Back (b)", elem_id="back", interactive=False)
        current = gradio.Textbox(visible=False)
        # Decisions are of whom the page was started for, whatever is typed into the box later.
        person = gradio.Textbox(visible=False)
        shown = [current, image, text, progress, yes, no, return_, person, name, begin]
        page.load(load, None, shown, queue=False)
        for event in (begin.click, name.submit):
            event(start, [name], shown, queue=False, js=keep_name(PERSON))
        yes.click(lambda who, key: decide(who, key, True), [person, current], shown, queue=False)
        no.click(lambda who, key: decide(who, key, False), [person, current], shown, queue=False)
        return_.click(back, [person, current], shown, queue=False)
    return page


def _or_error(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
) -> Result:
    """Calls a function; the page shows its error."""
    import gradio

    try:
        return function(*arguments, **options)
    except (ValueError, OSError) as error:
        raise gradio.Error(str(error)) from error


def serve_sheet(sheet: Sheet, host: str = "127.0.0.1", port: int | None = None) -> PageServer:
    """
    Serve the page of a sheet, to this machine only unless `host` says otherwise.

    Raises:
        ValueError: if Gradio is not installed.
        OSError: if the port is taken.
    """
    keys = {"y": "yes", "n": "no", "b": "back"}
    return serve(judging_page(sheet), files=sheet.folder / IMAGES, keys=keys, host=host, port=port)
