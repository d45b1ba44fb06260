"""
HTML and scripts of the local web pages, in which foreign text is only ever text.

    escape(text), image_html(name, alt)             # for gradio.HTML
    keys_script({"a": "accept"}, submit="save")     # keys that press the buttons with these `elem_id`s
    person_name(text)                               # one spelling for each person
    keep_name("reviewer")                           # `js` of the event that takes a name: the address remembers it
"""

import base64
import html
import io
import json
import re
import unicodedata
from collections.abc import Mapping
from urllib.parse import quote

from PIL import Image


MAX_NAME = 64  # characters of a person's name
FILES = "files"  # where images are found below the page's address

_KEYS = """
(() => {
  const keys = __KEYS__, submit = __SUBMIT__, focus = __FOCUS__;
  const press = (id) => {
    const button = document.getElementById(id);
    if (button && !button.disabled) button.click();
  };
  const typing = (node) => node && (node.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(node.tagName));
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.isComposing || document.querySelector("dialog.zoom")) return;
    if (submit && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault(); event.stopPropagation();
      if (document.activeElement) document.activeElement.blur();
      press(submit);
      return;
    }
    if (event.key === "Escape" && typing(document.activeElement)) { document.activeElement.blur(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const key = event.key.toLowerCase();
    if (focus[key]) {
      const field = document.querySelector("#" + focus[key] + " textarea, #" + focus[key] + " input");
      if (field) { event.preventDefault(); field.focus(); }
    } else if (keys[key]) { event.preventDefault(); press(keys[key]); }
    else if (key === "z") zoom(document.querySelector(".image img"));
  }, true);
  // Enter leaves a box of one line before the page's own code has heard of it: what is typed next are keys. Boxes that
  // grow have one line at first, and Shift-Enter begins their second.
  document.addEventListener("keypress", (event) => {
    const leaves = event.key === "Enter" && !event.shiftKey;
    if (leaves && event.target.matches("input, textarea[rows='1']")) event.target.blur();
  }, true);
  document.addEventListener("click", (event) => {
    const node = event.target.closest ? event.target : event.target.parentElement;
    const image = node.closest(".image img"), link = node.closest("[data-press]");
    if (image) zoom(image);
    if (link) { window.pressed = link.dataset.value; press(link.dataset.press); }
  });
  const zoom = (image) => {
    if (!image) return;
    const dialog = document.createElement("dialog"), copy = new Image(), close = document.createElement("button");
    dialog.className = "zoom"; copy.src = image.src; copy.alt = image.alt; close.textContent = "Close (Esc)";
    dialog.append(copy, close); document.body.append(dialog);
    let scale = 1;
    const fit = () => Math.min(innerWidth / copy.naturalWidth, innerHeight / copy.naturalHeight) || 1;
    const show = (times, x, y) => {
      const before = copy.getBoundingClientRect();
      const [left, top] = [(x - before.left) / before.width, (y - before.top) / before.height];
      scale = Math.min(8, Math.max(1, times));
      copy.style.width = fit() * scale * copy.naturalWidth + "px";
      dialog.scrollTo(left * copy.offsetWidth - x, top * copy.offsetHeight - y);  // what was below the pointer stays
    };
    copy.onload = () => show(1, 0, 0);
    copy.onclick = (event) => show(scale > 1 ? 1 : 3, event.clientX, event.clientY);
    dialog.addEventListener("wheel", (event) => {
      event.preventDefault(); show(scale * (event.deltaY < 0 ? 1.25 : 0.8), event.clientX, event.clientY);
    }, { passive: false });
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "+") show(scale * 1.25, innerWidth / 2, innerHeight / 2);
      if (event.key === "-") show(scale * 0.8, innerWidth / 2, innerHeight / 2);
      if (event.key.toLowerCase() === "z") dialog.close();
    });
    close.onclick = () => dialog.close();
    dialog.onclose = () => dialog.remove();
    dialog.showModal();
  };
})();
"""


def person_name(text: str) -> str:
    """
    One spelling for each person, so that `Anna` and ` anna` are not two.

    Raises:
        ValueError: for an empty name, one of more than 64 characters, or one with control characters.
    """
    name = " ".join(unicodedata.normalize("NFKC", str(text)).casefold().split())
    if not name:
        raise ValueError("give your name; it says whose decisions these are")
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters is too long; choose one of at most {MAX_NAME}")
    if any(map(is_hidden, name)):
        raise ValueError(f"the name {name!r} holds invisible characters; use letters and digits")
    return name


def keep_name(parameter: str) -> str:
    """
    The `js` of the event that takes a person's name.

    It puts the name into the page's address, so that a reload keeps it. The browser remembers the name for
    [`known_name`].

    Args:
        parameter: Name of the address's query parameter.
    """
    return (
        f'(name) => {{ history.replaceState(null, "", "?{parameter}=" + encodeURIComponent(name)); '
        f'try {{ localStorage.setItem("{parameter}", name); }} catch {{}} return [name]; }}'
    )


def known_name(parameter: str) -> str:
    """The `js` that fills in the name which this browser gave last; see [`keep_name`]."""
    return f'() => {{ try {{ return [localStorage.getItem("{parameter}") ?? ""]; }} catch {{ return [""]; }} }}'


def press_html(elem_id: str, value: str, content: str) -> str:
    """
    A button within HTML that presses another one.

    Args:
        elem_id: Of the button of the page, whose `js` reads the value as `window.pressed`.
        value: What is pressed.
        content: HTML.
    """
    return f'<button type="button" data-press="{elem_id}" data-value="{_entities(value)}">{content}</button>'


def escape(text: str) -> str:
    """
    HTML that shows a text as it is: markup as characters, and invisible characters by their code points.

    `{`, `}` and `$` become entities too, because Gradio's HTML has templates.
    """
    return "".join(
        f'<span class="control">U+{ord(character):04X}</span>' if is_hidden(character) else character
        for character in _entities(text.replace("\r\n", "\n"))
    )


def _entities(text: str) -> str:
    return re.sub(r"[{}$]", lambda match: f"&#{ord(match[0])};", html.escape(text))


def is_hidden(character: str) -> bool:
    """Whether it is a control or format character, as those for the writing direction are; not line feed and tab."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def image_html(name: str, alt: str) -> str:
    """The image `name` of the folder that [`~web.server.serve`] got as `files`."""
    return f'<div class="image"><img src="{FILES}/{quote(name, safe="")}" alt="{_entities(alt)}"></div>'


def thumbnail_url(image: Image.Image, longest: int) -> str:
    """A small JPEG as a `data:` URL; the image itself is shrunk to at most `longest` pixels on its longer side."""
    image.thumbnail((longest, longest))
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def keys_script(keys: Mapping[str, str], submit: str | None = None, focus: Mapping[str, str] | None = None) -> str:
    """
    A script that presses buttons by key.

    Args:
        keys: `elem_id` of the button for each key, in lower case. Keys do nothing while somebody types in a field.
        submit: `elem_id` of the button that Ctrl-Enter (Cmd-Enter) presses, within fields too. Escape leaves a field.
        focus: `elem_id` of the text box that a key puts the cursor in.

    A click on an image of [`image_html`], or Z, shows it as large as the window; wheel, click, + and - zoom.
    """
    script = _KEYS.replace("__KEYS__", json.dumps(dict(keys))).replace("__SUBMIT__", json.dumps(submit))
    return script.replace("__FOCUS__", json.dumps(dict(focus or {})))
