"""LLaVA's rows on their way into training: what is skipped and counted, and chat templates of other origins."""

import json

import pytest
import torch
from golden_llava import build, recorded
from golden_model import GOLDEN
from PIL import Image
from test_rows import processor_of
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor
from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.prompt_check import check_prompt_format, fit_processor


# As the llava-hf checkpoints have it, in shape: no <s>, no system text, nothing but a space after an answer.
HF_TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() + ': ' }}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]


def foreign(template: str) -> LlavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.pad_token = tokenizer.unk_token
    image_processor = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def runs_of(processor, batch) -> list[list[str]]:
    """The learned tokens, run by run."""
    runs: list[list[str]] = [[]]
    for id_, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()):
        if label == -100:
            runs.append([])
        else:
            assert label == id_
            runs[-1].append(processor.tokenizer.convert_ids_to_tokens(id_))
    return [run for run in runs if run]


@pytest.fixture
def source(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (30, 20), (90, 20, 200)).save(tmp_path / f"{name}.png")
    records = [record for record in recorded("rows") if record["id"] != "two_images_two_turns"]
    two = next(record for record in recorded("rows") if record["id"] == "two_images_two_turns")
    (tmp_path / "rows.json").write_text(json.dumps([*records, {**two, "image": ["a.png", "b.png"]}]))
    return f"llava:{tmp_path}/rows.json"


@pytest.mark.parametrize("name", ["v0", "v1", "llava_llama_2"])
def test_rows_that_the_authors_mask_are_skipped_and_counted(source, name):
    prompt_format = name if name.startswith("llava") else f"llava_{name}"
    rows = open_rows(source, prompt_format, epochs=1, shuffle=False, max_error_rate=None)
    kept = {row["key"]: row for row in rows.dataset}
    setting = recorded("text")[name]["rows"]
    masked = {key for key, row in setting.items() if row.get("printed") or "error" in row}
    assert not masked & kept.keys()
    # And what leaves nothing to learn, or a question open, with any format.
    ours = {"empty_answer", "empty_second_answer", "blank_answer", "question_without_answer", "roles_out_of_order"}
    assert kept.keys() == setting.keys() - masked - ours
    (seen,) = rows.skipped.counts().values()
    assert sum(seen[kind] for kind in ("caption", "entry", "prompt_format")) == len(setting.keys() - kept.keys())
    assert len(kept["two_images_two_turns"]["images"]) == 2 and len(kept["two_marks_one_turn"]["images"]) == 1
    # The texts have reached the collator as they were.
    processor = processor_of(prompt_format)
    collator = ImageTextCollator(processor)
    for key in kept.keys() - {"gpt_begins"}:  # whose first turn is left out; the authors' v0 learns it
        batch = collator([kept[key]])
        labels = [id_ for id_ in batch["labels"][0].tolist() if id_ != -100]
        assert labels == [id_ for id_ in setting[key]["labels"] if id_ != -100], key


@pytest.mark.parametrize("template", [HF_TEMPLATE, CHATML], ids=["llava-hf", "chatml"])
def test_foreign_templates_learn_the_end_mark(template):
    processor = foreign(template)
    batch = ImageTextCollator(processor)([{"messages": MESSAGES, "images": [Image.new("RGB", (9, 9))]}])
    end = "</s>" if template == HF_TEMPLATE else "<|im_end|>"
    runs = runs_of(processor, batch)
    assert [run[-1] for run in runs] == [end, end]
    assert "".join(runs[0]).replace("▁", " ").strip() == "A dog." + end
    assert batch["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4


def test_a_template_without_end_mark_is_saved_with_one():
    config = build("linear").config
    fitted = fit_processor("messages", config, processor := foreign(HF_TEMPLATE))
    assert processor.chat_template == HF_TEMPLATE
    text = fitted.apply_chat_template(MESSAGES)
    assert text == "USER: <image>\nWhat is this? ASSISTANT: A dog.</s> USER: Sure? ASSISTANT: Yes.</s> "
    assert fitted.apply_chat_template(MESSAGES[:1], add_generation_prompt=True) == processor.apply_chat_template(
        MESSAGES[:1], add_generation_prompt=True
    )
    assert fit_processor("messages", config, foreign(CHATML)).chat_template == CHATML


def test_an_authors_format_replaces_a_foreign_template(tmp_path):
    model = build("mlp2x_gelu")
    fitted = fit_processor("llava_v1", model.config, foreign(HF_TEMPLATE))
    assert isinstance(fitted, LlavaPromptProcessor) and fitted.writes("llava_v1")
    assert fit_processor("llava_v1", model.config, fitted) is fitted
    check_prompt_format("llava_v1", model.config, fitted, "x")
    with pytest.raises(ValueError, match="prompt_format: llava_v1"):
        check_prompt_format("messages", model.config, fitted, "x")
    fitted.legacy = True
    model.save_pretrained(tmp_path)
    fitted.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaPromptProcessor) and loaded.legacy and loaded.writes("llava_v1")
    assert loaded.encode_conversation(MESSAGES) == fitted.encode_conversation(MESSAGES)


def test_minigpt4_has_no_format_of_llava(tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="is for LLaVA"):
        check_prompt_format("llava_v1", object(), processor, "x")
    with pytest.raises(ValueError, match="max_row_length=9 is for LLaVA"):
        ImageTextCollator(processor, max_row_length=9)


def test_a_cut_through_an_image_leaves_the_image_out():
    processor = foreign(HF_TEMPLATE)
    messages = [*MESSAGES, {"role": "user", "content": [{"type": "image"}]}, MESSAGES[3]]
    row = {"messages": messages, "images": [Image.new("RGB", (9, 9), (colour, 0, 0)) for colour in (0, 255)]}
    collate = ImageTextCollator(processor)
    complete = collate([row])
    second = (complete["input_ids"][0] == processor.image_token_id).nonzero()[4].item()
    cut = ImageTextCollator(processor, max_row_length=second + 2)([row, row])
    assert cut["input_ids"].shape == (2, second)
    assert torch.equal(cut["pixel_values"], complete["pixel_values"][[0, 0]])
    assert torch.equal(cut["labels"][1], complete["labels"][0, :second])
