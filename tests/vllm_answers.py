"""Run by `test_vllm.py` with the Python of vLLM's environment: answers of a checkpoint, as JSON in a file."""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main(folder: str, requests_file: str, answers_file: str) -> None:
    rows = json.loads(Path(requests_file).read_text())
    prompts = []
    for row in rows:
        prompt = {"prompt": row["prompt"]}
        if row["images"]:
            prompt["multi_modal_data"] = {"image": [Image.open(path) for path in row["images"]]}
        prompts.append(prompt)
    llm = LLM(folder, dtype="float32", limit_mm_per_prompt={"image": 3}, enforce_eager=True)
    found = {}
    for name, more in {"free": {"ignore_eos": True}, "ended": {}}.items():
        sampling = SamplingParams(temperature=0, max_tokens=24, **more)
        # The first three one by one, then all at once.
        outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts[:3]]
        outputs += llm.generate(prompts, sampling, use_tqdm=False)
        found[name] = [
            {"prompt_ids": list(o.prompt_token_ids), "ids": list(o.outputs[0].token_ids), "text": o.outputs[0].text}
            for o in outputs
        ]
    Path(answers_file).write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM starts its engine by importing this file again
    main(*sys.argv[1:])
