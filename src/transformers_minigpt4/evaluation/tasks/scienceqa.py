"""ScienceQA: school questions with text or image as context, also in ensembles with a text-only language model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.data.scienceqa import (
    QUESTION_FORMATS,
    find_problems,
    image_folders,
    read_split,
    training_question,
)
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Statistic, Task, mean
from ..scienceqa_ensembles import (
    JUDGE_PROMPT,
    JUDGE_PROMPT_NOTE,
    TEXT_QUESTION,
    as_sentence,
    ask_judge,
    ask_text_model,
    combine,
    draw_examples,
    reference,
)
from ..scorers.choices import parse_choice, parse_choice_as_llava
from ..scorers.official_files import find_images


SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}
CONTEXTS = ("text", "image", "none")
GRADES = {"1-6": range(1, 7), "7-12": range(7, 13)}
# The columns of the paper's table, with the group that each counts.
COLUMNS = {
    **{f"subject/{name}": ("subject", value) for name, value in SUBJECTS.items()},
    **{f"context/{name}": (f"context_{name}", "yes") for name in CONTEXTS},
    **{f"grade/{name.replace('-', '_')}": ("grades", name) for name in GRADES},
}
DIRECTLY = "Answer with the option's letter from the given choices directly."  # LLaVA v1.5's last line


def _share(column: str, where: tuple[str, str] | None = None) -> Statistic:
    return mean(column, scale=100, where=where)


def _metrics() -> tuple[Metric, ...]:
    accuracies = {
        "accuracy": "correct",
        "accuracy/llava_script": "correct_as_llava",
        "text_model": "text_correct",
        "ensemble/complement": "complement_correct",
        "ensemble/judge": "judge_correct",
    }
    return (
        *(Metric(name, True, "%", _share(column)) for name, column in accuracies.items()),
        *(
            Metric(f"{name}/{group}", True, "%", _share(column, where))
            for name, column in accuracies.items()
            for group, where in COLUMNS.items()
        ),
        Metric("unparsed", False, "%", _share("unparsed")),
        Metric("text_model/no_answer", None, "%", _share("text_no_answer")),
        Metric("ensemble/upper_bound", None, "%", _share("upper_bound_correct")),
        Metric("ensemble/complement/unanswered", None, "%", _share("complement_unanswered")),
        Metric("ensemble/judge/unanswered", None, "%", _share("judge_unanswered")),
        Metric("ensemble/asked", None, "%", _share("judge_asked")),
        Metric("ensemble/unreadable", None, "%", _share("judge_unreadable")),
    )


class ScienceQA(Task):
    """
    Accuracy overall, by subject, context and grade; with a judge also the two ensembles of the LLaVA paper.

    The model is asked as LLaVA was trained, and may reason before it answers (`QCM-LEA`). The judge is a text-only
    language model, which first answers every question by itself after two examples. `ensemble/complement` takes its
    answer, or the model's if it gives none. `ensemble/judge` asks it again if the two differ, showing both answers (in
    an order drawn from the question's id), for one final answer; see [`~evaluation.scienceqa_ensembles`].
    """

    name = "scienceqa"
    paper = "LLaVA, ScienceQA"
    description = "school questions with context, reasoning before the answer; ensembles with a text-only model"
    data = "problems.json, pid_splits.json, and test/ (or images/test/) with PID/image.png"
    dataset = "scienceqa"
    split = "test"
    question_format = "QCM"
    prompts = {"question": QUESTION_FORMATS["QCM"].removeprefix("Question: ")}
    judge_prompts = {"text_model": TEXT_QUESTION, "ensemble": JUDGE_PROMPT}
    notes = (JUDGE_PROMPT_NOTE,)
    generation = {"max_new_tokens": 1024}
    primary = "accuracy"
    metrics = _metrics()

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read the test split in the order of `pid_splits.json`.

        Raises:
            ValueError: if a file is missing or has another format, an id is repeated or is not among the problems, or
                none of the images is there.
        """
        path = find_problems(data)
        problems = read_split(path, self.split)
        names = {pid: f"{pid}/{problem['image']}" for pid, problem in problems.items() if problem["image"]}
        images = find_images(path.parent, image_folders(self.split), names.values(), path)
        examples = read_examples(path)
        return [self._question(pid, problems[pid], images.get(names.get(pid, "")), examples) for pid in problems][
            :limit
        ]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `correct`, `correct_as_llava` and `unparsed`; with a judge also the ensembles' columns. All 0 for no answer.

        Raises:
            ValueError: with a judge, if the data has no training split to draw its examples from.
            JudgeStopped: as [`judging.ask_all`].
        """
        records = [_score(question.reference, answers.get(question.id)) for question in questions]
        if judge is not None:
            self._add_ensembles(questions, answers, records, judge)
        return records

    def asked(self, problem: JsonObject) -> str:
        """What the model is asked about a problem."""
        return training_question(problem, self.question_format)

    def sentence(self, answer: str) -> str:
        """The answer as the ensembles, which read sentences only, get it."""
        return answer

    def _question(self, pid: str, problem: JsonObject, image: str | None, examples: Sequence[JsonObject]) -> Question:
        images = (image,) if image else ()
        return Question(pid, self.asked(problem), images, reference(problem, examples), groups_of(problem))

    def _add_ensembles(
        self,
        questions: Sequence[Question],
        answers: Mapping[str, str],
        records: Sequence[Record],
        judge: ChatModel,
    ) -> None:
        references = {question.id: question.reference for question in questions if question.id in answers}
        check_examples(references)
        own = {pid: self.sentence(answers[pid]) for pid in references}
        text = ask_text_model(references, judge)
        judged = ask_judge(references, own, text, judge)
        for question, record in zip(questions, records):
            pid = question.id
            if pid not in references:
                record |= {f"{name}_correct": 0 for name in ("text", "complement", "judge", "upper_bound")}
                continue
            record |= combine(question.reference, own[pid], text[pid], judged.get(pid))
            record |= {"text_model": text[pid], **({"judged": judged[pid]} if pid in judged else {})}


class ScienceQAShort(ScienceQA):
    """The same questions in LLaVA v1.5's style: context first, and the letter alone for an answer."""

    name = "scienceqa_short"
    description = "the same questions, to be answered with the letter alone, as LLaVA v1.5 and other models are asked"
    question_format = "CQM"
    prompts = {"question": f"{QUESTION_FORMATS['CQM']}\n{DIRECTLY}"}
    generation = {"max_new_tokens": 50}

    def asked(self, problem: JsonObject) -> str:
        """What the model is asked about a problem."""
        return f"{super().asked(problem)}\n{DIRECTLY}"

    def sentence(self, answer: str) -> str:
        """The answer as a sentence, if it is a letter."""
        return as_sentence(answer)


def read_examples(problems_file: Path) -> list[JsonObject]:
    """The two problems of the training split that the text model sees first; none without such a split."""
    try:
        train = read_split(problems_file, "train")
    except ValueError:  # which only those who ask a text model need
        return []
    return [train[pid] for pid in draw_examples(train)]


def check_examples(references: Mapping[str, JsonObject]) -> None:
    """
    Refuse to ask the text model without its examples.

    Raises:
        ValueError: if the data has no training split.
    """
    if any(len(facts["two_shot"]) < 7 for facts in references.values()):
        raise ValueError(
            "the text model's prompt shows two problems of the split 'train', but pid_splits.json and problems.json "
            "hold none; give the official files, or leave out --judge"
        )


def groups_of(problem: JsonObject) -> dict[str, str]:
    """The groups of a problem that [`COLUMNS`] count."""
    grade = problem["grade"].removeprefix("grade")
    return {
        "subject": problem["subject"],
        "grades": next((name for name, span in GRADES.items() if grade.isdigit() and int(grade) in span), "other"),
        "context_text": "yes" if problem["hint"] else "no",
        "context_image": "yes" if problem["image"] else "no",
        "context_none": "no" if problem["hint"] or problem["image"] else "yes",
    }


def _score(reference: JsonObject, answer: str | None) -> Record:
    if answer is None:
        return {"correct": 0, "correct_as_llava": 0, "unparsed": None, "chosen": None}
    chosen = parse_choice(answer, reference["choices"])
    return {
        "correct": int(chosen == reference["correct"]),
        "correct_as_llava": int(parse_choice_as_llava(answer, reference["choices"]) == reference["correct"]),
        "unparsed": int(chosen is None),
        "chosen": chosen,
    }
