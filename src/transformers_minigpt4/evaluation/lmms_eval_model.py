"""A model for lmms-eval: runs its tasks on MiniGPT-4 or any other image-text-to-text checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from transformers_minigpt4.inference.generation import DEFAULT_MAX_NEW_TOKENS, answer_prompts
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image

from .evaluator import GREEDY


# Settings of an lmms-eval task that `generate` takes; the others are meant for other models.
_GENERATION = ("max_new_tokens", "num_beams", "temperature", "top_p", "do_sample")


class ImageTextToTextModel(lmms):
    """
    Answers lmms-eval's generation tasks: `lmms_eval --model minigpt4 --model_args pretrained=CHECKPOINT --tasks ...`.

    Args:
        pretrained: Folder or Hub id of any image-text-to-text model.
        batch_size: Prompts that go through the model at once.
        device: Such as `"cpu"` or `"cuda:1"`; by default this process's accelerator.
        dtype: As of `inference.loading.load_model_and_processor`.
        trust_remote_code: Whether to run code from the checkpoint.

    Raises:
        ValueError: if the checkpoint cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.batch_size = int(batch_size)
        # lmms-eval's command passes "cuda:0" to each process unless told otherwise.
        one_of_many = self._world_size > 1 or device is None
        self.model, self.processor = load_model_and_processor(
            pretrained, dtype, str(state.device) if one_of_many else device, bool(trust_remote_code)
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """
        Answer prompts about images, in the given order.

        Args:
            requests: With the arguments (text, settings, function from a document to its images, document id, task,
                split) of lmms-eval's simple models.

        Raises:
            ValueError: for media other than images.
        """
        rows = []
        for number, request in enumerate(requests):
            text, settings, to_visual, document, task, split = request.args
            images = _images(to_visual(self.task_dict[task][split][document]), task)
            prompt = text.replace("<image>", "").strip()
            rows.append(_Row(number, prompt, images, _generation(settings), _stop_strings(settings)))

        answers = [""] * len(rows)
        rows.sort(key=lambda row: (row.batch_key, -len(row.prompt)))
        with tqdm(total=len(rows), desc="answering", disable=self._rank != 0) as bar:
            for _, group in groupby(rows, key=lambda row: row.batch_key):
                alike = list(group)
                for start in range(0, len(alike), self.batch_size):
                    batch = alike[start : start + self.batch_size]
                    shown, prompts = [row.images for row in batch], [row.prompt for row in batch]
                    texts = answer_prompts(shown, prompts, self.model, self.processor, **batch[0].generation)
                    for row, text in zip(batch, texts):
                        answers[row.number] = answer = _cut(text, row.stop_strings)
                        self.cache_hook.add_partial("generate_until", requests[row.number].args[:2], answer)
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """
        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "tasks scored by log-likelihood are not supported; choose one that generates answers"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """
        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("multi-round tasks are not supported; choose one that asks once per document")


@dataclass(frozen=True)
class _Row:
    """One request: its place among the others, what to ask, and how."""

    number: int
    prompt: str
    images: list[Image.Image]
    generation: dict[str, object]
    stop_strings: list[str]

    @property
    def batch_key(self) -> tuple[int, str]:
        """Rows may share a batch if they have the same number of images and the same settings."""
        return len(self.images), str(sorted(self.generation.items()))


def _images(visuals: Iterable[object] | None, task: str) -> list[Image.Image]:
    images = []
    for visual in visuals or ():
        if not isinstance(visual, Image.Image):
            raise ValueError(f"the task {task} has a {type(visual).__name__}, but the model takes only images")
        images.append(load_image(visual))
    return images


def _generation(settings: Mapping[str, Any]) -> dict[str, object]:
    """The task's settings as `generate` takes them, greedy unless it asks for a temperature."""
    chosen = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
    chosen.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    if chosen.get("temperature", 0) > 0 and chosen.get("do_sample", True):
        return {**chosen, "do_sample": True}
    return {**GREEDY, **{name: chosen[name] for name in ("max_new_tokens", "num_beams") if name in chosen}}


def _stop_strings(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The answer up to the first stop string."""
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()
