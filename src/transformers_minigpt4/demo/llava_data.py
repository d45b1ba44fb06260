"""What the demo's LLaVA is trained on and asked: captions and instructions about drawn images, and questions."""

import json
import random
import threading
from pathlib import Path
from typing import NamedTuple

from datasets import load_from_disk

from transformers_minigpt4.data.prompt_formats import LLAVA_INSTRUCTIONS
from transformers_minigpt4.hub.instructions import INSTRUCTIONS_FILE
from transformers_minigpt4.instruct.build import DATASET, IMAGE_MARK, run_build
from transformers_minigpt4.instruct.check import run_check
from transformers_minigpt4.instruct.config import InstructConfig
from transformers_minigpt4.instruct.generate import run_generate
from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, DETAIL, KINDS, detail_questions
from transformers_minigpt4.instruct.store import InstructProject
from transformers_minigpt4.llm.types import ChatSettings
from transformers_minigpt4.utils.files import write_json

from .endpoint import MODEL, make_server
from .scenes import write_scenes
from .texts import QUESTIONS, answer, detailed_description
from .world import Scene
from .writer import REASONING, reason, write_answer


ALL = "all"  # kinds


class LlavaData(NamedTuple):
    """
    What the two stages are trained on, in LLaVA's format.

    Args:
        captions: Questions from the article's list with captions as answers, for stage 1.
        instructions: All of them under `all`, and those of each kind, for stage 2.
        images: The folder that the rows' images are relative to.
        rows: Instructions by kind.
    """

    captions: Path
    instructions: dict[str, Path]
    images: Path
    rows: dict[str, int]


def make_data(folder: Path, count: int, seed: int) -> LlavaData:
    """
    Draws scenes, and has the stand-in write instructions about them, by the steps of `minigpt4 instruct`.

    Args:
        folder: New folder for scenes, project and files to train on.
        count: Scenes; each gets a row of each kind.
        seed: Draws all of it.
    """
    path = write_scenes(folder / "scenes", count, seed)
    with make_server(0, write_answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        chat = ChatSettings(MODEL, f"http://127.0.0.1:{server.server_address[1]}/v1")
        # Texts about so small a world are all near-duplicates of each other.
        config = InstructConfig(str(path), chat=chat, seed=seed, kinds=dict.fromkeys(KINDS, 1.0), similarity=0.0)
        with InstructProject.create(folder / "project", config) as project:
            run_generate(project, config, progress=False)
            run_check(project, config, progress=False)
            built = run_build(project, config)
        server.shutdown()
    rows = json.loads((built.folder / INSTRUCTIONS_FILE).read_text(encoding="utf-8"))
    kind_of = load_from_disk(built.folder / DATASET)["kind"]
    files = {ALL: built.folder / INSTRUCTIONS_FILE}
    for kind in built.kinds:
        files[kind] = folder / f"{kind}.json"
        write_json(files[kind], [row for row, its in zip(rows, kind_of) if its == kind])
    write_json(folder / "captions.json", _caption_rows(path, random.Random(seed)))
    return LlavaData(folder / "captions.json", files, path.parent, built.kinds)


def _caption_rows(scenes: Path, rng: random.Random) -> list[dict[str, object]]:
    """Every caption of every scene, with a question that stage 1's `llava_v0` form asks."""
    rows: list[dict[str, object]] = []
    for line in scenes.read_text(encoding="utf-8").splitlines():
        scene = json.loads(line)
        for number, caption in enumerate(scene["captions"]):
            question = f"{rng.choice(LLAVA_INSTRUCTIONS)}\n{IMAGE_MARK}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
            rows.append({"id": f"{scene['id']}-{number}", "image": scene["image"], "conversations": turns})
    return rows


class Question(NamedTuple):
    """A question about a held-out image, and what the stand-in would have answered."""

    kind: str
    text: str
    reference: str


def ask_about(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of each kind."""
    asked, reasoned = rng.choice(QUESTIONS), rng.choice(REASONING)
    return [
        Question(CONVERSATION, asked, answer(asked, scene, rng)),
        Question(DETAIL, rng.choice(detail_questions()), detailed_description(scene, rng)),
        Question(COMPLEX, reasoned, reason(reasoned, scene)),
    ]
