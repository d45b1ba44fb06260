"""A saved folder works with `trust_remote_code=True` in a process that has no `transformers_minigpt4`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_linear_llava
from transformers import AutoModelForImageTextToText, AutoProcessor


BLOCKED = """
import json, sys
from PIL import Image
folder, picture = sys.argv[1:3]

class Blocker:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "transformers_minigpt4":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import transformers_minigpt4
    sys.exit("the package can be seen")
except ModuleNotFoundError:
    pass
"""
SCRIPT = (
    BLOCKED
    + """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer, pipeline

try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
    sys.exit("loaded without trust")
except ValueError:
    pass
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
try:
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
except ImportError:  # before transformers 5.19 this class wants torchvision
    image_processor = processor.image_processor
prompt = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
result = {
    "ids": model.generate(**inputs, **greedy).tolist(),
    "classes": [type(x).__name__ for x in (
        AutoConfig.from_pretrained(folder, **trust), AutoModel.from_pretrained(folder, **trust), model, processor,
        AutoTokenizer.from_pretrained(folder, **trust), image_processor)],
}
for task in ("image-to-text", "image-text-to-text"):
    pipe = pipeline(task, model=folder, **trust)
    result[task] = pipe(picture, generate_kwargs=dict(greedy))
chat = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "Hello?"}]}]
result["chat"] = pipe(text=chat, generate_kwargs=dict(greedy), return_full_text=False)[0]["generated_text"]
# What `transformers serve` does: tables of class names, the class for these, and the processor's `decode`.
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
served = AutoModelForMultimodalLM.from_pretrained(folder, **trust)
result["served"] = [type(served).__name__] + [names.get("minigpt4") for names in (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)]
ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in ("A red circle.###", "A circle ###")]
result["decoded"] = [processor.decode(row, skip_special_tokens=True).strip() for row in ids]
again = sys.argv[3]
model.save_pretrained(again)
processor.save_pretrained(again)
AutoModelForImageTextToText.from_pretrained(again, **trust)
AutoProcessor.from_pretrained(again, **trust)
print("RESULT" + json.dumps(result))
"""
)
LLAVA_SCRIPT = (
    BLOCKED
    + """
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

try:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    sys.exit("loaded without trust")
except ValueError:
    pass
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
answer = {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]}
prompt = processor.apply_chat_template([question], add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
result = {
    "classes": [type(x).__name__ for x in (AutoModel.from_pretrained(folder, **trust), model, processor)],
    "prompt": prompt,
    "ids": model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8).tolist(),
    "row": processor.encode_conversation([question, answer]),
}
again = sys.argv[3]
model.save_pretrained(again)
processor.save_pretrained(again)
AutoModelForImageTextToText.from_pretrained(again, **trust)
AutoProcessor.from_pretrained(again, **trust)
print("RESULT" + json.dumps(result))
"""
)


# Python of an environment with other versions of transformers and the rest (docs/versions.md), which loads what this
# one has saved, and saves what this one loads.
OTHER_PYTHON = os.environ.get("MINIGPT4_LOWEST_PYTHON")


@pytest.fixture(
    scope="module",
    params=[
        sys.executable,
        pytest.param(OTHER_PYTHON, marks=pytest.mark.skipif(not OTHER_PYTHON, reason="no MINIGPT4_LOWEST_PYTHON")),
    ],
    ids=["this environment", "the lowest versions"],
)
def remote(request, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    from PIL import Image

    picture = folder / "picture.png"
    Image.new("RGB", (70, 50), (200, 40, 40)).save(picture)
    result, logged = without_the_package(request.param, SCRIPT, tiny_checkpoint, picture, folder)
    return result, picture, folder / "again", logged


def without_the_package(python, script, checkpoint, picture, folder):
    """What a script prints as its result, and what it logs."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", script, str(checkpoint), str(picture), str(folder / "again")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT")), done.stderr


def test_same_classes(remote):
    assert remote[0]["classes"] == [
        "MiniGPT4Config",
        "MiniGPT4Model",
        "MiniGPT4ForConditionalGeneration",
        "MiniGPT4Processor",
        "TokenizersBackend",
        "BlipImageProcessorPil",
    ]


def test_what_transformers_serve_needs(remote):
    assert remote[0]["served"] == ["MiniGPT4ForConditionalGeneration"] * 3
    assert remote[0]["decoded"] == ["A red circle.", "A circle"]


def test_same_tokens(remote, tiny_checkpoint):
    from PIL import Image

    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    prompt = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
    inputs = processor(images=Image.open(remote[1]), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8).tolist()
    assert remote[0]["ids"] == ids


def test_same_pipelines(remote, tiny_checkpoint):
    from transformers import pipeline

    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = pipeline("image-to-text", model=tiny_checkpoint)(str(remote[1]), generate_kwargs=greedy)
    assert remote[0]["image-to-text"] == remote[0]["image-text-to-text"] == expected
    assert isinstance(remote[0]["chat"], str)
    assert "is not supported for" not in remote[3]


def test_a_folder_saved_there_loads_here(remote, tiny_checkpoint):
    config = json.loads((remote[2] / "config.json").read_text())
    assert config["auto_map"] == json.loads(Path(tiny_checkpoint, "config.json").read_text())["auto_map"]
    assert type(AutoModelForImageTextToText.from_pretrained(remote[2])).__module__.startswith("transformers_minigpt4")


@pytest.mark.slow
def test_llava_with_a_linear_projector(tmp_path):
    from PIL import Image

    checkpoint = tmp_path / "llava"
    save_linear_llava(checkpoint)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (70, 50), (200, 40, 40)).save(picture)
    found, _ = without_the_package(sys.executable, LLAVA_SCRIPT, checkpoint, picture, tmp_path)
    assert found["classes"] == ["LlavaLinearModel", "LlavaLinearForConditionalGeneration", "LlavaPromptProcessor"]
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert {type(each).__module__.split(".")[0] for each in (processor, model)} == {"transformers_minigpt4"}
    assert found["prompt"].startswith("A chat between a curious user") and found["prompt"].endswith(" ASSISTANT:")
    assert processor.writes("llava_v1")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]}
    assert found["prompt"] == processor.apply_chat_template([question], add_generation_prompt=True)
    assert found["row"] == [list(each) for each in processor.encode_conversation([question, answer])]
    inputs = processor(images=Image.open(picture), text=found["prompt"], return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8).tolist()
    assert found["ids"] == ids
