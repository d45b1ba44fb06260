"""Run by `test_vllm.py` with the Python of vLLM's environment: answers of our engine, as JSON in a file."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.turns import describe_in_turns
from transformers_minigpt4.inference.engines import Request
from transformers_minigpt4.inference.vllm_engine import VllmEngine
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4Model


def main(folder: str, requests_file: str, answers_file: str) -> None:
    encoded = []
    encode = MiniGPT4Model.get_image_features

    def counted(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    *rows, turns = json.loads(Path(requests_file).read_text())
    requests = (Request([Image.open(path).convert("RGB") for path in row["images"]], row["prompt"]) for row in rows)
    engine = VllmEngine(folder, batch_size=3, dtype="float32", images_per_prompt=2, enforce_eager=True)
    MiniGPT4Model.get_image_features = counted  # after vLLM's own trial runs
    answers = list(engine.answers(requests, do_sample=False, max_new_tokens=12))
    found = {"answers": answers, "encoded": sum(encoded)}
    found |= {"batch_size": engine.batch_size, "device": engine.device, "dtype": engine.dtype}
    shown = [Image.open(path).convert("RGB") for path in turns["images"]]
    found["turns"] = [
        [asdict(one) for one in describe_in_turns(shown, engine, CurationConfig("images", "checkpoint", **settings))]
        for settings in turns["settings"]
    ]
    found["encoded in turns"] = sum(encoded) - found["encoded"]
    early = engine.answers(iter([Request([], "What is this?")] * 5), do_sample=False, max_new_tokens=2)
    found["first"] = next(early)
    early.close()
    found["left"] = engine._llm.llm_engine.get_num_unfinished_requests()
    Path(answers_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
