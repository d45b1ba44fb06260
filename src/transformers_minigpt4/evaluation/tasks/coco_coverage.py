"""Table 2 of the MiniGPT-4 paper: whether a text covers the objects and relations of the ground-truth captions."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel

from ..evaluator import Metric, Question, Record, Task, find_file, mean, read_json
from ..judging import YES_NO, judge_all, need_judge
from ..scorers.official_files import find_images


PROMPT = "Describe this image in detail."
# The authors' own words (appendix A.3, "Details of Caption Evaluation").
JUDGE_PROMPT = (
    "There is one image caption1 '{caption}', and there is another image caption2 '{answer}'. Does image caption2 "
    "cover all the objects and visual relations shown in image caption1? Only answer yes or no without any "
    "explanation."
)
IMAGES = 5000  # of Table 2
IMAGE_FOLDERS = ("images", "val2014", "val2017", "train2014", "train2017", ".")
# COCO's own archive holds both train and val; the papers' tables are on val.
CAPTION_FILES = (
    *("captions_val*.json", "annotations/captions_val*.json"),
    *("captions_*.json", "annotations/captions_*.json", "captions.json"),
)
SEED = 0  # draws the images and, for each, the one caption of the yes/no figure


class CocoCoverage(Task):
    """
    The share of images whose text covers a ground-truth caption, and how many of its captions it covers.

    The judge is asked the authors' question about every caption of an image. `covered` is the answer for one caption
    drawn at random, as in the paper's first version (66.2 %); `captions_covered` counts all of them, as in its later
    one (2.22 of 5).
    """

    name = "coco_coverage"
    paper = "MiniGPT-4, Table 2"
    description = "ground-truth captions whose objects and relations the text covers, by a judge"
    data = "captions_val2014.json or captions_val2017.json (also in annotations/), and the images"
    dataset = "coco captions"
    split = "validation"
    prompts = {"describe": PROMPT}
    judge_prompts = {"covers": JUDGE_PROMPT}
    generation = {"max_new_tokens": 300}
    primary = "covered"
    metrics = (
        Metric("covered", True, "%", mean("covered", scale=100)),
        Metric("captions_covered", True, "captions", mean("captions_covered")),
        Metric("captions", None, "captions", mean("captions")),
        Metric("words", None, "words", mean("words")),
        Metric("unreadable", None, "%", mean("unreadable", scale=100)),
    )
    needs_judge = True

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        One question per image; of more than 5,000 images, 5,000 are drawn at random with seed 0.

        Raises:
            ValueError: as [`captioned_images`].
        """
        return [
            Question(str(key), PROMPT, (str(image),), {"captions": captions, "drawn": _draw(key, len(captions))})
            for key, image, captions in captioned_images(data, IMAGES)[:limit]
        ]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `covered` and `captions_covered`; a question without an answer covers nothing.

        If the judge was unreadable about a caption, the image has no `captions_covered`; if that is the drawn one, no
        `covered`.

        Raises:
            ValueError: without a judge.
            JudgeStopped: as [`judging.judge_all`].
        """
        judge = need_judge(judge, self.name)
        prompts = [
            ((question.id, number), JUDGE_PROMPT.format(caption=caption, answer=answers[question.id]))
            for question in questions
            if question.id in answers
            for number, caption in enumerate(question.reference["captions"])
        ]
        verdicts = judge_all(judge, prompts, YES_NO)
        records: list[Record] = []
        for question in questions:
            captions = len(question.reference["captions"])
            record: Record = {"covered": 0, "captions_covered": 0, "captions": captions}
            if question.id in answers:
                values = [verdicts[question.id, number].value for number in range(captions)]
                drawn = values[question.reference["drawn"]]
                record |= {
                    "covered": None if drawn is None else int(drawn),
                    "captions_covered": None if None in values else sum(map(bool, values)),
                    "words": len(answers[question.id].split()),
                    "unreadable": values.count(None) / captions,
                    "judge": [verdicts[question.id, number].text for number in range(captions)],
                }
            records.append(record)
        return records


def _draw(key: int, captions: int) -> int:
    return random.Random(f"{SEED} {key}").randrange(captions)


def captioned_images(data: Path, count: int) -> list[tuple[int, Path, list[str]]]:
    """
    Images of a COCO captions file with their captions, by id, at most `count`, drawn at random with seed 0.

    Args:
        data: The captions file, or a folder that holds it, itself or in `annotations/` (that of val if there are
            several). Images are looked for in its [`IMAGE_FOLDERS`].
        count: How many.

    Returns:
        Image id, path and captions, in the order of the ids.

    Raises:
        ValueError: if the file is missing or has another format, an id is repeated, or none of the images is there.
    """
    path = find_file(data, *CAPTION_FILES)
    files, captions = _read(path)
    chosen = sorted(captions)
    if len(chosen) > count:
        chosen = sorted(random.Random(SEED).sample(chosen, count))
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    images = find_images(root, IMAGE_FOLDERS, [files[key] for key in chosen], path)
    return [(key, Path(images[files[key]]), captions[key]) for key in chosen]


def _read(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File names and captions by image id."""
    content = read_json(path)
    files: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    try:
        for image in content["images"]:
            if image["id"] in files:
                raise ValueError(f"{str(path)!r} has the image id {image['id']} twice; fetch the file again")
            files[image["id"]] = image["file_name"]
        for annotation in content["annotations"]:
            if "caption" not in annotation or annotation["image_id"] not in files:
                raise ValueError(
                    f"{str(path)!r} has the annotation {str(annotation)[:80]}, which is not a caption of one of its "
                    "images; give the captions file, not the instances"
                )
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a COCO captions file ({error!r}); fetch it again") from error
    return files, captions
