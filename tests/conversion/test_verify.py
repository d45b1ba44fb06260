"""`verify`: a checkpoint that is good, and one that is wrong in each way that a check is for."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import typer
from demo_parts import BASE, save_demo_blip2
from released_files import edit_json, edit_tensors, save_modern_language_model, save_tower
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.conversion import key_maps
from transformers_minigpt4.conversion.commands import convert, verify
from transformers_minigpt4.conversion.convert import convert_checkpoint
from transformers_minigpt4.conversion.verify import verify_checkpoint
from transformers_minigpt4.demo.texts import detailed_description
from transformers_minigpt4.demo.world import training_scenes


CHECKS = [
    *("dtype", "vocabulary", "special tokens", "end of answers"),
    *("image processor", "finite weights", "recorded weights", "trained weights"),
    *("language model", "first loss", "image features", "captions"),
]


@pytest.fixture(scope="module")
def language() -> list[str]:
    """Sentences like those that the demo's language model was trained on; it does not know ordinary English."""
    rng = random.Random(5)
    return [detailed_description(rng.choice(training_scenes()), rng) for _ in range(6)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "blip2"
    save_demo_blip2(folder)
    return folder


@pytest.fixture(scope="module")
def good(parts, tmp_path_factory) -> Path:
    """The demo's parts, the only trained ones in the repository, with a new projector."""
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    return convert_checkpoint(folder, vision=str(parts), language_model=str(BASE / "language_model"), dtype="float32")


@pytest.fixture
def checkpoint(good, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


def statuses(report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def found(report, name: str):
    return next(check for check in report.checks if check.name == name)


def test_a_good_checkpoint(good, language):
    report = verify_checkpoint(good, sentences=language)
    assert list(statuses(report)) == CHECKS
    assert report.ok and "fail" not in str(report) and "warn" not in str(report), report
    assert found(report, "captions").status == "skip" and "untrained" in found(report, "captions").detail
    assert found(report, "vocabulary").detail == "735 tokens, 735 rows, image token 734"


def test_perplexity_is_that_of_transformers(good, language):
    model = LlamaForCausalLM.from_pretrained(BASE / "language_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE / "language_model")
    total = count = 0
    for sentence in language:
        ids = torch.tensor([[1, *tokenizer.encode(sentence, add_special_tokens=False)]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    detail = found(verify_checkpoint(good, sentences=language), "language model").detail
    assert detail.startswith(f"perplexity {math.exp(total / count):,.0f} on 6 sentences; guessing gives 735")


def test_a_chat_template_that_cannot_train(checkpoint, language):
    """It is no reason to fail: the checkpoint answers, and may be trained on captions."""
    (checkpoint / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    report = verify_checkpoint(checkpoint, sentences=language)
    check = found(report, "chat template")
    assert check.status == "warn" and "would never learn to stop" in check.detail


def test_random_weights_fail(tiny_checkpoint):
    """The golden model was never trained."""
    report = verify_checkpoint(tiny_checkpoint)
    assert statuses(report)["language model"] == "fail" and not report.ok
    assert statuses(report)["first loss"] == "warn"
    assert "delta without its base" in str(report)


@pytest.mark.parametrize("wrong", ["shuffled layers", "another embedding"])
def test_wrong_language_model_weights_fail(checkpoint, language, wrong):
    def spoil(state):
        if wrong == "another embedding":
            state[key_maps.EMBEDDING] = state[key_maps.EMBEDDING].flip(0).contiguous()
            return
        for name in [name for name in state if "layers.0." in name and name.startswith(key_maps.LANGUAGE)]:
            other = name.replace("layers.0.", "layers.3.")
            state[name], state[other] = state[other], state[name]

    edit_tensors(checkpoint / "model.safetensors", spoil)
    assert statuses(verify_checkpoint(checkpoint, sentences=language))["language model"] == "fail"


def test_nan(checkpoint, language):
    name = key_maps.LANGUAGE + "layers.1.mlp.up_proj.weight"
    edit_tensors(checkpoint / "model.safetensors", lambda state: state[name].view(-1)[7].fill_(float("nan")))
    report = verify_checkpoint(checkpoint, sentences=language)
    assert found(report, "finite weights").status == "fail" and name in found(report, "finite weights").detail
    assert statuses(report)["language model"] == statuses(report)["first loss"] == "fail"


def test_a_matrix_that_was_never_loaded(checkpoint, language):
    name = key_maps.PROJECTOR + "linear_1.weight"
    edit_tensors(checkpoint / "model.safetensors", lambda state: state[name].zero_())
    report = verify_checkpoint(checkpoint, sentences=language)
    assert statuses(report)["finite weights"] == statuses(report)["image features"] == "fail"


def test_a_model_that_does_not_see(checkpoint, language):
    """A patch embedding of zeros: every image looks the same."""
    name = key_maps.TOWER + "embeddings.patch_embedding.weight"
    edit_tensors(checkpoint / "model.safetensors", lambda state: state[name].mul_(1e-12))
    report = verify_checkpoint(checkpoint, sentences=language)
    assert statuses(report)["image features"] == "fail" and statuses(report)["language model"] != "fail"


def test_special_tokens_of_vicuna_v0s_config(checkpoint, language):
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"].update(bos_token_id=0, eos_token_id=1)
    (checkpoint / "config.json").write_text(json.dumps(config))
    check = found(verify_checkpoint(checkpoint, sentences=language), "special tokens")
    assert check.status == "fail"
    assert "config.text_config has bos 0, the tokenizer 1" in check.detail and "has eos 1" in check.detail


def test_generation_that_does_not_stop(checkpoint, language):
    edit_json(checkpoint / "generation_config.json", stop_sequences=[], eos_token_id=[2])
    check = found(verify_checkpoint(checkpoint, sentences=language), "end of answers")
    assert check.status == "fail" and "would not stop at" in check.detail


def test_another_image_token(checkpoint, language):
    """What needs token ids cannot be checked then."""
    edit_json(checkpoint / "config.json", image_token_id=5)
    report = verify_checkpoint(checkpoint, sentences=language)
    assert statuses(report)["vocabulary"] == "fail"
    assert statuses(report).keys() == set(CHECKS) - {"language model", "first loss", "captions"}


def test_projector_in_fewer_bits(checkpoint, language):
    def halve(state):
        for name in state:
            state[name] = state[name].bfloat16()

    edit_tensors(checkpoint / "model.safetensors", halve)
    check = found(verify_checkpoint(checkpoint, sentences=language), "dtype")
    assert check.status == "warn" and "projector in bfloat16" in check.detail


@pytest.mark.parametrize("damage", ["truncated", "missing", "no checkpoint"])
def test_a_checkpoint_that_does_not_load(checkpoint, damage):
    weights = checkpoint / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "missing":
        edit_tensors(weights, lambda state: state.pop(key_maps.QUERIES))
    else:
        weights.unlink()
    report = verify_checkpoint(checkpoint)
    assert not report.ok and report.checks[-1].name == "loading" and report.checks[-1].status == "fail"
    assert "\n" not in report.checks[-1].detail


def test_trained_modules(good, tmp_path, language):
    """
    A checkpoint of only the projector is checked together with its base.

    Nothing was trained. The projector, which the config says was, is no longer compared with the record, and is seen
    to know no image.
    """
    model = MiniGPT4ForConditionalGeneration.from_pretrained(good)
    model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "trained", trained_only=True)
    MiniGPT4Processor.from_pretrained(good).save_pretrained(tmp_path / "trained")
    report = verify_checkpoint(tmp_path / "trained", sentences=language)
    assert found(report, "recorded weights").detail.startswith("168 tensors")
    assert [check.name for check in report.checks if check.status == "fail"] == ["captions"]


# On the command line


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(convert)
    app.command()(verify)
    return app


def test_commands(app, tmp_path):
    out = tmp_path / "out"
    save_modern_language_model(tmp_path / "lm")
    save_tower("siglip", tmp_path / "tower")
    words = ["convert", "--output", out, "--vision", tmp_path / "tower", "--language-model", tmp_path / "lm"]
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    words += ["--dtype", "bfloat16", "--projector-layers", "3", "--chat-template", tmp_path / "template.jinja"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert len([name for name in load_file(out / "model.safetensors") if "projector" in name]) == 6

    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 1  # its language model is random
    assert "fail  language model" in done.output and "FAILED" in done.output


def test_verify_with_sentences(app, good, language, tmp_path):
    (tmp_path / "sentences.txt").write_text("\n".join(language) + "\n\n")
    done = CliRunner().invoke(app, ["verify", str(good), "--sentences", str(tmp_path / "sentences.txt")])
    assert done.exit_code == 0, done.output
    assert "6 sentences" in done.output and done.output.strip().splitlines()[-1].startswith("passed: ")
    (tmp_path / "empty.txt").write_text("\n")
    done = CliRunner().invoke(app, ["verify", str(good), "--sentences", str(tmp_path / "empty.txt")])
    assert isinstance(done.exception, ValueError) and "is empty" in str(done.exception)
