"""Answers and their end marks are the only labels, whatever the chat template of the language model."""

from itertools import groupby

import pytest
from chat_processors import TEMPLATES, TRLS, chat_processor, framed
from datasets import Dataset
from tiny_models import drawn_image, save_chat_model
from training_runs import curve, run, sources
from transformers import AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer, prepare_multimodal_messages
from trl.chat_template_utils import (
    has_generation_markers,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from transformers_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.training.collator import IGNORED, ImageTextCollator


# Two answers, " A red car. " and "No, blue.", as each template has them; white space around them is the template's.
LEARNED = {
    "qwen3": ["A red car.<|im_end|>", "No, blue.<|im_end|>"],
    "qwen2_5": ["A red car.<|im_end|>", "No, blue.<|im_end|>"],
    "smollm2": ["A red car.<|im_end|>", "No, blue.<|im_end|>"],
    "llama3": ["A red car.<|eot_id|>", "No, blue.<|eot_id|>"],
    "llama3_2": ["A red car.<|eot_id|>", "No, blue.<|eot_id|>"],
    "phi3": ["A red car.<|end|>", "No, blue.<|end|>"],
    "gemma3": ["A red car.<end_of_turn>", "No, blue.<end_of_turn>"],
    "mistral": ["A red car.</s>", "No, blue.</s>"],
    "vicuna_v1": ["A red car.</s>", "No, blue.</s>"],
    "llama2_chat": ["A red car. </s>", "No, blue. </s>"],
    "chatml_in_words": ["A red car.<|im_end|>", "No, blue.<|im_end|>"],
    "vicuna_v0": ["A red car.###", "No, blue.###"],
    "llama_2": ["A red car.</s>", "No, blue.</s>"],
}
NO_SYSTEM = ("mistral",)  # refuses a system message


def conversation(*, images=(1, 2), system=False, answers=("A red car.", "No, blue.")):
    """A row of two turns with so many images each."""
    messages = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}] if system else []
    for count, question, answer in zip(images, ("What is this?", "Is it red?"), answers):
        shown = [{"type": "image"} for _ in range(count)]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"images": [drawn_image(i) for i in range(sum(images))], "messages": messages}


def learned(processor, row) -> list[str]:
    """The runs of labels, as text."""
    batch = ImageTextCollator(processor)([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(label in (id_, IGNORED) for id_, label in zip(ids, labels))
    assert ids.count(processor.image_token_id) == 4 * len(row["images"])
    assert not row["images"] or len(batch["pixel_values"]) == len(row["images"])
    runs = groupby(zip(ids, labels), key=lambda token: token[1] != IGNORED)
    return [processor.tokenizer.decode([id_ for id_, _ in run]) for learns, run in runs if learns]


@pytest.mark.parametrize("name", LEARNED)
def test_answers_with_their_end_marks_are_the_only_labels(name):
    processor = chat_processor(name)
    for images in ((1, 0), (1, 2), (0, 0)):
        for system in (False, True)[: 1 if name in NO_SYSTEM else 2]:
            assert learned(processor, conversation(images=images, system=system)) == LEARNED[name]
    assert learned(processor, conversation(images=(1,))) == LEARNED[name][:1]
    assert learned(processor, conversation(images=(0,), answers=["No, blue."])) == LEARNED[name][1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_that_is_trained_is_the_one_that_is_asked(name):
    """The ids in front of the last answer are those with which inference asks for it."""
    processor, row = chat_processor(name), conversation()
    batch = ImageTextCollator(processor)([row])
    labels = batch["labels"][0]
    last = max(i for i in range(1, len(labels)) if labels[i] != IGNORED and labels[i - 1] == IGNORED)
    images = iter(row["images"])
    for message in row["messages"]:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = next(images)
    asked = processor.apply_chat_template(
        row["messages"][:-1], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert batch["input_ids"][0, :last].tolist() == asked


@pytest.mark.parametrize("name", TEMPLATES)
def test_assistant_masks_need_no_marks(name):
    """What TRL's own collators ask for, of templates without marks, padded on the left."""
    processor = chat_processor(name)
    rows = [conversation(images=images) for images in ((1, 2), (1,))]
    chats = [prepare_multimodal_messages(row["messages"], images=row["images"]) for row in rows]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = processor.apply_chat_template(chats, **options, return_tensors="pt", processor_kwargs={"padding": True})
    for ids, mask, count in zip(batch["input_ids"], batch["assistant_masks"], (2, 1)):
        learned_ids = ids[mask == 1].tolist()
        found, expected = processor.tokenizer.decode(learned_ids), "".join(LEARNED[name][:count])
        assert found.replace(" ", "") == expected.replace(" ", "")
    alone = processor.apply_chat_template(chats[1], **options)
    assert sum(alone["assistant_masks"][0]) == batch["assistant_masks"][1].sum()


def test_an_incomplete_conversation_has_no_assistant_mask():
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    chat = conversation(images=(0,))["messages"]
    with pytest.raises(ValueError, match="complete conversations only"):
        chat_processor("qwen3").apply_chat_template(chat, **options, add_generation_prompt=True)


@pytest.mark.parametrize("name", LEARNED)
def test_generation_stops_where_training_ends_an_answer(name):
    """Phi-3's and Gemma's end of a turn is not their tokenizer's end of sequence."""
    processor = chat_processor(name)
    ends = processor.tokenizer.convert_ids_to_tokens(processor.get_generation_config().eos_token_id)
    more = {"phi3": ["<|end|>"], "gemma3": ["<end_of_turn>"], "vicuna_v0": ["▁###"]}
    assert ends == [processor.tokenizer.eos_token, *more.get(name, [])]


def test_answers_that_look_like_something_else():
    """White space around an answer, letters of the template in it, the same answer twice, and none but a space."""
    for answers, expected in (
        ((" A red car.\n", "No"), ["A red car.<|eot_id|>", "No<|eot_id|>"]),
        (("assistant", "user"), ["assistant<|eot_id|>", "user<|eot_id|>"]),
        (("It is. It is.", "It is."), ["It is. It is.<|eot_id|>", "It is.<|eot_id|>"]),
        (("Is it red?", "answer-1"), ["Is it red?<|eot_id|>", "answer-1<|eot_id|>"]),
        (("<|", "é 🚗"), ["<|<|eot_id|>", "é 🚗<|eot_id|>"]),
    ):
        assert learned(chat_processor("llama3"), conversation(answers=answers)) == expected
    assert learned(chat_processor("qwen3"), conversation(answers=("<t", "<think"))) == [
        "<t<|im_end|>",
        "<think<|im_end|>",
    ]


def test_qwen3_is_trained_and_asked_without_thoughts_unless_the_template_says_otherwise():
    processor = chat_processor("qwen3")
    chat = conversation(images=(1,))["messages"]
    asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = processor.apply_chat_template(chat[:1], add_generation_prompt=True, enable_thinking=True)
    assert thinking.endswith("<|im_start|>assistant\n")
    template = "{%- set enable_thinking = true -%}" + processor.chat_template
    processor = MiniGPT4Processor(processor.image_processor, processor.tokenizer, 4, template)
    # The empty thought comes after the prompt then, so it is part of what the model must write.
    assert learned(processor, conversation()) == ["A red car.<|im_end|>", "<think>\n\n</think>\n\nNo, blue.<|im_end|>"]


@pytest.mark.parametrize(
    "template,words",
    [
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "prints nothing after an answer",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content | upper + eos_token }}{% endfor %}",
            "changes the text of an answer",
        ),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}", "would never be asked"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}",
            "would never be asked",
        ),
        ("{{ raise_exception('No chats today.') }}", "refuses a conversation .*No chats today"),
        ("{{ messages[0].context.text.more }}", "refuses a conversation"),
        ("{{ messages[1].content + eos_token }}", "changes the text of an answer or leaves it out"),
    ],
)
def test_templates_that_cannot_train(template, words):
    """One error, which names the reason; never other labels."""
    processor = framed(template)
    with pytest.raises(ValueError, match=words):
        processor.check_trainable()
    with pytest.raises(ValueError, match=words):
        ImageTextCollator(processor)([conversation()])


def test_a_row_that_the_template_refuses():
    with pytest.raises(ValueError, match=r"refuses a conversation \(Conversation roles must alternate.*Be brief"):
        ImageTextCollator(chat_processor("mistral"))([conversation(system=True)])


@pytest.mark.parametrize(
    "body",
    [
        "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}",
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    ],
)
def test_marks_choose_the_answers_and_not_their_extent(body):
    """SmolLM3's mark the role too; others leave out the end."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + body + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert learned(framed(template, "qwen2_5"), conversation()) == LEARNED["qwen2_5"]


def test_marks_may_leave_out_an_answer():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[Q]' + m.content + '[A]' }}{% elif loop.last %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert learned(framed(template), conversation()) == ["No, blue.</s>"]


def test_an_answer_that_the_template_rewrites_needs_marks():
    """Qwen3's template moves thoughts within an answer."""
    row = conversation(images=(1,), answers=("<think>Red?</think>A red car.",))
    with pytest.raises(ValueError, match="changes the text of an answer"):
        ImageTextCollator(chat_processor("qwen3"))([row])
    marked = (TRLS / "qwen3_training.jinja").read_text()
    assert learned(framed(marked, "qwen3"), row) == ["<think>\nRed?\n</think>\n\nA red car.<|im_end|>\n"]


# Through the trainer


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_modern_recipe_trains_on_a_real_template(name, tmp_path):
    save_chat_model(tmp_path / "base", chat_processor(name))
    more = ("--assistant-only-loss", "true") if name == "qwen3" else ()  # which is what the collator does anyway
    folder = run("modern_small", tmp_path / "out", tmp_path / "base", sources()["llava"], *more)
    losses = curve(folder / "checkpoint-2")
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("name", LEARNED)
def test_trls_probes_pass(name):
    """TRL asks whether a template knows tools, with an answer that says nothing, and whether the end is learned."""
    processor = chat_processor(name)
    assert isinstance(supports_tool_calling(processor), bool)
    assert has_generation_markers(processor.chat_template)
    if name not in ("vicuna_v0", "llama_2", "chatml_in_words"):  # whose ends are words, or missing before a question
        assert is_chat_template_stop_token_trained(processor)


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_trls_own_collator_learns_answers_only(name, tmp_path):
    processor = chat_processor(name)
    save_chat_model(tmp_path / "base", processor)
    rows = [conversation(images=(1, 2)), conversation(images=(1,))]
    arguments = SFTConfig(
        str(tmp_path), assistant_only_loss=True, max_length=None, bf16=False, use_cpu=True, report_to="none"
    )
    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"),
        args=arguments,
        train_dataset=Dataset.from_list([{"images": [], "messages": rows[0]["messages"]}]),
        processing_class=processor,
        data_collator=DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True),
    )
    batch = trainer.data_collator(rows)
    learned_ids = batch["labels"][batch["labels"] != IGNORED].tolist()
    expected = "".join(LEARNED[name] + LEARNED[name][:1])
    assert processor.tokenizer.decode(learned_ids).replace(" ", "") == expected.replace(" ", "")
