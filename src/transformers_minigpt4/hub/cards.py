"""Writes model and dataset cards from the records in a checkpoint or dataset folder; absent facts stay absent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict, DatasetInfo, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from transformers_minigpt4.modeling.configuration_minigpt4 import MiniGPT4Config
from transformers_minigpt4.utils.file_names import RESULTS_FILE
from transformers_minigpt4.utils.files import JsonObject

from .records import Facts, evaluations_of, hub_ids, read_facts, read_run, run_facts, source_name, table_row


TEMPLATES = Path(__file__).parent / "templates"

PAPER = "2304.10592"
# transformers 5 reads the name "image-to-text" as this one and logs a warning; Hub and `pipeline()` agree on it.
PIPELINE_TAG = "image-text-to-text"

# They only require their own text to be kept, so a stricter license next to them covers the combination.
_PERMISSIVE = {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause"}
_MODULES = {"multi_modal_projector": "projector", "qformer": "Q-Former"}  # in the words of the card
_SIZE_CATEGORIES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


@dataclass(frozen=True)
class License:
    """
    A license as the Hub's metadata names it.

    Args:
        id: One of the Hub's identifiers (`"apache-2.0"`, `"llama2"`), or `"other"`.
        name: Name of an `"other"` license.
        link: URL of its text, or the name of a file in the repository.

    Raises:
        ValueError: for `"other"` without name and link, and for an identifier that the Hub cannot have.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.lower() or not self.id.replace("-", "").replace(".", "").isalnum():
            raise ValueError(
                f"the license {self.id!r} is not an identifier of the Hub; give one such as apache-2.0, llama2 or "
                "other (https://huggingface.co/docs/hub/repositories-licenses)"
            )
        if self.id == "other" and not (self.name and self.link):
            raise ValueError(
                "the license 'other' needs a name and a link to its text; add --license-name and --license-link"
            )

    @property
    def metadata(self) -> JsonObject:
        fields = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in fields.items() if value}


def derive_license(sources: Sequence[Facts]) -> License:
    """
    The license of a checkpoint, from the recorded licenses of its bases.

    All bases must have a recorded one. A single license of all of them is the result; next to permissive ones (MIT,
    Apache, BSD) a single stricter one covers the combination. Anything else is for a person to decide.

    Raises:
        ValueError: if no license can be derived, with what is known.
    """
    known = [source.get("license") for source in sources]
    ids = {license_id for license_id in known if license_id}
    strict = ids - _PERMISSIVE
    decided = ids if len(ids) == 1 else strict
    if known and all(known) and len(decided) == 1 and decided != {"other"}:
        return License(decided.pop())
    rows = ", ".join(f"{source_name(source)}: {source.get('license') or 'unknown'}" for source in sources)
    raise ValueError(
        f"the license of this checkpoint is unknown ({rows or 'no record of its bases'}); give it with --license, "
        "such as llama2 for LLaMA-2, or other with --license-name and --license-link for the first LLaMA and Vicuna "
        "v0, which are for non-commercial research"
    )


def model_card(
    folder: Path,
    repo_id: str,
    license: License,
    *,
    sources: Sequence[Facts],
    parameters: int,
    dtypes: Sequence[str],
    complete: bool,
    language: Sequence[str] = ("en",),
) -> ModelCard:
    """
    Card of a MiniGPT-4 checkpoint.

    Args:
        folder: The checkpoint, with its records (`run.json`, `results.json`) if it has any.
        repo_id: Where it is published; the examples of the card load it from there.
        license: License of the checkpoint.
        sources: Its bases, see [`read_sources`].
        parameters: Number of stored parameters.
        dtypes: Their types, such as `["BF16", "F32"]`.
        complete: Whether all modules are stored, or only the trained ones.
        language: ISO codes.

    Raises:
        ValueError: if a record cannot be read.
    """
    run, results = read_run(folder), read_facts(folder, RESULTS_FILE)
    evaluations = list(evaluations_of(results, folder / RESULTS_FILE))
    data = run.get("datasets") or []
    bases = hub_ids(sources)
    name = repo_id.split("/")[-1]
    card_data = ModelCardData(
        **license.metadata,
        language=list(language),
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=bases or None,
        base_model_relation=("finetune" if complete else "adapter") if bases else None,
        datasets=hub_ids(data) or None,
        eval_results=[_eval_result(row) for row in evaluations] or None,
        model_name=name if evaluations else None,
        tags=["minigpt4", "vision-language", "image-captioning", "custom_code", f"arxiv:{PAPER}"],
    )
    card: ModelCard = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model_card.md.jinja"),
        name=name,
        repo_id=repo_id,
        license=license,
        task=PIPELINE_TAG,
        paper=PAPER,
        complete=complete,
        parameters=f"{parameters:,}",
        dtypes=", ".join(dtypes),
        modules=_modules(MiniGPT4Config.from_pretrained(folder)),
        sources=[
            table_row(source_name(source), source, "part", "revision", "sha256", "license") for source in sources
        ],
        run=run_facts(run),
        evaluations=evaluations,
    )
    return card


def adapter_card(
    folder: Path,
    repo_id: str,
    license: License,
    *,
    config: Facts,
    sources: Sequence[Facts],
    parameters: int,
    dtypes: Sequence[str],
    language: Sequence[str] = ("en",),
) -> ModelCard:
    """
    Card of a PEFT adapter for a MiniGPT-4 checkpoint.

    Args:
        folder, repo_id, license, parameters, dtypes, language: As for [`model_card`].
        config: Its `adapter_config.json`, as it is published.
        sources: Bases of the checkpoint that it is for, as far as they are known.

    Raises:
        ValueError: if a record cannot be read.
    """
    run, results = read_run(folder), read_facts(folder, RESULTS_FILE)
    evaluations = list(evaluations_of(results, folder / RESULTS_FILE))
    base, kind = str(config["base_model_name_or_path"]), str(config.get("peft_type") or "PEFT")
    name = repo_id.split("/")[-1]
    row = {"part": "base", "id": base, "revision": config.get("revision") or "main"}
    card_data = ModelCardData(
        **license.metadata,
        language=list(language),
        library_name="peft",
        pipeline_tag=PIPELINE_TAG,
        base_model=[base],
        base_model_relation="adapter",
        datasets=hub_ids(run.get("datasets") or []) or None,
        eval_results=[_eval_result(row) for row in evaluations] or None,
        model_name=name if evaluations else None,
        tags=["minigpt4", "vision-language", kind.lower(), f"base_model:adapter:{base}", f"arxiv:{PAPER}"],
    )
    rank = f", rank {config['r']}" if config.get("r") else ""
    complete = [_MODULES.get(module, module) for module in config.get("modules_to_save") or []]
    card: ModelCard = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model_card.md.jinja"),
        name=name,
        repo_id=repo_id,
        license=license,
        task=PIPELINE_TAG,
        paper=PAPER,
        adapter=f"{kind.replace('LORA', 'LoRA')}{rank}",
        adapter_base=base,
        adapter_revision=config.get("revision"),
        adapter_modules=" and the ".join(complete),
        has_processor=(folder / "processor_config.json").is_file(),
        parameters=f"{parameters:,}",
        dtypes=", ".join(dtypes),
        modules=[],
        sources=[
            table_row(source_name(source), source, "part", "revision", "sha256", "license")
            for source in (row, *sources)
        ],
        run=run_facts(run),
        evaluations=evaluations,
    )
    return card


def dataset_card(
    splits: DatasetDict,
    repo_id: str | None,
    license: License | None,
    *,
    record: Facts,
    num_bytes: Mapping[str, int] | None = None,
    download_size: int = 0,
    language: Sequence[str] = ("en",),
    local: str | None = None,
) -> DatasetCard:
    """
    Card of an image-caption dataset: published, with parquet shards named `data/SPLIT-*`, or in a folder.

    Args:
        splits: The dataset.
        repo_id: Where it is published; `None` for one that stays in a folder.
        license: Its license; `None` if that has not been chosen yet.
        record: The `run.json` of the curation, or an empty mapping.
        num_bytes: Size in memory, by split, of a published one.
        download_size: Bytes of all shards of a published one.
        language: ISO codes.
        local: Name of the folder of one that is not published; `cc_sbu_align` for the authors' format.
    """
    rows = {split: len(dataset) for split, dataset in splits.items()}
    features = next(iter(splits.values())).features
    total = sum(rows.values())
    card_data = DatasetCardData(
        **(license.metadata if license is not None else {}),
        language=list(language),
        pretty_name=repo_id.split("/")[-1] if repo_id is not None else local,
        task_categories=["image-to-text", PIPELINE_TAG],
        size_categories=[size_category(total)],
        tags=["minigpt4", "image-captioning", f"arxiv:{PAPER}"],
    )
    if repo_id is not None and num_bytes is not None:
        info = DatasetInfo(
            features=features,
            splits=[{"name": split, "num_bytes": num_bytes[split], "num_examples": rows[split]} for split in rows],
            download_size=download_size,
            dataset_size=sum(num_bytes.values()),
        )
        DatasetInfosDict({"default": info}).to_dataset_card_data(card_data)
        files = [{"split": split, "path": f"data/{split}-*"} for split in rows]
        card_data["configs"] = [{"config_name": "default", "data_files": files}]
    card: DatasetCard = DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "dataset_card.md.jinja"),
        name=card_data["pretty_name"],
        repo_id=repo_id,
        license=license,
        paper=PAPER,
        rows=rows,
        columns={column: _feature_name(feature) for column, feature in features.items()},
        first_split=next(iter(rows)),
        align={"image", "image_id", "caption"} <= set(features),
        local=local,
        run=run_facts(record),
    )
    return card


def size_category(rows: int) -> str:
    """The Hub's tag for a number of rows."""
    return next((name for limit, name in _SIZE_CATEGORIES.items() if rows < limit), "1M<n<10M")


def _feature_name(feature: object) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _modules(config: MiniGPT4Config) -> list[tuple[str, str]]:
    """What each module of the network is, in words; `getattr` because any tower and language model can be there."""

    def words(sub_config: PreTrainedConfig, *fields: tuple[str, str]) -> str:
        numbers = [(getattr(sub_config, key, None), unit) for key, unit in fields]
        known = [f"{number:,} {unit}" for number, unit in numbers if isinstance(number, int)]
        return ", ".join([f"`{sub_config.model_type}`", *known])

    size = (("num_hidden_layers", "layers"), ("hidden_size", "wide"))
    qformer = "none: each 4 neighboring patches are one position"
    if config.qformer_config is not None:
        qformer = f"{words(config.qformer_config, *size)}, {config.num_query_tokens} queries"
    layers = "one linear layer" if config.projector_layers == 1 else f"{config.projector_layers} linear layers"
    return [
        ("vision tower", words(config.vision_config, *size, ("image_size", "pixels"))),
        ("Q-Former", qformer),
        ("projector", f"{layers}, {config.image_seq_length} positions per image"),
        ("language model", words(config.text_config, *size, ("vocab_size", "tokens"))),
    ]


def _eval_result(row: Facts) -> EvalResult:
    return EvalResult(
        task_type=PIPELINE_TAG,
        task_name=row["task"],
        dataset_type=row["dataset"],
        dataset_name=row["task"],
        dataset_split=row["split"],
        dataset_revision=row["revision"],
        metric_type=row["metric"],
        metric_value=row["value"],
    )
