"""The local page on which people judge answers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from transformers_minigpt4.web.html import escape, image_html, person_name
from transformers_minigpt4.web.server import PageServer, import_gradio, new_page, serve

from .human_judging import IMAGES, Item, Sheet


if TYPE_CHECKING:
    import gradio as gr

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

QUESTION = "Does the answer satisfy the request?"


def judging_page(sheet: Sheet) -> "gr.Blocks":
    """
    The page of a sheet: one answer at a time with its image and the request, without the model's name.

    Args:
        sheet: What to judge.

    Raises:
        ValueError: if Gradio is not installed.
    """
    gradio = import_gradio("evaluation")
    page = new_page("Judge answers")

    def show(person: str, item: Item | None) -> list[object]:
        decided = sheet.decisions().get(person, {})
        progress = f"{len(decided)} of {len(sheet.asked)} judged by {person}"
        off = gradio.update(interactive=False)
        if item is None:
            return ["", "", "<p>That was the last one. Thank you.</p>", progress, off, off]
        before = f" You said {'yes' if decided[item.id] else 'no'}." if item.id in decided else ""
        text = f'<h3>{escape(item.prompt)}</h3><div class="foreign-text" id="answer">{escape(item.answer or "")}</div>'
        on = gradio.update(interactive=True)
        return [item.id, image_html(item.image, "the image"), text, progress + "." + before, on, on]

    def start(name: str) -> list[object]:
        person = _or_error(person_name, name)
        return show(person, sheet.next_for(person))

    def decide(name: str, key: str, success: bool) -> list[object]:
        person = _or_error(person_name, name)
        _or_error(sheet.decide, key, person, success)
        return show(person, sheet.next_for(person))

    def back(name: str, key: str) -> list[object]:
        person = _or_error(person_name, name)
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
            return_ = gradio.Button("Back (b)", elem_id="back")
        current = gradio.Textbox(visible=False)
        shown = [current, image, text, progress, yes, no]
        begin.click(start, [name], shown, queue=False)
        name.submit(start, [name], shown, queue=False)
        yes.click(lambda who, key: decide(who, key, True), [name, current], shown, queue=False)
        no.click(lambda who, key: decide(who, key, False), [name, current], shown, queue=False)
        return_.click(back, [name, current], shown, queue=False)
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
