"""Values that a key cannot have: one line with key, value and what is allowed, before anything is loaded."""

import pytest
import yaml
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.training import loading
from transformers_minigpt4.training.recipe import GROUPS, KEY_TYPES, parse_recipe
from transformers_minigpt4.training.recipe_files import find_recipe, recipe_names
from transformers_minigpt4.training.recipe_values import RANGES, check_values


WHOLE = "a whole number of at least 1"
WRONG = [
    ("per_device_train_batch_size", 0, WHOLE),
    ("per_device_train_batch_size", -4, WHOLE),
    ("per_device_train_batch_size", [8], WHOLE),
    ("per_device_train_batch_size", 1.5, WHOLE),
    ("per_device_train_batch_size", True, WHOLE),
    ("per_device_train_batch_size", None, WHOLE),
    ("gradient_accumulation_steps", "two", WHOLE),
    ("max_steps", [100], "a whole number of at least -1"),
    ("max_steps", "1e3", "a whole number of at least -1"),
    ("max_error_rate", 7, "a number from 0 to 1"),
    ("max_error_rate", {"a": 1}, "a number from 0 to 1"),
    ("learning_rate", -0.1, "a number of at least 0"),
    ("learning_rate", float("nan"), "a number of at least 0"),
    ("learning_rate", "inf", "a number of at least 0"),
    ("learning_rate", "fast", "a number of at least 0"),
    ("warmup_steps", -1, "a number of at least 0"),
    ("logging_steps", 0, "a number above 0"),
    ("seed", 2**32, "a whole number from 0 to 4,294,967,295"),
    ("prompt_format", "stage9", "one of stage1, stage2, stage2_llama2, messages"),
    ("lr_scheduler_type", "staircase", "one of linear, cosine"),
    ("save_strategy", False, "one of no, steps, epoch, best; put it in quotes"),
    ("dtype", "int9", "one of auto, bfloat16, float16, float32"),
    ("bf16", "perhaps", "true or false"),
    ("sources", [1], "a list of texts"),
    ("trainable_modules", {"projector": True}, "a list of texts"),
    ("output_dir", 2024, "text"),
    ("lr_scheduler_kwargs", 3, "text or a mapping"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG)
def test_a_wrong_value_in_a_recipe(key, value, allowed, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "x", "sources": "wds:x", "max_steps": 1, key: value}))
    with pytest.raises(ValueError, match=rf"^{key}(?: \(--[a-z-]+\))? is .*, but must be ") as caught:
        parse_recipe(["--config", str(path)])
    assert f"must be {allowed}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--batch-size", "0"],
            "per_device_train_batch_size (--batch-size) is 0, but must be a whole number of at least",
        ),
        (["--max-error-rate", "7"], "max_error_rate is 7.0, but must be a number from 0 to 1"),
        (["--learning-rate", "nan"], "learning_rate is nan, but must be a number of at least 0"),
        (["--learning-rate=-1"], "learning_rate is -1.0"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--lr-scheduler-type", "staircase"], "invalid choice: 'staircase' (choose from 'linear'"),
        (["--batch-size"], "expected one argument"),
    ],
)
def test_a_wrong_value_on_the_command_line(words, said, monkeypatch):
    monkeypatch.setattr(loading, "open_rows", lambda *_, **__: pytest.fail("rows were opened"))
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("a model was looked for"))
    for command in (["train", "minigpt4_stage2"], ["train", "minigpt4_stage2", "--show"], ["features", "tiny"]):
        done = CliRunner().invoke(app, [*command, *words])
        assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.output


def test_a_recipe_that_is_no_text(tmp_path):
    for content in (b"\xff\xfe", b"[" * 100_000, b"seed: 2024-99-99"):
        (tmp_path / "r.yaml").write_bytes(content)
        done = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml")])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "r.yaml is not valid YAML" in done.stderr


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_of_the_package_pass(name):
    with open(find_recipe(name), encoding="utf-8") as file:
        check_values(yaml.safe_load(file), KEY_TYPES)


def test_values_that_are_written_in_several_ways():
    check_values({"learning_rate": "1e-3", "seed": "3", "bf16": "yes", "sources": "wds:x", "unknown": 1}, KEY_TYPES)
    check_values(
        {"resume_from_checkpoint": True, "dtype": None, "report_to": ["none"], "warmup_steps": 0.1}, KEY_TYPES
    )


def test_every_default_passes_and_every_range_has_a_key():
    for group in GROUPS:
        for name, field in group.__dataclass_fields__.items():
            if isinstance(field.default, (str, int, float)) and name != "disable_tqdm":
                check_values({name: field.default}, KEY_TYPES)
    assert RANGES.keys() <= KEY_TYPES.keys()
