"""Checks the runner: model families, batches, resume after a break, failures, two processes, bad input, model card."""

import json
import multiprocessing
import multiprocessing.forkserver
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from evaluation_files import Letters, killed_in_batch, one_of_two_processes, write_letters
from golden_model import GOLDEN
from hub_server import Blob, HubServer
from scripted_endpoint import ScriptedEndpoint, user_text
from task_files import DATA
from transformers import (
    AutoTokenizer,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    T5Config,
)

from transformers_minigpt4.evaluation import run as running
from transformers_minigpt4.evaluation.answering import AnswerStore, image_digest, make_batches
from transformers_minigpt4.evaluation.compare import compare_results
from transformers_minigpt4.evaluation.evaluator import Question
from transformers_minigpt4.evaluation.results import checkpoint_fingerprint, data_fingerprint, read_results
from transformers_minigpt4.evaluation.run import evaluate
from transformers_minigpt4.evaluation.tasks import load_task
from transformers_minigpt4.hub.cards import License
from transformers_minigpt4.hub.publish import prepare
from transformers_minigpt4.inference.loading import load_engine
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatSettings


@pytest.fixture
def data(tmp_path) -> Path:
    return write_letters(tmp_path / "data")


def answers(output: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (output / "answers" / "letters.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}


def test_results_hold_all_that_they_depend_on(tiny_checkpoint, data, tmp_path):
    results = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", batch_size=4)
    assert results == read_results(tmp_path / "out")
    assert results["checkpoint"]["model_type"] == "minigpt4" and len(results["checkpoint"]["fingerprint"]) == 64
    assert str(tmp_path) not in json.dumps(results)  # it is published
    entry = results["tasks"]["letters"]
    assert entry["generation"] == {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 4,
    }
    assert entry["prompts"] == {"one": "What is this {scene}?"}
    assert (entry["samples"], entry["failures"], entry["primary"]) == (10, 0, "accuracy")
    assert entry["metrics"].keys() == {"accuracy", "accuracy/even", "share"} == entry["intervals"].keys()
    assert entry["without_value"] == ["never"]
    low, high = entry["intervals"]["accuracy"]
    assert low <= entry["metrics"]["accuracy"] <= high and low < high
    assert entry["run"]["versions"]["transformers"] and entry["run"]["batch_size"] == 4
    rows = answers(tmp_path / "out")
    assert list(rows) == [str(i) for i in range(10)]
    right = [(len(rows[i]["answer"]) % 2 == rows[i]["reference"]) for i in rows]
    assert entry["metrics"]["accuracy"] == pytest.approx(10 * sum(right))
    assert rows["3"]["record"] == {**rows["3"]["record"], "kind": "odd", "failed": False, "id": "3"}
    assert len({row["answer"] for row in rows.values()}) > 1


def test_answers_do_not_depend_on_the_batches(tiny_checkpoint, data, tmp_path):
    texts = []
    for size in (1, 3, 10):
        evaluate(tiny_checkpoint, [Letters()], data, tmp_path / str(size), batch_size=size)
        texts.append({id_: row["answer"] for id_, row in answers(tmp_path / str(size)).items()})
    assert texts[0] == texts[1] == texts[2]


def save_instructblip(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.pad_token = tokenizer.unk_token
    reader = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer", padding_side="right")
    reader.pad_token = reader.unk_token
    image_processor = BlipImageProcessorPil(size={"height": 56, "width": 56})
    processor = InstructBlipProcessor(image_processor, tokenizer, reader, num_query_tokens=8)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InstructBlipConfig(
        vision_config=Blip2VisionConfig(**small, image_size=56, patch_size=14).to_dict(),
        qformer_config=InstructBlipQFormerConfig(**small, encoder_hidden_size=32, vocab_size=1300).to_dict(),
        text_config=T5Config(
            vocab_size=1201, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
        ).to_dict(),
        num_query_tokens=8,
        image_token_index=1200,
    )
    InstructBlipForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Path:
    from tiny_models import save_blip2, save_llava

    folder = tmp_path_factory.mktemp("families")
    save_blip2(folder / "blip2")
    save_llava(folder / "llava")
    save_instructblip(folder / "instructblip")
    return folder


@pytest.mark.parametrize("family", ["blip2", "llava", "instructblip"])
def test_other_families(families, data, tmp_path, family):
    evaluate(str(families / family), [Letters()], data, tmp_path / "one", batch_size=1, limit=5)
    evaluate(str(families / family), [Letters()], data, tmp_path / "all", batch_size=4, limit=5)
    alone, together = (answers(tmp_path / name) for name in ("one", "all"))
    assert [row["answer"] for row in alone.values()] == [row["answer"] for row in together.values()]
    assert len(alone) == 5 and all("answer" in row for row in alone.values())


@pytest.mark.parametrize("images", [0, 2])
def test_text_only_and_several_images(families, tiny_checkpoint, tmp_path, images):
    data = write_letters(tmp_path / "data", rows=3, images=images)
    for checkpoint in (tiny_checkpoint, str(families / "llava")):
        out = tmp_path / Path(checkpoint).name
        assert evaluate(checkpoint, [Letters()], data, out)["tasks"]["letters"]["failures"] == 0
        assert all(len(row["images"]) == images and row["answer"] for row in answers(out).values())
    with pytest.raises(ValueError, match=f"takes one image per prompt, but a prompt has {images}"):
        evaluate(str(families / "blip2"), [Letters()], data, tmp_path / "blip2")
    assert not (tmp_path / "blip2" / "results.json").exists()


@pytest.fixture(scope="module")
def processes():
    """
    Starts processes from one that has imported what they need, and has computed nothing.

    A fork of this one could hang: the threads of OpenMP do not survive it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["transformers_minigpt4.evaluation.run", "transformers_minigpt4.modeling.modeling_minigpt4"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        multiprocessing.forkserver.ensure_running()
        yield context
    multiprocessing.forkserver._forkserver._stop()


def counting(monkeypatch) -> list[list[str]]:
    """The ids of every batch that goes through the model."""
    asked = []
    real = running.answer_batches

    def answer_batches(*arguments):
        for records in real(*arguments):
            asked.append([record["id"] for record in records])
            yield records

    monkeypatch.setattr(running, "answer_batches", answer_batches)
    return asked


def test_a_killed_run_loses_one_batch(tiny_checkpoint, data, tmp_path, monkeypatch, processes):
    whole = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "whole", batch_size=2)
    arguments = (4, tiny_checkpoint, data, tmp_path / "out")
    process = processes.Process(target=killed_in_batch, args=arguments, daemon=True)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    part = tmp_path / "out" / "answers" / "letters.part-0.jsonl"
    done = [json.loads(line)["id"] for line in part.read_bytes().splitlines()]
    assert len(done) == 6  # three batches of two; the fourth is lost
    with part.open("ab") as file:  # a kill in the middle of a write, which may cut a character in two
        file.write('{"id": "0", "answer": "é'.encode()[:-1])
    asked = counting(monkeypatch)
    results = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", batch_size=2)
    assert sorted(id_ for batch in asked for id_ in batch) == sorted(set(map(str, range(10))) - set(done))
    assert results["tasks"]["letters"]["metrics"] == whole["tasks"]["letters"]["metrics"]
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out" / "answers").iterdir()] == ["letters.jsonl"]


def test_an_error_while_answering_raises(tiny_checkpoint, data, tmp_path, monkeypatch):
    """No answer comes of it, and none is written."""

    def broken(*arguments, **options):
        engine = load_engine(*arguments, **options)
        monkeypatch.setattr(engine.model, "generate", lambda **_: 1 / 0)
        return engine

    monkeypatch.setattr(running, "load_engine", broken)
    with pytest.raises(ZeroDivisionError):
        evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    assert AnswerStore(tmp_path / "out" / "answers", "letters").read() == {}


def test_finished_answers_are_not_asked_again(tiny_checkpoint, data, tmp_path, monkeypatch):
    evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", limit=4)
    asked = counting(monkeypatch)
    evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    assert sorted(id_ for batch in asked for id_ in batch) == ["4", "5", "6", "7", "8", "9"]
    asked.clear()
    monkeypatch.setattr(running, "load_engine", None)  # no need for the model either
    evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    assert asked == []


def test_a_smaller_run_forgets_nothing(tiny_checkpoint, data, tmp_path, monkeypatch):
    whole = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    few = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", limit=3)
    assert few["tasks"]["letters"]["samples"] == 3 == len(answers(tmp_path / "out"))
    asked = counting(monkeypatch)
    again = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    assert asked == [] and again["tasks"]["letters"]["metrics"] == whole["tasks"]["letters"]["metrics"]
    assert [path.name for path in (tmp_path / "out" / "answers").iterdir()] == ["letters.jsonl"]


def test_a_question_under_two_ids_is_asked_once(tiny_checkpoint, data, tmp_path, monkeypatch):
    rows = json.loads((data / "letters.json").read_text())
    (data / "letters.json").write_text(json.dumps([*rows, {**rows[4], "id": 104}]))
    asked = counting(monkeypatch)
    results = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    assert sum(map(len, asked)) == 10 and results["tasks"]["letters"]["samples"] == 11
    kept = answers(tmp_path / "out")
    assert kept["104"]["answer"] == kept["4"]["answer"] and kept["104"]["record"]["id"] == "104"


def test_what_changed_is_asked_again(tiny_checkpoint, data, tmp_path, monkeypatch):
    evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    rows = json.loads((data / "letters.json").read_text())
    rows[3]["scene"] = "other"
    (data / "letters.json").write_text(json.dumps(rows))
    (data / "5-0.png").write_bytes((data / "1-0.png").read_bytes() + b"\0")
    asked = counting(monkeypatch)
    evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")
    assert sorted(id_ for batch in asked for id_ in batch) == ["3", "5"]
    longer = Letters()
    longer.generation = {"max_new_tokens": 5}
    asked.clear()
    evaluate(tiny_checkpoint, [longer], data, tmp_path / "out")
    assert len([id_ for batch in asked for id_ in batch]) == 10


def test_a_missing_image_is_a_failure_and_is_tried_again(tiny_checkpoint, data, tmp_path):
    content = (data / "2-0.png").read_bytes()
    (data / "2-0.png").unlink()
    (data / "6-0.png").write_bytes(b"not an image")
    entry = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", batch_size=4)["tasks"]["letters"]
    rows = answers(tmp_path / "out")
    assert entry["failures"] == 2 and entry["samples"] == 10
    for id_ in ("2", "6"):
        assert "answer" not in rows[id_] and "cannot load image" in rows[id_]["error"]
        assert rows[id_]["record"] == {**rows[id_]["record"], "correct": False, "failed": True}
    (data / "2-0.png").write_bytes(content)
    entry = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", batch_size=4)["tasks"]["letters"]
    assert entry["failures"] == 1 and answers(tmp_path / "out")["2"]["answer"]


def test_batches_are_sorted_by_length_and_kind():
    questions = [Question(str(i), "w" * (i % 5), images=("p",) * (i % 2)) for i in range(20)]
    batches = make_batches(questions, 4)
    assert sorted(question.id for batch in batches for question in batch) == sorted(str(i) for i in range(20))
    for batch in batches:
        assert len(batch) <= 4 and len({len(question.images) for question in batch}) == 1
    for images in (0, 1):
        lengths = [len(q.prompt) for batch in batches for q in batch if len(q.images) == images]
        assert lengths == sorted(lengths, reverse=True)
    assert batches == make_batches(questions[::-1], 4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_batches(questions, 0)


def test_two_processes_answer_what_one_does(tiny_checkpoint, data, tmp_path, processes):
    one = evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "one", batch_size=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, tiny_checkpoint, data, tmp_path / "two")
    pair = [processes.Process(target=one_of_two_processes, args=(rank, *arguments), daemon=True) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(timeout=120)
    assert [process.exitcode for process in pair] == [0, 0]
    assert json.loads((tmp_path / "two-1").read_text()) == {}
    two = json.loads((tmp_path / "two-0").read_text())
    assert two["tasks"]["letters"]["run"]["processes"] == 2
    assert two["tasks"]["letters"]["metrics"] == one["tasks"]["letters"]["metrics"]
    assert answers(tmp_path / "two") == answers(tmp_path / "one")


class TestBadInput:
    def test_unknown_task(self, tiny_checkpoint, data, tmp_path):
        with pytest.raises(ValueError, match=r"no task 'gqua'; the tasks are"):
            evaluate(tiny_checkpoint, ["gqua"], data, tmp_path / "out")
        with pytest.raises(ValueError, match="no task is named"):
            evaluate(tiny_checkpoint, [], data, tmp_path / "out")
        with pytest.raises(ValueError, match="named twice"):
            evaluate(tiny_checkpoint, [Letters(), Letters()], data, tmp_path / "out")

    def test_missing_data(self, tiny_checkpoint, data, tmp_path):
        with pytest.raises(ValueError, match=r"no data for the task 'letters' at .*gone"):
            evaluate(tiny_checkpoint, [Letters()], tmp_path / "gone", tmp_path / "out")
        with pytest.raises(ValueError, match=r"give --data letters=PATH"):
            evaluate(tiny_checkpoint, [Letters()], {"gqa": data}, tmp_path / "out")
        (data / "letters.json").write_text("[]")
        with pytest.raises(ValueError, match="holds no question for the task 'letters'"):
            evaluate(tiny_checkpoint, [Letters()], {"letters": data}, tmp_path / "out")

    def test_duplicate_ids(self, tiny_checkpoint, data, tmp_path):
        rows = json.loads((data / "letters.json").read_text())
        (data / "letters.json").write_text(json.dumps([*rows, rows[4]]))
        with pytest.raises(ValueError, match=r"holds the id '4' twice"):
            evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")

    def test_judge_wanted(self, tiny_checkpoint, data, tmp_path):
        task = Letters()
        task.needs_judge = True
        with pytest.raises(ValueError, match=r"'letters' needs a judge; give --judge"):
            evaluate(tiny_checkpoint, [task], data, tmp_path / "out")

    @pytest.mark.parametrize("kept", [(), ("tokenizer.json", "tokenizer_config.json")])
    def test_checkpoint_without_processor(self, tiny_checkpoint, data, tmp_path, kept):
        bare = tmp_path / "bare"
        bare.mkdir()
        for path in Path(tiny_checkpoint).iterdir():
            if path.name in ("config.json", "generation_config.json", *kept) or path.suffix == ".safetensors":
                shutil.copy(path, bare)
        with pytest.raises(ValueError, match="processor") as error:
            evaluate(str(bare), [Letters()], data, tmp_path / "out")
        assert "bare" in str(error.value) and "\n" not in str(error.value)

    def test_no_checkpoint(self, data, tmp_path):
        with pytest.raises(ValueError, match="no model folder"):
            evaluate(str(tmp_path / "gone"), [Letters()], data, tmp_path / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"cannot read the config of .*empty"):
            evaluate(str(tmp_path / "empty"), [Letters()], data, tmp_path / "out")

    def test_output_of_another_checkpoint(self, tiny_checkpoint, families, data, tmp_path):
        evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out", limit=2)
        with pytest.raises(ValueError, match="results of another checkpoint"):
            evaluate(str(families / "llava"), [Letters()], data, tmp_path / "out", limit=2)

    def test_foreign_file_among_the_answers(self, tiny_checkpoint, data, tmp_path):
        (tmp_path / "out" / "answers").mkdir(parents=True)
        (tmp_path / "out" / "answers" / "letters.jsonl").write_text('{"caption": "mine"}\n')
        with pytest.raises(ValueError, match=r"line 1 of .*letters.jsonl' is not an answer"):
            evaluate(tiny_checkpoint, [Letters()], data, tmp_path / "out")

    def test_scoring_must_be_complete(self, tiny_checkpoint, data, tmp_path):
        task = Letters()
        task.score = lambda questions, answers, judge=None: []
        with pytest.raises(ValueError, match="scored 0 of 10 questions"):
            evaluate(tiny_checkpoint, [task], data, tmp_path / "out")
        # What was answered is not lost.
        assert len(AnswerStore(tmp_path / "out" / "answers", "letters").read()) == 10


def test_data_from_the_hub(tiny_checkpoint, data, tmp_path, monkeypatch):
    with HubServer() as hub:
        repository = hub.create("datasets", "me/letters")
        files = {path.name: Blob(path.read_bytes(), False) for path in data.iterdir()}
        sha = hub.commit(repository, "main", files, "official files")
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        download = partial(huggingface_hub.snapshot_download, endpoint=hub.url, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        entry = evaluate(tiny_checkpoint, [Letters()], "hub:me/letters", tmp_path / "out")["tasks"]["letters"]
        assert (entry["data"], entry["revision"], entry["samples"]) == ("me/letters", sha, 10)
        with pytest.raises(ValueError, match=r"cannot get the dataset 'me/gone' from the Hub: .*check name"):
            evaluate(tiny_checkpoint, [Letters()], {"letters": "hub:me/gone@v1"}, tmp_path / "out")


def test_data_may_move_but_not_change(data, tmp_path):
    first = data_fingerprint(Letters().questions(data))
    moved = shutil.copytree(data, tmp_path / "moved")
    assert data_fingerprint(Letters().questions(moved)) == first
    assert data_fingerprint(Letters().questions(moved)[::-1]) == first
    assert data_fingerprint(Letters().questions(moved, limit=9)) != first
    rows = json.loads((moved / "letters.json").read_text())
    rows[0]["reference"] = 1
    (moved / "letters.json").write_text(json.dumps(rows))
    assert data_fingerprint(Letters().questions(moved)) != first
    assert image_digest(b"a") != image_digest(b"b")


def test_checkpoint_fingerprint_sees_one_weight(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    first = checkpoint_fingerprint(copy)
    (copy / "results.json").write_text("{}")  # our own traces do not count
    (copy / "README.md").write_text("card")
    assert checkpoint_fingerprint(copy) == first == checkpoint_fingerprint(Path(tiny_checkpoint))
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "projector" in name and name.endswith("bias"))
    weights[name] = weights[name] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_fingerprint(copy) != first


def test_every_task_runs(tiny_checkpoint, tmp_path):
    """All tasks but the captions, whose tools need Java, in one run, with a judge that knows what is wanted."""
    data = {name: tmp_path / "data" / name for name in DATA if name != "captions"}
    tasks = [load_task(name) for name in data]
    for name, folder in data.items():
        DATA[name](folder)
    for task in tasks:
        task.generation = {**task.generation, "max_new_tokens": 8}

    def judge(body):
        text = user_text(body)
        if "two scores" in text:
            return "8 4"
        return "The answer is A." if "Can you explain" in text or "The answer is" in text else "yes"

    with (
        ScriptedEndpoint(judge) as endpoint,
        open_chat_model(ChatSettings("judge", base_url=endpoint.base_url)) as model,
    ):
        results = evaluate(tiny_checkpoint, tasks, data, tmp_path / "out", judge=model)
        assert results["tasks"]["coco_coverage"]["judge"]["requests"] > 0
        again = evaluate(tiny_checkpoint, ["coco_coverage"], data, tmp_path / "more", judge=model, limit=1)
    assert results["tasks"].keys() == data.keys() and again["tasks"]["coco_coverage"]["samples"] == 1
    for name, entry in results["tasks"].items():
        assert entry["failures"] == 0
        # The tiny model names no object, so CHAIR_i has nothing to divide by.
        assert name == "chair" or entry["primary"] in entry["metrics"], name
        assert all(low <= high for low, high in entry["intervals"].values())
    assert results["tasks"]["coco_coverage"]["metrics"]["captions_covered"] == 1
    comparison = compare_results([tmp_path / "out", shutil.copytree(tmp_path / "out", tmp_path / "twin")])
    assert {task for columns in comparison.tables.values() for task, _ in columns} == data.keys()
    shown = [metric.name for task, metric in comparison.tables["LLaVA, chat score relative to GPT-4"]]
    # The paper's order, all questions last; then the stricter setting.
    assert shown == ["published/relative_score/conv", "published/relative_score", "relative_score"]
    assert all(d.value == 0 or np.isnan(d.value) for d in comparison.differences)


def test_results_reach_the_model_card(tiny_checkpoint, data, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    entry = evaluate(str(checkpoint), [Letters()], data, checkpoint)["tasks"]["letters"]
    publication = prepare(checkpoint, "me/model", tmp_path / "scratch", license=License("apache-2.0"))
    accuracy, (low, high) = entry["metrics"]["accuracy"], entry["intervals"]["accuracy"]
    line = next(line for line in publication.card.splitlines() if "| accuracy |" in line)
    assert f"{low:.4g} to {high:.4g}" in line and f"{accuracy:.4g}" in line and "letters" in line
    assert "type: accuracy" in publication.card  # the Hub's own metadata
    assert "results.json" in publication.files and not any(name.startswith("answers/") for name in publication.files)
