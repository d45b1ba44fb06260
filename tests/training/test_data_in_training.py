"""TRL's trainer trains on the stream directly, with data workers."""

import pytest
from data_files import shards
from trl import SFTConfig, SFTTrainer

from transformers_minigpt4.data.sources import open_rows


@pytest.mark.parametrize("prompt_format", ["stage1", "stage2"])
def test_sft_trainer(prompt_format, model, processor, tmp_path):
    rows = open_rows(
        [f"{shards(tmp_path / name, 2, 4)}::weight={weight}" for name, weight in (("a", 3), ("b", 1))],
        prompt_format,
    )
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        dataloader_num_workers=2,
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows.dataset, processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(5 < loss < 9 for loss in losses)  # ln(1200) is 7.1
    assert all(seen["rows"] >= 1 for seen in rows.skipped.counts().values())
