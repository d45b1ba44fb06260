"""The settings of a curation project: one flat YAML file, `curation.yaml`, in the project's folder."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from transformers_minigpt4.llm.types import ChatSettings
from transformers_minigpt4.utils.settings import field_values
from transformers_minigpt4.utils.text import first_line, without_surrogates


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


class CurationError(ValueError):
    """A project or step that cannot continue; the message says what was given, why it fails and what to do."""


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
        if not 0 <= self.review_twice <= 1:
            raise CurationError(f"review_twice is {self.review_twice!r}; set it to a share between 0 and 1")
        self._check_reasons()
        if not isinstance(self.rules, dict):
            raise CurationError(f"rules is {self.rules!r:.80}; write it as `rules: {{rule: {{parameter: value}}}}`")
        if ("<ImageHere>" in self.continue_prompt) or self.prompt.count("<ImageHere>") > 1:
            raise CurationError("the prompt shows one image, once: write <ImageHere> once, in `prompt` only")
        if "<ImageHere>" not in self.prompt and "###" in self.continue_prompt:
            raise CurationError(
                "`prompt` is a plain question, so it goes through the chat template; write "
                "`continue_prompt: Continue` too"
            )

    def _check_reasons(self) -> None:
        reasons = self.review_reasons
        for reason in reasons:
            printable = isinstance(reason, str) and reason.isprintable() and reason == " ".join(reason.split())
            if not printable or not 0 < len(reason) <= _LONGEST_REASON:
                raise CurationError(
                    f"review_reasons has {reason!r:.80}; write each as 1 to {_LONGEST_REASON} characters"
                )
        if len(reasons) > _MOST_REASONS or len(set(reasons)) < len(reasons):
            raise CurationError(
                f"review_reasons has {len(reasons)} entries; give at most {_MOST_REASONS}, each once: they "
                f"have the keys 1 to {_MOST_REASONS}"
            )

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


def load_config(path: Path) -> CurationConfig:
    """
    Reads `curation.yaml`.

    Raises:
        CurationError: for a file that is missing or not YAML, and for unknown keys or values that cannot work.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CurationError(
            f"there is no {path}; create a project with `minigpt4 curate init {path.parent} --source … --checkpoint …`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CurationError(f"{path} is not YAML: {first_line(error)}") from error
    except RecursionError:
        raise CurationError(f"{path} is nested too deeply; write one `key: value` per line") from None
    if not isinstance(values, dict):
        raise CurationError(f"{path} holds no settings; write lines such as `images: 5000`")
    known = [name for name, _, _ in _flat()]
    if unknown := [str(key) for key in values if key not in known]:
        raise CurationError(f"{path} has unknown keys {', '.join(unknown)}; it may have {', '.join(known)}")
    if missing := [name for name in ("source", "checkpoint") if name not in values]:
        raise CurationError(f"{path} lacks {' and '.join(missing)}")
    if broken := [name for name, value in values.items() if isinstance(value, str) and not _encodes(value)]:
        raise CurationError(f"{path}: {broken[0]} contains half a surrogate pair, which is no character; remove it")
    if values.get("rules", "") is None:  # `rules:` without a value
        del values["rules"]
    try:
        return CurationConfig(**field_values(CurationConfig, values), repair=ChatSettings.from_options(values, REPAIR))
    except CurationError:
        raise
    except ValueError as error:
        raise CurationError(f"{path}: {error}") from error


def _encodes(text: str) -> bool:
    return without_surrogates(text) == text


def commented_yaml(config: CurationConfig) -> str:
    """The content of a `curation.yaml`: settings that differ from the defaults, and all others as comments."""

    def line(name: str, value: object) -> str:
        # `None`: a list on one line, so that it can be a comment.
        flow = None if isinstance(value, list) else False
        text = yaml.safe_dump(
            {name: value}, allow_unicode=True, width=10_000, sort_keys=False, default_flow_style=flow
        )
        return str(text).strip()

    lines = ["# Settings of a curation project; docs/guides/curate.md explains them. The commented ones are defaults."]
    for name, value, default in _flat(config):
        lines.append(line(name, value) if value != default else f"# {line(name, value)}")
    return "\n".join(lines) + "\n"


def _flat(config: CurationConfig | None = None) -> Iterator[tuple[str, object, object]]:
    """The keys of `curation.yaml`, each with its value in a configuration and its default (`None` without one)."""
    repair = getattr(config, "repair", None)
    for part in fields(CurationConfig):
        if part.name == "repair":
            for own in fields(ChatSettings):
                default = None if own.default is MISSING else own.default
                yield REPAIR + own.name, getattr(repair, own.name, default), default
        else:
            default = part.default_factory() if callable(part.default_factory) else part.default
            yield part.name, getattr(config, part.name, default), default


def settings_hash(*parts: object) -> str:
    """A short digest of what a step depends on: prompts, models, parameters, as plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
