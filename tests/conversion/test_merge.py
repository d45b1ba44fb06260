"""`merge` writes the full model, bit for bit, and nothing when it cannot."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.conversion.merge import merge_checkpoint


@pytest.fixture
def trained(tiny_checkpoint, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    with torch.no_grad():
        projector.linear_1.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained", trained_only=True)
    processor.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained", model


def test_trained_modules(trained, tmp_path):
    folder, model = trained
    merged = merge_checkpoint(folder, tmp_path / "deep" / "merged")
    again = AutoModelForImageTextToText.from_pretrained(merged)
    assert again.config.base_checkpoints is None and AutoProcessor.from_pretrained(merged).image_seq_length == 8
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_adapter(trained, tmp_path, pictures, processor):
    folder, _ = trained
    model = AutoModelForImageTextToText.from_pretrained(folder)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    inputs = processor(images=pictures[0], text="<ImageHere> a", return_tensors="pt")
    expected = lora(**inputs).logits
    merged = AutoModelForImageTextToText.from_pretrained(merge_checkpoint(tmp_path / "lora", tmp_path / "merged"))
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_refusals_leave_nothing(trained, tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="complete checkpoint already"):
        merge_checkpoint(tiny_checkpoint, tmp_path / "merged")
    with pytest.raises(FileExistsError, match=r"exists and is not empty"):
        merge_checkpoint(trained[0], trained[0])
    with pytest.raises(OSError, match=r"there is no file or folder '.*missing'.*check the path or Hub id"):
        merge_checkpoint(tmp_path / "missing", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_merged_is_never_replaced(trained, tiny_checkpoint, tmp_path):
    folder, _ = trained
    model = AutoModelForImageTextToText.from_pretrained(folder)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    lora.save_pretrained(tmp_path / "lora")
    base = Path(tiny_checkpoint)
    for source, needed in ((folder, folder), (folder, base), (tmp_path / "lora", folder), (tmp_path / "lora", base)):
        for output in (needed, needed.parent):
            with pytest.raises(ValueError, match="is, or is inside, the output folder"):
                merge_checkpoint(source, output, overwrite=True)
    assert folder.is_dir() and base.is_dir()


def test_overwrite_on_the_command_line(trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "old").touch()
    words = ["merge", str(trained[0]), "--output", str(tmp_path / "merged")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1 and refused.stderr.startswith(f"minigpt4: {tmp_path}")
    assert refused.stderr.endswith("replace it with --overwrite.\n")
    done = CliRunner().invoke(app, [*words, "--overwrite", "--dtype", "bfloat16"])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'merged'}\n")
    assert not (tmp_path / "merged" / "old").exists()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
