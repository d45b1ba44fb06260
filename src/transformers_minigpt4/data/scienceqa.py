"""ScienceQA's official release: its problems, and the questions and answers that LLaVA was trained and tested on."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers_minigpt4.utils.files import JsonObject, write_json
from transformers_minigpt4.utils.json_files import brief, open_regular, parse_json

from .schema import DataError


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What a format's two halves stand for: Question, Context, Multiple options; Lecture, Explanation, Answer. The words
# and their order are those of LLaVA's converter (haotian-liu/LLaVA, c121f04, Apache-2.0), which the released models
# were trained with; there "AL" has the solution and "AE" the lecture.
QUESTION_FORMATS = {
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}",
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}",
}
ANSWER_FORMATS = {
    "LEA": "Answer: {lecture} {solution} The answer is {letter}.",
    "LEPA": "###\nANSWER: {letter}.",  # after a LECTURE and a SOLUTION, where there are any
    "A": "Answer: The answer is {letter}.",
    "ALE": "Answer: The answer is {letter}. BECAUSE: {lecture} {solution}",
    "AL": "Answer: The answer is {letter}. BECAUSE: {solution}",
    "AE": "Answer: The answer is {letter}. BECAUSE: {lecture}",
    "EA": "Answer: {solution} The answer is {letter}.",
    "LA": "Answer: {lecture} The answer is {letter}.",
}
FORMATS = tuple(f"{question}-{answer}" for question in QUESTION_FORMATS for answer in ANSWER_FORMATS)
REASONING_FIRST = "QCM-LEA"

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "question": str,
    "choices": list,
    "answer": int,
    "hint": str,
    "image": (str, type(None)),
    "subject": str,
    "grade": str,
}
_TEXTS = ("lecture", "solution")


def read_split(problems_file: Path, split: str) -> dict[str, JsonObject]:
    """
    The problems of a split, in the order of `pid_splits.json`.

    Args:
        problems_file: `problems.json`, with `pid_splits.json` in the same folder.
        split: Such as `"train"` or `"test"`.

    Returns:
        Problems by id.

    Raises:
        DataError: if a file is missing or has another format, there is no such split, or one of its ids occurs twice
            or is not among the problems.
    """
    problems, splits = _object(problems_file), _object(problems_file.parent / "pid_splits.json")
    chosen = splits.get(split)
    if not isinstance(chosen, list):
        raise DataError(
            f"{str(problems_file.parent / 'pid_splits.json')!r} has no split {split!r}, only "
            f"{', '.join(splits) or 'none'}; name one of these, or fetch it again"
        )
    lost = [pid for pid in chosen if not isinstance(pid, str) or pid not in problems]
    if lost:
        raise DataError(
            f"{len(lost)} of the {len(chosen)} ids of the split {split!r} are not in {str(problems_file)!r}, such as "
            f"{lost[0]!r}; take both files from the same release"
        )
    twice = [pid for pid, count in Counter(chosen).items() if count > 1]
    if twice:
        raise DataError(f"the split {split!r} holds the id {twice[0]!r} twice; fetch pid_splits.json again")
    return {pid: _checked(problems_file, pid, problems[pid]) for pid in chosen}


def find_problems(data: Path) -> Path:
    """
    `problems.json` of a release, given the file, its folder or the folder of the official repository.

    Raises:
        DataError: if there is none.
    """
    for path in (data, data / "problems.json", data / "data" / "scienceqa" / "problems.json"):
        if path.is_file():
            return path
    raise DataError(f"{str(data)!r} holds no problems.json; give the folder of ScienceQA's release")


def context(problem: JsonObject) -> str:
    """The hint of a problem, or `N/A`."""
    return str(problem["hint"]).strip() or "N/A"


def question_text(problem: JsonObject, question_format: str = "QCM") -> str:
    """A problem's question, context and options in one of [`QUESTION_FORMATS`]."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"]))
    return _cleaned(
        QUESTION_FORMATS[question_format].format(
            question=problem["question"], context=context(problem), options=options
        )
    )


def answer_text(problem: JsonObject, answer_format: str, escaped: bool = False) -> str:
    r"""
    A problem's answer in one of [`ANSWER_FORMATS`].

    Args:
        problem: With `lecture` and `solution`, which may be empty.
        answer_format: Its name.
        escaped: Whether line breaks in lecture and solution are written as `\n`, as in GPT-4's examples.
    """
    texts = {name: str(problem.get(name, "")) for name in _TEXTS}
    texts = {name: text.replace("\n", "\\n") if escaped else text.replace("\\n", "\n") for name, text in texts.items()}
    answer = ANSWER_FORMATS[answer_format].format(letter=LETTERS[problem["answer"]], **texts)
    if answer_format == "LEPA":
        answer = "".join(f"{name.upper()}: {texts[name]}\n" for name in _TEXTS if texts[name].strip()) + answer
    answer = _cleaned(answer)
    return answer.replace("BECAUSE:", "").strip() if answer.endswith("BECAUSE:") else answer


def training_question(problem: JsonObject, question_format: str = "QCM") -> str:
    """What a model is asked: the question text without the word `Question:` in front."""
    return _without("Question: ", question_text(problem, question_format))


def training_row(pid: str, problem: JsonObject, prompt_format: str = REASONING_FIRST) -> JsonObject:
    """
    A row in LLaVA's data format: one turn, with the image's placeholder after the question.

    Args:
        pid: The problem's id.
        problem: One of [`read_split`].
        prompt_format: One of [`FORMATS`].
    """
    question_format, _, answer_format = prompt_format.partition("-")
    question = training_question(problem, question_format)
    answer = _without("Answer: ", answer_text(problem, answer_format))
    image = problem["image"]
    turns = [
        {"from": "human", "value": f"{question}\n<image>" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": pid, **({"image": f"{pid}/{image}"} if image else {}), "conversations": turns}


class Converted(NamedTuple):
    """What [`write_training_rows`] has written: all rows, those with an image, and ids left out without theirs."""

    rows: int
    with_image: int
    images: Path | None
    missing: list[str]


def write_training_rows(
    data: Path, output: Path, split: str = "train", prompt_format: str = REASONING_FIRST
) -> Converted:
    """
    Write a split as LLaVA's training rows, in one step.

    Args:
        data: The release: `problems.json`, `pid_splits.json` and the images in one of [`image_folders`].
        output: JSON file, a list of [`training_row`].
        split: Of `pid_splits.json`.
        prompt_format: One of [`FORMATS`].

    Returns:
        `images` is the folder that the rows' images are relative to, `None` if no row has one. Rows whose image does
        not exist are left out.

    Raises:
        DataError: as [`read_split`], for an unknown format, a split without a problem, and if no image exists.
    """
    if prompt_format not in FORMATS:
        raise DataError(f"there is no format {prompt_format!r}; the formats are {', '.join(FORMATS)}")
    path = find_problems(data)
    problems = read_split(path, split)
    if not problems:
        raise DataError(f"the split {split!r} of {str(path)!r} is empty; name another")
    rows = [training_row(pid, problem, prompt_format) for pid, problem in problems.items()]
    names = {row["id"]: row["image"] for row in rows if "image" in row}
    folders = [path.parent / name for name in image_folders(split)]
    images = next((folder for folder in folders for name in names.values() if (folder / name).is_file()), None)
    if names and images is None:
        raise DataError(
            f"none of the {len(names)} images of the split {split!r} is in {', '.join(map(str, folders))}, such as "
            f"{next(iter(names.values()))}; put them there"
        )
    missing = [pid for pid, name in names.items() if images is not None and not (images / name).is_file()]
    left_out = set(missing)
    kept = [row for row in rows if row["id"] not in left_out]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, kept)
    return Converted(len(kept), len(names) - len(missing), images, missing)


def image_folders(split: str) -> tuple[str, ...]:
    """Where a split's images may be, next to `problems.json`: each image is `PID/image.png` in one of these."""
    return (f"images/{split}", split, "images")


def _cleaned(text: str) -> str:
    """As the authors' script: every two spaces become one, once, so that three become two."""
    return text.replace("  ", " ").strip()


def _without(label: str, text: str) -> str:
    """As the authors' script: a text that begins with the label loses it, wherever else it occurs, too."""
    return text.replace(label, "") if text.startswith(label) else text


def _object(path: Path) -> JsonObject:
    try:
        with open_regular(path) as file:
            content = parse_json(file.read(), _once)
    except FileNotFoundError as error:
        raise DataError(f"there is no {str(path)!r}; give ScienceQA's problems.json and pid_splits.json") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error}); fetch the official file again") from error
    if not isinstance(content, dict):
        raise DataError(f"{str(path)!r} holds a {type(content).__name__}, not records by id; give the official file")
    return content


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it holds the id {twice!r} twice")
    return content


def _checked(path: Path, pid: str, problem: object) -> JsonObject:
    if not isinstance(problem, dict):
        raise DataError(f"{pid!r} in {str(path)!r} is {brief(problem)}, not a problem; give the official file")
    for field, kind in _FIELDS.items():
        if field not in problem or not isinstance(problem[field], kind) or isinstance(problem[field], bool):
            raise DataError(
                f"the field {field!r} of {pid!r} in {str(path)!r} is {brief(problem.get(field))}; give the official "
                "file"
            )
    for field in _TEXTS:
        if not isinstance(problem.get(field, ""), str):
            raise DataError(f"the field {field!r} of {pid!r} in {str(path)!r} is not a text; give the official file")
    choices, answer = problem["choices"], problem["answer"]
    if not all(isinstance(choice, str) for choice in choices) or not 0 <= answer < len(choices) <= len(LETTERS):
        raise DataError(
            f"{pid!r} in {str(path)!r} has the options {brief(choices)} and the right one is number {answer}; give "
            "the official file"
        )
    return problem
