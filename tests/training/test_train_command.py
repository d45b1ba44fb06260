"""`minigpt4 train` besides training: the keys in its help, the list of recipes, --show and --dry-run."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from training_runs import SMALL, model_folder, sources
from trl import ModelConfig
from typer.testing import CliRunner, Result

from transformers_minigpt4.cli import app
from transformers_minigpt4.training.arguments import StageArguments, StageConfig
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.recipe_files import find_recipe, recipe_names
from transformers_minigpt4.training.recipe_keys import ALIASES, KEYS


FIELDS = {field.name: field for group in (StageArguments, StageConfig, ModelConfig) for field in fields(group)}
LISTED = [key for keys in KEYS.values() for key in keys]


def train(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, words)], env={"COLUMNS": "100"})


@pytest.mark.parametrize("key", LISTED, ids=lambda key: key.name)
def test_listed_keys_exist_with_their_defaults(key):
    field = FIELDS[ALIASES.get(key.name, key.name)]
    assert key.default == (field.default if field.default_factory is MISSING else field.default_factory())


def test_help_lists_what_recipes_use():
    listed = {ALIASES.get(key.name, key.name) for key in LISTED}
    assert len(listed) == len(LISTED) and set(ALIASES) <= {key.name for key in LISTED}
    for name in recipe_names():
        assert set(yaml.safe_load(Path(find_recipe(name)).read_text())) <= listed, name
    assert {field.name for field in fields(StageArguments)} <= listed
    text = train("--help").output
    for title, keys in KEYS.items():
        assert f"\n{title}:\n" in text
        assert all(f"\n  {key.option} {key.metavar}" in text for key in keys)


def test_help_all_lists_every_key():
    result = train("--help-all")
    assert result.exit_code == 0
    assert all(f"--{name}" in result.output for name in FIELDS)


def test_list_recipes():
    lines = dict(line.split(": ", 1) for line in train("--list-recipes").output.splitlines())
    assert list(lines) == recipe_names()
    assert lines["no_qformer_stage2"] == "Stage 2 of the paper's variant (a), without Q-Former."


def values(words: list[str]) -> list[dict[str, object]]:
    """What a run gets of a recipe."""
    parsed = parse_recipe([*words, "--use-cpu", "true", "--bf16", "false"])
    return [{field.name: getattr(group, field.name) for field in fields(group)} for group in parsed]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_without_changes_is_shown_as_it_is(name):
    assert train(name, "--show").output == Path(find_recipe(name)).read_text()


OVERRIDES = [
    *(
        "--model",
        "my: model",
        "--output_dir=out",
        "--batch-size",
        "3",
        "--sources",
        "table:a.csv",
        "dataset:b::weight=2",
    ),
    *("--learning-rate", "1e-2", "--max_steps", "60", "--run_name", "it's # one", "--lr-scheduler-type", "cosine"),
    *("--requires-stage1", "false", "--pack-rows", "--save-steps", "0.5"),
]


@pytest.mark.parametrize("name", ["minigpt4_stage2", "minigpt4_stage1", "minigpt4_stage2_qlora", "tiny"])
def test_what_is_shown_gives_the_same_run(name, tmp_path):
    shown = train(name, "--show", *OVERRIDES)
    assert shown.exit_code == 0, shown.output
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    assert values(["--config", str(tmp_path / "mine.yaml")]) == values(["--config", name, *OVERRIDES])
    recipe, mine = yaml.safe_load(Path(find_recipe(name)).read_text()), yaml.safe_load(shown.stdout)
    keys = {
        ALIASES.get(word, word) for word in (w[2:].split("=")[0].replace("-", "_") for w in OVERRIDES if w[:2] == "--")
    }
    assert set(mine) == set(recipe) | keys
    comments = [line for line in Path(find_recipe(name)).read_text().splitlines() if line.startswith("#")]
    assert [line for line in shown.stdout.splitlines() if line.startswith("#")] == comments


def test_show_refuses_what_a_run_refuses(tmp_path):
    for words, message in (
        (["nowhere"], "no recipe nowhere"),
        (["tiny", "--max-stepz", "3"], "Did you mean max_steps?"),
        (["tiny", "--max-steps", "many"], "invalid int value"),
        ([tmp_path / "old.yaml"], "train_parts is called trainable_modules now"),
        ([tmp_path / "list.yaml"], "not a mapping"),
    ):
        (tmp_path / "old.yaml").write_text("train_parts: projector\n")
        (tmp_path / "list.yaml").write_text("- tiny\n")
        result = train(*words, "--show")
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    result = train("--output", "out", "tiny", "--show")
    assert result.exit_code == 2 and "options follow the recipe" in result.stderr


def test_dry_run_of_the_toy_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train("tiny", "--max-steps", "20", "--dry-run")
    assert result.exit_code == 0, result.output
    row, _, counts, parameters = result.stdout.splitlines()
    assert row.startswith("<s> <ImageHere> x 8 ") and row.endswith("<0x0A>]") and row.count("[") == 1
    learned = row[row.index("[") + 1 : -1].split()
    assert counts == f"{1 + 8 + len(learned)} tokens, {len(learned)} of them learned (in brackets)"
    assert parameters == "12,416 of 1,518,528 parameters are trained"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "recipe, model, more",
    [
        ("minigpt4_stage2", "minigpt4", ["--requires_stage1", "false", "--pack-rows", "true"]),
        ("blip2_ft", "blip2", []),
        ("llava_stage2", "llava", ["--requires_stage1", "false"]),
    ],
)
def test_dry_run_of_other_models(recipe, model, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = sources()["llava" if model == "llava" else "cc_sbu_align"]
    result = train(recipe, *SMALL, "--model", model_folder(model), "--sources", source, *more, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "[" in result.stdout and " of them learned" in result.stdout and list(tmp_path.iterdir()) == []


def test_colors_on_a_terminal(monkeypatch, capsys):
    from transformers_minigpt4.training.dry_run import TokenizedRow, print_row

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_row(TokenizedRow([("<s>", False), ("▁a", True)], 1, 2))
    said = capsys.readouterr().out
    assert "\x1b[32m▁a" in said and "learned (in green)" in said


def test_dry_run_complains_as_a_run_would(tmp_path):
    result = train("tiny_stage2", "--model", tmp_path / "gone", "--dry-run")
    assert result.exit_code == 1 and "gone" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "function", "hint"),
    [
        (
            "train",
            "sft.main",
            "`minigpt4 train tiny --output {}/o --feature-cache {}/c --resume-from-checkpoint true` resumes",
        ),
        ("train", "recipe.parse_recipe", "--feature-cache {}/c --resume-from-checkpoint true` resumes"),
        (
            "features",
            "feature_building.build_features",
            "`minigpt4 features tiny --output {}/o --feature-cache {}/c` resumes",
        ),
    ],
)
def test_interrupted_says_how_to_resume(command, function, hint, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"transformers_minigpt4.training.{function}", interrupt)
    words = [command, "tiny", "--output", str(tmp_path / "o"), "--feature-cache", str(tmp_path / "c")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130 and result.stderr.count("\n") == 1
    assert hint.format(*[tmp_path] * hint.count("{}")) in result.stderr
