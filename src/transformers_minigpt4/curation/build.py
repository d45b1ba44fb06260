"""The build step: writes the accepted pairs as a dataset and as the authors' folder, with a card."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage

from transformers_minigpt4.hub.cards import dataset_card
from transformers_minigpt4.hub.cc_sbu_align import write_cc_sbu_align
from transformers_minigpt4.hub.records import public_name, public_source
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import JsonObject, atomic_folder
from transformers_minigpt4.utils.versions import package_versions

from .config import CurationConfig
from .filter import project_rules
from .progress import bar
from .records import Pair, now
from .review import ReviewQueue
from .settings_file import CurationError
from .status import lost_pairs, passed_on
from .store import Project


BUILD = "build"  # the folder in the project's folder
DATASET, ALIGN = "dataset", "cc_sbu_align"
CARD_FILE = "README.md"
_PACKAGES = ("transformers_minigpt4", "transformers", "torch", "datasets")


@dataclass(frozen=True)
class BuildSummary:
    """
    The result of a build.

    Args:
        folder: Of the build.
        pairs: Rows of the dataset.
        unreviewed: How many of them nobody has reviewed.
        skipped: Reasons by key, of accepted pairs whose image is missing or not the one that was sampled.
    """

    folder: Path
    pairs: int
    unreviewed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"build: {self.pairs} pairs in {self.folder / DATASET} and {self.folder / ALIGN}"]
        if self.unreviewed:
            lines.append(f"  {self.unreviewed} of them have not been reviewed")
        if self.skipped:
            lines.append(f"  {len(self.skipped)} accepted pairs left out:")
            lines += [f"    {key}: {reason}" for key, reason in list(self.skipped.items())[:10]]
            if len(self.skipped) > 10:
                lines.append(f"    and {len(self.skipped) - 10} more")
        return "\n".join(lines)


def run_build(
    project: Project, config: CurationConfig, progress: bool = True, unreviewed: bool | None = None
) -> BuildSummary:
    """
    Creates `build/` in the project's folder: `dataset/` for `load_from_disk`, and `cc_sbu_align/`, the authors'
    format.

    Both contain the same rows, images byte for byte, with a card and `run.json`. The folder appears when it is
    complete; an earlier build is replaced. An image that is missing, or not the one that was sampled, is left out, and
    the summary and the card say so.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show a bar on a terminal.
        unreviewed: Whether to include what the filter kept and nobody has decided on; by default the
            configuration's `build_unreviewed`.

    Raises:
        CurationError: when there is nothing to build from.
        OSError: when the disk is full. The earlier build is kept.
    """
    if unreviewed is None:
        unreviewed = config.build_unreviewed
    with project.writer("build"):
        target = project.folder / BUILD
        with atomic_folder(target, locked=True) as new:
            reviewed = {pair.id for pair, _ in project.accepted()}
            pairs = list(project.accepted(unreviewed))
            if not pairs:
                raise CurationError(_nothing(project, unreviewed))
            summary = _make(project, config, new, pairs, reviewed, progress)
    return BuildSummary(target, *summary)


def built_dataset(project: Project) -> Path:
    """
    The folder of the dataset that `build` has written, for `hub.publish.push_to_hub`.

    Raises:
        CurationError: if nothing has been built.
    """
    folder = project.folder / BUILD / DATASET
    if not folder.is_dir():
        raise CurationError(f"{project.folder} has no build yet; run `minigpt4 curate build {project.folder}` first")
    return folder


def _nothing(project: Project, unreviewed: bool) -> str:
    kept = sum(step.outcomes.get("kept", 0) for step in project.funnel().steps if step.step == "filter")
    if unreviewed or not kept:
        return f"nothing to build from: the filter has kept {kept} pairs; `minigpt4 curate status` shows why"
    return (
        f"nothing to build from: of the {kept} pairs that the filter kept, reviewers have accepted none; review them, "
        "or add --unreviewed to include what the filter kept"
    )


def _make(
    project: Project,
    config: CurationConfig,
    folder: Path,
    pairs: list[tuple[Pair, str]],
    reviewed: set[int],
    progress: bool,
) -> tuple[int, int, dict[str, str]]:
    """Writes everything to `folder`; returns the number of rows, of unreviewed ones, and the pairs left out."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows, skipped = [], {}
    with bar("build", len(pairs), shown=progress) as advance:
        for pair, text in pairs:
            try:
                rows.append((pair, text, _copied(project, pair, images)))
            except _ImageError as error:
                skipped[pair.key] = str(error)
            advance(1)
    if not rows:
        raise CurationError(
            f"nothing to build from: of {len(pairs)} accepted pairs none has its sampled image any more; the first, "
            f"{pairs[0][0].key}: {skipped[pairs[0][0].key]}"
        )
    plain = sum(pair.id not in reviewed for pair, _, _ in rows)
    record = run_info(project, config, len(rows), plain, len(skipped))
    dataset = _dataset([(path, pair.key, text) for pair, text, path in rows], folder / "embedded.arrow")
    dataset.save_to_disk(folder / DATASET, num_proc=None)
    write_cc_sbu_align(dataset, folder / ALIGN)
    for name in (DATASET, ALIGN):
        _describe(dataset, folder / name, name, record)
    shutil.rmtree(images)
    (folder / "embedded.arrow").unlink(missing_ok=True)
    return len(rows), plain, skipped


class _ImageError(Exception):
    """Why an image cannot be part of the dataset."""


def _copied(project: Project, pair: Pair, folder: Path) -> Path:
    """A copy of a pair's image, so that later changes of the original do not matter."""
    path = project.image_path(pair)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _ImageError(f"the file {pair.image} does not exist any more") from None
    except OSError as error:
        raise _ImageError(f"{pair.image} cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != pair.sha256:
        raise _ImageError(f"{pair.image} is not the image that was sampled")
    copy = folder / path.name
    copy.write_bytes(content)
    return copy


def _dataset(rows: Iterable[tuple[Path, str, str]], cache: Path) -> Dataset:
    """Columns `image` (the files' own bytes), `image_id` and `caption`."""
    files, ids, texts = zip(*rows)
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "caption": Value("string")})
    columns = {"image": [str(file) for file in files], "image_id": list(ids), "caption": list(texts)}
    dataset = Dataset.from_dict(columns, features=features).with_format("arrow")
    # In a file, because a few thousand photographs need not fit into memory.
    return dataset.map(embed_table_storage, batched=True, batch_size=100, cache_file_name=str(cache)).with_format(None)


def _describe(dataset: Dataset, folder: Path, loads: str, record: JsonObject) -> None:
    card = dataset_card(DatasetDict({"train": dataset}), None, None, record=record, local=loads)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    (folder / RUN_FILE).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def run_info(project: Project, config: CurationConfig, pairs: int, unreviewed: int, without_image: int) -> JsonObject:
    """
    What `hub.cards` shows of a curation: source, counts at every step, reasons, models, prompts, rules.

    Folders of this computer are named by their last part only.

    Args:
        project: Open.
        config: Its settings.
        pairs: Rows of the dataset.
        unreviewed: How many of them nobody has reviewed.
        without_image: How many accepted pairs were left out.
    """
    funnel = project.funnel()
    counts = {"images sampled": funnel.sampled}
    counts |= {project.step_words[step.step]: passed_on(step) for step in funnel.steps}
    counts["in this dataset"] = pairs
    lost = lost_pairs(funnel)
    if without_image:
        lost["build, image missing or changed"] = without_image
    models = {"description": public_name(config.checkpoint)}
    prompts = {"description": config.prompt}
    if config.continue_below:
        prompts[f"second turn, after an answer of {config.continue_below} tokens or fewer"] = config.continue_prompt
    if config.repair is not None:
        models["repair"] = public_name(config.repair.model)
        prompts["repair"] = config.repair_prompt
    return {
        "source": public_source(config.source),
        "seed": config.seed,
        "counts": counts,
        "lost": lost,
        "review": _review(project, pairs, unreviewed),
        "models": models,
        "prompts": prompts,
        "rules": project_rules(config).describe(),
        "versions": package_versions(_PACKAGES),
        "made_at": now(),
    }


def _review(project: Project, pairs: int, unreviewed: int) -> str:
    """Who reviewed the texts, in one or two sentences."""
    if unreviewed == pairs:
        return "**No person has reviewed these pairs**; they are what the filter kept."
    agreement = ReviewQueue(project).agreement()
    said = "People have reviewed every pair."
    if unreviewed:
        said = (
            f"People have reviewed {pairs - unreviewed} of the {pairs} pairs; "
            f"**nobody has reviewed the other {unreviewed}**."
        )
    if agreement.pairs:
        kappa = f", Cohen's kappa {agreement.kappa:.2f}" if agreement.kappa is not None else ""
        said += f" On {agreement.pairs} texts that two people saw, {agreement.agreed} decisions agree{kappa}."
    return said
