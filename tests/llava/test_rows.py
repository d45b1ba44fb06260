"""Token ids and labels of LLaVA's rows, and prompts of chats, against those of the authors' code."""

from functools import cache

import pytest
from golden_llava import IGNORED, IMAGE_MARK, recorded
from golden_model import GOLDEN as SHARED
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_minigpt4.data.annotations import llava_messages
from transformers_minigpt4.data.prompt_formats import plain_row
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor
from transformers_minigpt4.processing.prompt_formats_llava import PROMPT_FORMATS
from transformers_minigpt4.training.collator import ImageTextCollator


SETTINGS = [name for name in recorded("text") if name not in ("chat", "tokenizer_image_token")]
CONVERSATIONS = [name for name in SETTINGS if recorded("text")[name]["template"] != "plain"]


@cache
def processor_of(prompt_format: str, legacy: bool = True, start_end: bool = False, **options) -> LlavaPromptProcessor:
    """One position per image, as in the authors' ids."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer")
    if start_end:
        tokenizer.add_tokens(["[PAD]", "<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    return LlavaPromptProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=14,
        prompt_format=prompt_format,
        legacy=legacy,
        image_start_end=start_end,
        **options,
    )


def format_of(template: str) -> str:
    return template if template in PROMPT_FORMATS else f"llava_{template}"


def processor_for(setting: dict) -> LlavaPromptProcessor:
    return processor_of(format_of(setting["template"]), setting["legacy"], setting["mm_use_im_start_end"])


@cache
def messages_of(row: str) -> list[dict]:
    record = next(record for record in recorded("rows") if record["id"] == row)
    return llava_messages(record["conversations"])


def marked(processor, ids: list[int]) -> list[int]:
    return [IMAGE_MARK if id_ == processor.image_token_id else id_ for id_ in ids]


def cases(names: list[str]) -> list[tuple[str, str]]:
    return [(name, row) for name in names for row in recorded("text")[name]["rows"]]


@pytest.mark.parametrize(("name", "row"), cases(CONVERSATIONS), ids="-".join)
def test_ids_and_labels_equal_the_authors(name, row):
    setting = recorded("text")[name]
    expected = setting["rows"][row]
    processor, limit = processor_for(setting), setting["model_max_length"]
    if "error" in expected or expected.get("printed"):
        with pytest.raises(ValueError):
            processor.encode_conversation(messages_of(row), max_length=limit)
        return
    ids, learned = processor.encode_conversation(messages_of(row), max_length=limit)
    labels = [id_ if learns else IGNORED for id_, learns in zip(ids, learned)]
    # Their collator cuts rows with images, which their tokenizer does not.
    assert marked(processor, ids)[:limit] == expected["input_ids"][:limit]
    assert marked(processor, labels)[:limit] == expected["labels"][:limit]


# What is between question and answer, and between an answer and the next question, by the authors' style.
STYLES = {
    "SINGLE": ("###Assistant: ", "###Human: ", "###Assistant:"),
    "TWO": (" ASSISTANT: ", "</s>USER: ", " ASSISTANT:"),
    "LLAMA_2": (" [/INST] ", " </s><s>[INST] ", " [/INST]"),
}
CHATS = [name for name, chat in recorded("text")["chat"].items() if chat["sep_style"] in STYLES]


def chat_of(name: str) -> tuple[LlavaPromptProcessor, list[list[dict]]]:
    """A processor, and the conversations whose prompts are recorded."""
    chat = recorded("text")["chat"][name]
    first, second = (turn["prompt"] for turn in chat["turns"])
    before_answer, before_question, end = STYLES[chat["sep_style"]]
    question = first.rpartition("<image>\n")[2].removesuffix(end)
    answer, _, follow_up = (
        second.removeprefix(first.removesuffix(end)).removeprefix(before_answer).partition(before_question)
    )
    prompt_format = {"SINGLE": "llava_v0", "TWO": "llava_v1", "LLAMA_2": "llava_llama_2"}[chat["sep_style"]]
    messages = [{"role": "system", "content": chat["system"]}]
    messages += [
        {"role": ("user", "assistant")[chat["roles"].index(role)], "content": said}
        for role, said in chat["messages_before"]
    ]
    messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]})
    later = [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up.removesuffix(end)}]
    if (
        format_of(name) in PROMPT_FORMATS
        and not chat["messages_before"]
        and chat["system"] == PROMPT_FORMATS[format_of(name)].system
    ):
        prompt_format, messages = format_of(name), messages[1:]  # the format has the system text itself
    return processor_of(prompt_format), [messages, [*messages, *later]]


@pytest.mark.parametrize("name", CHATS)
def test_chat_prompts_equal_the_authors(name):
    processor, conversations = chat_of(name)
    for messages, turn in zip(conversations, recorded("text")["chat"][name]["turns"]):
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == turn["prompt"]
        images = [Image.new("RGB", (20, 10))] * prompt.count("<image>")
        ids = processor(images=images, text=prompt)["input_ids"][0]
        assert marked(processor, ids) == turn["input_ids"]


@pytest.mark.parametrize("case", recorded("text")["tokenizer_image_token"], ids=lambda case: repr(case["text"]))
def test_pieces_are_tokenized_as_by_the_authors(case):
    for legacy in (True, False):
        processor = processor_of("llava_v1", legacy)
        images = [Image.new("RGB", (20, 10))] * case["text"].count("<image>") or None
        ids = processor(images=images, text=case["text"])["input_ids"][0]
        assert marked(processor, ids) == case[f"legacy_{str(legacy).lower()}"]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in CONVERSATIONS])
def test_plain_rows_equal_the_authors(name):
    setting = recorded("text")[name]
    processor = processor_of("llava_v1", setting["legacy"])
    collator = ImageTextCollator(processor, max_row_length=setting["model_max_length"])
    for record in recorded("rows"):
        expected, messages = setting["rows"][record["id"]], messages_of(record["id"])
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        if "error" in expected:  # several turns, or no image
            assert len(messages) != 2 or images != 1
            continue
        batch = collator([plain_row([Image.new("RGB", (9, 9))] * images, record["conversations"][1]["value"])])
        assert (
            marked(processor, batch["input_ids"][0].tolist()) == expected["input_ids"][: setting["model_max_length"]]
        )
        assert batch["labels"][0].tolist() == expected["labels"][: setting["model_max_length"]]


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if "input_ids" in recorded("text")[name]["collated"]])
def test_batches_equal_the_authors(name):
    """With labels of all rows that their script does not mask."""
    setting = recorded("text")[name]
    collator = ImageTextCollator(processor_for(setting), max_row_length=setting["model_max_length"])
    collated = setting["collated"]
    places = [place for place, row in enumerate(collated["rows"]) if not setting["rows"][row].get("printed")]
    rows = []
    for place in places:
        messages = messages_of(collated["rows"][place])
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        rows.append({"messages": messages, "images": [Image.new("RGB", (9, 9))] * count})
    batch = collator(rows)
    for number, place in enumerate(places):
        length = sum(collated["attention_mask"][place])
        assert (
            marked(collator.processor, batch["input_ids"][number, :length].tolist())
            == collated["input_ids"][place][:length]
        )
        assert batch["labels"][number, :length].tolist() == collated["labels"][place][:length]
        assert batch["attention_mask"][number].sum() == length
