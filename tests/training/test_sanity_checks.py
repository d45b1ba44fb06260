"""Runs that cannot succeed stop with a cause and a remedy; the bar shows throughput and padding."""

import os
import signal

import pytest
import torch
from training_runs import model_folder, rows, trainer_on
from transformers import TrainerCallback

from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.training.sanity_checks import SanityCheckCallback, TrainingError


@pytest.fixture(scope="module")
def base():
    return model_folder("minigpt4")


def projector(trainer):
    return trainer.model.model.multi_modal_projector.linear_1.weight.detach().clone()


def test_nan_stops_before_the_weights_are_spoilt(base, tmp_path):
    trainer = trainer_on(base, tmp_path, rows())
    trainer.add_callback(SanityCheckCallback(check_first_loss=False))
    before = projector(trainer)
    with torch.no_grad():
        trainer.model.model.vision_tower.post_layernorm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="NaN or infinity in the gradients of step 1"):
        trainer.train()
    assert torch.equal(projector(trainer), before)


def test_a_frozen_parameter_with_a_gradient_stops_the_run(base, tmp_path):
    class Thaw(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.lm_head.requires_grad_(True)

    trainer = trainer_on(base, tmp_path, rows())
    trainer.add_callback(SanityCheckCallback(check_first_loss=False))
    trainer.add_callback(Thaw())
    with pytest.raises(TrainingError, match=r"frozen parameter lm_head\.weight received a gradient"):
        trainer.train()


def test_the_first_loss_of_guessing_stops_the_run(base, tmp_path):
    trainer = trainer_on(base, tmp_path, rows())
    trainer.add_callback(SanityCheckCallback())
    with pytest.raises(TrainingError, match=r"guessing among 1,201 words gives 7\.091"):
        trainer.train()


def test_a_stream_needs_an_end(base, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer_on(base, tmp_path, rows().to_iterable_dataset(), max_steps=-1)


class Masked:
    """A foreign collator that masks everything."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        batch = self.collator(examples)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_labels_stops_the_run(base, tmp_path, workers):
    trainer = trainer_on(base, tmp_path, rows(), collate=Masked, dataloader_num_workers=workers)
    with pytest.raises(TrainingError, match=r"^All labels of a batch of 2 rows are masked"):
        trainer.train()


def failing(how):
    """A stream whose fourth row fails, in whichever process reads it."""

    def give(row):
        if row["number"] == 3 and how == "error":
            raise DataError("7 of the first 9 rows cannot be used")
        if row["number"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    numbered = rows().add_column("number", list(range(16)))
    return numbered.to_iterable_dataset().map(give)


def test_an_error_of_a_data_worker_is_raised_as_it_is(base, tmp_path):
    trainer = trainer_on(base, tmp_path, failing("error"), dataloader_num_workers=1)
    with pytest.raises(DataError, match=r"^7 of the first 9 rows cannot be used$"):
        trainer.train()


def test_a_data_worker_that_dies(base, tmp_path):
    trainer = trainer_on(base, tmp_path, failing("death"), dataloader_num_workers=1)
    with pytest.raises(TrainingError, match=r"^A data worker died .* lower dataloader_num_workers"):
        trainer.train()


def test_a_run_shows_its_throughput_and_records_its_padding(base, tmp_path, capsys):
    trainer = trainer_on(base, tmp_path, rows(), disable_tqdm=False, max_steps=2)
    trainer.train()
    assert " samples/s=" in capsys.readouterr().out
    assert any("non_padding_fraction" in entry for entry in trainer.state.log_history)
