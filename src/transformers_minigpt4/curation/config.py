"""The settings of a curation project: one flat YAML file, `curation.yaml`, in the project's folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers_minigpt4.llm.types import ChatSettings

from .settings_file import CurationError, SettingsFile


CONFIG_FILE = "curation.yaml"
REPAIR = "repair_"  # before the names of the fields of `CurationConfig.repair`

# Verbatim from section 3.2 of the paper: no space after `</Img>`, none after `Assistant:`.
PROMPT = (
    "###Human: <Img><ImageHere></Img>Describe this image in detail. Give as many details as possible. "
    "Say everything you see. ###Assistant:"
)
CONTINUE_PROMPT = "###Human: Continue ###Assistant:"
REPAIR_PROMPT = (
    "Fix the error in the given paragraph. Remove any repeating sentences, meaningless characters, not English "
    "sentences, and so on. Remove unnecessary repetition. Rewrite any incomplete sentences. Return directly the "
    "results without explanation. Return directly the input paragraph if it is already correct without explanation."
)

REVIEW_GUIDELINE = (
    "Accept a description if all that it says can be seen in the image, it names what matters, and it reads well. "
    "Edit it if little is wrong: take out what is repeated or cannot be seen. Reject the rest."
)
REVIEW_REASONS = ("not in the image", "too little detail", "repetitive", "bad English", "unsuitable image")
_MOST_REASONS, _LONGEST_REASON = 9, 60  # one key each, 1 to 9; characters on a button


@dataclass(frozen=True)
class CurationConfig:
    """
    The settings of a project. Every field is a key of `curation.yaml`, except that `repair` is flat there.

    Args:
        source: Where images come from: `KIND:PATH` as in docs/reference/formats.md, a folder of images, or
            `python:MODULE:FUNCTION`, called with the number of images and the seed, giving rows with `image`.
        checkpoint: Folder or Hub id of the model that describes them.
        images: How many are sampled; the paper has 5,000.
        seed: For sampling the images, and the answers if `do_sample` is set.
        prompt: First turn. With `<ImageHere>` it is the complete text that the model sees; without, one user turn
            for the processor's own chat template.
        continue_prompt: Second turn, in the same format.
        continue_below: An answer of at most this many tokens gets the second turn; 0 for never.
        max_new_tokens: Longest answer of a turn, in tokens.
        do_sample: Whether answers are sampled as the checkpoint's generation config says, or decoded greedily.
        batch_size: Images that go through the model at once.
        dtype: As in `minigpt4 describe`; `auto` as the checkpoint is stored.
        device: Such as `cuda:1`; by default the first accelerator, else the CPU.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        repair: Language model that repairs; without one there is no repair. In `curation.yaml` each of its fields is
            a key: `repair_model`, `repair_base_url` and so on.
        repair_prompt: What it is asked; the paper's by default.
        rules: Changes to the filter's rules: `{rule: {parameter: value}}`, or `{rule: false}` to leave one out.
        review_guideline: What the review's page tells people to do.
        review_reasons: Why people reject pairs: at most nine, with the keys 1 to 9.
        review_twice: Share of pairs that two reviewers see, to measure their agreement.
        build_unreviewed: Whether `build` also takes what the filter kept and nobody has reviewed.
    """

    source: str
    checkpoint: str
    images: int = 5000
    seed: int = 42
    prompt: str = PROMPT
    continue_prompt: str = CONTINUE_PROMPT
    continue_below: int = 80
    max_new_tokens: int = 300
    do_sample: bool = False
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    repair: ChatSettings | None = None
    repair_prompt: str = REPAIR_PROMPT
    rules: dict[str, object] = field(default_factory=dict)
    review_guideline: str = REVIEW_GUIDELINE
    review_reasons: list[str] = field(default_factory=lambda: list(REVIEW_REASONS))
    review_twice: float = 0.1
    build_unreviewed: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "checkpoint", "prompt", "continue_prompt"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise CurationError(f"{name} is empty; set it in {CONFIG_FILE}")
        for name, least in (("images", 1), ("batch_size", 1), ("max_new_tokens", 1), ("continue_below", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CurationError(f"{name} is {value!r}; set it to a whole number of {least} or more")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise CurationError(f"seed is {self.seed!r}; set it to a whole number of 0 or more")
        check_review(self.review_reasons, self.review_twice)
        if not isinstance(self.rules, dict):
            raise CurationError(f"rules is {self.rules!r:.80}; write it as `rules: {{rule: {{parameter: value}}}}`")
        if ("<ImageHere>" in self.continue_prompt) or self.prompt.count("<ImageHere>") > 1:
            raise CurationError("the prompt shows one image, once: write <ImageHere> once, in `prompt` only")
        if "<ImageHere>" not in self.prompt and "###" in self.continue_prompt:
            raise CurationError(
                "`prompt` is a plain question, so it goes through the chat template; write "
                "`continue_prompt: Continue` too"
            )

    @property
    def wanted(self) -> int:
        """How many pairs there are when all have been sampled."""
        return self.images

    @property
    def repairs(self) -> bool:
        """Whether a language model repairs the texts."""
        return self.repair is not None

    def chat_settings(self) -> ChatSettings:
        """
        The settings of the model that repairs.

        Raises:
            CurationError: when no model is named.
        """
        if self.repair is None:
            raise CurationError(f"no model repairs: set {REPAIR}model in {CONFIG_FILE}, or leave the step out")
        return self.repair


def check_review(reasons: Sequence[object], twice: float) -> None:
    """
    Checks `review_reasons` and `review_twice`.

    Raises:
        CurationError: for reasons that no button can show, too many of them, or a share outside of 0 to 1.
    """
    if not 0 <= twice <= 1:
        raise CurationError(f"review_twice is {twice!r}; set it to a share between 0 and 1")
    for reason in reasons:
        printable = isinstance(reason, str) and reason.isprintable() and reason == " ".join(reason.split())
        if not isinstance(reason, str) or not printable or not 0 < len(reason) <= _LONGEST_REASON:
            raise CurationError(f"review_reasons has {reason!r:.80}; write each as 1 to {_LONGEST_REASON} characters")
    if len(reasons) > _MOST_REASONS or len(set(reasons)) < len(reasons):
        raise CurationError(
            f"review_reasons has {len(reasons)} entries; give at most {_MOST_REASONS}, each once: they have the keys "
            f"1 to {_MOST_REASONS}"
        )


SETTINGS = SettingsFile(
    CONFIG_FILE,
    CurationConfig,
    chat="repair",
    prefix=REPAIR,
    guide="docs/guides/curate.md",
    init="minigpt4 curate init {folder} --source … --checkpoint …",
)


def settings_hash(*parts: object) -> str:
    """A short digest of what a step depends on: prompts, models, parameters, as plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
