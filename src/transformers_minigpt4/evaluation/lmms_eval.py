"""A model of lmms-eval: its tasks on MiniGPT-4 or any other image-text-to-text checkpoint (needs `lmms-eval`)."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from transformers_minigpt4.inference.generation import DEFAULT_MAX_NEW_TOKENS, answer_prompts
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image

from .evaluator import GREEDY


# What a task of lmms-eval may set and `generate` takes; the rest of its settings are other programs' own.
_GENERATION = ("max_new_tokens", "num_beams", "temperature", "top_p", "do_sample")


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives: the name `minigpt4` stands for [`ImageTextToTextModel`]."""
    return ModelManifest(model_id="minigpt4", simple_class_path=f"{__name__}.ImageTextToTextModel")


class ImageTextToTextModel(lmms):
    """
    Answers lmms-eval's generation tasks: `lmms_eval --model minigpt4 --model_args pretrained=CHECKPOINT --tasks ...`.

    Args:
        pretrained: Folder or Hub id of any image-text-to-text model.
        batch_size: Prompts that go through the model at once.
        device: Such as `"cpu"` or `"cuda:1"`; by default this process's accelerator.
        dtype: As of `describe.load_model_and_processor`.
        trust_remote_code: Whether code in the checkpoint may run.

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
        from accelerate import PartialState

        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.batch_size = int(batch_size)
        # lmms-eval's command passes "cuda:0" for each process unless told otherwise.
        one_of_many = self._world_size > 1 or device is None
        self.model, self.processor = load_model_and_processor(
            pretrained, dtype, str(state.device) if one_of_many else device, bool(trust_remote_code)
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """
        Answer prompts about pictures, in the order given.

        Args:
            requests: With the arguments (text, settings, function from a document to its pictures, document id, task,
                split) of lmms-eval's simple models.

        Raises:
            ValueError: for media other than pictures.
        """
        rows = []
        for number, request in enumerate(requests):
            text, settings, to_visual, document, task, split = request.args
            images = _images(to_visual(self.task_dict[task][split][document]), task)
            rows.append((number, text.replace("<image>", "").strip(), _generation(settings), _stops(settings), images))

        answers = [""] * len(rows)
        rows.sort(key=lambda row: (_batch_key(row), -len(row[1])))
        with tqdm(total=len(rows), desc="answering", disable=self._rank != 0) as bar:
            for _, group in groupby(rows, key=_batch_key):
                alike = list(group)
                for start in range(0, len(alike), self.batch_size):
                    batch = alike[start : start + self.batch_size]
                    texts = answer_prompts(
                        [row[4] for row in batch], [row[1] for row in batch], self.model, self.processor, **batch[0][2]
                    )
                    for (number, _, _, stops, _), text in zip(batch, texts):
                        answers[number] = _cut(text, stops)
                        self.cache_hook.add_partial("generate_until", requests[number].args[:2], answers[number])
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
        raise NotImplementedError("tasks of several rounds are not supported; choose one that asks once a document")


def _batch_key(row: tuple[Any, ...]) -> tuple[int, str]:
    """Rows may share a batch when they have equally many pictures and the same settings."""
    return len(row[4]), str(sorted(row[2].items()))


def _images(visuals: Any, task: str) -> list[Any]:
    visuals = visuals or []
    for visual in visuals:
        if not hasattr(visual, "convert"):
            raise ValueError(f"the task {task} holds a {type(visual).__name__}, but the model takes pictures alone")
    return [load_image(visual) for visual in visuals]


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The task's settings as `generate` takes them, greedy unless it asks for a temperature."""
    chosen = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
    chosen.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    if chosen.get("temperature", 0) > 0 and chosen.get("do_sample", True):
        return {**chosen, "do_sample": True}
    return {**GREEDY, **{name: chosen[name] for name in ("max_new_tokens", "num_beams") if name in chosen}}


def _stops(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()
