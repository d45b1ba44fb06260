"""Sample answers: what the model writes about a few fixed images at each checkpoint."""

import contextlib
import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypedDict, cast

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from transformers_minigpt4.data.schema import IMAGE_PLACEHOLDER, Row
from transformers_minigpt4.inference.generation import decode_answers, generate_ids
from transformers_minigpt4.utils.families import family_of
from transformers_minigpt4.utils.files import to_json, write_atomically
from transformers_minigpt4.utils.json_files import json_lines
from transformers_minigpt4.utils.models import GenerativeModel
from transformers_minigpt4.utils.text import first_line

from .collator import IGNORED, Batch, Collator
from .features import encoder_outputs
from .held_out import HeldOutRows


logger = logging.getLogger(__name__)
SAMPLES_FILE = "samples.jsonl"
LONGEST = 300  # new tokens of a sample answer, for recipes that do not limit answers


class SampleAnswer(TypedDict):
    """One line of `samples.jsonl`: what the model wrote about an image after so many steps."""

    step: int
    sample: int
    image: str
    prompt: str
    caption: str | None
    answer: str


class SampleCallback(TrainerCallback):
    """
    Asks the model about each sample before the first step and at each checkpoint, and keeps the answers.

    One process answers, while the others wait at the next step. Answers are greedy, so no random number is drawn, and
    a run takes the same steps as one without samples.

    Args:
        held_out (`HeldOutRows`): Whose `samples` have one image each.
        collator (`Callable`): Collates them without packing; see `collator.make_collator`.
        processor (`ProcessorMixin`): The model's.
        max_new_tokens (`int`): Of an answer.
        context (`Callable`): Makes the context in which the trainer computes its loss.
    """

    def __init__(
        self,
        held_out: HeldOutRows,
        collator: Collator,
        processor: ProcessorMixin,
        max_new_tokens: int | None = None,
        context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.rows, self.captions_known = held_out.samples, held_out.captions_known
        self.collator, self.processor, self.context = collator, processor, context
        self.max_new_tokens = max_new_tokens or LONGEST
        self.answers: list[SampleAnswer] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            self.answers = []
            if state.global_step:
                found = read_answers(Path(args.output_dir) / SAMPLES_FILE)
                self.answers = [answer for answer in found if answer["step"] <= state.global_step]
            else:
                self._take(Path(args.output_dir), 0, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            self._take(Path(args.output_dir), state.global_step, model)

    def _take(self, folder: Path, step: int, model: PreTrainedModel | PeftModel) -> None:
        try:
            found = self._answer(step, model)
        except torch.OutOfMemoryError as error:  # not worth a run
            logger.warning("no sample answers at step %d: %s", step, first_line(error))
            return
        self.answers = [answer for answer in self.answers if answer["step"] != step] + found
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SAMPLES_FILE, "".join(to_json(answer) + "\n" for answer in self.answers))

    def _answer(self, step: int, model: PreTrainedModel | PeftModel) -> list[SampleAnswer]:
        unwrapped = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        config = copy.deepcopy(unwrapped.generation_config)
        config.update(do_sample=False, num_beams=1, num_return_sequences=1, use_cache=True)
        # Neutral values: in place of None, `generate` would take the model's own, and warn of them.
        config.update(temperature=1.0, top_p=1.0, top_k=50, max_length=None, max_new_tokens=self.max_new_tokens)
        known = config.eos_token_id
        ends = known if isinstance(known, list) else [known] if known is not None else []
        training = model.training
        model.eval()
        found: list[SampleAnswer] = []
        try:
            for number, row in enumerate(self.rows):
                prompt, answer = self._question(row, unwrapped)
                batch = send_to_device(prompt, unwrapped.device)
                config.eos_token_id = [*ends, *self._line_end(row, answer)]
                with torch.no_grad(), self.context():
                    if "image_features" in batch:
                        features = batch.pop("image_features")
                        batch["mm_encoder_outputs"] = encoder_outputs(unwrapped.base_model, features)
                    ids = generate_ids(cast(GenerativeModel, unwrapped), batch, generation_config=config)
                found.append(
                    {
                        "step": step,
                        "sample": number,
                        "image": str(row.get("key", f"image {number + 1}")),
                        "prompt": self._text(prompt["input_ids"]),
                        "caption": decode_answers(self.processor, answer)[0] if self.captions_known else None,
                        "answer": decode_answers(self.processor, ids)[0],
                    }
                )
        finally:
            model.train(training)
        return found

    def _question(self, row: Row, model: PreTrainedModel) -> tuple[Batch, torch.Tensor]:
        """A batch that ends where the row's first answer begins, and the ids of that answer, `(1, length)`."""
        batch = dict(self.collator([row]))
        labels = batch.pop("labels")
        learned = (labels[0] != IGNORED).nonzero()[:, 0].tolist()
        start = learned[0]
        if opening := getattr(self.processor, "answer_opening", ""):  # of LLaVA's v0, which learns it
            decode, ids = self.processor.tokenizer.decode, batch["input_ids"][0]
            start = next((place + 1 for place in learned if decode(ids[: place + 1]).endswith(opening)), start)
        end = next((place for place in range(start, len(labels[0])) if labels[0, place] == IGNORED), len(labels[0]))
        if not family_of(model.config).encoder_decoder:
            batch["input_ids"] = batch["input_ids"][:, :start]
            batch["attention_mask"] = batch["attention_mask"][:, :start]
        return batch, labels[:, start:end]

    def _line_end(self, row: Row, answer: torch.Tensor) -> list[int]:
        """The token that ends a caption of stage 1, which no generation config names."""
        last = int(answer[0, -1])
        is_line = row.get("completion", "").endswith("\n")
        is_line = is_line or getattr(self.processor, "prompt_format", None) == "llava_plain"
        ends = is_line and not self.processor.tokenizer.decode([last]).strip()
        return [last] if ends else []

    def _text(self, ids: torch.Tensor) -> str:
        """A prompt as people write it: one placeholder for each image, and no other special tokens."""
        tokenizer = self.processor.tokenizer
        image = tokenizer.convert_tokens_to_ids(str(getattr(self.processor, "image_token", IMAGE_PLACEHOLDER)))
        kept = [number for number in ids[0].tolist() if number != image]
        return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()


def read_answers(path: Path) -> list[SampleAnswer]:
    """The answers that a run has kept, none if there is no such file; damaged lines are not worth a run."""
    if not path.is_file():
        return []
    return [cast(SampleAnswer, answer) for _, answer in json_lines(path) if isinstance(answer, dict)]
