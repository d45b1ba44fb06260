"""
Holds each task's exact prompts and arguments of `generate`, by a snapshot in `snapshots/`.

A changed prompt makes new results incomparable with old ones. Where that is meant, write the snapshots anew and
say so in the changelog:

    MINIGPT4_UPDATE_SNAPSHOTS=1 pytest tests/evaluation/test_snapshot.py
"""

import json
import os
from pathlib import Path

import pytest
from task_files import DATA

from transformers_minigpt4.evaluation.evaluator import GREEDY
from transformers_minigpt4.evaluation.tasks import TASKS, load_task


SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_arguments_are_those_of_the_snapshot(name, tmp_path, monkeypatch):
    if name == "captions":  # its questions need no Java, only their scoring does
        monkeypatch.setattr("transformers_minigpt4.evaluation.tasks.captions._need_tools", dict)
    DATA[name](tmp_path)
    task = load_task(name)
    found = {
        "prompts": dict(task.prompts),
        "judge_prompts": dict(task.judge_prompts),
        "generation": {**GREEDY, **task.generation},
        # What the model is asked about the small data of this test, so that the prompts above are also the ones used.
        "asked": {question.id: question.prompt for question in task.questions(tmp_path)},
    }
    path = SNAPSHOTS / f"{name}.json"
    if os.environ.get("MINIGPT4_UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


def test_no_snapshot_is_left_over():
    assert {path.stem for path in SNAPSHOTS.glob("*.json")} == set(TASKS)
