"""Run info in the output folder and its checkpoints: recipe, versions, seeds, data, revision, and the loss curve."""

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset
from datasets.fingerprint import generate_fingerprint
from PIL import Image, ImageDraw
from transformers import TrainerCallback, TrainerState, TrainingArguments
from trl import ModelConfig

from transformers_minigpt4.data.skipped_rows import SkippedRows
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import PathLike, atomic_file, write_atomically
from transformers_minigpt4.utils.versions import CORE_PACKAGES, git_revision, package_versions

from .arguments import StageArguments, StageConfig


logger = logging.getLogger(__name__)
CURVE, EVAL_CURVE, PLOT = "loss.jsonl", "eval_loss.jsonl", "loss.png"
# Settings of the machine rather than of the training, and those that transformers computes from others.
_LOCAL = {"output_dir", "disable_tqdm", "accelerator_config", "debug", "report_to", "pad_to_multiple_of"}
_DERIVED = {
    *("do_eval", "ddp_find_unused_parameters"),
    *("average_tokens_across_devices", "include_num_input_tokens_seen"),
}


def recipe_settings(arguments: Sequence[StageArguments | TrainingArguments | ModelConfig]) -> dict[str, object]:
    """The keys of a recipe and their values, of the dataclasses that it was parsed into; secrets are left out."""
    recipe: dict[str, object] = {}
    for group in arguments:
        values = group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
        recipe.update({key: value for key, value in values.items() if "token" not in key or key.endswith("tokens")})
    return recipe


def run_info(
    recipe: Mapping[str, object],
    dataset: Dataset | IterableDataset,
    trainable: dict[str, int],
    fingerprint: str | None = None,
) -> dict[str, object]:
    """
    Facts that are known before the first step.

    Args:
        recipe (`Mapping[str, object]`): Of [`recipe_settings`].
        dataset (`Dataset` or `IterableDataset`): The rows.
        trainable (`dict[str, int]`): What `prepare_stage` returned.
        fingerprint (`str`, *optional*): Digest of the data; by default computed from `dataset`.
    """
    return {
        "recipe": recipe,
        "changed_settings": changed_settings(recipe),
        "command": sys.argv,
        "seed": recipe.get("seed"),
        "data_seed": recipe.get("data_seed"),
        "versions": package_versions((*CORE_PACKAGES, "pillow")),
        "git_revision": git_revision(),
        "data_fingerprint": data_fingerprint(dataset) if fingerprint is None else fingerprint,
        "trainable_parameters": trainable,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def changed_settings(recipe: Mapping[str, object]) -> dict[str, object]:
    """The settings of [`recipe_settings`] that differ from the defaults of their dataclasses, for page and card."""
    changed = {}
    for group in (StageArguments, StageConfig, ModelConfig):
        for field in dataclasses.fields(group):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = recipe.get(field.name)
            # TrainingArguments puts other values in place of empty ones, and angle brackets in place of tokens.
            is_unset = (not value and (not default or default is dataclasses.MISSING)) or str(value).startswith("<")
            if field.name not in _LOCAL | _DERIVED and value != default and not is_unset:
                changed[field.name] = value
    return changed


def data_fingerprint(dataset: Dataset | IterableDataset) -> str:
    """A hash of a dataset's content, or of the first row of a stream."""
    if isinstance(dataset, Dataset):
        return generate_fingerprint(dataset)
    row = next(iter(dataset))
    shown = {key: str(value) for key, value in row.items() if key not in ("image", "images")}
    shards = getattr(dataset, "num_shards", None)
    return hashlib.sha256(json.dumps([shown, shards], sort_keys=True).encode()).hexdigest()[:16]


class RunInfoCallback(TrainerCallback):
    """
    Writes the run info and the loss curve (JSON Lines and PNG) into the output folder and every checkpoint.

    Args:
        info (`dict`): The result of [`run_info`].
        skipped (`SkippedRows`, *optional*): Counts of rows read and skipped; their current values are added to the
            info whenever it is written, and they are logged at the end.
    """

    def __init__(self, info: dict[str, object], skipped: SkippedRows | None = None) -> None:
        self.info = info
        self.skipped = skipped

    def write(self, folder: PathLike, state: TrainerState) -> None:
        """Writes info and curve into a folder, which is created if it does not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        history = [entry for entry in state.log_history if "loss" in entry]
        evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
        counts = {} if self.skipped is None else {"rows": self.skipped.counts()}
        found = {**self.info, **counts, **_best(state)}
        write_atomically(folder / RUN_FILE, json.dumps(found, indent=1, default=str) + "\n")
        write_atomically(folder / CURVE, "".join(json.dumps(entry) + "\n" for entry in history))
        if evaluated:
            write_atomically(folder / EVAL_CURVE, "".join(json.dumps(entry) + "\n" for entry in evaluated))
        if history:
            with atomic_file(folder / PLOT) as scratch:
                plot_curve([(entry["step"], entry["loss"]) for entry in history]).save(scratch, format="PNG")

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (checkpoint / RUN_FILE).exists() and checkpoint.is_dir():
            self.write(checkpoint, state)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(args.output_dir, state)
            if self.skipped is not None:
                for line in self.skipped.report().splitlines():
                    logger.log(logging.INFO if line.endswith("none skipped") else logging.WARNING, line)


def _best(state: TrainerState) -> dict[str, object]:
    """The checkpoint with the lowest loss on held-out rows, if there were evaluations."""
    if state.best_model_checkpoint is None or state.best_global_step is None:
        return {}
    name = Path(state.best_model_checkpoint).name
    return {"best_checkpoint": {"checkpoint": name, "step": state.best_global_step, "eval_loss": state.best_metric}}


def plot_curve(points: list[tuple[float, float]], size: tuple[int, int] = (720, 360)) -> Image.Image:
    """A line of loss over steps with labeled corners; `size` in pixels."""
    width, height = size
    left, top, right, bottom = 60, 20, width - 20, height - 40
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    finite = [(step, loss) for step, loss in points if loss == loss and abs(loss) != float("inf")]
    pen.rectangle((left, top, right, bottom), outline=(150, 150, 150))
    pen.text((left, 4), "loss", fill="black")
    pen.text((right - 30, bottom + 20), "step", fill="black")
    if not finite:
        return image
    low, high = min(loss for _, loss in finite), max(loss for _, loss in finite)
    first, last = finite[0][0], finite[-1][0]
    line = [
        (
            left + (right - left) * (step - first) / max(last - first, 1),
            bottom - (bottom - top) * (loss - low) / max(high - low, 1e-12),
        )
        for step, loss in finite
    ]
    if len(line) > 1:
        pen.line(line, fill=(30, 90, 200), width=2)
    else:
        x, y = line[0]
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(30, 90, 200))
    for text, position in (
        (f"{high:.3f}", (4, top)),
        (f"{low:.3f}", (4, bottom - 10)),
        (str(first), (left, bottom + 6)),
        (str(last), (right - 40, bottom + 6)),
    ):
        pen.text(position, text, fill="black")
    return image
