"""What a run was, beside its checkpoints: resolved recipe, versions, seeds, data, revision, and its loss curve."""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from transformers import TrainerCallback

from transformers_minigpt4.data.skipped_rows import Problems
from transformers_minigpt4.utils.file_names import RUN_FILE


logger = logging.getLogger(__name__)
CURVE, PLOT = "loss.jsonl", "loss.png"
_PACKAGES = (
    *("transformers_minigpt4", "torch", "transformers", "trl", "peft", "datasets", "accelerate"),
    *("safetensors", "tokenizers", "pillow"),
)


def run_info(arguments: list[Any], dataset: Any, trainable: dict[str, int]) -> dict[str, Any]:
    """
    Facts that are known before the first step.

    Args:
        arguments (`list`): The dataclasses that a recipe was parsed into; secrets are left out.
        dataset: The rows.
        trainable (`dict[str, int]`): What `prepare_stage` returned.
    """
    recipe: dict[str, Any] = {}
    for group in arguments:
        values = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        recipe.update({key: value for key, value in values.items() if "token" not in key or key.endswith("tokens")})
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "recipe": recipe,
        "command": sys.argv,
        "seed": recipe.get("seed"),
        "data_seed": recipe.get("data_seed"),
        "versions": versions,
        "git_revision": git_revision(),
        "data_fingerprint": data_fingerprint(dataset),
        "trainable_parameters": trainable,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def git_revision() -> str | None:
    """Commit of the working folder, with `+changes` where it has any; `None` outside of git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def data_fingerprint(dataset: Any) -> str:
    """The data set's own fingerprint where it has one, else a hash of its description and first row."""
    own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if isinstance(own, str):
        return own
    row = next(iter(dataset))
    shown = {key: str(value) for key, value in row.items() if key not in ("image", "images")}
    shards = getattr(dataset, "num_shards", None)
    return hashlib.sha256(json.dumps([shown, shards], sort_keys=True).encode()).hexdigest()[:16]


class RunInfoCallback(TrainerCallback):
    """
    Writes the record and the loss curve (JSON Lines and PNG) into the output folder and every checkpoint.

    Args:
        record (`dict`): What [`run_info`] gave.
        problems (`Problems`, *optional*): Counts of rows read and skipped; they join the record as they stand when it
            is written, and are told at the end.
    """

    def __init__(self, record: dict[str, Any], problems: Problems | None = None):
        self.record = record
        self.problems = problems

    def write(self, folder: str | os.PathLike, state: Any) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        history = [entry for entry in state.log_history if "loss" in entry]
        counts = {} if self.problems is None else {"rows": self.problems.counts()}
        _replace(folder / RUN_FILE, (json.dumps({**self.record, **counts}, indent=1, default=str) + "\n").encode())
        _replace(folder / CURVE, "".join(json.dumps(entry) + "\n" for entry in history).encode())
        if history:
            scratch = folder / f".{PLOT}"
            plot_curve([(entry["step"], entry["loss"]) for entry in history]).save(scratch, format="PNG")
            os.replace(scratch, folder / PLOT)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (checkpoint / RUN_FILE).exists() and checkpoint.is_dir():
            self.write(checkpoint, state)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(args.output_dir, state)
            if self.problems is not None:
                for line in self.problems.report().splitlines():
                    logger.log(logging.INFO if line.endswith("none skipped") else logging.WARNING, line)


def plot_curve(points: list[tuple[int, float]], size: tuple[int, int] = (720, 360)) -> Image.Image:
    """A line of loss over steps with labelled corners."""
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
    place = lambda step, loss: (  # noqa: E731
        left + (right - left) * (step - first) / max(last - first, 1),
        bottom - (bottom - top) * (loss - low) / max(high - low, 1e-12),
    )
    line = [place(*point) for point in finite]
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


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    os.replace(scratch, path)
