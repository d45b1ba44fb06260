"""TRL's own trainer and collator work on this model, with the authors' ids, labels and losses."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


def rows(golden, pictures, name):
    case = golden["cases"][name]
    prompts = case.get("instruction_input") or [""] * len(case["rows"])
    return [
        {
            "images": [pictures[image]],
            # TRL adds no special tokens: the prompt brings its <s>.
            "prompt": "<s>" + (prompt or "<ImageHere>"),
            "completion": row["answer_text"],
        }
        for image, prompt, row in zip(case["images"], prompts, case["rows"])
    ]


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_collator_gives_the_authors_batch(model, processor, golden, golden_tensors, pictures, name):
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    case = golden["cases"][name]
    examples = rows(golden, pictures, name)
    if name == "stage1":  # the second caption is cut to 32 tokens, which TRL leaves to who makes the rows
        ids = case["rows"][1]["answer_ids"]
        examples[1]["completion"] = processor.tokenizer.decode(ids)
        assert processor.tokenizer.encode(examples[1]["completion"], add_special_tokens=False) == ids
    batch = collator(examples)
    for i, row in enumerate(case["rows"]):
        length = row["n_real_positions"]
        assert batch["labels"][i, :length].tolist() == row["targets"][:length]
        assert (batch["labels"][i, length:] == -100).all() and (batch["attention_mask"][i, length:] == 0).all()
    batch["pixel_values"] = golden_tensors["pixel_values"][case["images"]]
    assert model(**batch).loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_a_step_of_sft_moves_only_the_projector(model, processor, golden, pictures, tmp_path):
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    examples = [{**row, "prompt": row["prompt"]} for row in rows(golden, pictures, "stage2")]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(golden["cases"]["stage2"]["loss"], abs=0.1) and losses[1] < losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("multi_modal_projector" in name), name
