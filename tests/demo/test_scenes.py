"""The toy world goes through `minigpt4 instruct` whole: drawn images, captions, boxes, and a stand-in that writes."""

import json
import random
import threading

import numpy as np

from transformers_minigpt4.demo.endpoint import MODEL, make_server
from transformers_minigpt4.demo.scenes import write_scenes
from transformers_minigpt4.demo.world import all_scenes, draw, draw_with_box, training_scenes
from transformers_minigpt4.demo.writer import read_scene, write_answer
from transformers_minigpt4.instruct.build import run_build
from transformers_minigpt4.instruct.check import run_check
from transformers_minigpt4.instruct.config import InstructConfig
from transformers_minigpt4.instruct.generate import run_generate
from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, KINDS, messages, query
from transformers_minigpt4.instruct.scenes import read_scenes
from transformers_minigpt4.instruct.store import InstructProject
from transformers_minigpt4.llm.types import ChatSettings


def test_boxes_hold_the_shapes_and_images_are_those_of_before():
    scenes = all_scenes()[::37]
    for number, scene in enumerate(scenes):
        image, (x1, y1, x2, y2) = draw_with_box(scene, random.Random(number))
        assert image.tobytes() == draw(scene, random.Random(number)).tobytes()
        pixels = np.asarray(image).astype(int)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        rows, columns = np.nonzero(np.abs(pixels - background).max(axis=2) > 60)
        if len(rows):
            assert abs(columns.mean() / 64 - (x1 + x2) / 2) < 0.05 and abs(rows.mean() / 64 - (y1 + y2) / 2) < 0.05
            assert columns.min() / 64 > x1 - 0.06 and columns.max() / 64 < x2 + 0.06


def test_the_stand_in_reads_all_of_a_scene(tmp_path):
    scenes, found = set(training_scenes()), []
    for scene in read_scenes(write_scenes(tmp_path, 60), None):
        boxes = list(map(str, scene.boxes))
        for kind in KINDS:
            found.append(read_scene(query(kind, scene.captions, boxes)))
        assert found[-1] == found[-2] and found[-1] in scenes
        assert found[-3].words[:3] == found[-1].words[:3]
        asked = [message["content"] for message in messages(COMPLEX, scene.captions, boxes)]
        assert write_answer(asked) == write_answer([*asked, "an answer", "This cannot be used."])
    assert write_answer(["Repair this.\n\nA ring."]) is None
    assert write_answer([message["content"] for message in messages(CONVERSATION, ["A dog."], [])]) is None


def test_the_toy_world_becomes_instruction_data(tmp_path):
    path = write_scenes(tmp_path, 12)
    with make_server(0, write_answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        chat = ChatSettings(MODEL, f"http://127.0.0.1:{server.server_address[1]}/v1")
        config = InstructConfig(str(path), chat=chat, similarity=0.0)
        with InstructProject.create(tmp_path / "project", config) as project:
            done = run_generate(project, config, progress=False)
            checked = run_check(project, config, progress=False)
            built = run_build(project, config)
        server.shutdown()
    assert not done.failed and not done.refused and not checked.reasons and set(checked.kept) == set(KINDS)
    rows = json.loads((built.folder / "llava_instruct.json").read_text())
    assert len(rows) == checked.rows and built.missing == 0
    assert {len(row["conversations"]) for row in rows} >= {2, 4}
