"""Writes `run.html`: one file with a run's curves, sample answers, skipped rows, settings and versions."""

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import TrainerCallback, TrainerState

from transformers_minigpt4.data.images import image_bytes
from transformers_minigpt4.data.schema import Row, row_images
from transformers_minigpt4.data.skipped_rows import KINDS, SkippedRows
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image
from transformers_minigpt4.utils.files import JsonObject, PathLike, write_atomically
from transformers_minigpt4.web.html import is_hidden, thumbnail_url

from .charts import Series, line_chart
from .samples import SampleAnswer, SampleCallback


PAGE = "run.html"
TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 320  # pixels of the longer side; shown at 160


class RunPageCallback(TrainerCallback):
    """
    Writes the page into the output folder at each checkpoint and at the end.

    Args:
        info (`dict`): The result of [`run_info`].
        skipped (`SkippedRows`, *optional*): Counts of rows read and skipped.
        samples (`SampleCallback`, *optional*): Has the sample answers. It must come before this one.
    """

    def __init__(
        self, info: JsonObject, skipped: SkippedRows | None = None, samples: SampleCallback | None = None
    ) -> None:
        self.info, self.skipped, self.samples = info, skipped, samples
        self._images: list[str] | None = None

    def write(self, folder: PathLike, state: TrainerState, status: str) -> None:
        """Writes the page of a run in its present state; `status` says what this is."""
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_shown
        )
        page = environment.get_template("run.html.jinja").render(
            name=Path(folder).resolve().name,
            status=status,
            written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            facts=_facts(self.info, state),
            charts=charts(state),
            samples=list(self._samples()),
            sources=list(_sources(self.skipped)),
            processes=self.info["world_size"],
            settings={key: _text(value) for key, value in self.info["changed_settings"].items()},
            versions={**self.info["versions"], "git revision": self.info["git_revision"]},
            trained=self.info["trainable_parameters"],
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder) / PAGE, page)

    def _samples(self) -> Iterator[JsonObject]:
        if self.samples is None:
            return
        if self._images is None:
            self._images = [_thumbnail(row) for row in self.samples.rows]
        for number, image in enumerate(self._images):
            found = [answer for answer in self.samples.answers if answer["sample"] == number]
            if found:
                yield {**found[0], "thumbnail": image, "answers": list(_runs(found))}

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(args.output_dir, state, f"running, at step {state.global_step:,} of {state.max_steps:,}")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            steps = f"{state.global_step:,}"
            ended = "complete" if state.global_step >= state.max_steps else f"stopped, of {state.max_steps:,}"
            self.write(args.output_dir, state, f"{steps} steps, {ended}")


def charts(state: TrainerState) -> list[JsonObject]:
    """The curves of a run, as far as its log has them."""

    def points(name: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name]) for entry in state.log_history if name in entry]

    loss = [Series("training", points("loss")), Series("evaluation", points("eval_loss"))]
    drawn = (
        line_chart("Loss", "step", "nats per token", loss),
        line_chart("Learning rate", "step", "learning rate", [Series("learning rate", points("learning_rate"))]),
        line_chart("Throughput", "step", "samples per second", [Series("throughput", points("samples_per_second"))]),
    )
    return [chart for chart in drawn if chart is not None]


def _facts(info: JsonObject, state: TrainerState) -> dict[str, str]:
    """What a reader wants to know first."""
    recipe = info["recipe"]
    processes = info["world_size"]
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * processes
    trained = sum(info["trainable_parameters"].values())
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    facts = {
        "model": str(recipe["model_name_or_path"]),
        "trained": f"{trained:,} parameters of {', '.join(recipe['trainable_modules'])}",
        "sources": ", ".join(recipe["sources"]),
        "steps": f"{state.global_step:,} of {state.max_steps:,}, {batch:,} rows each",
        "device": str(info.get("device", "unknown")) + (f", {processes} processes" if processes > 1 else ""),
    }
    if losses:
        facts["training loss"] = f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
    if evaluated:
        loss, step = min(evaluated)
        last = f"{evaluated[-1][0]:.4f} at the end, lowest {loss:.4f} at step {step:,}"
        facts["evaluation loss"] = f"{last}, on {info['evaluation_rows']:,} held-out rows"
    if state.best_model_checkpoint:
        facts["best checkpoint"] = Path(state.best_model_checkpoint).name
    if seconds:
        facts["time"] = str(datetime.timedelta(seconds=round(seconds[-1])))
    return facts


def _runs(answers: list[SampleAnswer]) -> Iterator[JsonObject]:
    """The answers about an image by step; equal ones that follow each other are one."""
    for text, group in itertools.groupby(answers, key=lambda answer: answer["answer"]):
        steps = [answer["step"] for answer in group]
        yield {"steps": f"{steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else ""), "text": text}


def _thumbnail(row: Row) -> str:
    image = row_images(row)[0]
    # A copy, which is shrunk in place.
    return thumbnail_url((load_image(image_bytes(image)) if isinstance(image, dict) else image).copy(), _THUMBNAIL)


def _sources(skipped: SkippedRows | None) -> Iterator[JsonObject]:
    """For each source its rows read, and what was skipped and why."""
    if skipped is None:
        return
    for name, seen in skipped.counts().items():
        kinds = [
            {
                "kind": kind,
                "what": KINDS[kind],
                "count": seen[kind],
                "examples": skipped.examples.get((name, kind), []),
            }
            for kind in KINDS
            if seen[kind]
        ]
        yield {"name": name, "rows": seen["rows"], "kinds": kinds}


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _shown(value: object) -> object:
    """Invisible characters of foreign texts by their code points."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(f"⟨U+{ord(character):04X}⟩" if is_hidden(character) else character for character in value)
