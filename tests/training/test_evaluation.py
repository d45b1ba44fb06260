"""Runs evaluate on rows that they never train on, show what the model writes, and find their best checkpoint."""

import itertools
import json
import re

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import drawn_image
from training_runs import curve, model_folder, rows, run, sources, trainer_on, weights

from transformers_minigpt4.training import reporters
from transformers_minigpt4.training.charts import Series, line_chart, round_ticks
from transformers_minigpt4.training.evaluation import EvaluationMixin
from transformers_minigpt4.training.feature_building import build_features
from transformers_minigpt4.training.loading import load_rows
from transformers_minigpt4.training.loss import LabeledCollator, keep_labeled
from transformers_minigpt4.training.packing import pack
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.samples import read_answers
from transformers_minigpt4.training.throughput import ThroughputCallback
from transformers_minigpt4.utils.files import to_json


EVALUATE = ("--eval_share", "0.3")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(folder, steps):
    return json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]


def eval_losses(folder, steps):
    return [(entry["step"], entry["eval_loss"]) for entry in log(folder, steps) if "eval_loss" in entry]


def test_answers_with_unusual_line_breaks_are_read_back(tmp_path):
    answers = [{"step": 1, "text": "a\u2028b"}, {"step": 2, "text": "a\x85b\x1e"}]
    (tmp_path / "samples.jsonl").write_text("".join(to_json(answer) + "\n" for answer in answers) + '{"step": 3')
    assert read_answers(tmp_path / "samples.jsonl") == answers


# The loss


@pytest.fixture(scope="module")
def held_out():
    """Five rows whose answers have different lengths."""
    made = []
    for i in range(5):
        answer = f"a {'very ' * 3 * i}small dog\n"
        made.append({"images": [drawn_image(i)], "prompt": "<ImageHere>", "completion": answer})
    return Dataset.from_list(made)


def test_the_eval_loss_is_a_mean_over_tokens(held_out, tmp_path):
    trainer = trainer_on(model_folder("minigpt4"), tmp_path, rows(), eval_strategy="no")
    plain, model = trainer.data_collator, trainer.model
    total = tokens = 0.0
    for row in held_out:
        batch = plain([row])
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * count
        tokens += count
    found = {}
    for batch_size in (1, 2, 5):
        trainer.args.per_device_eval_batch_size = batch_size
        found[batch_size] = trainer.evaluate(held_out)
    trainer.data_collator = pack(model, plain)
    found["packed"] = trainer.evaluate(held_out)
    handles = keep_labeled(model)
    trainer.data_collator = LabeledCollator(pack(model, plain))
    found["labels only"] = trainer.evaluate(held_out)
    for handle in handles:
        handle.remove()
    for name, metrics in found.items():
        # TRL's fused head counts the image token's row in the softmax, which the model's own loss leaves out.
        expected, tolerance = (total / tokens, 1e-3) if name in (1, "labels only") else (found[1]["eval_loss"], 1e-5)
        assert metrics["eval_loss"] == pytest.approx(expected, abs=tolerance), name


def test_metrics_of_ones_own(held_out, tmp_path):
    trainer = trainer_on(model_folder("minigpt4"), tmp_path, rows(), eval_strategy="no", per_device_eval_batch_size=1)
    trainer.compute_metrics = lambda found: {"rows": len(found.predictions)}
    assert trainer.evaluate(held_out.select([0, 1]))["eval_rows"] == 2


def test_evaluation_changes_no_step(tmp_path):
    """Adapters have dropout, whose random numbers it must not use up; activations are recomputed."""
    more = ["--use_peft", "true", "--trainable_modules", "projector", "lora", "--lora_dropout", "0.2", "--lora_r", "4"]
    more += ["--lora_target_modules", "q_proj", "v_proj", "--activation_checkpointing", "true", "--max_steps", "4"]
    evaluate = ("--eval_sources", sources()["cc_sbu_align"], "--eval_rows", "5", "--load_best_model_at_end", "true")
    base, source = model_folder("minigpt4"), sources()["wds"]
    plain = run("minigpt4_stage1", tmp_path / "plain", base, source, *more)
    evaluated = run("minigpt4_stage1", tmp_path / "evaluated", base, source, *more, *evaluate)
    assert [step for step, _ in eval_losses(evaluated, 4)] == [2, 4]
    assert curve(plain) == curve(evaluated)
    for name, value in load_file(plain / "checkpoint-4" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(evaluated / "checkpoint-4" / "adapter_model.safetensors")[name], value), name
    answers = lines(evaluated / "samples.jsonl")
    assert [answer["step"] for answer in answers[::4]] == [0, 2, 4] and len(answers) == 12
    best = min(eval_losses(evaluated, 4), key=lambda entry: entry[1])[0]
    kept = load_file(evaluated / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in weights(evaluated).items())


# Which rows


def test_a_share_is_held_out_of_the_sources(tmp_path):
    words = ["--config", "minigpt4_stage1", "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    words += ["--model_name_or_path", "m", "--sources", sources()["wds"], sources()["cc_sbu_align"], *EVALUATE]
    stage, config, _ = parse_recipe(words)
    assert (config.eval_strategy, config.eval_steps, config.metric_for_best_model) == (
        "steps",
        config.save_steps,
        "loss",
    )
    loaded = load_rows(stage, config)
    held, samples = ([row["completion"] for row in found] for found in loaded.held_out[:2])
    trained = {row["completion"] for row in itertools.islice(loaded.dataset, 100)}
    assert len(held) > 5 and not trained & set(held) and len(trained | set(held)) == 30
    assert samples == held[:4]
    config.eval_rows = 4
    assert [row["source"] for row in load_rows(stage, config).held_out.evaluation] == [*sources().values()][
        0:1
    ] * 2 + [*sources().values()][1:2] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval_share", "0.02", "--eval_sources", "table:a.csv"], "exclude each other"),
        (["--eval_share", "2"], "at most 0.5"),
        (["--eval_share", "0.02", "--eval_rows", "0"], "eval_rows=0"),
        (["--eval_strategy", "steps"], "eval_strategy=.* needs rows to evaluate on"),
        (["--load_best_model_at_end", "true"], "load_best_model_at_end needs rows to evaluate on"),
        (["--report_to", "wandb"], "report_to: wandb needs the package wandb, .*`pip install wandb`"),
        (["--report_to", "tensorboardd"], "report_to: tensorboardd is unknown; choose none, all, tensorboard"),
    ],
)
def test_impossible_options(options, words, monkeypatch):
    monkeypatch.setitem(reporters._INSTALLED, "wandb", lambda: False)
    with pytest.raises(ValueError, match=words):
        parse_recipe(["--config", "minigpt4_stage1", "--use_cpu", "true", "--bf16", "false", *options])


def test_a_sample_image_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"sample_images: .*a\.png"):
        run(
            "minigpt4_stage1",
            tmp_path,
            model_folder("minigpt4"),
            sources()["wds"],
            "--sample_images",
            f"{tmp_path}/a.png",
        )


# Runs


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    loop = EvaluationMixin.evaluation_loop

    def falls_and_rises(*args, **kwargs):
        output = loop(*args, **kwargs)
        return output._replace(metrics={**output.metrics, "eval_loss": next(losses)})

    monkeypatch.setattr(EvaluationMixin, "evaluation_loop", falls_and_rises)
    more = [
        "--max_steps",
        "6",
        "--save_total_limit",
        "1",
        "--load_best_model_at_end",
        "true",
        "--learning_rate",
        "1e-2",
    ]
    folder = run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], *more, *EVALUATE)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    best = weights(folder / "checkpoint-4")
    assert all(torch.equal(value, best[name]) for name, value in weights(folder).items())
    record = json.loads((folder / "run.json").read_text())
    assert record["best_checkpoint"] == {"checkpoint": "checkpoint-4", "step": 4, "eval_loss": 1.0}
    assert [entry["eval_loss"] for entry in lines(folder / "eval_loss.jsonl")] == [3.0, 1.0, 2.0]
    page = (folder / "run.html").read_text()
    assert "checkpoint-4" in page and "lowest 1.0000 at step 4" in page and "6 steps, complete" in page


def test_the_best_checkpoint_survives_a_resume(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    loop = EvaluationMixin.evaluation_loop

    def rises(*args, **kwargs):
        output = loop(*args, **kwargs)
        return output._replace(metrics={**output.metrics, "eval_loss": next(losses)})

    monkeypatch.setattr(EvaluationMixin, "evaluation_loop", rises)
    more = ["--save_total_limit", "2", *EVALUATE]
    run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], *more, "--max_steps", "2")
    more += ["--max_steps", "6", "--resume_from_checkpoint", "true"]
    run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], *more)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2") and state["best_metric"] == 1.0
    steps = [answer["step"] for answer in lines(tmp_path / "samples.jsonl") if answer["sample"] == 0]
    assert steps == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("recipe", "model", "kind"),
    [
        ("llava_stage1", "llava", "llava"),
        ("blip2_ft", "blip2", "cc_sbu_align"),
        ("modern", "modern", "llava"),
    ],
)
def test_every_family_is_evaluated_and_answers(recipe, model, kind, tmp_path):
    short = ("--max_completion_length", "40")
    folder = run(recipe, tmp_path, model_folder(model), sources()[kind], *EVALUATE, *short)
    assert 0 < eval_losses(folder, 2)[0][1] < 20
    answers = lines(folder / "samples.jsonl")
    assert len(answers) == 8 and {answer["step"] for answer in answers} == {0, 2}
    assert all(" and " in answer["caption"] for answer in answers)


def test_cached_features_are_evaluated_and_answered_from(tmp_path):
    """With packed rows, data workers, and images of one's own; tensorboard gets everything."""
    shown = tmp_path / "mine.png"
    drawn_image(77).save(shown)
    more = [*EVALUATE, "--sample_images", str(shown), "--feature_cache", str(tmp_path / "cache")]
    more += ["--pack_rows", "true", "--dataloader_num_workers", "1", "--report_to", "tensorboard"]
    base, source = model_folder("minigpt4"), sources()["wds"]
    words = ["--config", "minigpt4_stage1", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"]
    words += ["--model_name_or_path", str(base), "--sources", source, *more]
    build_features(*parse_recipe(words))
    folder = run("minigpt4_stage1", tmp_path / "run", base, source, *more)
    answers = lines(folder / "samples.jsonl")
    assert [(answer["step"], answer["image"], answer["caption"]) for answer in answers] == [
        (0, "mine.png", None),
        (2, "mine.png", None),
    ]
    plain = run("minigpt4_stage1", tmp_path / "plain", base, source, *EVALUATE)
    assert eval_losses(folder, 2)[0][1] == pytest.approx(eval_losses(plain, 2)[0][1], abs=0.02)  # features are bf16
    events = EventAccumulator(str(next((folder / "runs").iterdir()))).Reload()
    assert {"train/loss", "eval/loss", "train/learning_rate", "train/samples_per_second"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Scalars("eval/loss")[0].value == pytest.approx(eval_losses(folder, 2)[0][1])


# The page


def test_the_page_shows_texts_as_they_are(tmp_path):
    source = tmp_path / "rows.csv"
    images = [tmp_path / f"{number}.png" for number in range(20)]
    for number, image in enumerate(images):
        drawn_image(number).save(image)
    text = "<script>alert(1)</script>\N{RIGHT-TO-LEFT OVERRIDE} & {{ 7 }}"
    written = "".join(f'{image.name},"{text} {number}"\n' for number, image in enumerate(images))
    source.write_text(f"image,caption\n{written}" + "broken.png,x\n" * 20)
    options = ("--prompt_format", "stage2", "--max_completion_length", "80", *EVALUATE)
    folder = run("minigpt4_stage1", tmp_path / "run", model_folder("minigpt4"), f"table:{source}", *options)
    page = (folder / "run.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page and "⟨U+202E⟩" in page
    assert "broken.png" in page and "unreadable_image" in page
    assert not re.search(r"(src|href)=.(?!data:image/jpeg)", page) and "://" not in page
    for title in ("Loss", "Learning rate", "Throughput"):
        assert f'aria-label="{title} by step"' in page
    assert page.count("data:image/jpeg;base64") == 4 and "nats per token" in page
    assert ">eval_share<" in page and ">0.3<" in page and ">adam_beta2<" not in page and ">transformers<" in page


def test_an_interrupted_run_leaves_its_page(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaluationMixin, "evaluation_loop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], *EVALUATE)
    page = (tmp_path / "run.html").read_text()
    assert "interrupted, at step 2 of 2" in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.83, 2.08, [0.5, 1.0, 1.5, 2.0, 2.5]),
        (0, 3e-5, [0, 1e-5, 2e-5, 3e-5]),
        (7, 7, [7]),
        (-3, 4, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks(low, high, ticks):
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_charts():
    assert line_chart("Loss", "step", "nats", [Series("a", []), Series("b", [(1, float("nan"))])]) is None
    single = line_chart("Loss", "step", "nats", [Series("a", [(5, 2.0)])])
    assert single["lines"][0]["path"] == "360.0,120.0"
    many = line_chart("Loss", "step", "nats", [Series("a", [(x, x % 2) for x in range(10_000)])])
    points = [tuple(map(float, point.split(","))) for point in many["lines"][0]["path"].split()]
    assert len(points) == 1000 and all(0 <= x <= 720 and y == 120 for x, y in points)
    assert len(many["lines"][0]["marks"]) <= 60


def test_the_time_of_checkpoints_is_no_throughput():
    callback = ThroughputCallback()
    batch = {"attention_mask": torch.ones(2, 3)}
    for interrupt in (callback.on_save, callback.on_evaluate):
        callback.count(batch)
        callback.on_step_begin(None, None, None)
        assert callback.rows == 2
        interrupt(None, None, None)
        before = callback.since
        callback.on_step_begin(None, None, None)
        assert callback.rows == callback.positions == 0 and callback.since > before
