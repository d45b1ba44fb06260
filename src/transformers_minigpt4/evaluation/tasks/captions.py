"""COCO captions: CIDEr, BLEU, METEOR and SPICE against the captions that people wrote."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel

from ..evaluator import Metric, Question, Record, Task, mean, of_sums
from ..scorers import caption_metrics
from ..scorers.caption_metrics import BLEU_COLUMNS, METEOR_COLUMNS
from .coco_coverage import captioned_images


logger = logging.getLogger(__name__)

# Ours; the papers name none.
PROMPT = "Describe this image in one short sentence."


class Captions(Task):
    """
    The standard metrics, by pycocoevalcap.

    Nothing can be scored without Java and that package, which is checked before a model is asked. SPICE needs models
    that the package does not contain; without them it has no value, and a warning says why. A caption that failed
    scores nothing, with the length 0.
    """

    name = "captions"
    paper = "COCO captions"
    description = "CIDEr, BLEU, METEOR and SPICE of short captions"
    data = "captions_val2014.json or captions_val2017.json (also in annotations/), and the images"
    dataset = "coco captions"
    split = "validation"
    prompts = {"caption": PROMPT}
    generation = {"max_new_tokens": 50}
    primary = "cider"
    metrics = (
        Metric("cider", True, "points", mean("cider", scale=100)),
        *(
            Metric(f"bleu_{n}", True, "points", of_sums(partial(caption_metrics.bleu, n), *BLEU_COLUMNS, scale=100))
            for n in range(1, 5)
        ),
        Metric("meteor", True, "points", of_sums(caption_metrics.meteor, *METEOR_COLUMNS, scale=100)),
        Metric("spice", True, "points", mean("spice", scale=100)),
        Metric("words", None, "words", mean("words")),
    )

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        One question per image of a COCO captions file, by id.

        Raises:
            ValueError: if the tools are missing, or as [`coco_coverage.captioned_images`].
        """
        _need_tools()
        return [
            Question(str(key), PROMPT, (str(image),), {"captions": captions})
            for key, image, captions in captioned_images(data, count=10**9)[:limit]
        ]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `cider`, `spice` (if it can run), and the sums that BLEU and METEOR are made of.

        Raises:
            ValueError: if the tools are missing.
            OSError: if one of the Java programs stops.
        """
        missing = _need_tools()
        texts = {q.id: [answers.get(q.id, ""), *q.reference["captions"]] for q in questions}
        tokenized = caption_metrics.tokenized(texts)
        captions = {key: group[0] for key, group in tokenized.items()}
        references = {key: group[1:] for key, group in tokenized.items()}
        cider = caption_metrics.cider_scores(captions, references)
        meteor = caption_metrics.meteor_sums(captions, references)
        spice = _spice(captions, references, missing)
        return [
            {
                "cider": cider[key],
                "spice": spice[key],
                "words": len(answers[key].split()) if key in answers else None,
                **caption_metrics.bleu_sums(captions[key], references[key]),
                **meteor[key],
                "tokenized": captions[key],
            }
            for key in captions
        ]


def _spice(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], missing: Mapping[str, str]
) -> Mapping[str, float | None]:
    """SPICE if it can run; else no values, and a warning. The other metrics do not need it."""
    reason = missing.get("spice")
    if reason is None:
        try:
            return caption_metrics.spice_scores(captions, references)
        except OSError as error:
            reason = str(error)
    logger.warning(reason)
    return dict.fromkeys(captions)


def _need_tools() -> dict[str, str]:
    missing = caption_metrics.missing_tools()
    if "all" in missing:
        raise ValueError(f"captions cannot be scored here: {missing['all']}")
    return missing
