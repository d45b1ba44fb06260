"""CHAIR (Table 5 of the MiniGPT-4 paper): objects in descriptions that are not in the image, and their length."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Task, find_file, mean, ratio, read_json
from ..scorers.chair import ObjectWords, hallucinations
from .coco_coverage import CAPTION_FILES, captioned_images


# The paper's own (Table 5).
PROMPTS = {
    "long": "Please describe this image as detailed as possible.",
    "short": "Please describe the image shortly and precisely, in less than 20 words.",
}

# Lists of synonyms by the hash of their text. Every question refers to one, and 4 KB each would be most of the answers
# file.
_LISTS: dict[str, ObjectWords] = {}


def _metrics(length: str) -> tuple[Metric, ...]:
    where = ("length", length)
    chair_i = ratio("hallucinated", "mentioned", scale=100, where=where, share=True)
    return (
        Metric(f"chair_i/{length}", False, "%", chair_i),
        Metric(f"chair_s/{length}", False, "%", mean("has_hallucination", scale=100, where=where)),
        Metric(f"words/{length}", None, "words", mean("words", where=where)),
        Metric(f"mentioned/{length}", None, "objects", mean("mentioned", where=where)),
    )


class CHAIR(Task):
    """
    CHAIR_i (share of the objects named that are not there), CHAIR_s (share of descriptions with such an object).

    What is there: the categories of the image's instances, and what its five captions name. A description that failed
    counts in neither; the results say how many did. Words are what white space separates.
    """

    name = "chair"
    paper = "MiniGPT-4, Table 5"
    description = "hallucinated objects and number of words of long and short descriptions"
    data = "synonyms.txt, captions_val2014.json and instances_val2014.json (also in annotations/), and the images"
    dataset = "coco"
    split = "validation"
    prompts = PROMPTS
    generation = {"max_new_tokens": 300}
    primary = "chair_i/long"
    metrics = (*_metrics("long"), *_metrics("short"))

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Two questions per image, in the order of the ids; val2017 and train2014 work like val2014.

        Raises:
            ValueError: if a file is missing or has another format, captions and instances are from different splits,
                or as [`coco_coverage.captioned_images`].
        """
        images = captioned_images(data, count=10**9)[: None if limit is None else -(-limit // 2)]
        words, there = _ground_truth(data, {key for key, _, _ in images})
        return [
            Question(
                f"{key}/{length}",
                prompt,
                (str(image),),
                {"objects": sorted(there[key]), "synonyms": words.digest},
                {"length": length},
            )
            for key, image, _ in images
            for length, prompt in PROMPTS.items()
        ][:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `mentioned`, `hallucinated`, `has_hallucination` and `words`, with the words themselves; `None` for no answer.

        Raises:
            ValueError: if the questions' list of synonyms has not been read in this process.
        """
        return [_score(question.reference, answers.get(question.id)) for question in questions]


def _ground_truth(data: Path, images: set[int]) -> tuple[ObjectWords, Mapping[int, frozenset[str]]]:
    captions = find_file(data, *CAPTION_FILES)
    instances = captions.with_name(captions.name.replace("captions", "instances", 1))
    if not instances.is_file():
        raise ValueError(
            f"there is no {instances.name!r} next to {str(captions)!r}; CHAIR needs the instances of the same split, "
            "from the same archive"
        )
    folder = captions.parent if captions.parent.name != "annotations" else captions.parent.parent
    synonyms = find_file(folder, "synonyms.txt", "annotations/synonyms.txt")
    words = ObjectWords(synonyms.read_text(encoding="utf-8"))
    boxes, texts = _content(instances, "images", "annotations", "categories"), _content(captions, "annotations")
    try:
        lost = images - {row["id"] for row in boxes["images"]}
        if lost:
            raise ValueError(
                f"{len(lost)} of the {len(images)} images of {captions.name!r} are not in {str(instances)!r}, "
                f"such as {min(lost)}; take captions and instances of the same split"
            )
        boxes["annotations"] = [row for row in boxes["annotations"] if row["image_id"] in images]
        texts["annotations"] = [row for row in texts["annotations"] if row["image_id"] in images]
        there = words.categories_of(boxes, texts)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(instances)!r} is not a COCO instances file ({error!r}); fetch it again") from error
    _LISTS[words.digest] = words
    return words, there


def _content(path: Path, *fields: str) -> JsonObject:
    content = read_json(path)
    missing = [field for field in fields if not isinstance(content, dict) or field not in content]
    if missing:
        raise ValueError(f"{str(path)!r} has no field {missing[0]!r}; give COCO's own file of this name")
    return dict(content)


def _score(reference: JsonObject, answer: str | None) -> Record:
    words = _LISTS.get(reference["synonyms"])
    if words is None:
        raise ValueError(
            "the list of synonyms that these questions were made with has not been read; make them with "
            "CHAIR().questions(data) first"
        )
    if answer is None:
        return {"mentioned": None, "hallucinated": None, "has_hallucination": None, "words": None}
    mentions = words.mentions(answer)
    wrong = hallucinations(mentions, reference["objects"])
    return {
        "mentioned": len(mentions),
        "hallucinated": len(wrong),
        "has_hallucination": int(bool(wrong)),
        "words": len(answer.split()),
        "hallucinated_words": [mention.word for mention in wrong],
    }
