"""Publishes instruction data in LLaVA's format: one JSON file that names its images, the record, and a card."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from transformers_minigpt4.utils.file_names import RUN_FILE

from .cards import PIPELINE_TAG, TEMPLATES, License, size_category
from .records import Facts, read_facts, run_facts, table_cell
from .upload import CARD_FILE, Publication


INSTRUCTIONS_FILE = "llava_instruct.json"
PAPER = "2304.08485"


def is_instructions(folder: Path) -> bool:
    """Whether a folder holds instruction data, as `minigpt4 instruct build` writes them."""
    return (folder / INSTRUCTIONS_FILE).is_file()


def prepare_instructions(
    folder: Path, repo_id: str, license: License | None, language: Sequence[str] | None = None
) -> Publication:
    """
    The files of a folder of instruction data with a card.

    Raises:
        ValueError: without a license, and for a record that cannot be read.
    """
    if license is None:
        raise ValueError("give the license of the dataset with --license; the data does not name it")
    record = read_facts(folder, RUN_FILE)
    files = {name: folder / name for name in (INSTRUCTIONS_FILE, RUN_FILE) if (folder / name).is_file()}
    card = instructions_card(record, repo_id, license, language=language or ("en",))
    return Publication(repo_id, "dataset", {**files, CARD_FILE: str(card).encode("utf-8")})


def instructions_card(
    record: Facts, repo_id: str | None, license: License | None, *, language: Sequence[str] = ("en",)
) -> DatasetCard:
    """
    Card of instruction data.

    Args:
        record: The `run.json` of the build.
        repo_id: Where they are published; `None` for those that stay in a folder.
        license: Their license; `None` if that has not been chosen yet.
        language: ISO codes.
    """
    kinds = {table_cell(kind): int(count) for kind, count in dict(record.get("kinds") or {}).items()}
    rows = sum(kinds.values())
    name = repo_id.split("/")[-1] if repo_id is not None else "Instruction data"
    card_data = DatasetCardData(
        **(license.metadata if license is not None else {}),
        language=list(language),
        pretty_name=name,
        task_categories=["visual-question-answering", PIPELINE_TAG],
        size_categories=[size_category(rows)],
        tags=["llava", "instruction-tuning", "synthetic", f"arxiv:{PAPER}"],
    )
    if repo_id is not None:
        card_data["configs"] = [{"config_name": "default", "data_files": INSTRUCTIONS_FILE}]
    card: DatasetCard = DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "instructions_card.md.jinja"),
        name=name,
        repo_id=repo_id,
        license=license,
        paper=PAPER,
        file=INSTRUCTIONS_FILE,
        images=table_cell(record.get("images") or "which the source says"),
        kinds=kinds,
        rows=rows,
        cost=table_cell(record.get("cost")),
        run=run_facts(record),
    )
    return card
