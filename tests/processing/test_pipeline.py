"""`pipeline("image-to-text")` needs no text; chats work; other models keep their pipelines."""

import logging
import os
import subprocess
import sys

import pytest
from golden_model import GOLDEN
from PIL import EpsImagePlugin
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    ImageTextToTextPipeline,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from versions import transformers_before


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return pipeline("image-to-text", model=tiny_checkpoint)


def test_a_picture_alone(pipe, pictures, tmp_path):
    path = tmp_path / "image.png"
    pictures[0].save(path)
    answer = pipe(pictures[0], generate_kwargs=GREEDY)
    assert list(answer[0]) == ["generated_text"] and answer[0]["generated_text"]
    for source in (str(path), path, path.read_bytes()):
        assert pipe(source, generate_kwargs=GREEDY) == answer
    assert pipe(pictures[0], prompt="What is this?", generate_kwargs=GREEDY) != answer


def test_many_pictures_in_batches_equal_one_at_a_time(pipe, pictures):
    alone = [pipe(picture, generate_kwargs=GREEDY) for picture in pictures]
    assert pipe(pictures, generate_kwargs=GREEDY) == alone
    assert pipe(pictures, batch_size=2, generate_kwargs=GREEDY) == alone


def test_data_sets_and_generators(pipe, pictures):
    from datasets import Dataset
    from transformers.pipelines.pt_utils import KeyDataset

    alone = [pipe(picture, generate_kwargs=GREEDY) for picture in pictures]
    assert list(pipe((picture for picture in pictures), generate_kwargs=GREEDY)) == alone
    rows = Dataset.from_dict({"image": pictures})
    assert list(pipe(KeyDataset(rows, "image"), batch_size=2, generate_kwargs=GREEDY)) == alone
    asked = pipe({"images": pictures[0], "text": "<ImageHere> a"}, generate_kwargs=GREEDY)
    assert asked[0]["input_text"] == "<ImageHere> a"


def test_postscript_starts_no_program(pipe, pictures, tmp_path, monkeypatch):
    """Whatever it is called, and however it is given."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **_: pytest.fail("Ghostscript was started"))
    path = str(tmp_path / "photo.jpg")
    pictures[0].save(path, "EPS")
    content = [{"type": "image", "url": path}, {"type": "text", "text": "What is it?"}]
    for ask in (
        lambda: pipe(path),
        lambda: pipe({"images": path, "text": "<ImageHere> a"}),
        lambda: pipe(images=[path], text="<ImageHere> a"),
        lambda: pipe([{"role": "user", "content": content}]),
    ):
        with pytest.raises(ValueError, match="not an image in one of the formats JPEG"):
            ask()


def test_chat(pipe, pictures):
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Describe this image in detail."}]
    chat = [{"role": "user", "content": content}]
    expected = pipe(pictures[0], generate_kwargs=GREEDY)[0]["generated_text"]
    full = pipe(text=chat, generate_kwargs=GREEDY)[0]["generated_text"]
    assert full[0]["role"] == "user" and full[1] == {"role": "assistant", "content": expected}
    short = pipe(text=chat, generate_kwargs=GREEDY, return_full_text=False)
    assert short[0]["generated_text"] == expected
    ids = pipe(text=chat, generate_kwargs=GREEDY, return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) > 20


def test_a_question_and_a_ready_prompt(pipe, pictures):
    asked = pipe(pictures[0], text="What is this?", generate_kwargs=GREEDY, return_full_text=False)
    assert (
        asked[0]["generated_text"]
        == pipe(pictures[0], prompt="What is this?", generate_kwargs=GREEDY)[0]["generated_text"]
    )
    prompt = "###Human: <Img><ImageHere></Img> What is this? ###Assistant: "
    ready = pipe(pictures[0], text=prompt, generate_kwargs=GREEDY)
    assert ready[0]["generated_text"].startswith(prompt)


def test_prompt_of_the_pipeline(tiny_checkpoint, pipe, pictures):
    asking = pipeline("image-to-text", model=tiny_checkpoint, prompt="What is this?")
    expected = pipe(pictures[0], prompt="What is this?", generate_kwargs=GREEDY)
    assert asking(pictures[0], generate_kwargs=GREEDY) == expected


def test_neither_image_nor_text(pipe):
    with pytest.raises(ValueError, match="list of images is empty"):
        pipe([])
    with pytest.raises(ValueError, match="at least provide either text or images"):
        pipe()


SCRIPT = """
import sys
from transformers import pipeline
import transformers_minigpt4
from transformers.utils import logging

logging.disable_progress_bar()
for task in ("image-text-to-text", "image-to-text"):
    pipe = pipeline(task, model=sys.argv[1])
    print(type(pipe).__name__, len(pipe(sys.argv[2], generate_kwargs={"max_new_tokens": 2, "do_sample": False})))
"""


@pytest.mark.skipif(transformers_before("5.22"), reason="older ones warn about the options of their own pipelines")
def test_silent_under_both_names(tiny_checkpoint, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    words = [sys.executable, "-c", SCRIPT, tiny_checkpoint, str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert (done.stdout, done.returncode) == ("MiniGPT4ImageToTextPipeline 1\n" * 2, 0), done.stderr
    known = "pad_token_id must be `None` or an integer"  # of the tiny language model
    assert [line for line in done.stderr.splitlines() if known not in line] == []


def test_other_models_keep_the_stock_pipeline_and_its_warning(pictures, caplog):
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **size),
        text_config=LlamaConfig(vocab_size=1201, **size),
        image_token_index=1200,
    )
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    logger = logging.getLogger("transformers.pipelines")
    logger.warning_once.__func__.cache_clear()  # it may have warned before
    logger.addHandler(caplog.handler)  # transformers' own loggers need not propagate
    caplog.set_level(logging.WARNING, logger=logger.name)  # commands that ran before may have silenced it
    try:
        pipe = pipeline("image-to-text", model=LlavaForConditionalGeneration(config), processor=processor)
    finally:
        logger.removeHandler(caplog.handler)
    assert type(pipe) is ImageTextToTextPipeline
    messages = {record.getMessage() for record in caplog.records}
    # Before 5.19 transformers did not know the name any more.
    assert transformers_before("5.19") or any("`image-to-text` has been removed" in message for message in messages)
    with pytest.raises(ValueError, match="You must provide text"):
        pipe(pictures[0])
    assert pipe(pictures[0], text="<image> a", max_new_tokens=3)[0]["generated_text"].startswith("<image> a")


def test_transformers_serve_knows_the_class(tiny_checkpoint):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.cli.serving.model_manager import ModelManager

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    modality = ModelManager.get_model_modality(model, AutoProcessor.from_pretrained(tiny_checkpoint))
    assert modality.name in ("VLM", "MULTIMODAL")
