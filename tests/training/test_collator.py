"""Batches of the collator are the authors' own: ids, labels, losses and gradients of the golden files."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer
from versions import NO_CHECKPOINTING

from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.stages import prepare_stage


# The authors train conversations in the single-turn frame of stage 2, turn after turn, with `<s>` before each question
# and without system text (`conv_train` of the golden files), which differs from the chat of their demo.
TRAINING_TEMPLATE_VICUNA_V0 = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{- bos_token + '###Human: ' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if not loop.first -%}{{- ' ' -}}{%- endif -%}"
    "{{- '<Img><ImageHere></Img>' if part.type == 'image' else part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- ' ###Assistant: ' -}}{%- elif message.role == 'assistant' -%}{%- generation -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{{- part.text -}}{%- endfor -%}{%- endif -%}{{- '###' -}}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)
CASES = {
    "stage1": 32,
    "stage2": 160,
    "stage2_shared": 160,
    "stage2_truncated": 20,
    "multi_image": 160,
    "text_only": 160,
}


def golden_rows(golden, name, pictures):
    """The rows of a case of the golden files, and the images in reading order."""
    case = golden["cases"][name]
    shared = case.get("prompt_list") or [None]
    prompts = case.get("instruction_input") or [shared[0]] * len(case["rows"])
    images = case.get("images") or [[] for _ in case["rows"]]
    images = [entry if isinstance(entry, list) else [entry] for entry in images]
    if "length" in case:
        images = [entry[:length] for entry, length in zip(images, case["length"])]
    if isinstance(prompts, str):
        prompts = [prompts] * len(case["rows"])
    rows = [
        {
            "images": [pictures[i] for i in numbers],
            "prompt": prompt if prompt is not None else "<ImageHere>",
            "completion": row["answer_text"],
        }
        for numbers, prompt, row in zip(images, prompts, case["rows"])
    ]
    return rows, [i for numbers in images for i in numbers]


def check_batch(batch, case):
    for i, row in enumerate(case["rows"]):
        length = row["n_real_positions"]
        assert batch["labels"][i, :length].tolist() == row["targets"][:length]
        assert (batch["labels"][i, length:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        ids = []
        for kind, part in row["layout"]:
            ids += part if kind == "ids" else [1200] * part if kind == "image" else []
        assert batch["input_ids"][i, :length].tolist() == ids


@pytest.mark.parametrize("name", CASES)
def test_golden_batches(model, processor, golden, golden_tensors, pictures, name):
    case = golden["cases"][name]
    rows, numbers = golden_rows(golden, name, pictures)
    collator = ImageTextCollator(processor, max_completion_length=case["max_txt_len"])
    assert case["max_txt_len"] == CASES[name]
    batch = collator(rows)
    check_batch(batch, case)
    if numbers:
        assert batch["pixel_values"].shape[0] == len(numbers)
        batch["pixel_values"] = golden_tensors["pixel_values"][numbers]
    else:
        assert "pixel_values" not in batch
    prepare_stage(model)
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    if f"{name}.grad.llama_proj.weight" in golden_tensors:
        loss.backward()
        check_gradients(model, golden_tensors, name)


def check_gradients(model, golden_tensors, name):
    projector = model.model.multi_modal_projector.linear_1
    for part in ("weight", "bias"):
        expected = golden_tensors[f"{name}.grad.llama_proj.{part}"]
        torch.testing.assert_close(getattr(projector, part).grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_golden_batches_through_sft_trainer(model, processor, golden, golden_tensors, pictures, name, tmp_path):
    case = golden["cases"][name]
    rows, numbers = golden_rows(golden, name, pictures)
    collator = ImageTextCollator(processor, max_completion_length=case["max_txt_len"])
    with torch.no_grad():  # its fused head knows the image token's row, see docs/architecture.md
        model.lm_head.weight[1200] = 0
    prepare_stage(model)
    arguments = SFTConfig(
        str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none", **NO_CHECKPOINTING
    )
    rows_as_data = Dataset.from_list([{**row, "images": []} for row in rows])
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=rows_as_data, data_collator=collator, processing_class=processor
    )
    batch = collator(rows)
    if numbers:
        batch["pixel_values"] = golden_tensors["pixel_values"][numbers]
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    # The image token's row of zeros takes its share of the fused softmax, and is all that differs.
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].double()
    total = torch.logsumexp(logits[batch["labels"][:, 1:] != -100], dim=-1)
    share = torch.nn.functional.softplus(-total).mean().item()
    assert loss.item() == pytest.approx(case["loss"] + share, abs=1e-5)
    if f"{name}.grad.llama_proj.weight" in golden_tensors:
        loss.backward()
        assert model.lm_head.weight.grad is None
        expected = golden_tensors[f"{name}.grad.llama_proj.weight"]
        found = model.model.multi_modal_projector.linear_1.weight.grad
        assert (found - expected).norm() < 5e-3 * expected.norm()  # that share, again


def test_golden_conversations(model, processor, golden, golden_tensors, pictures):
    case = golden["cases"]["conv_train"]
    rows = []
    for number, questions, answers in zip(case["images"], case["conv_q"], case["conv_a"]):
        messages = []
        for question, answer in zip(questions.split(case["connect_sym"]), answers.split(case["connect_sym"])):
            text = question.removeprefix("<Img><ImageHere></Img> ")
            content = [{"type": "text", "text": text}]
            if text != question:
                content = [{"type": "image"}, *content]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"images": [pictures[number]], "messages": messages})
    collator = ImageTextCollator(processor, chat_template=TRAINING_TEMPLATE_VICUNA_V0)
    batch = collator(rows)
    width = batch["labels"].shape[1]
    for i, targets in enumerate(case["targets"]):
        assert batch["labels"][i].tolist() == targets[:width]
        assert batch["attention_mask"][i].tolist() == case["attention_mask"][i][:width]
    batch["pixel_values"] = golden_tensors["pixel_values"][case["images"]]
    assert model(**batch).loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_messages_learn_all_answers_and_nothing_else(processor, pictures):
    row = {
        "images": [pictures[0]],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A car."},
            {"role": "user", "content": "Is it red?"},
            {"role": "assistant", "content": "No."},
        ],
    }
    batch = ImageTextCollator(processor)([row])
    learned = batch["input_ids"][batch["labels"] != -100]
    assert processor.tokenizer.decode(learned).replace(" ", "") == "Acar.###No.###"
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    cut = ImageTextCollator(processor, max_completion_length=2)([row])
    assert (cut["labels"] != -100).sum() == 4
    assert (cut["input_ids"] == processor.image_token_id).sum() == processor.image_seq_length


def test_a_mixed_batch(model, processor, pictures):
    """Pairs and conversations, with and without images, in one batch: each row as in a batch by itself."""
    rows = [
        {
            "images": [pictures[0]],
            "prompt": "###Human: <Img><ImageHere></Img> Go. ###Assistant: ",
            "completion": "A.###",
        },
        {"images": [], "prompt": "###Human: Hi. ###Assistant: ", "completion": "Hello.###"},
        {
            "images": [pictures[1]],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A teacher."}],
        },
    ]
    collator = ImageTextCollator(processor)
    batch = collator(rows)
    assert batch["pixel_values"].shape[0] == 2
    order = [2, 0, 1]  # conversations first
    losses, counts = [], []
    for position, index in enumerate(order):
        alone = collator([rows[index]])
        length = alone["input_ids"].shape[1]
        assert batch["input_ids"][position, :length].tolist() == alone["input_ids"][0].tolist()
        counts.append((alone["labels"] != -100).sum().item())
        losses.append(model(**alone).loss.item())
    mean = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
    assert model(**batch).loss.item() == pytest.approx(mean, abs=1e-5)


def test_rows_are_left_as_they_were(processor, pictures):
    row = {"image": pictures[0], "prompt": "<ImageHere>", "completion": "a dog\n"}
    ImageTextCollator(processor)([row])
    assert set(row) == {"image", "prompt", "completion"} and isinstance(row["image"], Image.Image)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": [], "prompt": "Hi", "completion": ""}, "answer is empty"),
        ({"images": [], "messages": [{"role": "user", "content": "Hi"}]}, "left to learn"),
        ({"images": []}, "neither messages nor a prompt"),
    ],
)
def test_rows_without_labels_are_errors(processor, row, words):
    with pytest.raises(ValueError, match=words):
        ImageTextCollator(processor)([row])


def test_an_answer_cannot_be_cut_to_nothing(processor):
    with pytest.raises(ValueError, match="max_completion_length=0"):
        ImageTextCollator(processor, max_completion_length=0)
