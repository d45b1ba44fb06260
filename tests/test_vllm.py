"""
vLLM answers with the same ids as `generate`, loads without `trust_remote_code`, and ends answers where ours end.

Runs where MINIGPT4_VLLM_PYTHON names the Python of an environment that has vLLM and this package, see `.ci/run`.
"""

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from golden_model import GOLDEN
from peft import LoraConfig, get_peft_model
from served import free_port, served, user
from tiny_models import SIZE, drawn_image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    LlamaConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.turns import Description, describe_in_turns
from transformers_minigpt4.inference.chat import Chat
from transformers_minigpt4.inference.engines import Request
from transformers_minigpt4.inference.loading import load_engine


PYTHON = os.environ.get("MINIGPT4_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="MINIGPT4_VLLM_PYTHON names no Python that has vLLM")
# Of `minigpt4 curate generate`: with the paper's prompts, and by the chat template.
TURNS = (
    {"max_new_tokens": 12},
    {"max_new_tokens": 12, "prompt": "Describe this image.", "continue_prompt": "Continue"},
)
IMAGES_OF_PROMPTS = (0, 1, 2, 1, 1, 3, 0, 2)


WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**WIDTHS, "image_size": 56, "patch_size": 14}
TEXT = {**WIDTHS, "vocab_size": 1201, "initializer_range": 0.3, "max_position_embeddings": 2048}  # heads of 32 or more


def authors_parts() -> MiniGPT4Config:
    """The parts of the authors' model: EVA's tower, a Q-Former, and LLaMA."""
    return MiniGPT4Config(
        vision_config=Blip2VisionConfig(**TOWER),
        qformer_config=Blip2QFormerConfig(**WIDTHS, encoder_hidden_size=64),
        num_query_tokens=8,
        text_config=LlamaConfig(**TEXT),
        image_token_id=1200,
    )


def other_parts() -> MiniGPT4Config:
    """SigLIP's tower, no Q-Former, and Qwen3."""
    return MiniGPT4Config(
        # With its pooling head, which the model does not use, vLLM fails on a CPU.
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        qformer_config=None,
        text_config=Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=64),
        image_token_id=1200,
    )


def save(folder: Path, config: MiniGPT4Config) -> None:
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration(config)
    model.lm_head.weight.data[1200] = 0
    processor = MiniGPT4Processor(
        BlipImageProcessorPil(size=SIZE),
        AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"),
        image_seq_length=config.image_seq_length,
    )
    model.generation_config = processor.get_generation_config()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def our_answers(folder: Path, rows: list[dict], pictures: dict) -> list[dict]:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = []
    for row in rows:
        images = [pictures[path] for path in row["images"]] or None
        inputs = processor(images=images, text=row["prompt"], return_tensors="pt")
        options = {"do_sample": False, "repetition_penalty": 1.0, "min_new_tokens": 24, "max_new_tokens": 24}
        ids = model.generate(**inputs, **options, stop_sequences=[], eos_token_id=-1)[0].tolist()
        length = inputs["input_ids"].shape[1]
        found.append({"prompt_ids": ids[:length], "ids": ids[length:]})
    return found


@pytest.fixture(scope="module", params=[authors_parts, other_parts])
def answers(request, tmp_path_factory):
    """(vLLM's answers, ours, the stop string of two tokens, the token that ends an answer)"""
    folder = tmp_path_factory.mktemp("vllm")
    checkpoint = folder / "checkpoint"
    save(checkpoint, request.param())
    pictures = {str(folder / f"{number}.png"): drawn_image(number) for number in range(4)}
    for path, picture in pictures.items():
        picture.save(path)
    rows = [
        {
            "prompt": f"<s>###Human: {'<Img><ImageHere></Img> ' * count}What is this, {number}? ###Assistant: ",
            "images": list(pictures)[:count] if number % 2 else list(pictures)[::-1][:count],
        }
        for number, count in enumerate(IMAGES_OF_PROMPTS)
    ]
    ours = our_answers(checkpoint, rows, pictures)
    # Random models never say ###. Two tokens in the middle of an answer take its place, and one of another answer.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stop, end = tokenizer.decode(ours[1]["ids"][8:10]).strip(), ours[2]["ids"][10]
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps({**settings, "stop": [stop], "eos_token_id": [end]}))
    return run_in_vllm("vllm_answers.py", folder, rows), ours, stop, end


def run_in_vllm(script: str, folder: Path, rows: list[dict], **variables: str) -> Any:
    """What a script writes that is run with vLLM's Python, for rows and the checkpoint in a folder."""
    (folder / "rows.json").write_text(json.dumps(rows))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **variables}
    done = subprocess.run(
        [
            PYTHON,
            Path(__file__).with_name(script),
            folder / "checkpoint",
            folder / "rows.json",
            folder / "answers.json",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "answers.json").read_text())


def test_same_ids_for_text_one_image_two_images_and_a_batch(answers):
    theirs, ours, *_ = answers
    for found, expected in zip(theirs["free"], [*ours[:3], *ours], strict=True):
        assert found["prompt_ids"] == expected["prompt_ids"]
        assert found["ids"] == expected["ids"]
    assert len({tuple(row["ids"]) for row in ours}) > 4  # the images and prompts make a difference


def test_answers_end_at_both_forms_of_the_end_mark(answers):
    theirs, _, stop, end = answers
    ended = theirs["ended"]
    assert stop not in ended[1]["text"] and len(ended[1]["ids"]) <= 10
    assert ended[2]["ids"][-1] == end and len(ended[2]["ids"]) <= 11
    for found in ended:
        assert stop not in found["text"]
        assert end not in found["ids"][:-1]


def test_the_engine_gives_the_answers_of_transformers(tmp_path):
    save(tmp_path / "checkpoint", authors_parts())
    path = tmp_path / "checkpoint" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(5, 1200, 17))}))
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, path in enumerate(paths):
        drawn_image(number).save(path)
    rows = [{"images": [path], "prompt": f"What is this, {n}?"} for path in paths for n in range(4)]
    rows += [{"images": [], "prompt": "Who are you?"}, {"images": paths[:2], "prompt": "Which is larger?"}]
    turns = {"images": paths, "settings": TURNS}
    # In one process, where calls of the model can be counted.
    found = run_in_vllm("vllm_engine_answers.py", tmp_path, [*rows, turns], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    engine = load_engine("transformers", str(tmp_path / "checkpoint"), dtype="float32", device="cpu", batch_size=2)
    pictures = {path: drawn_image(number) for number, path in enumerate(paths)}
    requests = [Request([pictures[path] for path in row["images"]], row["prompt"]) for row in rows]
    expected = list(engine.answers(requests, do_sample=False, max_new_tokens=12))
    assert found["answers"] == expected
    assert len(set(expected)) > 4
    assert (found["batch_size"], found["device"], found["dtype"]) == (3, "cpu", "torch.float32")
    assert found["encoded"] == 3  # each image once, for five prompts
    assert found["first"] == next(engine.answers([Request([], "What is this?")], do_sample=False, max_new_tokens=2))
    assert found["left"] == 0
    for settings, described in zip(TURNS, found["turns"], strict=True):
        ours = describe_in_turns(list(pictures.values()), engine, CurationConfig("images", "checkpoint", **settings))
        assert [Description(tuple(one["turns"]), tuple(one["tokens"])) for one in described] == ours
        assert all(len(one.turns) == 2 and min(one.tokens) < 12 for one in ours)  # some end before the limit
    assert found["encoded in turns"] == 0  # still known from the requests before


def complete(text: str) -> str:
    """An answer without half a character at its end, which vLLM leaves out."""
    return text.strip().rstrip("\ufffd")


def test_server_with_an_adapter(tmp_path):
    """`minigpt4 serve --engine vllm`: greedy answers equal ours, ended by the stop string, streamed, and adapted."""
    folder, adapter = tmp_path / "checkpoint", tmp_path / "adapter"
    save(folder, authors_parts())
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    question, picture = user("What is this?", drawn_image(1)), drawn_image(1)
    options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 16}

    def ours(model):
        chat = Chat(model, processor, parameters=options)
        return chat.ask("What is this?", [picture])

    free = ours(model)
    ids = processor.tokenizer.encode(free, add_special_tokens=False)
    stop = processor.tokenizer.decode(ids[6:8]).strip()
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "stop": [stop]}))
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(model, config).save_pretrained(str(adapter))
    adapted = ours(AutoModelForImageTextToText.from_pretrained(adapter))

    port = free_port()
    command = [PYTHON, "-m", "transformers_minigpt4.cli", "serve", folder, "--engine", "vllm", "--port", port]
    command += ["--dtype", "float32", "--", "--enforce-eager", "--enable-lora", "--lora-modules", f"tuned={adapter}"]
    environment = {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with served([str(word) for word in command], port, tmp_path / "log.txt", 900, **environment) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300)
        ask = partial(client.chat.completions.create, messages=[question], temperature=0, max_tokens=16)
        ask = partial(ask, frequency_penalty=0, extra_body={"repetition_penalty": 1.0})
        assert [model.id for model in client.models.list().data] == ["checkpoint", str(folder), "tuned"]
        answer = ask(model="checkpoint").choices[0]
        expected = complete(free.split(stop)[0])
        assert (complete(answer.message.content), answer.finish_reason) == (expected, "stop")
        chunks = ask(model="checkpoint", stream=True)
        assert complete("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == expected
        tuned = ask(model="tuned").choices[0].message.content
        assert complete(tuned) == complete(adapted.split(stop)[0]) != expected
        with pytest.raises(openai.APIStatusError, match="must be from one of the allowed domains"):
            ask(model="checkpoint", messages=[user("What?", "http://127.0.0.1:9/x.png")])
