"""A project for instruction data: a curation project whose pairs are an image and a kind, with images by reference."""

from collections.abc import Iterator
from pathlib import Path

from transformers_minigpt4.curation.records import Pair, Result
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.store import ProjectStore

from .answers import CUT_OFF, Refused, check_turns, parse_turns
from .config import SETTINGS, InstructConfig


class InstructProject(ProjectStore[InstructConfig]):
    """
    A project's folder; its steps are `generate`, `repair` (asks once more), `filter` (the check) and `review`.

    `Pair.sha256` is the digest of what the model is shown, and `Pair.origin` has it: `kind`, `scene` (the key of the
    image in its source), `captions` and `boxes`, each a list of lines.
    """

    settings_file = SETTINGS
    command, finish = "minigpt4 instruct", "build"
    what, sampled = "conversation", "rows"
    step_words = {
        "generate": "answered",
        "repair": "answered, with the refused ones asked once more",
        "filter": "passed the check",
        "review": "accepted by reviewers",
    }

    @property
    def images(self) -> Path:
        folder = self.config.images
        return Path(folder) if folder is not None else Path(self.config.captions).parent

    def image_file(self, image: str) -> Path:
        return self.images / image

    def check_edit(self, text: str) -> None:
        try:
            check_turns(parse_turns(text), self.config.language)
        except Refused as error:
            raise CurationError(
                f"the edited text cannot be used ({error}); keep the lines Question:, Answer: and === as they were"
            ) from error

    def answers(self) -> Iterator[tuple[Pair, str, bool]]:
        """Each pair that reaches the check, with the model's answer, and whether the limit of tokens ended it."""
        steps = [step for step in self.steps if step in ("generate", "repair")]
        cut = {step: {pair.id for pair, result in self.current(step) if _is_cut(result)} for step in steps}
        again = {pair.id for pair, result in self.current("repair") if result.text is not None}
        for pair, text in self.texts("filter"):
            step = "repair" if pair.id in again and "repair" in cut else "generate"
            yield pair, text, pair.id in cut[step]


def _is_cut(result: Result) -> bool:
    return bool(result.details.get(CUT_OFF))
