"""What the review's page shows and what its buttons do; `review_page.py` arranges it."""

import os
import shlex
from typing import NamedTuple

from transformers_minigpt4.web.html import escape, image_html, person_name, press_html
from transformers_minigpt4.web.server import import_gradio

from .decisions import same_text
from .review import Progress, ReviewPair, ReviewQueue
from .review_diff import mark_differences
from .review_list import Listing, list_pairs
from .settings_file import CurationError
from .store import AnyProject


JUMP, TURN = "jump", "turn"  # `elem_id`s of the buttons that the list's rows and its page numbers press
_EXCERPT = 160  # characters of a text in the list
_DIGITS = 18  # of a number that SQLite can hold


class Screen(NamedTuple):
    """What the page shows, in the order of its elements: HTML, except for the first, and the last three (text)."""

    who: object  # whether the row with the name is visible
    status: object
    progress: object
    image: object
    before: object
    after: object
    text: object
    shown: object  # what the buttons are about, as `PAIR TEXT_ID DECISION`
    reviewer: object


class Shown(NamedTuple):
    """The pair, the text, and the reviewer's own decision on it (or 0) that a request is about; pair 0 for none."""

    pair: int
    text_id: str
    decision: int


def what_next(project: AnyProject, progress: Progress) -> str:
    """The command that comes after the review as it is now, in one line."""

    def command(name: str) -> str:
        return f"`{project.command} {shlex.join([name, os.fspath(project.folder)])}`"

    accepted = progress.accepted + progress.edited
    if not progress.pairs:
        return f"no pair has reached the review; {command('status')} shows why"
    if progress.due:
        return f"{progress.due:,} of {progress.pairs:,} pairs still need a decision; {command('review')} resumes"
    if not accepted:
        return f"all {progress.pairs:,} pairs are decided, and none is accepted; {command('status')} shows why"
    decided = f"all {progress.pairs:,} pairs are decided"
    return f"{decided}; {command(project.finish)} builds the dataset ({accepted:,} accepted)"


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
        about = parse_shown(shown)
        now = self.queue.current(self.queue.project.connection(), about.pair) if about.pair else None
        if now is not None and now["text_id"] == about.text_id and not same_text(text, now["after"]):
            return self._stay("You changed the text. Save the edit (Ctrl-Enter), or restore the text to accept it.")
        return self._decide(reviewer, shown, "accepted")

    def save(self, reviewer: str, shown: str, text: str) -> Screen:
        """Accepts the pair with the text in the box."""
        return self._decide(reviewer, shown, "edited", text)

    def reject(self, reviewer: str, shown: str, reason: str = "") -> Screen:
        """Rejects the pair, with a reason or without."""
        return self._decide(reviewer, shown, "rejected", reason=reason)

    def undo(self, reviewer: str) -> Screen:
        """Brings back the pair that the reviewer decided on last."""
        if not reviewer:
            return self.start(reviewer)
        try:
            pair, message = self.queue.undo(reviewer)
        except CurationError as error:
            return self._stay(str(error))
        return self._next(reviewer, message) if pair is None else self._show(reviewer, pair, message)

    def jump(self, reviewer: str, number: str) -> Screen:
        """Shows the pair that the reviewer chose from the list."""
        if not reviewer:
            return self.start(reviewer)
        try:
            pair, message = self.queue.open(reviewer, parse_shown(number).pair)
        except CurationError as error:
            return self._stay(str(error))
        return self._stay(message) if pair is None else self._show(reviewer, pair, message)

    def listed(self, reviewer: str, state: str, reason: str | None, search: str, page: str) -> tuple[str, str]:
        """One page of the list as HTML, and its number."""
        if not reviewer:
            return "<p>Give your name first; the list is about what you can decide.</p>", "1"
        number = parse_shown(page).pair
        try:
            found = list_pairs(self.queue, reviewer, state, reason or "", search, number)
        except CurationError as error:
            return _status(str(error)), page
        return list_html(found), str(found.page)

    def _decide(self, reviewer: str, shown: str, action: str, text: str | None = None, reason: str = "") -> Screen:
        if not reviewer:
            return self.start(reviewer)
        about = parse_shown(shown)
        if not about.pair:
            return self._next(reviewer, "")
        try:
            message = self.queue.decide(reviewer, about.pair, about.text_id, action, text, reason, about.decision)
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
        image = image_html(self.queue.project.image_name(pair.image), f"Image {pair.key}")
        return Screen(
            import_gradio().update(visible=False),
            _status(message or changed),
            self._progress(reviewer, self.queue.progress(reviewer)),
            f"{image}<small>Pair {pair.id}: {escape(pair.key)}. Click on the image, or press Z, to zoom.</small>",
            f'<b>As the model wrote it</b><div class="foreign-text">{before}</div>',
            f'<b>To decide on</b>{flag}<div class="foreign-text">{after}</div>',
            pair.after,
            f"{pair.id} {pair.text_id} {pair.decision}",
            reviewer,
        )

    def blank(self, message: str, reviewer: str = "", progress: Progress | None = None) -> Screen:
        """A page without a pair."""
        who = import_gradio().update(visible=not reviewer)
        if progress is None:
            return Screen(who, _status(message), "", "", "", "", "", "", reviewer)
        following = "Whoever else reviews opens this page under another name."
        if not progress.due:
            said = what_next(self.queue.project, progress)
            following = said[0].upper() + said[1:] + "."
        code = "".join(
            f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(escape(following).split("`"))
        )
        end = f'<div id="next">{code}</div>'
        return Screen(who, _status(message), self._progress(reviewer, progress), "", end, "", "", "", reviewer)

    @staticmethod
    def _stay(message: str) -> Screen:
        same = import_gradio().skip()
        return Screen(same, _status(message), *[same] * (len(Screen.__annotations__) - 2))

    def _progress(self, reviewer: str, progress: Progress) -> str:
        parts = [
            f"{progress.decided} of {progress.pairs} pairs decided",
            f"{progress.accepted} accepted, {progress.edited} edited, {progress.rejected} rejected",
            f'you, {escape(reviewer)} (<a href="?">change</a>): {progress.mine} decided, {progress.left} to come',
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


def list_html(found: Listing) -> str:
    """A page of the list: rows that open their pair, and links to the pages before and after."""
    rows = []
    for pair in found.rows:
        text = pair.text if len(pair.text) <= _EXCERPT else pair.text[:_EXCERPT] + "…"
        reasons = f"<i>{escape(', '.join(pair.reasons))}</i>" if pair.reasons else ""
        state = f'<span class="state {pair.state.replace(" ", "-")}">{pair.state}</span>'
        content = f"<span>{pair.id}</span>{state}<span>{escape(' '.join(text.split()))} {reasons}</span>"
        rows.append(press_html(JUMP, str(pair.id), content))
    count = f"{found.found:,} pairs" if found.found != 1 else "1 pair"
    turns = [f"{count}, page {found.page} of {found.pages}"]
    if found.page > 1:
        turns.append(press_html(TURN, str(found.page - 1), "← earlier"))
    if found.page < found.pages:
        turns.append(press_html(TURN, str(found.page + 1), "later →"))
    return f'<div class="turns">{" ".join(turns)}</div><div class="pairs">{"".join(rows)}</div>'


def parse_shown(shown: str) -> Shown:
    """What a request is about, from a page that anybody may have changed."""
    pair, text_id, decision = (*shown.split(" "), "", "")[:3]
    return Shown(_number(pair), text_id if text_id.isascii() else "", _number(decision))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else 0


def _status(message: str) -> str:
    return f'<div role="status">{escape(message)}</div>'
