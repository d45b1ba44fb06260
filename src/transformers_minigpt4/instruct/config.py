"""The settings of a project for instruction data: one flat YAML file, `instruct.yaml`, in the project's folder."""

from dataclasses import dataclass, field

from transformers_minigpt4.curation.config import check_review
from transformers_minigpt4.curation.settings_file import CurationError, SettingsFile
from transformers_minigpt4.llm.types import ChatSettings

from .answers import LANGUAGES
from .prompts import KINDS, detail_questions


CONFIG_FILE = "instruct.yaml"
REVIEW_GUIDELINE = (
    "Accept a conversation if every answer is right for the image and every question can be answered from it. Edit it "
    "if little is wrong; keep the lines Question:, Answer: and ===. Reject the rest."
)
REVIEW_REASONS = (
    "not in the image",
    "wrong count or place",
    "question not about the image",
    "too vague",
    "unsuitable",
)


@dataclass(frozen=True)
class InstructConfig:
    """
    The settings of a project. Every field is a key of `instruct.yaml`, except that `chat` is flat there.

    Args:
        captions: COCO's `captions_*.json`, or a `.jsonl` file of one's own; see docs/reference/formats.md.
        instances: COCO's `instances_*.json`, for the boxes; not for a file of one's own, which may hold boxes.
        images: The folder that the images' names are relative to; by default the one of `captions`.
        chat: The language model that writes. In `instruct.yaml` each of its fields is a key: `model`, `base_url` and
            so on.
        limit: Rows wanted, of all kinds; by default as many as the images give without one twice in a kind.
        kinds: Shares of the kinds, as any numbers.
        seed: For the images of each kind, the questions of descriptions, and the place of the image in a question.
        language: Of questions and answers.
        ask_again: Whether an answer that is refused is asked for once more, with the reason.
        similarity: Two rows of a kind with this share of common 3-word shingles are near-duplicates; 0 to not look.
        detail_questions: Drawn from for the descriptions; the article's 16 by default.
        review_guideline: What the review's page tells people to do.
        review_reasons: Why people reject rows: at most nine, with the keys 1 to 9.
        review_twice: Share of rows that two reviewers see, to measure their agreement.
        build_unreviewed: Whether `build` also takes what was kept and nobody has reviewed.
    """

    captions: str
    instances: str | None = None
    images: str | None = None
    chat: ChatSettings | None = None
    limit: int | None = None
    kinds: dict[str, float] = field(default_factory=lambda: dict(KINDS))
    seed: int = 42
    language: str = "English"
    ask_again: bool = True
    similarity: float = 0.8
    detail_questions: list[str] = field(default_factory=lambda: list(detail_questions()))
    review_guideline: str = REVIEW_GUIDELINE
    review_reasons: list[str] = field(default_factory=lambda: list(REVIEW_REASONS))
    review_twice: float = 0.1
    build_unreviewed: bool = True

    def __post_init__(self) -> None:
        if not self.captions.strip():
            raise CurationError(f"captions is empty; name COCO's file or your own in {CONFIG_FILE}")
        if self.instances is not None and self.captions.endswith(".jsonl"):
            raise CurationError("instances goes with COCO's captions; a .jsonl file has its boxes in each line")
        if self.limit is not None and self.limit < 1:
            raise CurationError(f"limit is {self.limit}; set it to 1 or more")
        if self.seed < 0:
            raise CurationError(f"seed is {self.seed}; set it to a whole number of 0 or more")
        if self.language not in LANGUAGES:
            raise CurationError(f"language is {self.language!r}; choose one of {', '.join(LANGUAGES)}")
        if not 0 <= self.similarity <= 1:
            raise CurationError(f"similarity is {self.similarity}; set it to a share between 0 and 1")
        if not self.detail_questions or not all(isinstance(q, str) and q.strip() for q in self.detail_questions):
            raise CurationError("detail_questions is a list of questions; leave it out for the article's")
        check_shares(self.kinds)
        check_review(self.review_reasons, self.review_twice)

    @property
    def shares(self) -> dict[str, float]:
        """The kinds that are wanted, in the order of `KINDS`, with shares that add up to 1."""
        total = sum(self.kinds.values())
        return {kind: self.kinds[kind] / total for kind in KINDS if self.kinds.get(kind)}

    @property
    def wanted(self) -> int:
        """How many rows are wanted, or 0 for as many as there are."""
        return self.limit or 0

    @property
    def repairs(self) -> bool:
        """Whether there is the step that asks again."""
        return self.ask_again

    def chat_settings(self) -> ChatSettings:
        """
        The settings of the model that writes.

        Raises:
            CurationError: when no model is named.
        """
        if self.chat is None:
            raise CurationError(f"no model is named: set model, and base_url for an endpoint, in {CONFIG_FILE}")
        return self.chat


def check_shares(kinds: dict[str, float]) -> None:
    """
    Raises:
        CurationError: for kinds that do not exist, and shares that are no numbers of 0 or more, or all 0.
    """
    if unknown := [str(kind) for kind in kinds if kind not in KINDS]:
        raise CurationError(f"there is no kind {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    for kind, share in kinds.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 <= share < float("inf"):
            raise CurationError(f"the share of {kind} is {share!r}; give a number of 0 or more")
    if not sum(kinds.values()):
        raise CurationError("all shares are 0; give at least one kind a number above 0")


SETTINGS = SettingsFile(
    CONFIG_FILE,
    InstructConfig,
    chat="chat",
    prefix="",
    guide="docs/guides/generate-instructions.md",
    init="minigpt4 instruct init {folder} --captions … --model …",
)
