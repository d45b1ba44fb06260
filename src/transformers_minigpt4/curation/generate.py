"""Describes sampled images with a checkpoint, in batches that are recorded one by one."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from transformers_minigpt4.inference.engines import EngineName
from transformers_minigpt4.inference.loading import load_engine
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image

from .config import CurationConfig, settings_hash
from .progress import bar
from .records import FAILED, Result, Work
from .sampling import Sampled, sample_images
from .store import Project
from .turns import TurnEngine, describe_in_turns


_MOST_AT_ONCE = 128  # decoded images in memory, with an engine that works on more requests at once


@dataclass(frozen=True)
class Generated:
    """What `run_generate` did."""

    sampled: Sampled
    described: int
    continued: int
    failed: int

    def __str__(self) -> str:
        text = f"{self.sampled}\n{self.described:,} described, {self.continued:,} of them in two turns"
        return text + (f"; {self.failed:,} failed, see `minigpt4 curate status`" if self.failed else "")


def run_generate(
    project: Project, config: CurationConfig, progress: bool = True, engine: EngineName = "transformers"
) -> Generated:
    """
    Samples images and describes those that have no description yet, or one by other settings.

    Each batch is recorded when it is done; an interrupted run resumes with the batch that it was working on. An image
    whose file is missing or unreadable is recorded as failed, and tried again by the next run.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show bars on a terminal.
        engine: What runs the model. vLLM chooses by itself how many images it works on.

    Raises:
        CurationError: for a project that another process works on, or an unsuitable source or checkpoint.
        DataError: for a source that cannot be opened.
        ValueError: for a checkpoint that cannot be loaded.
    """
    with project.writer("generate"):
        sampled = sample_images(project, config, progress)
        settings = generate_settings(config)
        waiting = sum(1 for _ in project.pending("generate", settings))
        if not waiting:
            return Generated(sampled, 0, 0, 0)
        loaded = load_engine(
            engine,
            config.checkpoint,
            batch_size=config.batch_size if engine == "transformers" else None,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
        size = min(loaded.batch_size, max(config.batch_size, _MOST_AT_ONCE))
        described = continued = failed = 0
        with bar("generate", waiting, shown=progress) as count:
            for works in _batches(project.pending("generate", settings), size):
                results = _describe_works(project, works, loaded, config, settings)
                project.record("generate", results)
                described += sum(result.outcome == "ok" for result in results)
                continued += sum(len(result.details.get("turns", ())) > 1 for result in results)
                failed += sum(result.outcome == FAILED for result in results)
                count(len(results))
        return Generated(sampled, described, continued, failed)


def generate_settings(config: CurationConfig) -> str:
    """The digest of what a description depends on, including the weights of a checkpoint in a folder."""
    return settings_hash(
        config.checkpoint,
        _weights_digest(Path(config.checkpoint)),
        config.dtype,
        config.prompt,
        config.continue_prompt,
        config.continue_below,
        config.max_new_tokens,
        config.seed if config.do_sample else None,
    )


def _weights_digest(folder: Path) -> list[str]:
    """Of a folder, since a retrained checkpoint in the same place is another one. It takes less time than loading."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def _batches(works: Iterator[Work], size: int) -> Iterator[list[Work]]:
    while batch := list(islice(works, size)):
        yield batch


def _describe_works(
    project: Project,
    works: list[Work],
    engine: TurnEngine,
    config: CurationConfig,
    settings: str,
) -> list[Result]:
    results, images, readable = [], [], []
    for work in works:
        path = project.image_path(work.pair)
        try:
            images.append(load_image(path))
            readable.append(work)
        except ImageLoadError as error:
            reason = "unreadable image" if path.exists() else "missing image"
            results.append(Result(work.pair.id, settings, work.input, FAILED, reason, details={"error": str(error)}))
    if not images:
        return results
    if config.do_sample:
        # Sampled answers depend only on the seed and the batch, not on how often the run was stopped.
        torch.manual_seed(config.seed * 1_000_003 + readable[0].pair.id)
    for work, found in zip(readable, describe_in_turns(images, engine, config)):
        details = {"turns": list(found.turns), "tokens": list(found.tokens)}
        outcome, reason = ("ok", "") if found.text else (FAILED, "empty answer")
        results.append(Result(work.pair.id, settings, work.input, outcome, reason, found.text, details))
    return results
