"""The settings of a curation project: one flat YAML file, `curation.yaml`, in the project's folder."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from transformers_minigpt4.llm.types import ChatSettings

CONFIG_FILE = "curation.yaml"

# The paper's section 3.2, to the letter: no space behind `</Img>`, none behind `Assistant:`.
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


class CurationError(ValueError):
    """A project or step that cannot go on; the message says what was given, why it fails and what to do."""


@dataclass(frozen=True)
class CurationConfig:
    """
    What a project is made of. Every field is a key of `curation.yaml`.

    Args:
        source: Where pictures come from: `KIND:PATH` as in docs/reference/formats.md, a folder of pictures, or
            `python:MODULE:FUNCTION`, called with the number of pictures and the seed, giving rows with `image`.
        checkpoint: Folder or Hub id of the model that describes them.
        images: How many are drawn; the paper has 5,000.
        seed: Draws the pictures, and the answers where `do_sample` is set.
        prompt: First turn. With `<ImageHere>` it is the whole text that the model sees; without, one user turn
            for the processor's own chat template.
        continue_prompt: Second turn, in the same form.
        continue_below: An answer of at most so many tokens gets the second turn; 0 for never.
        max_new_tokens: Longest answer of a turn, in tokens.
        do_sample: Whether answers are drawn as the checkpoint's generation config says, or the likeliest words.
        batch_size: Pictures that go through the model at once.
        dtype: As in `minigpt4 describe`; `auto` as the checkpoint is stored.
        device: Such as `cuda:1`; by default the first accelerator, else the CPU.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        repair_model: Language model that repairs; without one there is no repair. The keys `repair_*` up to
            `repair_api_key_env` are those of `chat.ChatSettings`.
        repair_prompt: What it is asked; the paper's by default.
        rules: Changes to the filter's rules: `{rule: {parameter: value}}`, or `{rule: false}` to leave one out.
        review_twice: Share of pairs that two reviewers see, for the figure of agreement.
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
    repair_model: str | None = None
    repair_base_url: str | None = None
    repair_concurrency: int = 8
    repair_requests_per_minute: float | None = None
    repair_timeout: float = 60.0
    repair_max_retries: int = 5
    repair_temperature: float = 0.0
    repair_max_tokens: int = 1024
    repair_budget_tokens: int | None = None
    repair_budget_cost: float | None = None
    repair_price_in: float | None = None
    repair_price_out: float | None = None
    repair_api_key_env: str = "OPENAI_API_KEY"
    repair_prompt: str = REPAIR_PROMPT
    rules: dict = field(default_factory=dict)
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
        if not 0 <= self.review_twice <= 1:
            raise CurationError(f"review_twice is {self.review_twice!r}; set it to a share between 0 and 1")
        if not isinstance(self.rules, dict):
            raise CurationError(f"rules is {self.rules!r:.80}; write it as `rules: {{rule: {{parameter: value}}}}`")
        if ("<ImageHere>" in self.continue_prompt) or self.prompt.count("<ImageHere>") > 1:
            raise CurationError("the prompt shows one picture, once: write <ImageHere> in `prompt` alone, and once")
        if "<ImageHere>" not in self.prompt and "###" in self.continue_prompt:
            raise CurationError(
                "`prompt` is a plain question, so the chat template frames it; write `continue_prompt: Continue` too"
            )

    @property
    def repairs(self) -> bool:
        """Whether a language model repairs the texts."""
        return self.repair_model is not None

    def chat_settings(self) -> "ChatSettings":
        """
        The settings of the model that repairs.

        Raises:
            CurationError: when no model is named.
            ValueError: for settings that cannot work.
        """
        from transformers_minigpt4.llm.types import ChatSettings

        if self.repair_model is None:
            raise CurationError(f"no model repairs: set repair_model in {CONFIG_FILE}, or leave the step out")
        names = [part.name for part in fields(ChatSettings)]
        return ChatSettings(**{name: getattr(self, f"repair_{name}") for name in names})


def load_config(path: Path) -> CurationConfig:
    """
    Reads `curation.yaml`.

    Raises:
        CurationError: for a file that is missing or no YAML, and for unknown keys or values that cannot work.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CurationError(
            f"there is no {path}; make a project with `minigpt4 curate init {path.parent} --source … --checkpoint …`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CurationError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise CurationError(f"{path} holds no settings; write lines such as `images: 5000`")
    known = {part.name: part for part in fields(CurationConfig)}
    if unknown := [str(key) for key in values if key not in known]:
        raise CurationError(f"{path} has unknown keys {', '.join(unknown)}; it may have {', '.join(known)}")
    if missing := [name for name in ("source", "checkpoint") if name not in values]:
        raise CurationError(f"{path} lacks {' and '.join(missing)}")
    if values.get("rules", "") is None:  # `rules:` with nothing behind it
        del values["rules"]
    for name, part in known.items():
        if name in values:
            values[name] = _checked(path, name, values[name], part.type)
    return CurationConfig(**values)


def _checked(path: Path, name: str, value: Any, kind: Any) -> Any:
    """A value of one of the fields' plain types; YAML reads `1e-3` as text and `no` as false."""
    if value is None and isinstance(None, kind):
        return None
    whole = isinstance(value, int) and isinstance(1.0, kind)
    if not (whole or isinstance(value, kind)) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", str(kind).replace(" | None", ""))
        raise CurationError(f"{name} in {path} is {value!r:.80}, but must be of type {wanted}")
    return float(value) if whole else value  # 0 and 0.0 are one setting, for the digests too


def settings_hash(*parts: Any) -> str:
    """A short digest of what a step depends on: prompts, models, parameters, as plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
