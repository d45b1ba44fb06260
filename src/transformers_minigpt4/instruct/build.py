"""The build: what was kept, in LLaVA's format and as a dataset with images by reference, with a card and a record."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from transformers_minigpt4.curation.records import Pair, now
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.spending import used_so_far
from transformers_minigpt4.curation.status import lost_pairs, passed_on
from transformers_minigpt4.hub.instructions import INSTRUCTIONS_FILE, instructions_card
from transformers_minigpt4.hub.records import public_name
from transformers_minigpt4.hub.upload import CARD_FILE
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import JsonObject, atomic_folder, to_json, write_json
from transformers_minigpt4.utils.versions import package_versions

from .answers import REASONS, Turn, parse_turns
from .config import InstructConfig
from .prompts import KINDS, messages
from .store import InstructProject


BUILD, DATASET = "build", "dataset"
IMAGE_MARK = "<image>"
_STEPS = {"generate": "generate", "repair": "asking again", "filter": "check", "review": "review"}
_PACKAGES = ("transformers_minigpt4", "datasets", "openai")


@dataclass(frozen=True)
class Built:
    """The folder of a build, its rows by kind, how many nobody has reviewed, and how many have no image file here."""

    folder: Path
    kinds: dict[str, int]
    unreviewed: int
    missing: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        lines = [f"build: {sum(self.kinds.values()):,} rows ({kinds}) in {self.folder / INSTRUCTIONS_FILE}"]
        if self.unreviewed:
            lines.append(f"  {self.unreviewed:,} of them have not been reviewed")
        if self.missing:
            lines.append(f"  {self.missing:,} of them name an image that is not in the folder of images")
        return "\n".join(lines)


def run_build(project: InstructProject, config: InstructConfig, unreviewed: bool | None = None) -> Built:
    """
    Creates `build/` in the project's folder: `llava_instruct.json`, `dataset/` for `load_from_disk`, card, record.

    The folder appears when it is complete; an earlier build is replaced. Images are named, not copied.

    Args:
        project: Open.
        config: Its settings.
        unreviewed: Whether to include what was kept and nobody has decided on; by default the configuration's
            `build_unreviewed`.

    Raises:
        CurationError: when there is nothing to build from.
        OSError: when the disk is full. The earlier build is kept.
    """
    unreviewed = config.build_unreviewed if unreviewed is None else unreviewed
    with project.writer("build"):
        target = project.folder / BUILD
        with atomic_folder(target, locked=True) as new:
            reviewed = {pair.id for pair, _ in project.accepted()}
            rows = [(pair, parse_turns(text)) for pair, text in project.accepted(unreviewed)]
            if not rows:
                raise CurationError(_nothing(project, unreviewed))
            counts = Counter(pair.origin["kind"] for pair, _ in rows)
            kinds = {kind: counts[kind] for kind in KINDS if counts[kind]}
            plain = sum(pair.id not in reviewed for pair, _ in rows)
            there = project.existing_images({pair.image for pair, _ in rows})
            missing = sum(pair.image not in there for pair, _ in rows)
            record = run_info(project, config, kinds, plain)
            _write_list(new / INSTRUCTIONS_FILE, (llava_row(pair, turns, config.seed) for pair, turns in rows))
            _dataset(project, rows).save_to_disk(new / DATASET)
            write_json(new / RUN_FILE, record)
            (new / CARD_FILE).write_text(str(instructions_card(record, None, None)), encoding="utf-8")
    return Built(target, kinds, plain, missing)


def built_folder(project: InstructProject) -> Path:
    """
    The folder that `build` has written.

    Raises:
        CurationError: if nothing has been built.
    """
    folder = project.folder / BUILD
    if not (folder / INSTRUCTIONS_FILE).is_file():
        raise CurationError(f"{project.folder} has no build yet; run `{project.command} build {project.folder}` first")
    return folder


def llava_row(pair: Pair, turns: list[Turn], seed: int) -> JsonObject:
    """A row in LLaVA's format. The image's mark stands before or after the first question, drawn by the row's key."""
    first = _in_front(pair, seed)
    conversations = []
    for number, turn in enumerate(turns):
        parts = [turn.question] if number else [IMAGE_MARK, turn.question] if first else [turn.question, IMAGE_MARK]
        conversations += [{"from": "human", "value": "\n".join(parts)}, {"from": "gpt", "value": turn.answer}]
    return {"id": pair.origin["scene"], "image": pair.image, "conversations": conversations}


def _in_front(pair: Pair, seed: int) -> bool:
    return hashlib.sha256(f"{seed}/{pair.key}".encode()).digest()[0] % 2 == 0


def _dataset(project: InstructProject, rows: list[tuple[Pair, list[Turn]]]) -> Dataset:
    """Rows as they are trained on: `images` by their paths, and `messages` with the image in front of the question."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "id": Value("string"),
            "kind": Value("string"),
            "images": [ImageFeature()],
            "messages": [{"role": Value("string"), "content": [part]}],
        }
    )
    columns = {
        "id": [pair.origin["scene"] for pair, _ in rows],
        "kind": [pair.origin["kind"] for pair, _ in rows],
        "images": [[str(project.image_path(pair).absolute())] for pair, _ in rows],
        "messages": [_messages(turns) for _, turns in rows],
    }
    return Dataset.from_dict(columns, features=features)


def _messages(turns: list[Turn]) -> list[JsonObject]:
    found: list[JsonObject] = []
    for number, turn in enumerate(turns):
        image = [] if number else [{"type": "image", "text": None}]
        found.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        found.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return found


def _write_list(path: Path, rows: Iterator[JsonObject]) -> None:
    """A JSON list with one row a line."""
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(("[\n" if number == 0 else ",\n") + to_json(row))
        file.write("\n]\n")


def run_info(project: InstructProject, config: InstructConfig, kinds: dict[str, int], unreviewed: int) -> JsonObject:
    """What the card shows: source, counts at every step, reasons, model, prompts, cost. No folder of this computer."""
    funnel = project.funnel()
    rows = sum(kinds.values())
    counts = {project.sampled: funnel.sampled}
    counts |= {project.step_words[step.step]: passed_on(step) for step in funnel.steps}
    lost = lost_pairs(funnel, _STEPS)
    used, settings = used_so_far(project), config.chat_settings()
    priced = settings.price_in is not None and settings.price_out is not None
    asked = [message for kind in config.shares for message in messages(kind, (), (), config.language)[:1]]
    return {
        "source": f"captions {Path(config.captions).name}"
        + (f", boxes {Path(config.instances).name}" if config.instances is not None else ""),
        "images": f"such as {project.images.absolute().name}",
        "seed": config.seed,
        "kinds": kinds,
        "counts": {**counts, "in this dataset": rows},
        "lost": lost,
        "review": _review(rows, unreviewed),
        "models": {"answers": public_name(settings.model)},
        "prompts": dict(zip(config.shares, (message["content"] for message in asked))),
        "examples": {kind: messages(kind, (), (), config.language)[1:-1] for kind in config.shares},
        "changed_settings": {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "language": config.language,
            "asked once more": config.ask_again,
            "similarity": config.similarity,
        },
        "rules": REASONS,
        "cost": f"{used.requests:,} requests, {used.prompt_tokens:,} tokens in and {used.completion_tokens:,} out"
        + (f", {used.cost:.2f} at {settings.price_in:g} and {settings.price_out:g} per million." if priced else "."),
        "versions": package_versions(_PACKAGES),
        "made_at": now(),
    }


def _review(rows: int, unreviewed: int) -> str:
    if unreviewed == rows:
        return "**No person has reviewed these rows**; they are what the check kept."
    if unreviewed:
        return (
            f"People have reviewed {rows - unreviewed:,} of the {rows:,} rows; **nobody has reviewed the other ones**."
        )
    return "People have reviewed every row."


def _nothing(project: InstructProject, unreviewed: bool) -> str:
    kept = sum(step.outcomes.get("kept", 0) for step in project.funnel().steps if step.step == "filter")
    if unreviewed or not kept:
        return (
            f"nothing to build from: the check has kept {kept} rows; `{project.command} status {project.folder}` "
            "shows why, and `check` comes before `build`"
        )
    return (
        f"nothing to build from: of the {kept} rows that were kept, reviewers have accepted none; review them, or add "
        "--unreviewed"
    )
