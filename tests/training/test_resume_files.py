"""Files that a run resumes from and that are damaged, or would run code: one line with the file's name, in time."""

import os
import pickle
import shutil

import pytest
import torch
from training_runs import model_folder, rows, trainer_on

from transformers_minigpt4.training.checkpoints import resolve_resume
from transformers_minigpt4.training.resume_files import read_saved


class Planted:
    """Would make a folder while it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer_on(model_folder("minigpt4"), folder, rows()).train()
    torch.save({"workers": 0, "batch_size": 4, "positions": []}, folder / "checkpoint-4" / "data_position_0.pt")
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    return shutil.copytree(run / "checkpoint-4", tmp_path / "out" / "checkpoint-4")


SAVED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "data_position_0.pt")


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("how", ["inside", "pickle"])
def test_planted_code_is_named_and_not_run(name, how, checkpoint, tmp_path):
    planted = Planted(tmp_path / "planted")
    if how == "inside":
        torch.save({**read_saved(checkpoint / name), "extra": planted}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(planted))
    for resume in (True, str(checkpoint)):
        with pytest.raises(ValueError, match=rf"checkpoint-4/{name} cannot be resumed from: it ") as caught:
            resolve_resume(checkpoint.parent, resume)
        text = str(caught.value)
        assert "\n" not in text and "weights_only" not in text and "Nothing in it was run. Name an earlier" in text
        assert ("posix.mkdir, which could run code" in text) == (how == "inside" and os.name == "posix")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("name", [*SAVED, "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("keep", [0, 40, -10])
def test_a_file_cut_short_is_named(name, keep, checkpoint):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"checkpoint-4/{name} cannot be resumed from: it is (damaged|missing)"):
        resolve_resume(checkpoint.parent, True)


@pytest.mark.parametrize("text", ["[]", "{}", '{"global_step": "4"}', "[" * 100_000])
def test_a_state_of_something_else(text, checkpoint):
    (checkpoint / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=r"trainer_state\.json cannot be resumed from: it "):
        resolve_resume(checkpoint.parent, True)


def test_a_trainer_refuses_them_and_takes_intact_ones(checkpoint, tmp_path):
    assert resolve_resume(checkpoint.parent, True) == str(checkpoint)
    (checkpoint / "scheduler.pt").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    trainer = trainer_on(model_folder("minigpt4"), checkpoint.parent, rows())
    with pytest.raises(ValueError, match=r"scheduler\.pt cannot be resumed from"):
        trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / "planted").exists()
